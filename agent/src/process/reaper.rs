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
    table: Mutex<Table>,
}

#[derive(Debug, Default)]
struct Table {
    waiting: HashMap<i32, oneshot::Sender<ExitStatus>>,
    /// How many have asked that unclaimed statuses be kept.
    keepers: usize,
    unclaimed: HashMap<i32, ExitStatus>,
}

/// While it lives, the statuses of children that nobody has asked for are kept, and can be asked for later.
#[derive(Debug)]
pub(crate) struct KeepUnclaimed<'a>(&'a Reaper);

impl Drop for KeepUnclaimed<'_> {
    fn drop(&mut self) {
        let mut table = self.0.table();
        table.keepers -= 1;
        if table.keepers == 0 {
            table.unclaimed = HashMap::new();
        }
    }
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

    fn table(&self) -> MutexGuard<'_, Table> {
        // No code panics while it holds the lock, and each change leaves the maps whole.
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Asks for the status of a child. To be called in the same step of the runtime as the child's making, so that it
    /// cannot have been reaped, or under [`Self::keep_unclaimed`].
    pub(crate) fn expect(&self, pid: i32) -> oneshot::Receiver<ExitStatus> {
        let (sender, receiver) = oneshot::channel();
        let mut table = self.table();
        match table.unclaimed.remove(&pid) {
            // The receiver is in our hands.
            Some(status) => drop(sender.send(status)),
            None => drop(table.waiting.insert(pid, sender)),
        }
        receiver
    }

    /// For a child that another process makes: its pid is known here only after a while, and it may have ended by then.
    pub(crate) fn keep_unclaimed(&self) -> KeepUnclaimed<'_> {
        self.table().keepers += 1;
        KeepUnclaimed(self)
    }

    /// Takes every child that has ended. Those that nobody asks for are orphans.
    fn reap(&self) {
        loop {
            match rustix::process::wait(WaitOptions::NOHANG) {
                Ok(Some((pid, status))) => {
                    let status = ExitStatus { code: exit_code(status), at: trace::now() };
                    self.table().hand_out(pid.as_raw_nonzero().get(), status);
                }
                Err(Errno::INTR) => {}
                Ok(None) | Err(_) => return,
            }
        }
    }
}

impl Table {
    fn hand_out(&mut self, pid: i32, status: ExitStatus) {
        match self.waiting.remove(&pid) {
            // Whoever asked may have lost interest.
            Some(sender) => drop(sender.send(status)),
            None if self.keepers > 0 => {
                self.unclaimed.insert(pid, status);
            }
            None => {}
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

    #[tokio::test(flavor = "current_thread")]
    async fn unclaimed_statuses_are_kept_only_on_request() {
        let reaper = Reaper::default();
        let status = ExitStatus { code: 3, at: Duration::ZERO };
        reaper.table().hand_out(100, status);
        let keeper = reaper.keep_unclaimed();
        reaper.table().hand_out(101, status);
        reaper.table().hand_out(102, status);

        assert_eq!(reaper.expect(101).await, Ok(status));
        assert!(reaper.expect(100).try_recv().is_err());
        drop(keeper);
        assert!(reaper.table().unclaimed.is_empty());
    }

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
