// SPDX-License-Identifier: Apache-2.0
//! Where things lie in guest-physical memory.
//!
//! ```text
//! 0x0000_0500  descriptor table        0x0009_e000  reserved: MP table (its pointer at 0x9_fc00)
//! 0x0000_7000  boot_params             0x000a_0000  end of low memory
//! 0x0000_8ff0  stack, downwards        0x0010_0000  kernel (where its ELF says, 16 MiB up)
//! 0x0000_9000  page tables             initramfs, on the page behind the kernel
//! 0x0002_0000  command line            0xd000_0000  virtio windows, 4 KiB each
//! ```

use crate::config::{MAX_DISKS, MAX_NETS};

/// The descriptor table.
pub const GDT: u64 = 0x500;
/// The `boot_params` ("zero page").
pub const BOOT_PARAMS: u64 = 0x7000;
/// The bootstrap vCPU's first stack.
pub const STACK_TOP: u64 = 0x8ff0;
/// Three pages of page tables.
pub const PAGE_TABLES: u64 = 0x9000;
/// The kernel's command line.
pub const CMDLINE: u64 = 0x2_0000;
/// Most bytes of the command line, with its final NUL (`COMMAND_LINE_SIZE` of x86).
pub const CMDLINE_MAX: usize = 2048;
/// The MP configuration table.
pub const MP_TABLE: u64 = 0x9_e000;
/// The MP floating pointer, in the last KiB of base memory, where kernels look for it.
pub const MP_POINTER: u64 = 0x9_fc00;
/// End of base memory.
pub const LOW_MEMORY_END: u64 = 0xa_0000;
/// Memory above 1 MiB.
pub const HIGH_MEMORY: u64 = 0x10_0000;
/// The first virtio window.
pub const VIRTIO_WINDOWS: u64 = 0xd000_0000;
/// Length of a window.
pub const VIRTIO_WINDOW_LEN: u64 = 0x1000;
/// The first interrupt line that a device may have: those below belong to the timer, the cascade and serial ports.
pub const FIRST_IRQ: u32 = 5;
/// The last line of the IO-APIC.
pub const LAST_IRQ: u32 = 23;
/// Besides the network's and block devices, a machine has vsock, two shares, and rng.
const _: () = assert!(4 + MAX_NETS + MAX_DISKS <= (LAST_IRQ - FIRST_IRQ + 1) as usize);
/// The IO-APIC's registers.
pub const IO_APIC: u32 = 0xfec0_0000;
/// The local APICs' registers.
pub const LOCAL_APIC: u32 = 0xfee0_0000;
