// SPDX-License-Identifier: Apache-2.0
//! Waiting for the end of a process, by its descriptor.

use std::io;
use std::os::fd::OwnedFd;

use rustix::process::{Pid, PidfdFlags, pidfd_open};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

/// The descriptor of a child that has not been reaped.
///
/// # Errors
///
/// When no descriptor is left.
pub(crate) fn open(pid: u32) -> io::Result<OwnedFd> {
    let pid = Pid::from_raw(pid.cast_signed()).ok_or(io::ErrorKind::NotFound)?;
    Ok(pidfd_open(pid, PidfdFlags::NONBLOCK)?)
}

/// Waits until a process has ended; within an event loop.
///
/// # Errors
///
/// When it cannot be waited for.
pub(crate) async fn ended(pidfd: OwnedFd) -> io::Result<()> {
    // SAFETY: an `OwnedFd` is the same open descriptor until it is dropped, which is after its registration: the
    // `AsyncFd` owns it from here on.
    let watched = unsafe { AsyncFd::register_with_interest(pidfd, Interest::READABLE) }?;
    let _ready = watched.readable().await?;
    Ok(())
}
