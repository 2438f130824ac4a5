// SPDX-License-Identifier: Apache-2.0
//! A process that lives on when its caller has what it came for.
//!
//! The caller forks: the child becomes the head of a session of its own, keeps the standard streams, and tells in one
//! message whether it succeeded; then the parent ends, and the child is the reaper's, which is the engine (conmon,
//! containerd's shim) or init. If the parent is gone before that, the child gives up, unless its container runs already: then the
//! parent has waited for it to be ready.

use std::fs;
use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::os::fd::{AsFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::panic::{self, AssertUnwindSafe};
use std::process;

use nix::sys::wait::{WaitStatus, waitpid};
use nix::unistd::{ForkResult, Pid, fork};
use rustix::io::{FdFlags, fcntl_getfd};
use serde::{Deserialize, Serialize};
use thiserror::Error;

use crate::text;

/// Longest message of a child.
const MAX_REPORT: u64 = 64 * 1024;

/// A child that did not come to be, or did not succeed.
#[derive(Debug, Error)]
pub(crate) enum DetachError {
    #[error("cannot {0} for the supervisor")]
    Prepare(&'static str, #[source] io::Error),
    /// In the child's own words.
    #[error("{message}")]
    Failed { message: String, status: u8 },
    #[error("the supervisor ended without a word: {0}")]
    Silent(String),
}

impl DetachError {
    /// The exit status that says so.
    pub(crate) fn exit_status(&self) -> u8 {
        match self {
            Self::Failed { status, .. } => *status,
            Self::Prepare(..) | Self::Silent(_) => 1,
        }
    }
}

/// What a child tells its parent.
#[derive(Debug, Serialize, Deserialize)]
struct Report {
    /// Absent where it succeeded.
    error: Option<String>,
    status: u8,
    /// The line by which a container has told that it is ready, where that was waited for.
    ready: Option<String>,
}

/// A child that lives on.
#[derive(Debug)]
pub(crate) struct Detached {
    pub(crate) pid: u32,
    /// The line by which its container has told that it is ready, where that was waited for.
    pub(crate) ready: Option<String>,
}

/// The child's side of the report. Dropped without one, it says that the child has failed.
#[derive(Debug)]
pub(crate) struct Reporter(UnixStream);

impl Reporter {
    /// Lets the parent end well.
    pub(crate) fn succeeded(self) {
        self.succeeded_and(None);
    }

    /// The same, with the line by which the container has told that it is ready.
    pub(crate) fn succeeded_and(self, ready: Option<String>) {
        self.send(&Report { error: None, status: 0, ready });
    }

    /// Lets the parent say what has failed, and end with that status.
    pub(crate) fn failed(self, message: String, status: u8) {
        self.send(&Report { error: Some(message), status, ready: None });
    }

    fn send(mut self, report: &Report) {
        // A parent that is gone does not want to know.
        let _ = serde_json::to_vec(report).map(|message| self.0.write_all(&message));
        let _ = self.0.shutdown(Shutdown::Both);
    }

    /// A second descriptor, which becomes readable when the parent is gone.
    pub(crate) fn watch(&self) -> io::Result<UnixStream> {
        self.0.try_clone()
    }
}

/// Runs `child` in a process of its own, which ends with the status that it gives; returns once it has reported.
///
/// The process must have one thread only.
///
/// # Errors
///
/// What the child reported, or why there is none.
pub(crate) fn detach(child: impl FnOnce(Reporter) -> u8) -> Result<(), DetachError> {
    detach_and_hear(child).map(drop)
}

/// The same for a child that may have more to report.
///
/// # Errors
///
/// As [`detach`].
pub(crate) fn detach_and_hear(child: impl FnOnce(Reporter) -> u8) -> Result<Detached, DetachError> {
    let prepare = |doing| move |error: io::Error| DetachError::Prepare(doing, error);
    let (ours, theirs) = UnixStream::pair().map_err(prepare("make a socket"))?;
    // SAFETY: the program starts threads only once a sandbox or an exec'd process is under way, which is in the child, so
    // no lock can be held by a thread that the child does not have.
    match unsafe { fork() }.map_err(|error| prepare("fork")(error.into()))? {
        ForkResult::Child => {
            drop(ours);
            process::exit(i32::from(become_child(Reporter(theirs), child)));
        }
        ForkResult::Parent { child } => {
            drop(theirs);
            await_report(ours, child)
        }
    }
}

fn become_child(reporter: Reporter, child: impl FnOnce(Reporter) -> u8) -> u8 {
    close_inherited();
    // Neither fails: a forked child heads no group, and `/` is there.
    let _ = rustix::process::setsid();
    let _ = rustix::process::chdir("/");
    // The panic hook has told the cause.
    panic::catch_unwind(AssertUnwindSafe(|| child(reporter))).unwrap_or(1)
}

/// Closes what the caller left open: whoever waits for the end of one of these must not wait for the container's.
fn close_inherited() {
    let Ok(entries) = fs::read_dir("/proc/self/fd") else {
        return;
    };
    let numbers: Vec<RawFd> = entries.flatten().filter_map(|entry| entry.file_name().to_str()?.parse().ok()).collect();
    for number in numbers.into_iter().filter(|number| *number > 2) {
        // SAFETY: used for one question only; a number that has been closed meanwhile gets an error for an answer.
        let descriptor = unsafe { BorrowedFd::borrow_raw(number) };
        // All that this program opens is closed on exec, so the rest is none of its own.
        if fcntl_getfd(descriptor.as_fd()).is_ok_and(|flags| !flags.contains(FdFlags::CLOEXEC)) {
            // SAFETY: it was inherited, and nothing here owns it.
            drop(unsafe { OwnedFd::from_raw_fd(number) });
        }
    }
}

fn await_report(stream: UnixStream, child: Pid) -> Result<Detached, DetachError> {
    let mut message = Vec::new();
    stream
        .take(MAX_REPORT)
        .read_to_end(&mut message)
        .map_err(|error| DetachError::Prepare("read the report", error))?;
    match serde_json::from_slice(&message) {
        Ok(Report { error: None, ready, .. }) => Ok(Detached { pid: child.as_raw().cast_unsigned(), ready }),
        Ok(Report { error: Some(message), status, .. }) => Err(DetachError::Failed { message, status }),
        Err(_) => Err(DetachError::Silent(match waitpid(child, None) {
            Ok(WaitStatus::Exited(_, status)) => format!("exit status {status}"),
            Ok(WaitStatus::Signaled(_, signal, _)) => format!("{signal}"),
            Ok(other) => text::one_line(&format!("{other:?}")),
            Err(error) => error.to_string(),
        })),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn told(report: impl FnOnce(Reporter)) -> Result<Detached, DetachError> {
        let (ours, theirs) = UnixStream::pair().unwrap();
        report(Reporter(theirs));
        // Nobody's child.
        await_report(ours, Pid::from_raw(i32::MAX))
    }

    #[test]
    fn the_parent_learns_what_the_child_says() {
        assert!(matches!(told(Reporter::succeeded), Ok(Detached { ready: None, .. })));
        let ready = told(|reporter| reporter.succeeded_and(Some("READY=1".into())));
        assert!(matches!(ready, Ok(Detached { ready: Some(line), .. }) if line == "READY=1"));
        assert!(matches!(
            told(|reporter| reporter.failed("no".into(), 127)),
            Err(DetachError::Failed { message, status: 127 }) if message == "no"
        ));
        assert!(matches!(told(drop), Err(DetachError::Silent(_))));
    }
}
