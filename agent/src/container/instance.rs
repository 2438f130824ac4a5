// SPDX-License-Identifier: Apache-2.0
//! One container, from its making to its end.
//!
//! ```text
//! created ──start──> running ──exit──> stopped
//!    └─────────────exit──────────────────┘
//! ```

use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Duration;

use tokio::sync::{oneshot, watch};
use tokio::task::{AbortHandle, JoinHandle};

use super::cgroup::Cgroup;
use super::channel::AgentEnd;
use crate::process::stdio::AgentStdio;
use crate::process::{ExitStatus, FdStream};
use crate::storage::SharedTree;

/// How a container's first process ended.
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
    /// Whether the kernel's OOM killer struck in the container's cgroup.
    pub oom_killed: bool,
}

/// A container that the engine knows.
#[derive(Debug)]
pub(crate) struct Instance {
    pub(crate) id: String,
    pub(crate) pid: i32,
    pub(crate) trees: Vec<SharedTree>,
    pub(crate) cgroup: Option<Arc<Cgroup>>,
    pub(crate) terminal: Option<Arc<FdStream>>,
    pub(crate) pumps: Arc<Pumps>,
    /// What starting needs; taken by the first start.
    pub(crate) waiting: Mutex<Option<Waiting>>,
    /// When the program was executed.
    pub(crate) started_at: Arc<OnceLock<Duration>>,
    /// Set once: when the process has ended and its output has been handed on.
    pub(crate) exit: watch::Receiver<Option<Exit>>,
    /// Set once: when the process has ended.
    pub(crate) ended: watch::Receiver<Option<ExitStatus>>,
}

/// What a container has until it is started.
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
}

impl Instance {
    /// Takes what starting needs; `None` if the container has been started.
    pub(crate) fn take_waiting(&self) -> Option<Waiting> {
        // Nothing panics while the lock is held.
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner).take()
    }

    /// Whether the first process has ended.
    pub(crate) fn has_ended(&self) -> bool {
        self.ended.borrow().is_some()
    }

    /// How it ended, once it has and its output has been handed on.
    pub(crate) async fn wait(&self) -> Exit {
        let mut exit = self.exit.clone();
        match exit.wait_for(Option::is_some).await.map(|exit| *exit) {
            Ok(Some(exit)) => exit,
            // The task that watches the process outlives the process, unless the runtime is going down with everything.
            _ => std::future::pending().await,
        }
    }
}

/// The tasks that move a process's bytes.
#[derive(Debug, Default)]
pub(crate) struct Pumps {
    tasks: Mutex<Tasks>,
}

#[derive(Debug, Default)]
struct Tasks {
    inputs: Vec<AbortHandle>,
    outputs: Vec<AbortHandle>,
    /// The outputs that nobody waits for yet.
    unfinished: Vec<JoinHandle<()>>,
}

impl Pumps {
    fn tasks(&self) -> MutexGuard<'_, Tasks> {
        // Nothing panics while the lock is held.
        self.tasks.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Runs a pump to the process: it ends with the process at the latest.
    pub(crate) fn spawn_input(&self, pump: impl Future<Output = ()> + Send + 'static) {
        self.tasks().inputs.push(tokio::spawn(pump).abort_handle());
    }

    /// Runs a pump from the process: it ends when everything has been handed on.
    pub(crate) fn spawn_output(&self, pump: impl Future<Output = ()> + Send + 'static) {
        let task = tokio::spawn(pump);
        let mut tasks = self.tasks();
        tasks.outputs.push(task.abort_handle());
        tasks.unfinished.push(task);
    }

    /// After the process's end: ends the pumps to it and waits for those from it.
    pub(crate) async fn finish(&self) {
        let unfinished = {
            let mut tasks = self.tasks();
            tasks.inputs.iter().for_each(AbortHandle::abort);
            std::mem::take(&mut tasks.unfinished)
        };
        for output in unfinished {
            // A pump that was aborted, because its container is being deleted, is done as well.
            let _ = output.await;
        }
    }

    /// Ends all pumps, whatever is still under way.
    pub(crate) fn abort(&self) {
        let tasks = self.tasks();
        tasks.inputs.iter().chain(&tasks.outputs).for_each(AbortHandle::abort);
    }
}
