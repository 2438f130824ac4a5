// SPDX-License-Identifier: Apache-2.0
//! Waiting for the end of a process, by its descriptor.

use std::io;
use std::os::fd::{AsFd, OwnedFd};

use rustix::process::{Pid, PidfdFlags, WaitId, WaitIdOptions, pidfd_open, waitid};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::runtime::Handle;

/// The descriptor of a child that has not been reaped, or of another process that is known to be there.
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

/// Reaps a child when it has ended, in the event loop that there is. Without one, this process ends before it matters.
pub(crate) fn reap(pidfd: OwnedFd) {
    let (Ok(event_loop), Ok(watched)) = (Handle::try_current(), pidfd.try_clone()) else { return };
    event_loop.spawn(async move {
        if ended(watched).await.is_ok() {
            // Somebody else may have reaped it.
            let _ = waitid(WaitId::PidFd(pidfd.as_fd()), WaitIdOptions::EXITED);
        }
    });
}

#[cfg(test)]
mod tests {
    use std::process::Command;
    use std::time::Duration;

    use super::*;

    #[tokio::test]
    async fn a_child_that_nobody_waits_for_does_not_stay() {
        let mut child = Command::new("true").spawn().unwrap();

        reap(open(child.id()).unwrap());

        let stat = format!("/proc/{}/stat", child.id());
        for _ in 0..1000 {
            if !std::fs::exists(&stat).unwrap() {
                break;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        assert_eq!(child.wait().unwrap_err().raw_os_error(), Some(libc::ECHILD));
    }
}
