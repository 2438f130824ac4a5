// SPDX-License-Identifier: Apache-2.0
//! A vCPU: its state at the start, and running it until the guest wants something.

use kvm_bindings::{
    KVM_SYSTEM_EVENT_CRASH, KVM_SYSTEM_EVENT_RESET, KVM_SYSTEM_EVENT_SHUTDOWN, kvm_lapic_state, kvm_regs, kvm_segment,
    kvm_sregs,
};
use kvm_ioctls::{VcpuExit, VcpuFd};

use crate::cpuid::{self, VcpuTopology};
use crate::msr;
use crate::vm::{Kvm, KvmError, cannot};

/// Where the bootstrap vCPU begins: in 64-bit mode, with paging on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct StartState {
    /// The first instruction, guest-virtual.
    pub rip: u64,
    /// The stack.
    pub rsp: u64,
    /// The kernel's argument.
    pub rsi: u64,
    /// Guest-physical address of the top page table.
    pub cr3: u64,
    /// Guest-physical address of the descriptor table: null, code (selector 0x10), data (0x18).
    pub gdt: u64,
}

/// Accesses of the guest that the machine answers.
pub trait ExitIo {
    /// The guest reads a port.
    fn port_in(&mut self, port: u16, data: &mut [u8]);
    /// The guest writes a port. An answer stops the vCPU.
    fn port_out(&mut self, port: u16, data: &[u8]) -> Option<Stop>;
    /// The guest reads a device's memory.
    fn mmio_read(&mut self, address: u64, data: &mut [u8]);
    /// The guest writes a device's memory.
    fn mmio_write(&mut self, address: u64, data: &[u8]);
}

/// Why a vCPU has stopped for good.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stop {
    /// The guest has reset or shut down the machine.
    Reset,
    /// An exception could not be delivered.
    TripleFault,
    /// The guest has said that it crashed.
    Crash,
}

/// A vCPU that KVM could not go on running.
#[derive(Debug, thiserror::Error)]
pub enum VcpuError {
    /// `KVM_RUN` failed.
    #[error("KVM cannot run vCPU {id}")]
    Run {
        /// The vCPU.
        id: u8,
        /// The cause.
        #[source]
        source: kvm_ioctls::Error,
    },
    /// KVM met something that it cannot emulate.
    #[error(
        "KVM gave up on vCPU {id} (internal error, suberror {suberror}, at instruction {rip:#x}){}",
        if *suberror == 1 { ": it cannot emulate that instruction, so this KVM does not run unmodified guests" } else { "" }
    )]
    Internal {
        /// The vCPU.
        id: u8,
        /// `KVM_INTERNAL_ERROR_*`: 1 is a failed emulation.
        suberror: u32,
        /// The instruction pointer; 0 when it cannot be read.
        rip: u64,
    },
    /// The processor refused the vCPU's state.
    #[error("the processor refused to enter vCPU {id} (hardware reason {reason:#x})")]
    Entry {
        /// The vCPU.
        id: u8,
        /// The hardware's reason.
        reason: u64,
    },
    /// An exit that no guest of ours has cause for.
    #[error("vCPU {id} stopped with an exit that the VMM does not know ({exit})")]
    UnknownExit {
        /// The vCPU.
        id: u8,
        /// KVM's exit, by name or number.
        exit: String,
    },
}

/// A vCPU. Belongs to the thread that runs it.
#[derive(Debug)]
pub struct Vcpu {
    id: u8,
    fd: VcpuFd,
}

impl Vcpu {
    pub(crate) fn new(id: u8, fd: VcpuFd) -> Self {
        Self { id, fd }
    }

    /// The vCPU's number.
    #[must_use]
    pub fn id(&self) -> u8 {
        self.id
    }

    /// Sets up CPUID, the MSRs and the local APIC; and, for the one vCPU that starts at once, its registers. The others
    /// wait for the guest to start them.
    ///
    /// # Errors
    ///
    /// When KVM refuses a part of it.
    pub fn set_up(&self, kvm: &Kvm, topology: VcpuTopology, start: Option<StartState>) -> Result<(), KvmError> {
        let cpuid = cpuid::for_vcpu(&kvm.supported_cpuid()?, topology, kvm.has_tsc_deadline_timer());
        self.fd.set_cpuid2(&cpuid).map_err(cannot("set a vCPU's CPUID"))?;
        self.set_msrs()?;
        self.set_local_interrupts()?;
        start.map_or(Ok(()), |start| self.set_registers(start))
    }

    fn set_msrs(&self) -> Result<(), KvmError> {
        let Some(msrs) = msr::at_start() else { return Ok(()) };
        let set = self.fd.set_msrs(&msrs).map_err(cannot("set a vCPU's MSRs"))?;
        if set == msr::AT_START.len() {
            return Ok(());
        }
        Err(KvmError::MissingCapability("a model-specific register that guests need (IA32_MISC_ENABLE or MTRRs)"))
    }

    /// LINT0 takes the PIC's interrupts, LINT1 is the NMI, as after firmware.
    fn set_local_interrupts(&self) -> Result<(), KvmError> {
        const LVT_LINT0: usize = 0x350;
        const LVT_LINT1: usize = 0x360;
        const MODE_EXTINT: u32 = 7 << 8;
        const MODE_NMI: u32 = 4 << 8;
        let mut lapic = self.fd.get_lapic().map_err(cannot("read a local APIC"))?;
        set_lapic_mode(&mut lapic, LVT_LINT0, MODE_EXTINT);
        set_lapic_mode(&mut lapic, LVT_LINT1, MODE_NMI);
        self.fd.set_lapic(&lapic).map_err(cannot("set a local APIC"))
    }

    fn set_registers(&self, start: StartState) -> Result<(), KvmError> {
        let regs = kvm_regs {
            rflags: 2,
            rip: start.rip,
            rsp: start.rsp,
            rbp: start.rsp,
            rsi: start.rsi,
            ..Default::default()
        };
        self.fd.set_regs(&regs).map_err(cannot("set a vCPU's registers"))?;
        let mut sregs = self.fd.get_sregs().map_err(cannot("read a vCPU's system registers"))?;
        enter_long_mode(&mut sregs, start);
        self.fd.set_sregs(&sregs).map_err(cannot("set a vCPU's system registers"))
    }

    /// Runs the guest until it stops for good; its accesses go to `io`.
    ///
    /// # Errors
    ///
    /// When KVM cannot go on.
    pub fn run(&mut self, io: &mut impl ExitIo) -> Result<Stop, VcpuError> {
        let id = self.id;
        loop {
            match self.fd.run() {
                Ok(VcpuExit::MmioRead(address, data)) => io.mmio_read(address, data),
                Ok(VcpuExit::MmioWrite(address, data)) => io.mmio_write(address, data),
                Ok(VcpuExit::IoIn(port, data)) => io.port_in(port, data),
                Ok(VcpuExit::IoOut(port, data)) => {
                    if let Some(stop) = io.port_out(port, data) {
                        return Ok(stop);
                    }
                }
                Ok(VcpuExit::Intr) => {}
                Ok(VcpuExit::Shutdown) => return Ok(Stop::TripleFault),
                Ok(VcpuExit::SystemEvent(KVM_SYSTEM_EVENT_CRASH, _)) => return Ok(Stop::Crash),
                Ok(VcpuExit::SystemEvent(KVM_SYSTEM_EVENT_SHUTDOWN | KVM_SYSTEM_EVENT_RESET, _)) => {
                    return Ok(Stop::Reset);
                }
                Ok(VcpuExit::FailEntry(reason, _)) => return Err(VcpuError::Entry { id, reason }),
                Ok(VcpuExit::InternalError) => return Err(self.internal_error()),
                Ok(exit) => return Err(VcpuError::UnknownExit { id, exit: format!("{exit:?}") }),
                Err(source) if matches!(source.errno(), libc::EINTR | libc::EAGAIN) => {}
                Err(source) => return Err(VcpuError::Run { id, source }),
            }
        }
    }

    fn internal_error(&mut self) -> VcpuError {
        let rip = self.fd.get_regs().map_or(0, |regs| regs.rip);
        // SAFETY: KVM has just answered KVM_EXIT_INTERNAL_ERROR, for which `internal` is the union's valid member; it
        // holds only integers.
        let suberror = unsafe { self.fd.get_kvm_run().__bindgen_anon_1.internal.suberror };
        VcpuError::Internal { id: self.id, suberror, rip }
    }
}

/// Sets the delivery mode (bits 8 to 10) of a local vector table entry.
fn set_lapic_mode(lapic: &mut kvm_lapic_state, offset: usize, mode: u32) {
    let old = (0..4).fold(0u32, |word, byte| word | (u32::from(lapic.regs[offset + byte] as u8) << (8 * byte)));
    for (byte, value) in ((old & !(7 << 8)) | mode).to_le_bytes().into_iter().enumerate() {
        lapic.regs[offset + byte] = value.cast_signed();
    }
}

/// 64-bit mode as the Linux boot protocol wants it (Documentation/arch/x86/boot.rst, "64-bit boot protocol").
fn enter_long_mode(sregs: &mut kvm_sregs, start: StartState) {
    const CR0_PE: u64 = 1;
    const CR0_ET: u64 = 1 << 4;
    const CR0_PG: u64 = 1 << 31;
    const CR4_PAE: u64 = 1 << 5;
    const EFER_LME: u64 = 1 << 8;
    const EFER_LMA: u64 = 1 << 10;
    let flat = |selector: u16, type_: u8, long: bool| kvm_segment {
        base: 0,
        limit: 0xf_ffff,
        selector,
        type_,
        present: 1,
        dpl: 0,
        db: u8::from(!long),
        s: 1,
        l: u8::from(long),
        g: 1,
        ..Default::default()
    };
    sregs.cs = flat(0x10, 0xb, true);
    let data = flat(0x18, 0x3, false);
    (sregs.ds, sregs.es, sregs.fs, sregs.gs, sregs.ss) = (data, data, data, data, data);
    sregs.tr = kvm_segment { limit: 0xffff, selector: 0x20, type_: 0xb, present: 1, ..Default::default() };
    sregs.gdt.base = start.gdt;
    sregs.gdt.limit = 4 * 8 - 1;
    sregs.idt.base = 0;
    sregs.idt.limit = 0;
    sregs.cr3 = start.cr3;
    sregs.cr4 |= CR4_PAE;
    sregs.cr0 = CR0_PE | CR0_ET | CR0_PG;
    sregs.efer |= EFER_LME | EFER_LMA;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn local_vector_mode_keeps_the_other_bits() {
        let mut lapic = kvm_lapic_state::default();
        lapic.regs[0x352] = 1; // masked
        lapic.regs[0x351] = 0x12u8.cast_signed(); // pending, another mode
        set_lapic_mode(&mut lapic, 0x350, 7 << 8);
        assert_eq!([lapic.regs[0x350], lapic.regs[0x351], lapic.regs[0x352]], [0, 0x17, 1]);
    }

    #[test]
    fn long_mode_is_on_with_paging() {
        let mut sregs = kvm_sregs::default();
        enter_long_mode(&mut sregs, StartState { rip: 0, rsp: 0, rsi: 0, cr3: 0x9000, gdt: 0x500 });
        assert_eq!((sregs.cr3, sregs.cs.l, sregs.cs.selector, sregs.ds.selector), (0x9000, 1, 0x10, 0x18));
        assert_eq!(sregs.efer & 0x500, 0x500);
    }
}
