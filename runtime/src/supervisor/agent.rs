// SPDX-License-Identifier: Apache-2.0
//! The calls to the guest's agent. The guest is not trusted: its texts are cleaned, its answers bounded by ttrpc (4 MiB),
//! its silence by a deadline where silence would hold something up.

use std::io;
use std::os::unix::net::UnixStream;
use std::time::Duration;

use bulkhead_protocol::agent::{
    CreateContainerRequest, CreateContainerResponse, DeleteContainerRequest, GetInfoRequest, GetInfoResponse,
    ResizeTerminalRequest, SignalProcessRequest, WaitProcessRequest, WaitProcessResponse,
};
use bulkhead_protocol::agent_ttrpc::AgentClient;
use bulkhead_protocol::{ERROR_PROGRAM_NOT_EXECUTABLE, ERROR_PROGRAM_NOT_FOUND};
use nix::sys::signal::Signal;
use thiserror::Error;
use tokio::time::timeout;
use ttrpc::asynchronous::Client;
use ttrpc::asynchronous::transport::Socket;
use ttrpc::context::Context;

use super::terminal::Size;
use crate::text;

/// How long a signal or a new terminal size may take to arrive.
const SIGNAL_TIMEOUT: Duration = Duration::from_secs(10);

/// How long a guest may take to write its dirty pages back: all of its memory, to a slow disk.
const DELETE_TIMEOUT: Duration = Duration::from_secs(120);

/// A call that did not succeed.
#[derive(Debug, Error)]
pub(crate) enum AgentError {
    /// The agent says no.
    #[error("{message}")]
    Refused {
        /// The agent's words, one clean line.
        message: String,
        /// What they are about.
        kind: Refusal,
    },
    /// The agent does not answer.
    #[error("the guest's agent does not answer")]
    Timeout,
    /// The connection is gone, most likely with the machine.
    #[error("the connection to the guest's agent was lost")]
    Lost,
}

/// What an agent's refusal is about, as far as exit statuses tell.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Refusal {
    /// The program does not exist.
    ProgramNotFound,
    /// The program cannot be executed.
    ProgramNotExecutable,
    /// Anything else.
    Other,
}

impl From<ttrpc::Error> for AgentError {
    fn from(error: ttrpc::Error) -> Self {
        let ttrpc::Error::RpcStatus(status) = error else {
            return Self::Lost;
        };
        let code = status.code();
        let kind = if code == ERROR_PROGRAM_NOT_FOUND {
            Refusal::ProgramNotFound
        } else if code == ERROR_PROGRAM_NOT_EXECUTABLE {
            Refusal::ProgramNotExecutable
        } else {
            Refusal::Other
        };
        Self::Refused { message: text::one_line(status.message()), kind }
    }
}

/// The agent of a sandbox, seen from a container's supervisor.
#[derive(Clone)]
pub(crate) struct Agent {
    client: AgentClient,
    container_id: String,
}

impl Agent {
    /// Takes the socket that becomes the connection to the agent once it is up; calls made before wait for that.
    pub(crate) fn new(socket: UnixStream, container_id: String) -> io::Result<Self> {
        socket.set_nonblocking(true)?;
        let client = Client::new(Socket::new(tokio::net::UnixStream::from_std(socket)?));
        Ok(Self { client: AgentClient::new(client), container_id })
    }

    pub(crate) async fn get_info(&self) -> Result<GetInfoResponse, AgentError> {
        Ok(self.client.get_info(Context::default(), &GetInfoRequest::default()).await?)
    }

    pub(crate) async fn create(&self, request: &CreateContainerRequest) -> Result<CreateContainerResponse, AgentError> {
        Ok(self.client.create_container(Context::default(), request).await?)
    }

    /// Returns when init has ended, however long that takes.
    pub(crate) async fn wait(&self) -> Result<WaitProcessResponse, AgentError> {
        let request = WaitProcessRequest { container_id: self.container_id.clone(), ..WaitProcessRequest::default() };
        Ok(self.client.wait_process(Context::default(), &request).await?)
    }

    pub(crate) async fn signal(&self, signal: Signal) -> Result<(), AgentError> {
        let request = SignalProcessRequest {
            container_id: self.container_id.clone(),
            signal: (signal as i32).unsigned_abs(),
            ..SignalProcessRequest::default()
        };
        within(SIGNAL_TIMEOUT, self.client.signal_process(Context::default(), &request)).await
    }

    pub(crate) async fn resize(&self, size: Size) -> Result<(), AgentError> {
        let request = ResizeTerminalRequest {
            container_id: self.container_id.clone(),
            rows: size.rows,
            columns: size.columns,
            ..ResizeTerminalRequest::default()
        };
        within(SIGNAL_TIMEOUT, self.client.resize_terminal(Context::default(), &request)).await
    }

    /// Returns when all that the container wrote has reached the host.
    pub(crate) async fn delete(&self) -> Result<(), AgentError> {
        let request =
            DeleteContainerRequest { container_id: self.container_id.clone(), ..DeleteContainerRequest::default() };
        within(DELETE_TIMEOUT, self.client.delete_container(Context::default(), &request)).await
    }
}

/// A call whose answer is not waited for beyond `limit`.
async fn within<T>(limit: Duration, call: impl Future<Output = ttrpc::Result<T>>) -> Result<(), AgentError> {
    timeout(limit, call).await.map_err(|_| AgentError::Timeout)??;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn refusals_are_cleaned_and_told_apart() {
        let error = |code, message: &str| AgentError::from(ttrpc::Error::RpcStatus(ttrpc::get_status(code, message)));

        assert!(matches!(
            error(ERROR_PROGRAM_NOT_FOUND, "no\x1b program\n"),
            AgentError::Refused { kind: Refusal::ProgramNotFound, message } if message == "no\u{fffd} program"
        ));
        assert!(matches!(
            error(ERROR_PROGRAM_NOT_EXECUTABLE, ""),
            AgentError::Refused { kind: Refusal::ProgramNotExecutable, .. }
        ));
        assert!(matches!(error(ttrpc::Code::INTERNAL, ""), AgentError::Refused { kind: Refusal::Other, .. }));
        assert!(matches!(AgentError::from(ttrpc::Error::LocalClosed), AgentError::Lost));
    }
}
