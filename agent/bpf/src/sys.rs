// SPDX-License-Identifier: Apache-2.0
//! The system call. All of this crate's `unsafe` is here.

use std::io;
use std::os::fd::{FromRawFd, OwnedFd, RawFd};

/// Commands of bpf(2).
const MAP_CREATE: libc::c_int = 0;
const MAP_UPDATE_ELEM: libc::c_int = 2;
const PROG_LOAD: libc::c_int = 5;
const PROG_ATTACH: libc::c_int = 8;
const LINK_CREATE: libc::c_int = 28;

/// The length of a name, with its NUL.
const NAME_LEN: usize = 16;

/// The start of `union bpf_attr` for `BPF_MAP_CREATE`; the kernel takes the rest for zero, here and below.
#[repr(C)]
#[derive(Default)]
pub(crate) struct MapArgs {
    pub(crate) map_type: u32,
    pub(crate) key_size: u32,
    pub(crate) value_size: u32,
    pub(crate) max_entries: u32,
    pub(crate) flags: u32,
    pub(crate) inner_map: u32,
    pub(crate) numa_node: u32,
    pub(crate) name: [u8; NAME_LEN],
}

#[repr(C)]
struct UpdateArgs {
    map: u32,
    padding: u32,
    key: u64,
    value: u64,
    flags: u64,
}

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
    name: [u8; NAME_LEN],
    interface: u32,
    attach_type: u32,
}

#[repr(C)]
#[derive(Default)]
pub(crate) struct AttachArgs {
    pub(crate) target: u32,
    pub(crate) program: u32,
    pub(crate) attach_type: u32,
    pub(crate) flags: u32,
    pub(crate) replaced: u32,
}

#[repr(C)]
#[derive(Default)]
pub(crate) struct LinkArgs {
    pub(crate) program: u32,
    pub(crate) target: u32,
    pub(crate) attach_type: u32,
    pub(crate) flags: u32,
}

/// A name as the kernel takes it: cut where it is too long.
pub(crate) fn name(text: &str) -> [u8; NAME_LEN] {
    let mut name = [0; NAME_LEN];
    // The last byte stays 0.
    for (to, from) in name.iter_mut().take(NAME_LEN - 1).zip(text.bytes()) {
        *to = from;
    }
    name
}

pub(crate) fn create_map(args: &MapArgs) -> io::Result<OwnedFd> {
    // SAFETY: `args` has no address in it.
    let result = unsafe { bpf(MAP_CREATE, args) };
    descriptor(result)
}

/// Sets an element of a map whose keys and values are of 4 bytes.
pub(crate) fn update_map(map: RawFd, key: u32, value: u32) -> io::Result<()> {
    let args = UpdateArgs {
        map: map.cast_unsigned(),
        padding: 0,
        key: (&raw const key).addr() as u64,
        value: (&raw const value).addr() as u64,
        flags: 0,
    };
    // SAFETY: the addresses are those of two live integers, which the kernel only reads. Of a map with longer keys or values
    // it would read beyond them: the only ones that this crate makes are `SocketMap`'s, whose both are of 4 bytes.
    let result = unsafe { bpf(MAP_UPDATE_ELEM, &args) };
    done(result)
}

pub(crate) fn load_program(
    program_type: u32,
    attach_type: u32,
    name: [u8; NAME_LEN],
    instructions: &[[u8; 8]],
) -> io::Result<OwnedFd> {
    let too_long = |_| io::Error::from_raw_os_error(libc::E2BIG);
    let args = LoadArgs {
        program_type,
        instruction_count: u32::try_from(instructions.len()).map_err(too_long)?,
        instructions: instructions.as_ptr().addr() as u64,
        license: c"Apache-2.0".as_ptr().addr() as u64,
        name,
        attach_type,
        ..LoadArgs::default()
    };
    // SAFETY: `args` names a live slice of instructions by its address and their number, and a NUL-terminated constant; the
    // kernel copies both, and writes nothing, as no log is asked for.
    let result = unsafe { bpf(PROG_LOAD, &args) };
    descriptor(result)
}

pub(crate) fn attach_program(args: &AttachArgs) -> io::Result<()> {
    // SAFETY: `args` has no address in it.
    let result = unsafe { bpf(PROG_ATTACH, args) };
    done(result)
}

pub(crate) fn create_link(args: &LinkArgs) -> io::Result<OwnedFd> {
    // SAFETY: `args` has no address in it.
    let result = unsafe { bpf(LINK_CREATE, args) };
    descriptor(result)
}

/// # Safety
///
/// `A` is the start of `union bpf_attr` for `command`, and each address in it is that of memory which the kernel may use for
/// the command as it does.
unsafe fn bpf<A>(command: libc::c_int, args: &A) -> libc::c_long {
    // SAFETY: `args` is live, initialised, and of the size given; for the addresses in it the caller answers.
    unsafe { libc::syscall(libc::SYS_bpf, command, std::ptr::from_ref(args), size_of::<A>()) }
}

/// The descriptor that a successful call has made.
fn descriptor(result: libc::c_long) -> io::Result<OwnedFd> {
    match RawFd::try_from(result) {
        // SAFETY: the call has succeeded, so this is a new descriptor, which nobody else knows of.
        Ok(made) if made >= 0 => Ok(unsafe { OwnedFd::from_raw_fd(made) }),
        _ => Err(io::Error::last_os_error()),
    }
}

fn done(result: libc::c_long) -> io::Result<()> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}
