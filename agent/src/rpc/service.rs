// SPDX-License-Identifier: Apache-2.0
//! The methods of the agent's service.

use std::fmt;
use std::fs;
use std::sync::Arc;

use async_trait::async_trait;
use bulkhead_protocol::agent as wire;
use bulkhead_protocol::agent_ttrpc::Agent;
use tokio::sync::OnceCell;
use ttrpc::Code;
use ttrpc::r#async::TtrpcContext;

use super::status::ToStatus;
use crate::container::{
    ContainerSpec, CreateError, Engine, ExecError, ProcessSpec, ResizeError, SandboxSpec, SpecError, StartError,
    TerminalSize,
};
use crate::cpus::Cpu;
use crate::disks::{DiskError, Disks, Number};
use crate::init::SYS;
use crate::late;
use crate::memory;
use crate::network::{Connect, Network, Question};
use crate::process::StreamTable;
use crate::trace::{Trace, TracePoint, nanoseconds, now};

/// Makes the shared device's trees appear; says why it cannot.
type MountShared = Box<dyn Fn() -> Result<(), String> + Send + Sync>;

/// The agent's service.
pub struct AgentService {
    engine: Engine,
    /// Where the host's streams arrive.
    streams: Arc<StreamTable>,
    network: Network,
    disks: Disks,
    boot: Trace,
    /// Most sandboxes have no trees that the host changes, and no device for them: it is mounted when first named.
    mount_shared: Option<MountShared>,
    shared_mounted: OnceCell<()>,
}

impl fmt::Debug for AgentService {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        out.debug_struct("AgentService").field("engine", &self.engine).finish_non_exhaustive()
    }
}

impl AgentService {
    /// The service of an engine, whose streams arrive in `streams`. `boot` is what the agent did before it could answer.
    pub fn new(engine: Engine, streams: Arc<StreamTable>, boot: Trace) -> Self {
        let (network, disks, mount_shared, shared_mounted) =
            (Network::default(), Disks::default(), None, OnceCell::new());
        Self { engine, streams, network, disks, boot, mount_shared, shared_mounted }
    }

    /// Sets what is to be done before the shared device's trees are first used.
    #[must_use]
    pub fn with_shared_device(mut self, mount: impl Fn() -> Result<(), String> + Send + Sync + 'static) -> Self {
        self.mount_shared = Some(Box::new(mount));
        self
    }

    /// Asks the disks that have come since the last time for their serial numbers.
    async fn ask_disks(&self) -> Result<(), DiskError> {
        let mut without = Vec::new();
        while let Some(asked) = self.disks.ask_next(SYS.as_ref(), &without)? {
            let file = asked.file(SYS.as_ref());
            match self.engine.read_apart(|| fs::read_to_string(file)).await {
                Ok(serial) => asked.answered(&serial),
                // It is none that is asked for.
                Err(_) => without.push(asked.name().to_owned()),
            }
        }
        Ok(())
    }

    async fn mount_shared_if_used(&self, spec: &ContainerSpec) -> ttrpc::Result<()> {
        let Some(mount) = &self.mount_shared else { return Ok(()) };
        if !spec.uses_shared_device() {
            return Ok(());
        }
        let mounted = self.shared_mounted.get_or_try_init(|| async { mount() }).await;
        mounted.map(drop).map_err(|message| status(Code::INTERNAL, message))
    }
}

fn status(code: Code, message: impl ToString) -> ttrpc::Error {
    ttrpc::Error::RpcStatus(ttrpc::get_status(code, message))
}

fn disk_to_wire(number: Number) -> wire::Disk {
    wire::Disk { major: number.major, minor: number.minor, ..Default::default() }
}

fn to_wire(points: &[TracePoint]) -> Vec<wire::TracePoint> {
    let point = |point: &TracePoint| wire::TracePoint {
        name: point.name.to_owned(),
        begin_ns: nanoseconds(point.begin),
        end_ns: nanoseconds(point.end),
        ..Default::default()
    };
    points.iter().map(point).collect()
}

#[async_trait]
impl Agent for AgentService {
    async fn get_info(
        &self,
        _context: &TtrpcContext,
        _request: wire::GetInfoRequest,
    ) -> ttrpc::Result<wire::GetInfoResponse> {
        Ok(wire::GetInfoResponse {
            agent_version: env!("CARGO_PKG_VERSION").to_owned(),
            kernel_release: rustix::system::uname().release().to_string_lossy().into_owned(),
            now_ns: nanoseconds(now()),
            trace: to_wire(self.boot.points()),
            ..Default::default()
        })
    }

    async fn configure_network(
        &self,
        _context: &TtrpcContext,
        request: wire::ConfigureNetworkRequest,
    ) -> ttrpc::Result<wire::Empty> {
        self.network.configure(&request).map_err(ToStatus::into_status)?;
        Ok(wire::Empty::default())
    }

    async fn wait_question(&self, _context: &TtrpcContext, _request: wire::Empty) -> ttrpc::Result<wire::Question> {
        let Question { id, message, over_tcp } = self.network.resolver.next().await;
        Ok(wire::Question { id, message, over_tcp, ..Default::default() })
    }

    async fn answer_question(&self, _context: &TtrpcContext, answer: wire::Answer) -> ttrpc::Result<wire::Empty> {
        self.network.resolver.answer(answer.id, answer.message);
        Ok(wire::Empty::default())
    }

    async fn configure_sandbox(
        &self,
        _context: &TtrpcContext,
        request: wire::ConfigureSandboxRequest,
    ) -> ttrpc::Result<wire::Empty> {
        let sandbox = SandboxSpec::from_wire(request).map_err(|error| CreateError::from(error).into_status())?;
        sandbox.apply().map_err(|failure| status(Code::INTERNAL, failure))?;
        Ok(wire::Empty::default())
    }

    async fn add_memory(&self, _context: &TtrpcContext, request: wire::AddMemoryRequest) -> ttrpc::Result<wire::Empty> {
        memory::add(SYS.as_ref(), request.address, request.length).await.map_err(ToStatus::into_status)?;
        Ok(wire::Empty::default())
    }

    async fn online_cpus(
        &self,
        _context: &TtrpcContext,
        request: wire::OnlineCpusRequest,
    ) -> ttrpc::Result<wire::Empty> {
        for cpu in Cpu::first(SYS.as_ref(), request.count) {
            // The kernel starts it before this returns.
            let online = self.engine.apart(|| cpu.bring_online()).await;
            online.map_err(|source| cpu.error(source).into_status())?;
        }
        Ok(wire::Empty::default())
    }

    async fn find_disks(
        &self,
        _context: &TtrpcContext,
        request: wire::DisksRequest,
    ) -> ttrpc::Result<wire::FindDisksResponse> {
        self.ask_disks().await.map_err(ToStatus::into_status)?;
        let found = self.disks.find(SYS.as_ref(), &request.serials).map_err(ToStatus::into_status)?;
        Ok(wire::FindDisksResponse { disks: found.into_iter().map(disk_to_wire).collect(), ..Default::default() })
    }

    async fn add_disk(&self, _context: &TtrpcContext, request: wire::AddDiskRequest) -> ttrpc::Result<wire::Disk> {
        let wire::AddDiskRequest { serial, window, .. } = request;
        // Whose disk does not answer waits for ever; nobody else does.
        let looked = self.engine.apart(|| late::look_at(SYS.as_ref(), window)).await;
        let added = looked.and_then(|()| self.disks.add(SYS.as_ref(), &serial, window));
        added.map(disk_to_wire).map_err(|source| DiskError::Add { serial, window, source }.into_status())
    }

    async fn release_disks(&self, _context: &TtrpcContext, request: wire::DisksRequest) -> ttrpc::Result<wire::Empty> {
        for serial in request.serials {
            let released = self.engine.apart(|| self.disks.release(SYS.as_ref(), &serial)).await;
            if let Err(source) = released {
                return Err(DiskError::Release { serial, source }.into_status());
            }
            self.disks.forget(&serial);
        }
        Ok(wire::Empty::default())
    }

    async fn connect_port(
        &self,
        _context: &TtrpcContext,
        request: wire::ConnectPortRequest,
    ) -> ttrpc::Result<wire::Empty> {
        let connect = Connect::from_wire(&request).map_err(ToStatus::into_status)?;
        connect.run(&self.streams).await.map_err(ToStatus::into_status)?;
        Ok(wire::Empty::default())
    }

    async fn create_container(
        &self,
        _context: &TtrpcContext,
        request: wire::CreateContainerRequest,
    ) -> ttrpc::Result<wire::CreateContainerResponse> {
        let start = request.start;
        let spec = ContainerSpec::from_wire(request).map_err(|error| CreateError::from(error).into_status())?;
        self.mount_shared_if_used(&spec).await?;
        let mut trace = Trace::default();
        let pid = self.engine.create(&spec, start, &mut trace).await.map_err(ToStatus::into_status)?;
        Ok(wire::CreateContainerResponse { pid, trace: to_wire(trace.points()), ..Default::default() })
    }

    async fn start_container(
        &self,
        _context: &TtrpcContext,
        request: wire::StartContainerRequest,
    ) -> ttrpc::Result<wire::StartContainerResponse> {
        let mut trace = Trace::default();
        self.engine.start(&request.container_id, &mut trace).await.map_err(StartError::into_status)?;
        Ok(wire::StartContainerResponse { trace: to_wire(trace.points()), ..Default::default() })
    }

    async fn exec_process(
        &self,
        _context: &TtrpcContext,
        request: wire::ExecProcessRequest,
    ) -> ttrpc::Result<wire::ExecProcessResponse> {
        let process = request.process.into_option().ok_or(SpecError::Missing("process"));
        let spec = process.and_then(ProcessSpec::from_wire).map_err(|error| ExecError::from(error).into_status())?;
        let mut trace = Trace::default();
        let executed = self.engine.exec(&request.container_id, &request.exec_id, &spec, &mut trace).await;
        let pid = executed.map_err(ToStatus::into_status)?;
        Ok(wire::ExecProcessResponse { pid, trace: to_wire(trace.points()), ..Default::default() })
    }

    async fn wait_process(
        &self,
        _context: &TtrpcContext,
        request: wire::WaitProcessRequest,
    ) -> ttrpc::Result<wire::WaitProcessResponse> {
        let exit = self.engine.wait(&request.container_id, &request.exec_id).await.map_err(ToStatus::into_status)?;
        let run = exit.started_at.map(|begin| TracePoint { name: "run", begin, end: exit.at });
        let drain = TracePoint { name: "drain", begin: exit.at, end: exit.drained_at };
        let points: Vec<TracePoint> = run.into_iter().chain([drain]).collect();
        Ok(wire::WaitProcessResponse {
            exit_status: u32::from(exit.code),
            exited_at_ns: nanoseconds(exit.at),
            oom_kills: exit.oom_kills,
            trace: to_wire(&points),
            ..Default::default()
        })
    }

    async fn wait_end(&self, _context: &TtrpcContext, request: wire::WaitProcessRequest) -> ttrpc::Result<wire::Empty> {
        self.engine.ended(&request.container_id, &request.exec_id).await.map_err(ToStatus::into_status)?;
        Ok(wire::Empty::new())
    }

    async fn signal_process(
        &self,
        _context: &TtrpcContext,
        request: wire::SignalProcessRequest,
    ) -> ttrpc::Result<wire::Empty> {
        let wire::SignalProcessRequest { container_id, exec_id, signal, all, .. } = request;
        self.engine.signal(&container_id, &exec_id, signal, all).map_err(ToStatus::into_status)?;
        Ok(wire::Empty::new())
    }

    async fn resize_terminal(
        &self,
        _context: &TtrpcContext,
        request: wire::ResizeTerminalRequest,
    ) -> ttrpc::Result<wire::Empty> {
        let size = TerminalSize::from_wire(request.rows, request.columns)
            .map_err(|error| ResizeError::from(error).into_status())?;
        self.engine.resize(&request.container_id, &request.exec_id, size).map_err(ToStatus::into_status)?;
        Ok(wire::Empty::new())
    }

    async fn delete_process(
        &self,
        _context: &TtrpcContext,
        request: wire::DeleteProcessRequest,
    ) -> ttrpc::Result<wire::Empty> {
        self.engine.delete_process(&request.container_id, &request.exec_id).map_err(ToStatus::into_status)?;
        Ok(wire::Empty::new())
    }

    async fn list_processes(
        &self,
        _context: &TtrpcContext,
        request: wire::ListProcessesRequest,
    ) -> ttrpc::Result<wire::ListProcessesResponse> {
        let processes = self.engine.processes(&request.container_id).await.map_err(ToStatus::into_status)?;
        Ok(wire::ListProcessesResponse { processes, ..Default::default() })
    }

    async fn read_processes(
        &self,
        _context: &TtrpcContext,
        request: wire::ListProcessesRequest,
    ) -> ttrpc::Result<wire::ReadProcessesResponse> {
        self.engine.process_files(&request.container_id).await.map_err(ToStatus::into_status)
    }

    async fn pause_container(
        &self,
        _context: &TtrpcContext,
        request: wire::PauseContainerRequest,
    ) -> ttrpc::Result<wire::Empty> {
        self.engine.pause(&request.container_id).await.map_err(ToStatus::into_status)?;
        Ok(wire::Empty::new())
    }

    async fn resume_container(
        &self,
        _context: &TtrpcContext,
        request: wire::ResumeContainerRequest,
    ) -> ttrpc::Result<wire::Empty> {
        self.engine.resume(&request.container_id).await.map_err(ToStatus::into_status)?;
        Ok(wire::Empty::new())
    }

    async fn update_container(
        &self,
        _context: &TtrpcContext,
        request: wire::UpdateContainerRequest,
    ) -> ttrpc::Result<wire::Empty> {
        self.engine.update(request).await.map_err(ToStatus::into_status)?;
        Ok(wire::Empty::new())
    }

    async fn get_stats(
        &self,
        _context: &TtrpcContext,
        request: wire::GetStatsRequest,
    ) -> ttrpc::Result<wire::GetStatsResponse> {
        self.engine.stats(&request.container_id).map_err(ToStatus::into_status)
    }

    async fn wait_oom(
        &self,
        _context: &TtrpcContext,
        request: wire::WaitOomRequest,
    ) -> ttrpc::Result<wire::WaitOomResponse> {
        let kills = self.engine.wait_oom(&request.container_id, request.seen).await.map_err(ToStatus::into_status)?;
        Ok(wire::WaitOomResponse { count: kills.count, ended: kills.ended, ..Default::default() })
    }

    async fn wait_connection(
        &self,
        _context: &TtrpcContext,
        request: wire::WaitConnectionRequest,
    ) -> ttrpc::Result<wire::WaitConnectionResponse> {
        let waited = self.engine.wait_connection(&request.container_id, request.stream).await;
        let socket = waited.map_err(ToStatus::into_status)?;
        let (ended, socket) = (socket.is_none(), socket.unwrap_or_default());
        Ok(wire::WaitConnectionResponse { socket, ended, ..Default::default() })
    }

    async fn wait_ready(
        &self,
        _context: &TtrpcContext,
        request: wire::WaitReadyRequest,
    ) -> ttrpc::Result<wire::WaitReadyResponse> {
        let line = self.engine.wait_ready(&request.container_id).await.map_err(ToStatus::into_status)?;
        Ok(wire::WaitReadyResponse { line: line.unwrap_or_default(), ..Default::default() })
    }

    async fn delete_container(
        &self,
        _context: &TtrpcContext,
        request: wire::DeleteContainerRequest,
    ) -> ttrpc::Result<wire::Empty> {
        self.engine.delete(&request.container_id, request.release_trees).await.map_err(ToStatus::into_status)?;
        Ok(wire::Empty::new())
    }
}
