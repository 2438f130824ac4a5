// SPDX-License-Identifier: Apache-2.0
//! A guest and memory that its machine may be given: of a few instructions, so that any KVM runs it.

use std::fs::File;

use bulkhead_kvm::{ExitIo, Kvm, Reserve, ReserveLayout, StartState, Stop, Vcpu, VcpuTopology, Vm, allocate};
use bulkhead_vmm::arch::x86_64::{layout, paging};
use vm_memory::{Bytes, GuestAddress};

const CODE: u64 = 0x1000;

/// The last of the 2 MiB pages that a guest begins with: here it leads to where its memory grows.
const WINDOW: u64 = 511 << 21;
const WINDOW_ENTRY: u64 = layout::PAGE_TABLES + 0x2000 + 511 * 8;
const PRESENT_WRITABLE_LARGE: u64 = 0x83;

/// Tells the byte that is at the beginning of the window, again and again.
#[rustfmt::skip]
const GUEST: [u8; 17] = {
    let window = (WINDOW as u32).to_le_bytes();
    [
        0x0f, 0x20, 0xd8,                                             // mov rax, cr3
        0x0f, 0x22, 0xd8,                                             // mov cr3, rax: the window may lead elsewhere now
        0x8a, 0x04, 0x25, window[0], window[1], window[2], window[3], // mov al, [WINDOW]
        0xe6, 0xf4,                                                   // out 0xf4, al
        0xeb, 0xef,                                                   // jmp to the first
    ]
};

/// What the machine was asked for.
#[derive(Default)]
struct Seen {
    read_of_no_memory: Option<u64>,
    told: Option<u8>,
}

impl ExitIo for Seen {
    fn port_in(&mut self, _port: u16, data: &mut [u8]) {
        data.fill(0);
    }

    fn port_out(&mut self, _port: u16, data: &[u8]) -> Option<Stop> {
        self.told = data.first().copied();
        Some(Stop::Reset)
    }

    fn mmio_read(&mut self, address: u64, data: &mut [u8]) {
        self.read_of_no_memory = Some(address);
        data.fill(0xff);
    }

    fn mmio_write(&mut self, _address: u64, _data: &[u8]) {}
}

/// Runs the guest until it tells something; where it read no memory, and what it told.
fn run(vcpu: &mut Vcpu) -> (Option<u64>, Option<u8>) {
    let mut seen = Seen::default();
    assert!(matches!(vcpu.run(&mut seen), Ok(Stop::Reset)));
    (seen.read_of_no_memory, seen.told)
}

#[test]
fn a_guest_has_no_memory_before_it_is_granted() {
    let Ok(device) = File::options().read(true).write(true).open("/dev/kvm") else {
        // Where there is no KVM there is nothing to be seen.
        return;
    };
    let kvm = Kvm::new(device.into()).unwrap();
    let mut vm: Vm = kvm.create_vm().unwrap();
    vm.create_irqchip().unwrap();
    let reserve = ReserveLayout::new(1, 257).unwrap();
    let ram = allocate(1).unwrap();
    paging::write(&ram, false).unwrap();
    ram.write_slice(&GUEST, GuestAddress(CODE)).unwrap();
    ram.write_obj(reserve.address(0) | PRESENT_WRITABLE_LARGE, GuestAddress(WINDOW_ENTRY)).unwrap();
    let memory = vm.set_memory(ram, Reserve::map(reserve)).unwrap();
    let mut vcpu = vm.create_vcpu(0).unwrap();
    let start = StartState { rip: CODE, rsp: layout::STACK_TOP, rsi: 0, cr3: layout::PAGE_TABLES, gdt: layout::GDT };
    vcpu.set_up(&kvm, VcpuTopology { id: 0, count: 1 }, Some(start)).unwrap();

    assert_eq!(run(&mut vcpu), (Some(reserve.address(0)), Some(0xff)));

    vm.grant_memory(128).unwrap();
    memory.write_obj(7_u8, GuestAddress(reserve.address(0))).unwrap();
    assert_eq!(run(&mut vcpu), (None, Some(7)));

    // The rest is not its own yet.
    memory.write_obj(reserve.address(128) | PRESENT_WRITABLE_LARGE, GuestAddress(WINDOW_ENTRY)).unwrap();
    assert_eq!(run(&mut vcpu), (Some(reserve.address(128)), Some(0xff)));
    assert!(vm.grant_memory(384).is_err());
    // Asked for again, what it has is not more.
    vm.grant_memory(128).unwrap();
    assert_eq!(run(&mut vcpu), (Some(reserve.address(128)), Some(0xff)));
    vm.grant_memory(256).unwrap();
    assert_eq!(run(&mut vcpu), (None, Some(0)));
}
