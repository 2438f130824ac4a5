// SPDX-License-Identifier: Apache-2.0
//! Calls to the supervisor of a container, from another process.

use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::time::Duration;

use bulkhead_protocol::agent::{WaitReadyRequest, WaitReadyResponse};
use bulkhead_protocol::agent_ttrpc::AgentClient;
use bulkhead_protocol::notification::is_ready_line;
use containerd_shim_protos::api::StartRequest;
use containerd_shim_protos::shim_async::TaskClient;
use thiserror::Error;
use tokio::runtime::Runtime;
use tokio::time::timeout;
use ttrpc::asynchronous::Client;
use ttrpc::asynchronous::transport::Socket;
use ttrpc::context::Context;

use super::container::CallError;
use super::state::{Found, LookupError, Record, Status};
use crate::notify::{NotifyError, NotifySocket};
use crate::{event_loop, pidfd, text};

/// How long a supervisor may take to end after its container.
const LAST_STEPS: Duration = Duration::from_secs(10);

/// A call that could not be made, or was refused.
#[derive(Debug, Error)]
pub(crate) enum ClientError {
    #[error(transparent)]
    Lookup(#[from] LookupError),
    /// Known without asking the supervisor.
    #[error(transparent)]
    State(#[from] CallError),
    #[error("cannot set up the event loop")]
    EventLoop(#[source] io::Error),
    #[error("cannot reach the container's supervisor")]
    Connect(#[source] io::Error),
    /// In the supervisor's words.
    #[error("{0}")]
    Refused(String),
    #[error("the container's supervisor ended before it answered")]
    Lost,
    #[error(transparent)]
    Notify(#[from] NotifyError),
    #[error("the container's supervisor gave an answer that cannot be understood")]
    Answer,
}

impl From<ttrpc::Error> for ClientError {
    fn from(error: ttrpc::Error) -> Self {
        match error {
            ttrpc::Error::RpcStatus(status) => Self::Refused(text::one_line(status.message())),
            _ => Self::Lost,
        }
    }
}

/// An event loop for a command.
pub(crate) fn event_loop() -> Result<Runtime, ClientError> {
    event_loop::new().map_err(ClientError::EventLoop)
}

/// A supervisor's process, to be waited for; `None` of a pod's, which does not end with a container.
pub(crate) fn process(found: &Found) -> Option<OwnedFd> {
    let record = found.record();
    // The descriptor is taken first: as long as the supervisor's own lock is held, the id is its.
    let process = pidfd::open(record.pid).ok().filter(|_| record.sandbox.is_none())?;
    found.is_alive().then_some(process)
}

/// Returns when a container's supervisor has ended, if the container has: whoever is told of the one finds the other.
pub(crate) fn see_end(found: &Found, supervisor: OwnedFd) {
    if !matches!(found.status_now(), Ok(Status::Stopped) | Err(LookupError::NotFound(_))) {
        return;
    }
    if let Ok(runtime) = event_loop() {
        let _ = runtime.block_on(async { timeout(LAST_STEPS, pidfd::ended(supervisor)).await });
    }
}

/// Connects to the supervisor; within an event loop.
fn connect(found: &Found) -> Result<Client, ClientError> {
    let stream = UnixStream::connect(found.task_path()).map_err(ClientError::Connect)?;
    stream.set_nonblocking(true).map_err(ClientError::Connect)?;
    let stream = tokio::net::UnixStream::from_std(stream).map_err(ClientError::Connect)?;
    Ok(Client::new(Socket::new(stream)))
}

/// The error of a call, to a container that is still being created, that has `ended` as its error to one that has ended: until
/// there is a machine, nobody takes calls.
fn while_creating(ended: CallError) -> CallError {
    match ended {
        CallError::StartStopped => CallError::StartWhileCreating,
        CallError::ExecStopped => CallError::ExecWhileCreating,
        CallError::NotRunning => CallError::Creating,
        other => other,
    }
}

/// Makes one call to the supervisor of a container that has not ended; `ended` is the error if it has.
pub(crate) fn call<T>(
    found: &Found,
    ended: CallError,
    work: impl AsyncFnOnce(&TaskClient, String) -> ttrpc::Result<T>,
) -> Result<T, ClientError> {
    let ended = expect_alive(found, ended)?;
    event_loop()?.block_on(async {
        let client = connect_unless_ended(found, ended)?;
        Ok(work(&client, found.record().id.clone()).await?)
    })
}

/// Fails unless there is an init; returns the error of a container that has ended.
fn expect_alive(found: &Found, ended: CallError) -> Result<CallError, ClientError> {
    match found.status() {
        Status::Stopped => Err(ended.into()),
        Status::Creating => Err(while_creating(ended).into()),
        Status::Created | Status::Running | Status::Paused => Ok(ended),
    }
}

/// Starts a container that has not ended, and tells `socket` when it is ready. Returns once that is told, or the container has ended
/// without.
pub(crate) fn start_and_tell(found: &Found, socket: &NotifySocket) -> Result<(), ClientError> {
    let ended = expect_alive(found, CallError::StartStopped)?;
    event_loop()?.block_on(async {
        let (task, agent) = connect_with_agent(found, ended)?;
        let Record { id, pid, .. } = found.record();
        let request = WaitReadyRequest { container_id: id.clone(), ..WaitReadyRequest::default() };
        // It is asked for before there is anything to be told, so that no end comes before the question.
        let ready = tokio::spawn(async move { agent.wait_ready(Context::default(), &request).await });
        tokio::task::yield_now().await;
        task.start(Context::default(), &StartRequest { id: id.clone(), ..StartRequest::default() }).await?;
        let manager = socket.connect()?;
        match ready.await {
            Ok(Ok(WaitReadyResponse { line, .. })) if is_ready_line(&line) => {
                Ok(manager.tell(&line, Some(*pid)).await?)
            }
            // It has ended, in one way or another.
            _ => Ok(()),
        }
    })
}

/// Connects to the supervisor of a container that may just have ended; `ended` is the error if it has.
pub(crate) fn connect_unless_ended(found: &Found, ended: CallError) -> Result<TaskClient, ClientError> {
    Ok(TaskClient::new(connect_or_tell(found, ended)?))
}

/// The same, and by the agent's own protocol for what the Task API has no call for.
pub(crate) fn connect_with_agent(found: &Found, ended: CallError) -> Result<(TaskClient, AgentClient), ClientError> {
    let client = connect_or_tell(found, ended)?;
    Ok((TaskClient::new(client.clone()), AgentClient::new(client)))
}

fn connect_or_tell(found: &Found, ended: CallError) -> Result<Client, ClientError> {
    match (connect(found), found.status()) {
        (Err(ClientError::Connect(_)), Status::Stopped) => Err(ended.into()),
        (Err(ClientError::Connect(_)), Status::Creating) => Err(while_creating(ended).into()),
        (result, _) => result,
    }
}
