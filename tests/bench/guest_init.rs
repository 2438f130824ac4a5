// SPDX-License-Identifier: Apache-2.0
//! The one program of the guest that the QEMU case boots: writes `bench: user space` to the kernel's console, then
//! restarts the machine, or waits for ever when its first argument begins with `i` (idle).
//!
//! Compiled alone, without the standard library, into a static executable of a few kilobytes (see `run` beside it), so
//! that the case measures QEMU and the kernel. The console is `/dev/kmsg`, a node of the image: the guest kernel has no
//! serial driver, only its early console on the serial port.
#![no_std]
#![no_main]

use core::arch::{asm, global_asm};

const SYS_WRITE: usize = 1;
const SYS_OPEN: usize = 2;
const SYS_PAUSE: usize = 34;
const SYS_REBOOT: usize = 169;
const O_WRONLY: usize = 1;

// reboot(2): the two magic numbers, and the command to restart.
const REBOOT_MAGIC1: usize = 0xfee1_dead;
const REBOOT_MAGIC2: usize = 0x2812_1969;
const REBOOT_RESTART: usize = 0x0123_4567;

/// Priority 0, so that a quiet kernel prints it too.
const LINE: &[u8] = b"<0>bench: user space\n";

// The stack pointer at entry points to argc, then argv (System V ABI, process initialization).
global_asm!(".globl _start", "_start:", "mov rdi, rsp", "call {main}", main = sym main);

/// System call `number` with four arguments.
fn syscall(number: usize, arguments: [usize; 4]) -> usize {
    let result;
    // SAFETY: the calls made here read memory that outlives them and write none; `syscall` clobbers rcx and r11.
    unsafe {
        asm!("syscall", inlateout("rax") number => result, in("rdi") arguments[0], in("rsi") arguments[1],
            in("rdx") arguments[2], in("r10") arguments[3], lateout("rcx") _, lateout("r11") _);
    }
    result
}

extern "C" fn main(stack: *const usize) -> ! {
    let console = syscall(SYS_OPEN, [c"/dev/kmsg".as_ptr() as usize, O_WRONLY, 0, 0]);
    syscall(SYS_WRITE, [console, LINE.as_ptr() as usize, LINE.len(), 0]);
    // SAFETY: at the entry of a process the stack holds argc, and argv[1] follows argv[0] when argc is 2 or more.
    let idle = unsafe { *stack >= 2 && **stack.add(2).cast::<*const u8>() == b'i' };
    if !idle {
        syscall(SYS_REBOOT, [REBOOT_MAGIC1, REBOOT_MAGIC2, REBOOT_RESTART, 0]);
    }
    loop {
        syscall(SYS_PAUSE, [0; 4]);
    }
}

#[panic_handler]
fn panic(_: &core::panic::PanicInfo<'_>) -> ! {
    loop {}
}
