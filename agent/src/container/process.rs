// SPDX-License-Identifier: Apache-2.0
//! One process of a container that the host knows by name: its init, or one that was exec'd.

use std::os::fd::AsFd;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::Duration;

use tokio::sync::{oneshot, watch};

use super::cgroup::Cgroup;
use super::channel::AgentEnd;
use super::error::{ResizeError, SignalError};
use super::spec::TerminalSize;
use crate::process::stdio::AgentStdio;
use crate::process::{ExitStatus, FdStream, Pumps, Reaper, terminal};
use crate::sys::{self, Child};
use crate::trace::now;

/// How a process ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Exit {
    /// 0 to 255: the exit code, or 128 + n if signal n ended the process.
    pub code: u8,
    /// When the program was executed, on CLOCK_MONOTONIC; `None` if it never was.
    pub started_at: Option<Duration>,
    /// When its end was seen, on CLOCK_MONOTONIC.
    pub at: Duration,
    /// When its last output had been handed on, on CLOCK_MONOTONIC.
    pub drained_at: Duration,
    /// How often the kernel's OOM killer had struck in the container's cgroup by then.
    pub oom_kills: u64,
}

/// A process of a container.
#[derive(Debug)]
pub(crate) struct Process {
    child: Child,
    pumps: Arc<Pumps>,
    /// Set once: the agent's end of its terminal, if it has one.
    pub(crate) terminal: OnceLock<Arc<FdStream>>,
    /// What starting needs; taken by the first start.
    waiting: Mutex<Option<Waiting>>,
    /// When the program was executed.
    started_at: Arc<OnceLock<Duration>>,
    /// Set once: when the process has ended and its output has been handed on.
    exit: watch::Receiver<Option<Exit>>,
    /// Set once: when the process has ended.
    ended: watch::Receiver<Option<ExitStatus>>,
}

/// What a process has until it is started.
#[derive(Debug)]
pub(crate) struct Waiting {
    pub(crate) channel: AgentEnd,
    pub(crate) stdio: AgentStdio,
    pub(crate) streams: ExpectedStreams,
}

/// The host's streams that the process was given by name, on their way.
#[derive(Debug)]
pub(crate) struct ExpectedStreams {
    pub(crate) stdin: Option<(u32, oneshot::Receiver<FdStream>)>,
    pub(crate) stdout: Option<(u32, oneshot::Receiver<FdStream>)>,
    pub(crate) stderr: Option<(u32, oneshot::Receiver<FdStream>)>,
    /// Of the descriptors from 3 on; `None` for one that needs none.
    pub(crate) preserved: Vec<Option<(u32, oneshot::Receiver<FdStream>)>>,
}

impl Process {
    /// Follows a child to its end.
    pub(crate) fn follow(child: Child, reaper: &Reaper, cgroup: Option<Arc<Cgroup>>) -> Self {
        let pumps = Arc::new(Pumps::default());
        let started_at = Arc::new(OnceLock::new());
        let (ended_sender, ended) = watch::channel(None);
        let (exit_sender, exit) = watch::channel(None);
        let status = reaper.expect(child.pid);
        let (its_pumps, its_start) = (Arc::clone(&pumps), Arc::clone(&started_at));
        tokio::spawn(async move {
            let Ok(status) = status.await else { return };
            ended_sender.send_replace(Some(status));
            its_pumps.finish().await;
            exit_sender.send_replace(Some(Exit {
                code: status.code,
                started_at: its_start.get().copied(),
                at: status.at,
                drained_at: now(),
                oom_kills: cgroup.and_then(|cgroup| cgroup.oom_kills()).unwrap_or(0),
            }));
        });
        Self { child, pumps, terminal: OnceLock::new(), waiting: Mutex::default(), started_at, exit, ended }
    }

    /// Its pid as the agent sees it.
    pub(crate) fn pid(&self) -> i32 {
        self.child.pid
    }

    /// The process, by a descriptor that no other process can come to have.
    pub(crate) fn pidfd(&self) -> std::os::fd::BorrowedFd<'_> {
        self.child.pidfd.as_fd()
    }

    /// The tasks that move its bytes.
    pub(crate) fn pumps(&self) -> &Pumps {
        &self.pumps
    }

    /// Keeps what starting will need.
    pub(crate) fn set_waiting(&self, waiting: Waiting) {
        // Nothing panics while the lock is held.
        *self.waiting.lock().unwrap_or_else(PoisonError::into_inner) = Some(waiting);
    }

    /// Takes what starting needs; `None` if the process has been started.
    pub(crate) fn take_waiting(&self) -> Option<Waiting> {
        // Nothing panics while the lock is held.
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner).take()
    }

    /// Notes when the program was executed.
    pub(crate) fn set_started(&self, at: Duration) {
        // A process is started once: `waiting` has been taken.
        let _ = self.started_at.set(at);
    }

    /// Whether it has ended.
    pub(crate) fn has_ended(&self) -> bool {
        self.ended.borrow().is_some()
    }

    /// Waits until it has ended, whatever is still to be delivered of its output.
    pub(crate) async fn ended(&self) {
        if self.ended.clone().wait_for(Option::is_some).await.is_err() {
            // As in `wait`.
            std::future::pending::<()>().await;
        }
    }

    /// How it ended, once it has and all that it wrote has been handed on.
    pub(crate) async fn wait(&self) -> Exit {
        let mut exit = self.exit.clone();
        match exit.wait_for(Option::is_some).await.map(|exit| *exit) {
            Ok(Some(exit)) => exit,
            // The task that watches the process outlives the process, unless the runtime is going down with everything.
            _ => std::future::pending().await,
        }
    }

    /// Sends it a signal, 1 to 64.
    pub(crate) fn signal(&self, signal: i32) -> Result<(), SignalError> {
        if self.has_ended() {
            return Err(SignalError::Finished);
        }
        sys::pidfd_kill(self.pidfd(), signal).map_err(|source| match source.raw_os_error() {
            // Its end is known to the kernel already.
            Some(libc::ESRCH) => SignalError::Finished,
            _ => SignalError::Kill { signal, source },
        })
    }

    /// Sets the size of its terminal.
    pub(crate) fn resize(&self, size: TerminalSize) -> Result<(), ResizeError> {
        let controller = self.terminal.get().ok_or(ResizeError::NoTerminal)?;
        terminal::resize(controller.as_fd(), size).map_err(ResizeError::Resize)
    }
}
