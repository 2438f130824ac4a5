// SPDX-License-Identifier: Apache-2.0
//! The model-specific registers that a vCPU starts with.

use kvm_bindings::{Msrs, kvm_msr_entry};

/// `IA32_MISC_ENABLE`, bit 0: fast string operations.
const MISC_ENABLE: (u32, u64) = (0x1a0, 1);
/// `IA32_MTRR_DEF_TYPE`: MTRRs on, all memory write-back. Without it Linux maps RAM uncached.
const MTRR_DEF_TYPE: (u32, u64) = (0x2ff, (1 << 11) | 6);

/// What firmware would have set (Intel SDM vol. 4).
pub(crate) const AT_START: &[(u32, u64)] = &[MISC_ENABLE, MTRR_DEF_TYPE];

/// The list that `KVM_SET_MSRS` takes.
pub(crate) fn at_start() -> Option<Msrs> {
    let entries: Vec<_> =
        AT_START.iter().map(|&(index, data)| kvm_msr_entry { index, data, ..Default::default() }).collect();
    Msrs::from_entries(&entries).ok()
}
