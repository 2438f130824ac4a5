// SPDX-License-Identifier: Apache-2.0
//! bpf(2): programs that decide over a cgroup's access to devices.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};

/// Bytes of a `struct bpf_insn`.
pub(crate) const BPF_INSTRUCTION_LEN: usize = 8;

/// Commands of bpf(2).
const PROG_LOAD: libc::c_int = 5;
const PROG_ATTACH: libc::c_int = 8;

const PROG_TYPE_CGROUP_DEVICE: u32 = 15;
const CGROUP_DEVICE: u32 = 6;

/// Programs of cgroups below this one are asked as well: a container may have containers of its own.
const ALLOW_MULTI: u32 = 1 << 1;
const REPLACE: u32 = 1 << 2;

/// The start of `union bpf_attr` for `BPF_PROG_LOAD`; the kernel takes the rest for zero.
#[repr(C)]
#[derive(Default)]
struct LoadArgs {
    program_type: u32,
    instruction_count: u32,
    instructions: u64,
    license: u64,
    log_level: u32,
    log_size: u32,
    log: u64,
    kernel_version: u32,
    flags: u32,
    name: [u8; 16],
    interface: u32,
    attach_type: u32,
}

/// The same for `BPF_PROG_ATTACH`.
#[repr(C)]
#[derive(Default)]
struct AttachArgs {
    target: u32,
    program: u32,
    attach_type: u32,
    flags: u32,
    replaced: u32,
}

/// Loads a program of instructions (`struct bpf_insn`), which the kernel checks.
pub(crate) fn load_device_filter(instructions: &[u8]) -> io::Result<OwnedFd> {
    let too_long = |_| io::Error::from_raw_os_error(libc::E2BIG);
    let mut name = [0; 16];
    name[..7].copy_from_slice(b"devices");
    let args = LoadArgs {
        program_type: PROG_TYPE_CGROUP_DEVICE,
        instruction_count: u32::try_from(instructions.len() / BPF_INSTRUCTION_LEN).map_err(too_long)?,
        instructions: instructions.as_ptr().addr() as u64,
        license: c"Apache-2.0".as_ptr().addr() as u64,
        name,
        attach_type: CGROUP_DEVICE,
        ..LoadArgs::default()
    };
    // SAFETY: `args` is a live, initialised start of `union bpf_attr` of the size given. It names a slice of whole
    // instructions by its address and their number, and a NUL-terminated constant; the kernel copies both, and writes
    // nothing, as no log is asked for.
    let result = unsafe { libc::syscall(libc::SYS_bpf, PROG_LOAD, &raw const args, size_of::<LoadArgs>()) };
    match RawFd::try_from(result) {
        // SAFETY: the call has succeeded, so this is a new descriptor, which nobody else knows of.
        Ok(program) if program >= 0 => Ok(unsafe { OwnedFd::from_raw_fd(program) }),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Has a cgroup's accesses to devices decided by a program, in the place of one that is `replaced`.
pub(crate) fn attach_device_filter(
    cgroup: BorrowedFd<'_>,
    program: BorrowedFd<'_>,
    replaced: Option<BorrowedFd<'_>>,
) -> io::Result<()> {
    let number = |descriptor: BorrowedFd<'_>| descriptor.as_raw_fd().cast_unsigned();
    let args = AttachArgs {
        target: number(cgroup),
        program: number(program),
        attach_type: CGROUP_DEVICE,
        flags: ALLOW_MULTI | if replaced.is_some() { REPLACE } else { 0 },
        replaced: replaced.map_or(0, number),
    };
    // SAFETY: `args` is a live, initialised start of `union bpf_attr` of the size given, without any address in it.
    let result = unsafe { libc::syscall(libc::SYS_bpf, PROG_ATTACH, &raw const args, size_of::<AttachArgs>()) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}
