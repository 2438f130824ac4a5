// SPDX-License-Identifier: Apache-2.0
//! A container, as containerd's calls see it: what happens to it is told to containerd before anybody else.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use containerd_shim_protos::api::{DeleteResponse, StateResponse};
use containerd_shim_protos::events::task::{TaskExit, TaskOOM, TaskPaused, TaskResumed, TaskStart};
use tokio::sync::watch;
use tokio::time::sleep;

use super::events::Publisher;
use super::exec::ExecProcess;
use super::rootfs::Rootfs;
use super::stdio::Stdio;
use crate::supervisor::agent::AgentError;
use crate::supervisor::container::{CallError, Container, Ended, SIGKILL};
use crate::supervisor::state::Status;
use crate::supervisor::streams::InputCloser;
use crate::supervisor::task_service::{container_state, timestamp};

/// Between two events of memory that ran out: a guest that tells of many must not crowd out the others.
const OOM_PAUSE: Duration = Duration::from_secs(1);

/// The topics of events.
pub(super) mod topics {
    pub(in crate::shim) use containerd_shim_protos::topics::{
        TASK_CREATE_EVENT_TOPIC as CREATE, TASK_DELETE_EVENT_TOPIC as DELETE,
        TASK_EXEC_ADDED_EVENT_TOPIC as EXEC_ADDED, TASK_EXEC_STARTED_EVENT_TOPIC as EXEC_STARTED,
        TASK_EXIT_EVENT_TOPIC as EXIT, TASK_OOM_EVENT_TOPIC as OOM, TASK_PAUSED_EVENT_TOPIC as PAUSED,
        TASK_RESUMED_EVENT_TOPIC as RESUMED, TASK_START_EVENT_TOPIC as START,
    };
}

/// The container.
#[derive(Debug)]
pub(super) struct Task {
    pub(super) container: Arc<Container>,
    stdio: Stdio,
    stdin: Mutex<Option<InputCloser>>,
    rootfs: Mutex<Option<Rootfs>>,
    execs: Mutex<HashMap<String, Arc<ExecProcess>>>,
    /// Of how many times that memory ran out containerd has been told; of no more from the end on.
    oom_told: Mutex<Option<u64>>,
    /// Held by a start until containerd has been told, and by the end.
    starting: tokio::sync::Mutex<()>,
    /// Its end, once containerd has been told.
    ended: watch::Sender<Option<Ended>>,
    /// Whether its sandbox is gone from the host.
    gone: watch::Receiver<bool>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // Nothing panics while one of these is held.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Task {
    /// A container that has been created. `gone` tells when its sandbox is.
    pub(super) fn new(
        container: Arc<Container>,
        stdio: Stdio,
        stdin: Option<InputCloser>,
        rootfs: Rootfs,
        gone: watch::Receiver<bool>,
    ) -> Self {
        Self {
            container,
            stdio,
            stdin: Mutex::new(stdin),
            rootfs: Mutex::new(Some(rootfs)),
            execs: Mutex::default(),
            oom_told: Mutex::new(Some(0)),
            starting: tokio::sync::Mutex::default(),
            ended: watch::Sender::new(None),
            gone,
        }
    }

    /// Tells containerd of its end, and of each time that memory ran out before.
    pub(super) fn follow(self: &Arc<Self>, events: &Arc<Publisher>) {
        let (this, publisher) = (Arc::clone(self), Arc::clone(events));
        tokio::spawn(async move {
            let Ok(ended) = this.container.wait().await else {
                return;
            };
            let _not_starting = this.starting.lock().await;
            this.close_stdin();
            // Memory may have run out while the other task paused; and who hears of the end is to know of it.
            this.tell_oom(&publisher, this.container.oom_kills());
            lock(&this.oom_told).take();
            let event = TaskExit {
                container_id: this.container.id().to_owned(),
                id: this.container.id().to_owned(),
                pid: this.container.record().pid,
                exit_status: u32::from(ended.status),
                exited_at: timestamp(&ended),
                ..TaskExit::default()
            };
            publisher.publish(topics::EXIT, &event);
            this.ended.send_replace(Some(ended));
        });
        let (this, publisher) = (Arc::clone(self), Arc::clone(events));
        tokio::spawn(async move {
            let mut seen = 0;
            while let Ok(kills) = this.container.agent.wait_oom(seen).await {
                this.tell_oom(&publisher, kills.count);
                // The guest's word: a count that does not grow would be asked for again and again.
                if kills.ended || kills.count <= seen {
                    return;
                }
                seen = kills.count;
                sleep(OOM_PAUSE).await;
            }
        });
    }

    /// Tells containerd that memory ran out, unless it has been told of so many times.
    fn tell_oom(&self, events: &Publisher, kills: u64) {
        // Held until it is published, so that the end comes after it.
        let mut told = lock(&self.oom_told);
        if told.is_some_and(|told| kills > told) {
            *told = Some(kills);
            let container_id = self.container.id().to_owned();
            events.publish(topics::OOM, &TaskOOM { container_id, ..TaskOOM::default() });
        }
    }

    /// Lets init execute its program; its pid.
    pub(super) async fn start(&self, events: &Publisher) -> Result<u32, CallError> {
        let _starting = self.starting.lock().await;
        self.container.start().await?;
        let (container_id, pid) = (self.container.id().to_owned(), self.container.record().pid);
        events.publish(topics::START, &TaskStart { container_id, pid, ..TaskStart::default() });
        Ok(pid)
    }

    pub(super) async fn pause(&self, events: &Publisher) -> Result<(), CallError> {
        self.container.pause().await?;
        let container_id = self.container.id().to_owned();
        events.publish(topics::PAUSED, &TaskPaused { container_id, ..TaskPaused::default() });
        Ok(())
    }

    pub(super) async fn resume(&self, events: &Publisher) -> Result<(), CallError> {
        self.container.resume().await?;
        let container_id = self.container.id().to_owned();
        events.publish(topics::RESUMED, &TaskResumed { container_id, ..TaskResumed::default() });
        Ok(())
    }

    /// Sends a signal. Of what has ended, containerd wants to hear that it is not there.
    pub(super) async fn kill(&self, exec_id: &str, signal: u32, all: bool) -> Result<(), CallError> {
        if exec_id.is_empty() {
            let sent = self.container.kill(signal, all).await;
            return match sent {
                Err(_) if self.container.status() == Status::Stopped => Err(CallError::Finished),
                Err(CallError::NotRunning) => Err(CallError::Finished),
                Err(CallError::Agent(AgentError::Lost)) => Err(CallError::Finished),
                sent => sent,
            };
        }
        self.exec(exec_id)?;
        let not_started = || CallError::NotStarted(exec_id.to_owned());
        // One whose start has failed is not the container's any more.
        let exec = self.container.execs.get(exec_id).map_err(|_| not_started())?;
        if exec.ended().is_some() {
            return Err(CallError::Finished);
        }
        exec.pid().ok_or_else(not_started)?;
        match self.container.agent.signal(exec_id, signal, all).await {
            Err(_) if exec.ended().is_some() => Err(CallError::Finished),
            sent => Ok(sent?),
        }
    }

    /// Waits for its end.
    pub(super) async fn wait(&self) -> Result<Ended, CallError> {
        let mut ended = self.ended.subscribe();
        let seen = ended.wait_for(Option::is_some).await.ok().and_then(|ended| ended.clone());
        // The sender is this very task's: it lives.
        seen.ok_or(CallError::NotRunning)
    }

    /// Removes it, if it has ended or was never started: returns when nothing of it is left on the host.
    pub(super) async fn delete(&self) -> Result<DeleteResponse, CallError> {
        match self.container.status() {
            Status::Running | Status::Paused => {
                return Err(CallError::DeleteRunning(self.container.id().to_owned()));
            }
            Status::Stopped => {}
            // A start that has failed ends by itself.
            Status::Creating | Status::Created => drop(self.container.kill(SIGKILL, true).await),
        }
        let ended = self.wait().await?;
        // Its sender lives as long as the server.
        let _ = self.gone.clone().wait_for(|gone| *gone).await;
        let rootfs = lock(&self.rootfs).take();
        if let Some(rootfs) = rootfs {
            rootfs.unmount_apart().await;
        }
        let (pid, exit_status) = (self.container.record().pid, u32::from(ended.status));
        Ok(DeleteResponse { pid, exit_status, exited_at: timestamp(&ended), ..DeleteResponse::default() })
    }

    /// What containerd is told of it, with the streams by the names that it gave them.
    pub(super) fn state(&self) -> StateResponse {
        let mut state = container_state(&self.container);
        self.stdio.name(&mut state);
        state
    }

    /// Ends its stdin.
    pub(super) fn close_stdin(&self) {
        lock(&self.stdin).take();
    }

    /// Remembers a further process.
    pub(super) fn add(&self, exec_id: &str, exec: ExecProcess) {
        lock(&self.execs).insert(exec_id.to_owned(), Arc::new(exec));
    }

    /// Looks a further process up.
    pub(super) fn exec(&self, exec_id: &str) -> Result<Arc<ExecProcess>, CallError> {
        lock(&self.execs).get(exec_id).cloned().ok_or_else(|| CallError::NoSuchProcess(exec_id.to_owned()))
    }

    /// Forgets a further process.
    pub(super) fn forget(&self, exec_id: &str) {
        lock(&self.execs).remove(exec_id);
    }
}
