// SPDX-License-Identifier: Apache-2.0
//! What the guest sees as CPUID: what KVM supports, with each vCPU's own place in the topology.

use kvm_bindings::{CpuId, kvm_cpuid_entry2};

/// A vCPU's place among the machine's: one socket, a core each, no threads.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct VcpuTopology {
    /// The vCPU's number, which is also its APIC id.
    pub id: u8,
    /// How many vCPUs the machine has.
    pub count: u8,
}

/// Leaf 1, ECX: VMX.
const VMX: u32 = 1 << 5;
/// Leaf 0x8000_0001, ECX: SVM.
const SVM: u32 = 1 << 2;
/// Leaf 1, ECX: the local APIC has a TSC deadline timer.
const TSC_DEADLINE: u32 = 1 << 24;
/// Leaf 1, ECX: there is a hypervisor.
const HYPERVISOR: u32 = 1 << 31;
/// Leaf 1, EDX: EBX\[23:16\] is valid.
const HYPERTHREADING: u32 = 1 << 28;

/// Fits what KVM supports to one vCPU.
pub(crate) fn for_vcpu(supported: &CpuId, topology: VcpuTopology, tsc_deadline: bool) -> CpuId {
    let mut cpuid = supported.clone();
    for entry in cpuid.as_mut_slice() {
        adapt(entry, topology, tsc_deadline);
    }
    cpuid
}

fn adapt(entry: &mut kvm_cpuid_entry2, topology: VcpuTopology, tsc_deadline: bool) {
    let (id, count) = (u32::from(topology.id), u32::from(topology.count));
    match entry.function {
        // Basic information (Intel SDM vol. 2A, CPUID; AMD APM vol. 3, appendix E).
        1 => {
            entry.ebx = (entry.ebx & 0xffff) | (id << 24) | (count << 16);
            // No guests of the guest's: what serves them is a large part of KVM, which a hostile guest does not need.
            entry.ecx = (entry.ecx & !VMX) | HYPERVISOR;
            if tsc_deadline {
                entry.ecx |= TSC_DEADLINE;
            }
            entry.edx = if count > 1 { entry.edx | HYPERTHREADING } else { entry.edx & !HYPERTHREADING };
        }
        // Cache parameters: caches of level 1 and 2 are a core's own, level 3 is shared; EAX[31:26]: cores a socket.
        4 if entry.eax & 0x1f != 0 => {
            let shared_by = if (entry.eax >> 5) & 7 >= 3 { count - 1 } else { 0 };
            entry.eax = (entry.eax & 0x3fff) | (shared_by << 14) | ((count - 1) << 26);
        }
        // Extended topology: level 0 is a thread, level 1 a core; EAX is the shift of the APIC id to the next level.
        0xb | 0x1f => {
            let (eax, ebx, kind) = match entry.index {
                0 => (0, 1, 1),
                1 => (count.next_power_of_two().trailing_zeros(), count, 2),
                _ => (0, 0, 0),
            };
            (entry.eax, entry.ebx, entry.ecx, entry.edx) = (eax, ebx, (kind << 8) | (entry.index & 0xff), id);
        }
        0x8000_0001 => entry.ecx &= !SVM,
        // What SVM can do.
        0x8000_000a => (entry.eax, entry.ebx, entry.ecx, entry.edx) = (0, 0, 0, 0),
        // AMD: ECX[7:0] is the number of cores less one, ECX[15:12] the size of the APIC id's core part.
        0x8000_0008 => {
            entry.ecx = (entry.ecx & !0xf0ff) | (count - 1) | (count.next_power_of_two().trailing_zeros() << 12);
        }
        // AMD extended topology: the APIC id, a thread a core, one node.
        0x8000_001e => (entry.eax, entry.ebx, entry.ecx) = (id, id, 0),
        _ => {}
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn adapted(function: u32, index: u32, topology: VcpuTopology) -> kvm_cpuid_entry2 {
        let mut entry = kvm_cpuid_entry2 { function, index, ..Default::default() };
        adapt(&mut entry, topology, true);
        entry
    }

    #[test]
    fn leaf_1_names_the_vcpu_and_the_hypervisor() {
        let entry = adapted(1, 0, VcpuTopology { id: 3, count: 4 });
        assert_eq!(entry.ebx >> 24, 3);
        assert_eq!((entry.ebx >> 16) & 0xff, 4);
        assert_eq!(entry.ecx, HYPERVISOR | TSC_DEADLINE);
        assert_eq!(entry.edx, HYPERTHREADING);
    }

    #[test]
    fn guests_have_no_guests() {
        let one = VcpuTopology { id: 0, count: 1 };
        for (function, virtualization) in [(1, VMX), (0x8000_0001, SVM), (0x8000_000a, u32::MAX)] {
            let mut entry = kvm_cpuid_entry2 { function, ecx: u32::MAX, eax: 1, ..Default::default() };
            adapt(&mut entry, one, true);
            assert_eq!(entry.ecx & virtualization, 0, "{function:#x}");
        }
    }

    #[test]
    fn a_lone_vcpu_has_no_siblings() {
        assert_eq!(adapted(1, 0, VcpuTopology { id: 0, count: 1 }).edx & HYPERTHREADING, 0);
    }

    #[test]
    fn the_extended_topology_has_one_core_a_vcpu() {
        let core = adapted(0xb, 1, VcpuTopology { id: 2, count: 3 });
        assert_eq!((core.eax, core.ebx, core.ecx, core.edx), (2, 3, 0x201, 2));
        let end = adapted(0xb, 2, VcpuTopology { id: 2, count: 3 });
        assert_eq!((end.ebx, end.ecx), (0, 2));
    }
}
