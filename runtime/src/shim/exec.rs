// SPDX-License-Identifier: Apache-2.0
//! A further process of a container, as containerd's calls see it.

use std::sync::{Arc, Mutex, PoisonError};

use containerd_shim_protos::api::{ExecProcessRequest, StateResponse, Status};
use containerd_shim_protos::events::task::{TaskExecStarted, TaskExit};
use tokio::sync::watch;

use super::events::Publisher;
use super::logger::Source;
use super::stdio::{Stdio, StdioError};
use super::task::{Task, topics};
use crate::supervisor::container::{CallError, Container, Ended, SIGKILL};
use crate::supervisor::execs;
use crate::supervisor::streams::{self, Ends, GivenEnds, InputCloser, Outputs};
use crate::supervisor::task_service::{add_exec, exec_state, timestamp};
use crate::text;

/// The status of a process that could not be started: containerd's own for one that it does not know.
const NEVER_RAN: u8 = 255;

/// The process.
#[derive(Debug)]
pub(super) struct ExecProcess {
    id: String,
    stdio: Stdio,
    /// Until the process is started.
    ends: Mutex<Option<GivenEnds>>,
    stdin: Mutex<Option<InputCloser>>,
    /// Its end, once containerd has been told, or that it could not be started.
    ended: watch::Sender<Option<Ended>>,
}

impl ExecProcess {
    /// Describes a process to the container, with the streams that the request names.
    pub(super) async fn add(
        container: &Container,
        namespace: &str,
        request: &ExecProcessRequest,
    ) -> Result<Self, CallError> {
        container.require_exec()?;
        let stdio = Stdio {
            stdin: request.stdin.clone(),
            stdout: request.stdout.clone(),
            stderr: request.stderr.clone(),
            terminal: request.terminal,
        };
        let unusable = |error: StdioError| CallError::BadRequest(text::chain(&error));
        // First of all the id is taken: for one that is there already, nothing is opened, and no program started.
        add_exec(container, request, stdio.wanted().map_err(unusable)?)?;
        let source = Source { namespace, id: &request.exec_id };
        let opened = stdio.open(source).await;
        let (ends, stdin) = opened.map_err(unusable).inspect_err(|_| container.execs.remove(&request.exec_id))?;
        Ok(Self {
            id: request.exec_id.clone(),
            stdio,
            ends: Mutex::new(Some(ends)),
            stdin: Mutex::new(stdin),
            ended: watch::Sender::new(None),
        })
    }

    /// Starts it; its pid in the guest.
    pub(super) async fn start(self: &Arc<Self>, task: &Arc<Task>, events: &Arc<Publisher>) -> Result<u32, CallError> {
        let container = &task.container;
        container.require_exec()?;
        let exec = container.execs.get(&self.id)?;
        let ends = self.ends.lock().unwrap_or_else(PoisonError::into_inner).take();
        let ends = ends.ok_or_else(|| CallError::ProcessExists(self.id.clone()))?;
        let path = container.vsock_path();
        exec.attend();
        // Both to their ends: a process that has been started is not left without anybody who knows. The streams of one that
        // could not be started may never come.
        let (starting, opening) = (execs::start(container, &self.id), streams::open(&path, exec.streams));
        tokio::pin!(starting, opening);
        let mut opened = None;
        let pid = loop {
            tokio::select! {
                started = &mut starting => match started {
                    Ok(pid) => break pid,
                    Err(error) => {
                        self.close_stdin();
                        self.ended.send_replace(Some(Ended::now(NEVER_RAN)));
                        return Err(error);
                    }
                },
                result = &mut opening, if opened.is_none() => opened = Some(result),
            }
        };
        let opened = match opened {
            Some(opened) => opened,
            None => opening.await,
        };
        let event = TaskExecStarted {
            container_id: container.id().to_owned(),
            exec_id: self.id.clone(),
            pid,
            ..TaskExecStarted::default()
        };
        events.publish(topics::EXEC_STARTED, &event);
        let (this, task, events) = (Arc::clone(self), Arc::clone(task), Arc::clone(events));
        let opened = opened.and_then(|opened| opened.pump(Ends::Given(ends)));
        let failure = opened.as_ref().err().map(|error| CallError::Create(text::chain(error)));
        let unserved = failure.is_some();
        tokio::spawn(async move {
            if unserved {
                // Where it runs, nobody has its streams; its end is told all the same.
                let _ = task.container.agent.signal(&this.id, SIGKILL, false).await;
            }
            let streams = opened.as_ref().map(Outputs::streams).unwrap_or_default();
            let ended = tokio::select! {
                ended = exec.wait() => ended,
                never = task.container.agent.at_end(&this.id, || streams.let_go()) => match never {},
            };
            if let Some(ended) = ended {
                this.end(&task.container, &events, pid, ended);
            }
            if let Ok(mut outputs) = opened {
                outputs.drained().await;
            }
            task.container.execs.unattend(&exec);
        });
        failure.map_or(Ok(pid), Err)
    }

    /// Tells containerd, and then those who wait.
    fn end(&self, container: &Container, events: &Publisher, pid: u32, ended: Ended) {
        self.close_stdin();
        let event = TaskExit {
            container_id: container.id().to_owned(),
            id: self.id.clone(),
            pid,
            exit_status: u32::from(ended.status),
            exited_at: timestamp(&ended),
            ..TaskExit::default()
        };
        events.publish(topics::EXIT, &event);
        self.ended.send_replace(Some(ended));
    }

    /// How it has ended, once containerd has been told.
    pub(super) fn ended(&self) -> Option<Ended> {
        self.ended.borrow().clone()
    }

    /// Waits for its end, or, if it is never started, for the container's.
    pub(super) async fn wait(&self, task: &Task) -> Result<Ended, CallError> {
        let mut ended = self.ended.subscribe();
        let own = async { ended.wait_for(Option::is_some).await.ok().and_then(|ended| ended.clone()) };
        tokio::select! {
            biased;
            ended = own => ended.ok_or_else(|| CallError::NoSuchProcess(self.id.clone())),
            ended = task.wait() => ended,
        }
    }

    /// Forgets it, if it has ended or was never started.
    pub(super) async fn delete(&self, container: &Container) -> Result<Ended, CallError> {
        let exec = match container.execs.get(&self.id) {
            Ok(exec) => exec,
            // Its start has failed.
            Err(_) => return Ok(self.ended().unwrap_or_else(|| Ended::now(NEVER_RAN))),
        };
        if exec.pid().is_some() && self.ended().is_none() {
            return Err(CallError::DeleteRunning(self.id.clone()));
        }
        let ended = execs::delete(container, &self.id).await?;
        self.ended.send_if_modified(|told| told.is_none().then(|| *told = Some(ended.clone())).is_some());
        Ok(ended)
    }

    /// What containerd is told of it, with the streams by the names that it gave them.
    pub(super) fn state(&self, container: &Container) -> Result<StateResponse, CallError> {
        let mut state = match (exec_state(container, &self.id), self.ended()) {
            (Ok(state), _) => state,
            // Its start has failed: until it is deleted, containerd knows of it.
            (Err(_), Some(ended)) => StateResponse {
                id: container.id().to_owned(),
                exec_id: self.id.clone(),
                status: Status::STOPPED.into(),
                exit_status: ended.status.into(),
                exited_at: timestamp(&ended),
                ..StateResponse::default()
            },
            (Err(error), None) => return Err(error),
        };
        self.stdio.name(&mut state);
        Ok(state)
    }

    /// Ends its stdin.
    pub(super) fn close_stdin(&self) {
        self.stdin.lock().unwrap_or_else(PoisonError::into_inner).take();
    }
}
