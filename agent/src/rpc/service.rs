// SPDX-License-Identifier: Apache-2.0
//! The methods of the agent's service.

use std::fmt;

use async_trait::async_trait;
use bulkhead_protocol::agent as wire;
use bulkhead_protocol::agent_ttrpc::Agent;
use tokio::sync::OnceCell;
use ttrpc::Code;
use ttrpc::r#async::TtrpcContext;

use super::status::ToStatus;
use crate::container::{ContainerSpec, CreateError, Engine, NoSuchContainer, ResizeError, StartError, TerminalSize};
use crate::trace::{Trace, TracePoint, nanoseconds, now};

/// Makes the shared device's trees appear; says why it cannot.
type MountShared = Box<dyn Fn() -> Result<(), String> + Send + Sync>;

/// The agent's service.
pub struct AgentService {
    engine: Engine,
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
    /// The service of an engine. `boot` is what the agent did before it could answer.
    pub fn new(engine: Engine, boot: Trace) -> Self {
        Self { engine, boot, mount_shared: None, shared_mounted: OnceCell::new() }
    }

    /// Sets what is to be done before the shared device's trees are first used.
    #[must_use]
    pub fn with_shared_device(mut self, mount: impl Fn() -> Result<(), String> + Send + Sync + 'static) -> Self {
        self.mount_shared = Some(Box::new(mount));
        self
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

/// Only a container's first process has a name so far.
fn refuse_exec_id(exec_id: &str, container_id: &str) -> ttrpc::Result<()> {
    if exec_id.is_empty() {
        return Ok(());
    }
    Err(status(Code::NOT_FOUND, format!("process does not exist: {exec_id:?} in container {container_id:?}")))
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

    async fn wait_process(
        &self,
        _context: &TtrpcContext,
        request: wire::WaitProcessRequest,
    ) -> ttrpc::Result<wire::WaitProcessResponse> {
        refuse_exec_id(&request.exec_id, &request.container_id)?;
        let exit = self.engine.wait(&request.container_id).await.map_err(NoSuchContainer::into_status)?;
        let run = exit.started_at.map(|begin| TracePoint { name: "run", begin, end: exit.at });
        let drain = TracePoint { name: "drain", begin: exit.at, end: exit.drained_at };
        let points: Vec<TracePoint> = run.into_iter().chain([drain]).collect();
        Ok(wire::WaitProcessResponse {
            exit_status: u32::from(exit.code),
            exited_at_ns: nanoseconds(exit.at),
            oom_killed: exit.oom_killed,
            trace: to_wire(&points),
            ..Default::default()
        })
    }

    async fn signal_process(
        &self,
        _context: &TtrpcContext,
        request: wire::SignalProcessRequest,
    ) -> ttrpc::Result<wire::Empty> {
        refuse_exec_id(&request.exec_id, &request.container_id)?;
        self.engine.signal(&request.container_id, request.signal, request.all).map_err(ToStatus::into_status)?;
        Ok(wire::Empty::new())
    }

    async fn resize_terminal(
        &self,
        _context: &TtrpcContext,
        request: wire::ResizeTerminalRequest,
    ) -> ttrpc::Result<wire::Empty> {
        refuse_exec_id(&request.exec_id, &request.container_id)?;
        let size = TerminalSize::from_wire(request.rows, request.columns)
            .map_err(|error| ResizeError::from(error).into_status())?;
        self.engine.resize(&request.container_id, size).map_err(ToStatus::into_status)?;
        Ok(wire::Empty::new())
    }

    async fn delete_container(
        &self,
        _context: &TtrpcContext,
        request: wire::DeleteContainerRequest,
    ) -> ttrpc::Result<wire::Empty> {
        self.engine.delete(&request.container_id).await.map_err(ToStatus::into_status)?;
        Ok(wire::Empty::new())
    }
}
