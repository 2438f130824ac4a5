// SPDX-License-Identifier: Apache-2.0
//! The system and VM levels of KVM.

use std::os::fd::{IntoRawFd, OwnedFd};
use std::sync::{Mutex, PoisonError};

use kvm_bindings::{CpuId, KVM_API_VERSION, KVM_MAX_CPUID_ENTRIES, kvm_userspace_memory_region};
use kvm_ioctls::{Cap, IoEventAddress, VmFd};
use vm_memory::{GuestMemoryBackend as _, GuestMemoryRegion};
use vmm_sys_util::eventfd::EventFd;

use crate::memory::GuestMemory;
use crate::reserve::{GrantError, Reserve};
use crate::vcpu::Vcpu;

/// Something that KVM refused.
#[derive(Debug, thiserror::Error)]
pub enum KvmError {
    /// The descriptor is not KVM's, or KVM speaks another version.
    #[error(
        "{}", if *found < 0 { "the device is not KVM".to_owned() }
              else { format!("KVM's API version is {found}, not {KVM_API_VERSION}") }
    )]
    ApiVersion {
        /// What `KVM_GET_API_VERSION` answered; -1 for a descriptor that is not KVM.
        found: i32,
    },
    /// KVM lacks something that the machine needs.
    #[error("this KVM lacks {0}")]
    MissingCapability(&'static str),
    /// An ioctl failed.
    #[error("KVM cannot {doing}")]
    Ioctl {
        /// Completes "KVM cannot …".
        doing: &'static str,
        /// The cause.
        #[source]
        source: kvm_ioctls::Error,
    },
}

/// Turns an ioctl's failure into an error that says what was being done.
pub(crate) fn cannot(doing: &'static str) -> impl FnOnce(kvm_ioctls::Error) -> KvmError {
    move |source| KvmError::Ioctl { doing, source }
}

/// What a machine needs of KVM, and what to call it.
const NEEDED: &[(Cap, &str)] = &[
    (Cap::Irqchip, "an in-kernel interrupt controller (KVM_CAP_IRQCHIP)"),
    (Cap::Irqfd, "interrupts by eventfd (KVM_CAP_IRQFD)"),
    (Cap::Ioeventfd, "notifications by eventfd (KVM_CAP_IOEVENTFD)"),
    (Cap::UserMemory, "user memory (KVM_CAP_USER_MEMORY)"),
    (Cap::ExtCpuid, "CPUID (KVM_CAP_EXT_CPUID)"),
    (Cap::ImmediateExit, "immediate exit (KVM_CAP_IMMEDIATE_EXIT)"),
];

/// `/dev/kvm`.
#[derive(Debug)]
pub struct Kvm(kvm_ioctls::Kvm);

impl Kvm {
    /// Takes `/dev/kvm`, open for reading and writing, and checks that it has what a machine needs.
    ///
    /// # Errors
    ///
    /// When it is not KVM, or lacks something; the error names it.
    pub fn new(device: OwnedFd) -> Result<Self, KvmError> {
        use std::os::fd::FromRawFd;
        // SAFETY: the descriptor is owned and handed over, so nobody else closes it. One that is not KVM's is found out
        // by the version query.
        let kvm = unsafe { kvm_ioctls::Kvm::from_raw_fd(device.into_raw_fd()) };
        let found = kvm.get_api_version();
        if u32::try_from(found) != Ok(KVM_API_VERSION) {
            return Err(KvmError::ApiVersion { found });
        }
        match NEEDED.iter().find(|(cap, _)| !kvm.check_extension(*cap)) {
            Some((_, name)) => Err(KvmError::MissingCapability(name)),
            None => Ok(Self(kvm)),
        }
    }

    /// Makes a virtual machine without memory.
    ///
    /// # Errors
    ///
    /// When KVM refuses.
    pub fn create_vm(&self) -> Result<Vm, KvmError> {
        let fd = self.0.create_vm().map_err(cannot("create a virtual machine"))?;
        Ok(Vm { fd, memory: None, growth: None })
    }

    /// What KVM can show a guest as CPUID.
    pub(crate) fn supported_cpuid(&self) -> Result<CpuId, KvmError> {
        self.0.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES).map_err(cannot("tell its CPUID"))
    }

    /// Whether KVM emulates the local APIC's TSC deadline timer; `KVM_GET_SUPPORTED_CPUID` does not report it.
    pub(crate) fn has_tsc_deadline_timer(&self) -> bool {
        self.0.check_extension(Cap::TscDeadlineTimer)
    }
}

/// A virtual machine. Keeps the memory mapped that KVM was told of.
#[derive(Debug)]
pub struct Vm {
    fd: VmFd,
    memory: Option<GuestMemory>,
    growth: Option<Mutex<Growth>>,
}

/// What of the machine's memory is yet to come.
#[derive(Debug)]
struct Growth {
    reserve: Reserve,
    /// The number of the next part for KVM.
    slot: u32,
}

impl Vm {
    /// Gives the machine its memory; once. Answers all that its guest may ever have, which is what devices are to know: of the
    /// reserve, nothing is the guest's yet.
    ///
    /// # Errors
    ///
    /// When KVM refuses a region.
    pub fn set_memory(&mut self, ram: GuestMemory, reserve: Option<Reserve>) -> Result<GuestMemory, KvmError> {
        for (slot, region) in (0..).zip(ram.iter()) {
            let region = memory_region(slot, region.start_addr().0, region.len(), region.as_ptr());
            // SAFETY: the region is mapped, belongs to guest memory alone, and stays mapped as long as the VM's
            // descriptor is open, since `self.memory` holds it and is dropped after `self.fd`.
            unsafe { self.fd.set_user_memory_region(region) }.map_err(cannot("map guest memory"))?;
        }
        let slot = ram.iter().count() as u32; // two at most
        let joined = reserve.and_then(|reserve| Some((reserve.joined_with(&ram)?, Growth { reserve, slot })));
        let (memory, growth) = joined.map_or((ram, None), |(memory, growth)| (memory, Some(Mutex::new(growth))));
        (self.memory, self.growth) = (Some(memory.clone()), growth);
        Ok(memory)
    }

    /// Grants the guest so much of the reserve in all.
    ///
    /// # Errors
    ///
    /// When it is not so large, or the host or KVM refuses it; nothing is granted then.
    pub fn grant_memory(&self, total_mib: u64) -> Result<(), GrantError> {
        let growth = self.growth.as_ref().ok_or(GrantError::NoReserve)?;
        // Nothing panics while the lock is held.
        let mut growth = growth.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(part) = growth.reserve.missing(total_mib)? else { return Ok(()) };
        growth.reserve.allow(&part, true).map_err(|source| GrantError::Protect { total_mib, source })?;
        let (guest_address, address) = growth.reserve.addresses(&part);
        let region = memory_region(growth.slot, guest_address, part.end - part.start, address);
        // SAFETY: as in `set_memory`: the reserve's region is one of those that `self.memory` holds.
        if let Err(error) = unsafe { self.fd.set_user_memory_region(region) } {
            // Nobody has touched it: it can be asked for again.
            let _ = growth.reserve.allow(&part, false);
            return Err(cannot("map added memory")(error).into());
        }
        growth.slot += 1;
        growth.reserve.grant(&part);
        Ok(())
    }

    /// Makes the in-kernel PICs, IO-APIC and local APICs; before any vCPU.
    ///
    /// # Errors
    ///
    /// When KVM refuses.
    pub fn create_irqchip(&self) -> Result<(), KvmError> {
        // Intel processors without unrestricted guest mode need three pages for a task state segment, outside RAM.
        self.fd.set_tss_address(0xfffb_d000).map_err(cannot("place the task state segment"))?;
        self.fd.create_irq_chip().map_err(cannot("create its interrupt controller"))
    }

    /// Makes vCPU `id`, counted from 0.
    ///
    /// # Errors
    ///
    /// When KVM refuses.
    pub fn create_vcpu(&self, id: u8) -> Result<Vcpu, KvmError> {
        let fd = self.fd.create_vcpu(id.into()).map_err(cannot("create a vCPU"))?;
        Ok(Vcpu::new(id, fd))
    }

    /// Turns each signal of `event` into an interrupt on `irq`.
    ///
    /// # Errors
    ///
    /// When KVM refuses.
    pub fn register_irqfd(&self, event: &EventFd, irq: u32) -> Result<(), KvmError> {
        self.fd.register_irqfd(event, irq).map_err(cannot("register an interrupt"))
    }

    /// Turns each 32-bit write of `value` to `address` into a signal of `event`.
    ///
    /// # Errors
    ///
    /// When KVM refuses.
    pub fn register_ioevent(&self, event: &EventFd, address: u64, value: u32) -> Result<(), KvmError> {
        // The type of the value is the width of the write.
        self.fd
            .register_ioevent(event, &IoEventAddress::Mmio(address), value)
            .map_err(cannot("register a notification"))
    }

    /// Takes [`Self::register_irqfd`] back.
    ///
    /// # Errors
    ///
    /// When KVM refuses.
    pub fn unregister_irqfd(&self, event: &EventFd, irq: u32) -> Result<(), KvmError> {
        self.fd.unregister_irqfd(event, irq).map_err(cannot("give an interrupt up"))
    }

    /// Takes [`Self::register_ioevent`] back.
    ///
    /// # Errors
    ///
    /// When KVM refuses.
    pub fn unregister_ioevent(&self, event: &EventFd, address: u64, value: u32) -> Result<(), KvmError> {
        self.fd
            .unregister_ioevent(event, &IoEventAddress::Mmio(address), value)
            .map_err(cannot("give a notification up"))
    }
}

fn memory_region(slot: u32, guest_phys_addr: u64, memory_size: u64, address: *mut u8) -> kvm_userspace_memory_region {
    kvm_userspace_memory_region { slot, flags: 0, guest_phys_addr, memory_size, userspace_addr: address as u64 }
}
