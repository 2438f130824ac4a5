// SPDX-License-Identifier: Apache-2.0
//! The one place that waits for children: pid 1 gets the orphans of the whole guest as well, and whoever waits for any
//! child would steal the status that somebody else waits for.

use std::collections::HashMap;
use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use rustix::io::Errno;
use rustix::process::{WaitOptions, WaitStatus};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::oneshot;

use crate::trace;

/// How a process ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ExitStatus {
    /// 0 to 255: the exit code, or 128 + n if signal n ended the process.
    pub code: u8,
    /// When it was seen, on CLOCK_MONOTONIC.
    pub at: Duration,
}

/// Waits for all children of this process and hands out their statuses.
#[derive(Debug, Default)]
pub struct Reaper {
    waiting: Mutex<HashMap<i32, oneshot::Sender<ExitStatus>>>,
}

impl Reaper {
    /// Starts waiting for children, in the current tokio runtime, which must have one thread.
    pub fn start() -> io::Result<Arc<Self>> {
        let reaper = Arc::new(Self::default());
        let mut signals = signal(SignalKind::child())?;
        let task = Arc::clone(&reaper);
        tokio::spawn(async move {
            while signals.recv().await.is_some() {
                task.reap();
            }
        });
        Ok(reaper)
    }

    fn waiting(&self) -> MutexGuard<'_, HashMap<i32, oneshot::Sender<ExitStatus>>> {
        // No code panics while it holds the lock, and each change leaves the map whole.
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Asks for the status of a child. To be called in the same step of the runtime as the child's making, so that it
    /// cannot have been reaped.
    pub(crate) fn expect(&self, pid: i32) -> oneshot::Receiver<ExitStatus> {
        let (sender, receiver) = oneshot::channel();
        self.waiting().insert(pid, sender);
        receiver
    }

    /// Takes every child that has ended. Those that nobody asked for are orphans.
    fn reap(&self) {
        loop {
            match rustix::process::wait(WaitOptions::NOHANG) {
                Ok(Some((pid, status))) => {
                    if let Some(sender) = self.waiting().remove(&pid.as_raw_nonzero().get()) {
                        // Whoever asked may have lost interest.
                        let _ = sender.send(ExitStatus { code: exit_code(status), at: trace::now() });
                    }
                }
                Err(Errno::INTR) => {}
                Ok(None) | Err(_) => return,
            }
        }
    }
}

fn exit_code(status: WaitStatus) -> u8 {
    let code = status.exit_status().or_else(|| status.terminating_signal().map(|signal| 128 + signal));
    // Both are below 256, and a child that was waited for has one of them.
    code.and_then(|code| u8::try_from(code).ok()).unwrap_or(u8::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::Command;

    // One test: the reaper takes all children of the test process.
    #[tokio::test(flavor = "current_thread")]
    async fn statuses_of_several_children_reach_those_who_wait() {
        let reaper = Reaper::start().unwrap();
        let cases = [("exit 0", 0), ("exit 7", 7), ("kill -9 $$", 137), ("kill -15 $$", 143)];

        // Nobody waits for this one, as for the orphans that pid 1 gets.
        #[expect(clippy::zombie_processes, reason = "the reaper waits for it")]
        let _orphan = Command::new("/bin/true").spawn().unwrap();
        let mut waiting = Vec::new();
        for (script, expected) in cases {
            #[expect(clippy::zombie_processes, reason = "the reaper waits for it")]
            let child = Command::new("/bin/sh").args(["-c", script]).spawn().unwrap();
            waiting.push((script, reaper.expect(i32::try_from(child.id()).unwrap()), expected));
        }

        for (script, status, expected) in waiting {
            assert_eq!(status.await.unwrap().code, expected, "{script}");
        }
        let no_child_left = || matches!(rustix::process::wait(WaitOptions::NOHANG), Err(Errno::CHILD));
        for _ in 0..100 {
            if no_child_left() {
                return;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        panic!("the orphan is left");
    }
}
