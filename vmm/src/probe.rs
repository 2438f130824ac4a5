// SPDX-License-Identifier: Apache-2.0
//! Whether this KVM can run Linux guests at all, found out by running one: a few dozen bytes that go where a Linux kernel
//! goes first, from privilege level 0 to 3 and back by `syscall`. There are KVMs that answer every query well and fail at
//! just that.

use std::os::fd::OwnedFd;
use std::sync::mpsc::channel;
use std::time::Duration;

use bulkhead_kvm::{ExitIo, Kvm, KvmError, MemoryError, StartState, Stop, VcpuError, VcpuTopology, allocate};
use bulkhead_virtio::thread::builder;
use vm_memory::{Bytes, GuestAddress, GuestMemoryError};

use crate::arch::x86_64::{layout, paging};

/// How long a probe guest may take; it runs some thirty instructions.
const TIMEOUT: Duration = Duration::from_secs(5);

/// A probe that failed.
#[derive(Debug, thiserror::Error)]
pub enum ProbeError {
    /// KVM refused a part of the set-up.
    #[error(transparent)]
    Kvm(#[from] KvmError),
    /// The guest's memory could not be had.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// The guest's code could not be placed.
    #[error("cannot write the probe guest")]
    Code(#[from] GuestMemoryError),
    /// KVM could not go on.
    #[error("this KVM cannot run Linux guests")]
    Run(#[from] VcpuError),
    /// The guest's `syscall` did not reach privilege level 0.
    #[error("this KVM cannot run Linux guests: after a system call the processor is at privilege level {level}, not 0")]
    PrivilegeLevel {
        /// The level found.
        level: u8,
    },
    /// The guest ended before it could say anything.
    #[error("this KVM cannot run Linux guests: a system call from guest user space faults ({how})")]
    Ended {
        /// How.
        how: &'static str,
    },
    /// The guest never ended.
    #[error("this KVM cannot run Linux guests: a guest of a few instructions did not end within {} s", TIMEOUT.as_secs())]
    Hung,
    /// The host is out of something.
    #[error("cannot start a thread for the probe guest")]
    Thread(#[source] std::io::Error),
}

const CODE: u64 = 0x1000;
/// Offsets of the parts of [`GUEST`].
const USER_OFFSET: u32 = 63;
const HANDLER_OFFSET: u32 = USER_OFFSET + 2;
/// The port that the guest tells its privilege level to.
const REPORT_PORT: u16 = 0xf4;

/// The guest. MSRs and their use: AMD APM vol. 2, 6.1.1.
#[rustfmt::skip]
const GUEST: [u8; 72] = {
    let user = (CODE as u32 + USER_OFFSET).to_le_bytes();
    let handler = (CODE as u32 + HANDLER_OFFSET).to_le_bytes();
    [
        0xb9, 0x80, 0x00, 0x00, 0xc0,                           // mov ecx, EFER
        0x0f, 0x32,                                             // rdmsr
        0x83, 0xc8, 0x01,                                       // or eax, SCE
        0x0f, 0x30,                                             // wrmsr
        0xb9, 0x81, 0x00, 0x00, 0xc0,                           // mov ecx, STAR
        0x31, 0xc0,                                             // xor eax, eax
        0xba, 0x10, 0x00, 0x18, 0x00,                           // mov edx, selectors: kernel 0x10, user from 0x18
        0x0f, 0x30,                                             // wrmsr
        0xb9, 0x82, 0x00, 0x00, 0xc0,                           // mov ecx, LSTAR
        0xb8, handler[0], handler[1], handler[2], handler[3],   // mov eax, handler
        0x31, 0xd2,                                             // xor edx, edx
        0x0f, 0x30,                                             // wrmsr
        0xb9, 0x84, 0x00, 0x00, 0xc0,                           // mov ecx, SFMASK
        0x31, 0xc0,                                             // xor eax, eax
        0x0f, 0x30,                                             // wrmsr
        0xb9, user[0], user[1], user[2], user[3],               // mov ecx, user
        0x41, 0xbb, 0x02, 0x00, 0x00, 0x00,                     // mov r11d, flags
        0x48, 0x0f, 0x07,                                       // sysretq
        // user:
        0x0f, 0x05,                                             // syscall
        // handler:
        0x8c, 0xc8,                                             // mov eax, cs
        0xe6, 0xf4,                                             // out REPORT_PORT, al
        0xf4,                                                   // hlt
        0xeb, 0xfd,                                             // jmp to hlt
    ]
};

/// Runs the probe guest on `device`, which is `/dev/kvm`.
///
/// # Errors
///
/// When the guest does not do what it does on a processor. After [`ProbeError::Hung`] a thread is left behind that runs
/// the guest on.
pub fn run(device: OwnedFd) -> Result<(), ProbeError> {
    let (sender, receiver) = channel();
    let probe = move || {
        // Nobody listens any more when the probe took too long.
        let _ = sender.send(run_guest(device));
    };
    builder("probe").spawn(probe).map_err(ProbeError::Thread)?;
    receiver.recv_timeout(TIMEOUT).unwrap_or(Err(ProbeError::Hung))
}

fn run_guest(device: OwnedFd) -> Result<(), ProbeError> {
    let kvm = Kvm::new(device)?;
    let mut vm = kvm.create_vm()?;
    let memory = allocate(1)?;
    memory.write_slice(&GUEST, GuestAddress(CODE))?;
    paging::write(&memory, true)?;
    vm.set_memory(memory, None)?;
    vm.create_irqchip()?;
    let mut vcpu = vm.create_vcpu(0)?;
    let start = StartState { rip: CODE, rsp: layout::STACK_TOP, rsi: 0, cr3: layout::PAGE_TABLES, gdt: layout::GDT };
    vcpu.set_up(&kvm, VcpuTopology { id: 0, count: 1 }, Some(start))?;
    let mut answer = Answer(None);
    match (vcpu.run(&mut answer)?, answer.0) {
        (Stop::Reset, Some(selector)) if selector & 3 == 0 => Ok(()),
        (Stop::Reset, Some(selector)) => Err(ProbeError::PrivilegeLevel { level: selector & 3 }),
        (Stop::Reset | Stop::Crash, _) => Err(ProbeError::Ended { how: "reset" }),
        (Stop::TripleFault, _) => Err(ProbeError::Ended { how: "triple fault" }),
    }
}

/// What the guest told: the low byte of its code selector.
struct Answer(Option<u8>);

impl ExitIo for Answer {
    fn port_in(&mut self, _port: u16, data: &mut [u8]) {
        data.fill(0xff);
    }

    fn port_out(&mut self, port: u16, data: &[u8]) -> Option<Stop> {
        self.0 = data.first().copied().filter(|_| port == REPORT_PORT);
        Some(Stop::Reset)
    }

    fn mmio_read(&mut self, _address: u64, data: &mut [u8]) {
        data.fill(0xff);
    }

    fn mmio_write(&mut self, _address: u64, _data: &[u8]) {}
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_guest_is_laid_out_as_its_offsets_say() {
        let at = |offset: u32, len: usize| &GUEST[offset as usize..offset as usize + len];
        assert_eq!(at(USER_OFFSET, 2), [0x0f, 0x05]);
        assert_eq!(at(HANDLER_OFFSET, 2), [0x8c, 0xc8]);
    }

    #[test]
    fn a_file_that_is_not_kvm_is_found_out() {
        let file = tempfile::tempfile().unwrap();
        assert!(matches!(run(file.into()), Err(ProbeError::Kvm(KvmError::ApiVersion { .. }))));
    }
}
