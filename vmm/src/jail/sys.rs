// SPDX-License-Identifier: Apache-2.0
//! System calls that neither nix nor rustix offers.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, RawFd};

use rustix::mount::MountAttrFlags;

/// Sets attributes of the mount that `mount` refers to, and of those below it if `recursive`; makes them private to their
/// mount namespace.
///
/// # Errors
///
/// As mount_setattr(2).
pub(super) fn mount_setattr(mount: BorrowedFd<'_>, recursive: bool, set: MountAttrFlags) -> io::Result<()> {
    let attributes =
        libc::mount_attr { attr_set: u64::from(set.bits()), attr_clr: 0, propagation: libc::MS_PRIVATE, userns_fd: 0 };
    let flags = libc::AT_EMPTY_PATH | if recursive { libc::AT_RECURSIVE } else { 0 };
    // SAFETY: the path is a constant C string, and the kernel only reads `attributes`, of which it is told the size.
    let result = unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            mount.as_raw_fd(),
            c"".as_ptr(),
            flags,
            &raw const attributes,
            size_of::<libc::mount_attr>(),
        )
    };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Closes every descriptor above 2 that is not in `kept`: whatever the caller leaked into the process.
///
/// # Errors
///
/// As close_range(2).
pub fn close_all_but(kept: &[RawFd]) -> io::Result<()> {
    let mut kept: Vec<u32> = kept.iter().filter_map(|fd| u32::try_from(*fd).ok()).filter(|fd| *fd > 2).collect();
    kept.sort_unstable();
    kept.dedup();
    let mut first = 3;
    for fd in kept {
        if fd > first {
            close_range(first, fd - 1)?;
        }
        first = fd + 1;
    }
    close_range(first, u32::MAX)
}

fn close_range(first: u32, last: u32) -> io::Result<()> {
    // SAFETY: called before the process owns any descriptor but those that the caller keeps, so none that a safe type
    // holds is closed behind its back.
    let result = unsafe { libc::syscall(libc::SYS_close_range, first, last, 0) };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}
