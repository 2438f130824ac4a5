// SPDX-License-Identifier: Apache-2.0
//! A system call that neither nix nor rustix offers.

use std::io;
use std::os::fd::RawFd;

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
