// SPDX-License-Identifier: Apache-2.0
//! The calls to the guest's agent. The guest is not trusted: its texts are cleaned, its answers bounded by ttrpc (4 MiB),
//! its silence by a deadline where silence would hold something up.

use std::convert::Infallible;
use std::fmt;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use bulkhead_protocol::agent::{
    AddDiskRequest, AddMemoryRequest, Answer, CgroupSetting, ConfigureNetworkRequest, ConfigureSandboxRequest,
    ConnectPortRequest, CreateContainerRequest, CreateContainerResponse, DeleteContainerRequest, DeleteProcessRequest,
    DisksRequest, Empty, ExecProcessRequest, ExecProcessResponse, GetInfoRequest, GetInfoResponse, GetStatsRequest,
    GetStatsResponse, ListProcessesRequest, OnlineCpusRequest, PauseContainerRequest, Process, ProcessInfo, Question,
    ReadProcessesResponse, ResizeTerminalRequest, ResumeContainerRequest, SignalProcessRequest, StartContainerRequest,
    StartContainerResponse, UpdateContainerRequest, WaitConnectionRequest, WaitOomRequest, WaitOomResponse,
    WaitProcessRequest, WaitProcessResponse, WaitReadyRequest,
};
use bulkhead_protocol::agent_ttrpc::AgentClient;
use bulkhead_protocol::notification::is_ready_line;
use bulkhead_protocol::{ERROR_PROCESS_FINISHED, ERROR_PROGRAM_NOT_EXECUTABLE, ERROR_PROGRAM_NOT_FOUND};
use thiserror::Error;
use tokio::time::timeout;
use ttrpc::asynchronous::Client;
use ttrpc::asynchronous::transport::Socket;
use ttrpc::context::Context;

use super::terminal::Size;
use crate::storage::block_device::Number;
use crate::text;
use crate::trace::now_ns;

/// How long a call may take that has nothing to wait for.
const CALL_TIMEOUT: Duration = Duration::from_secs(10);

/// How long a guest may take for a change of its network, which it may first have to find devices for.
const NETWORK_TIMEOUT: Duration = Duration::from_secs(30);

/// How long a guest may take to have its kernel use more memory: 8,000 blocks for a terabyte.
const MEMORY_TIMEOUT: Duration = Duration::from_secs(120);

/// How long a guest may take to have its kernel use more processors, each of which starts.
const CPUS_TIMEOUT: Duration = Duration::from_secs(30);

/// How long a guest may take to write its dirty pages back, or to reclaim memory: all that it has, to a slow disk.
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

/// What an agent's refusal is about, as far as exit statuses and engines tell.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Refusal {
    /// The program does not exist.
    ProgramNotFound,
    /// The program cannot be executed.
    ProgramNotExecutable,
    /// The process that a signal was for has ended.
    Finished,
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
        } else if code == ERROR_PROCESS_FINISHED {
            Refusal::Finished
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
    /// What to add, modulo 2^64, to the guest's clock for the host's, as the guest has told it.
    clock_offset_ns: Arc<AtomicU64>,
}

impl Agent {
    /// Takes the socket that becomes the connection to the agent once it is up; calls made before wait for that.
    pub(crate) fn new(socket: UnixStream, container_id: String) -> io::Result<Self> {
        socket.set_nonblocking(true)?;
        let client = Client::new(Socket::new(tokio::net::UnixStream::from_std(socket)?));
        Ok(Self { client: AgentClient::new(client), container_id, clock_offset_ns: Arc::default() })
    }

    /// The same agent, seen from another container's supervisor.
    pub(super) fn for_container(&self, id: &str) -> Self {
        Self { container_id: id.to_owned(), ..self.clone() }
    }

    pub(super) async fn configure_sandbox(&self, request: &ConfigureSandboxRequest) -> Result<(), AgentError> {
        self.client.configure_sandbox(Context::default(), request).await?;
        Ok(())
    }

    pub(crate) async fn get_info(&self) -> Result<GetInfoResponse, AgentError> {
        let info = self.client.get_info(Context::default(), &GetInfoRequest::default()).await?;
        self.clock_offset_ns.store(now_ns().wrapping_sub(info.now_ns), Ordering::Relaxed);
        Ok(info)
    }

    pub(crate) async fn configure_network(&self, request: &ConfigureNetworkRequest) -> Result<(), AgentError> {
        self.client.configure_network(Context::default(), request).await?;
        Ok(())
    }

    /// The same while containers are there.
    pub(crate) async fn change_network(&self, request: &ConfigureNetworkRequest) -> Result<(), AgentError> {
        within(NETWORK_TIMEOUT, self.client.configure_network(Context::default(), request)).await?;
        Ok(())
    }

    /// Has the guest's kernel use memory that the machine was given.
    pub(super) async fn add_memory(&self, address: u64, length: u64) -> Result<(), AgentError> {
        let request = AddMemoryRequest { address, length, ..Default::default() };
        within(MEMORY_TIMEOUT, self.client.add_memory(Context::default(), &request)).await?;
        Ok(())
    }

    /// Has the guest's kernel use so many of the machine's processors.
    pub(super) async fn online_cpus(&self, count: u32) -> Result<(), AgentError> {
        let request = OnlineCpusRequest { count, ..Default::default() };
        within(CPUS_TIMEOUT, self.client.online_cpus(Context::default(), &request)).await?;
        Ok(())
    }

    /// The numbers that the guest's kernel has given to the machine's block devices with these serial numbers.
    pub(super) async fn find_disks(&self, serials: Vec<String>) -> Result<Vec<Number>, AgentError> {
        let count = serials.len();
        let request = DisksRequest { serials, ..Default::default() };
        let found = self.client.find_disks(Context::default(), &request).await?;
        if found.disks.len() != count {
            let message = format!("the guest's agent tells of {} block devices, not {count}", found.disks.len());
            return Err(AgentError::Refused { message, kind: Refusal::Other });
        }
        Ok(found.disks.iter().map(|disk| Number { major: disk.major, minor: disk.minor }).collect())
    }

    /// Has the guest's kernel look for the block device that the machine was given in that window, and know it by that serial number from
    /// then on; its number there.
    pub(super) async fn add_disk(&self, serial: &str, window: u32) -> Result<Number, AgentError> {
        let request = AddDiskRequest { serial: serial.to_owned(), window, ..Default::default() };
        let disk = self.client.add_disk(Context::default(), &request).await?;
        Ok(Number { major: disk.major, minor: disk.minor })
    }

    /// Has the guest let go of block devices that the machine is to lose.
    pub(super) async fn release_disks(&self, serials: Vec<String>) -> Result<(), AgentError> {
        let request = DisksRequest { serials, ..Default::default() };
        self.client.release_disks(Context::default(), &request).await?;
        Ok(())
    }

    /// Waits for the next question that the container asks the host's resolver.
    pub(super) async fn next_question(&self) -> Result<Question, AgentError> {
        Ok(self.client.wait_question(Context::default(), &Empty::default()).await?)
    }

    /// Brings its answer; an empty one is none.
    pub(super) async fn answer_question(&self, id: u64, message: Vec<u8>) -> Result<(), AgentError> {
        let answer = Answer { id, message, ..Default::default() };
        within(CALL_TIMEOUT, self.client.answer_question(Context::default(), &answer)).await?;
        Ok(())
    }

    /// Has a connection to a port of the guest joined with the stream of that number.
    pub(crate) async fn connect_port(&self, to: SocketAddr, stream: u32) -> Result<(), AgentError> {
        let address = match to.ip() {
            IpAddr::V4(address) => address.octets().to_vec(),
            IpAddr::V6(address) => address.octets().to_vec(),
        };
        let request = ConnectPortRequest { address, port: to.port().into(), stream, ..Default::default() };
        within(CALL_TIMEOUT, self.client.connect_port(Context::default(), &request)).await?;
        Ok(())
    }

    pub(crate) async fn create(&self, request: &CreateContainerRequest) -> Result<CreateContainerResponse, AgentError> {
        Ok(self.client.create_container(Context::default(), request).await?)
    }

    pub(crate) async fn start(&self) -> Result<StartContainerResponse, AgentError> {
        let request = StartContainerRequest { container_id: self.container_id.clone(), ..Default::default() };
        Ok(self.client.start_container(Context::default(), &request).await?)
    }

    /// Makes and starts a further process.
    pub(crate) async fn exec(&self, exec_id: &str, process: Process) -> Result<ExecProcessResponse, AgentError> {
        let request = ExecProcessRequest {
            container_id: self.container_id.clone(),
            exec_id: exec_id.to_owned(),
            process: Some(process).into(),
            ..Default::default()
        };
        Ok(self.client.exec_process(Context::default(), &request).await?)
    }

    /// Waits for the end of a process; `exec_id` is empty for init, here and below.
    pub(crate) async fn wait(&self, exec_id: &str) -> Result<WaitProcessResponse, AgentError> {
        let request = WaitProcessRequest {
            container_id: self.container_id.clone(),
            exec_id: exec_id.to_owned(),
            ..Default::default()
        };
        Ok(self.client.wait_process(Context::default(), &request).await?)
    }

    /// Calls `then` once a process has ended, whatever is still on its way of its output; never returns.
    pub(crate) async fn at_end(&self, exec_id: &str, then: impl FnOnce()) -> Infallible {
        let request = WaitProcessRequest {
            container_id: self.container_id.clone(),
            exec_id: exec_id.to_owned(),
            ..Default::default()
        };
        // Of a connection that is lost, whoever waits for the process hears too.
        if self.client.wait_end(Context::default(), &request).await.is_ok() {
            then();
        }
        std::future::pending().await
    }

    /// When, on the host's `CLOCK_MONOTONIC`, it was that time by the guest's.
    pub(super) fn on_host_clock(&self, guest_ns: u64) -> u64 {
        guest_ns.wrapping_add(self.clock_offset_ns.load(Ordering::Relaxed))
    }

    /// Sends a signal, by its number, to a process, or to `all` of the container.
    pub(crate) async fn signal(&self, exec_id: &str, signal: u32, all: bool) -> Result<(), AgentError> {
        let request = SignalProcessRequest {
            container_id: self.container_id.clone(),
            exec_id: exec_id.to_owned(),
            signal,
            all,
            ..Default::default()
        };
        within(CALL_TIMEOUT, self.client.signal_process(Context::default(), &request)).await?;
        Ok(())
    }

    pub(crate) async fn resize(&self, exec_id: &str, size: Size) -> Result<(), AgentError> {
        let request = ResizeTerminalRequest {
            container_id: self.container_id.clone(),
            exec_id: exec_id.to_owned(),
            rows: size.rows,
            columns: size.columns,
            ..Default::default()
        };
        within(CALL_TIMEOUT, self.client.resize_terminal(Context::default(), &request)).await?;
        Ok(())
    }

    pub(crate) async fn processes(&self) -> Result<Vec<ProcessInfo>, AgentError> {
        let request = ListProcessesRequest { container_id: self.container_id.clone(), ..Default::default() };
        Ok(within(CALL_TIMEOUT, self.client.list_processes(Context::default(), &request)).await?.processes)
    }

    /// The files of the same processes in the container's own /proc.
    pub(super) async fn process_files(&self) -> Result<ReadProcessesResponse, AgentError> {
        let request = ListProcessesRequest { container_id: self.container_id.clone(), ..Default::default() };
        within(CALL_TIMEOUT, self.client.read_processes(Context::default(), &request)).await
    }

    pub(crate) async fn pause(&self) -> Result<(), AgentError> {
        let request = PauseContainerRequest { container_id: self.container_id.clone(), ..Default::default() };
        // It writes back, as a delete does.
        within(DELETE_TIMEOUT, self.client.pause_container(Context::default(), &request)).await?;
        Ok(())
    }

    pub(crate) async fn resume(&self) -> Result<(), AgentError> {
        let request = ResumeContainerRequest { container_id: self.container_id.clone(), ..Default::default() };
        within(DELETE_TIMEOUT, self.client.resume_container(Context::default(), &request)).await?;
        Ok(())
    }

    pub(crate) async fn update(
        &self,
        cgroup_settings: Vec<CgroupSetting>,
        device_filter: Vec<u8>,
    ) -> Result<(), AgentError> {
        let container_id = self.container_id.clone();
        let request = UpdateContainerRequest { container_id, cgroup_settings, device_filter, ..Default::default() };
        within(DELETE_TIMEOUT, self.client.update_container(Context::default(), &request)).await?;
        Ok(())
    }

    pub(crate) async fn stats(&self) -> Result<GetStatsResponse, AgentError> {
        let request = GetStatsRequest { container_id: self.container_id.clone(), ..Default::default() };
        within(CALL_TIMEOUT, self.client.get_stats(Context::default(), &request)).await
    }

    /// Returns once more out-of-memory kills have happened than `seen`, or the container has ended.
    pub(crate) async fn wait_oom(&self, seen: u64) -> Result<WaitOomResponse, AgentError> {
        let request = WaitOomRequest { container_id: self.container_id.clone(), seen, ..Default::default() };
        Ok(self.client.wait_oom(Context::default(), &request).await?)
    }

    /// Waits for the next connection to one of the container's sockets, which is joined with the stream of that number. Returns
    /// the socket's, or `None` after the container's end.
    pub(crate) async fn next_connection(&self, stream: u32) -> Result<Option<u32>, AgentError> {
        let request = WaitConnectionRequest { container_id: self.container_id.clone(), stream, ..Default::default() };
        let response = self.client.wait_connection(Context::default(), &request).await?;
        Ok((!response.ended).then_some(response.socket))
    }

    /// Waits until the container tells that it is ready: the line by which it does, or `None` once it has ended without.
    pub(crate) async fn wait_ready(&self) -> Result<Option<String>, AgentError> {
        let request = WaitReadyRequest { container_id: self.container_id.clone(), ..Default::default() };
        let line = self.client.wait_ready(Context::default(), &request).await?.line;
        if !line.is_empty() && !is_ready_line(&line) {
            let message = "the guest's agent takes for readiness what is none".to_owned();
            return Err(AgentError::Refused { message, kind: Refusal::Other });
        }
        Ok(Some(line).filter(|line| !line.is_empty()))
    }

    /// Forgets an exec'd process that has ended.
    pub(crate) async fn delete_process(&self, exec_id: &str) -> Result<(), AgentError> {
        let container_id = self.container_id.clone();
        let request = DeleteProcessRequest { container_id, exec_id: exec_id.to_owned(), ..Default::default() };
        within(CALL_TIMEOUT, self.client.delete_process(Context::default(), &request)).await?;
        Ok(())
    }

    /// Returns when all that the container wrote has reached the host; where the machine lives on, also when the guest has
    /// let go of the container's trees.
    pub(crate) async fn delete(&self, machine_lives_on: bool) -> Result<(), AgentError> {
        let (container_id, release_trees) = (self.container_id.clone(), machine_lives_on);
        let request = DeleteContainerRequest { container_id, release_trees, ..Default::default() };
        within(DELETE_TIMEOUT, self.client.delete_container(Context::default(), &request)).await?;
        Ok(())
    }
}

impl fmt::Debug for Agent {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        out.debug_struct("Agent").field("container_id", &self.container_id).finish_non_exhaustive()
    }
}

/// A call whose answer is not waited for beyond `limit`.
async fn within<T>(limit: Duration, call: impl Future<Output = ttrpc::Result<T>>) -> Result<T, AgentError> {
    Ok(timeout(limit, call).await.map_err(|_| AgentError::Timeout)??)
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
