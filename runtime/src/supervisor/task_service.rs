// SPDX-License-Identifier: Apache-2.0
//! The supervisor's control interface: containerd's Task API, served to the command line.
//!
//! Versions 2 and 3 differ in the package name alone, so both are served. A call's work goes on when its caller is gone:
//! a container must not be left half started.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use containerd_shim_protos::api::{
    CloseIORequest, ConnectRequest, ConnectResponse, DeleteRequest, DeleteResponse, Empty, ExecProcessRequest,
    KillRequest, PauseRequest, PidsRequest, PidsResponse, ProcessInfo, ResizePtyRequest, ResumeRequest, StartRequest,
    StartResponse, StateRequest, StateResponse, StatsRequest, StatsResponse, Status as TaskStatus, UpdateTaskRequest,
    WaitRequest, WaitResponse,
};
use containerd_shim_protos::shim_async::{Task, create_task};
use protobuf::well_known_types::any::Any;
use protobuf::well_known_types::timestamp::Timestamp;
use protobuf::{EnumOrUnknown, Message, MessageField};
use tokio::sync::{RwLock, RwLockReadGuard};
use tokio::time::timeout;
use ttrpc::Code;
use ttrpc::asynchronous::transport::Listener;
use ttrpc::asynchronous::{Server, Service, TtrpcContext};

use super::agent::{AgentError, Refusal};
use super::container::{CallError, Container, Ended};
use super::machine_memory::GrowError;
use super::state::Status;
use super::streams::StreamIds;
use super::terminal::Size;
use super::{agent_service, execs};
use crate::spec::{self, PartError};
use crate::text;

/// What a stream is called in `ExecProcess` to be carried to whoever asks for it, and, with its number, in the answer to
/// `State`.
pub(crate) const STREAM: &str = "stream:";

/// The type of the details of a process: the agent's own message.
pub(crate) const PROCESS_INFO_TYPE: &str = "bulkhead.agent.ProcessInfo";

/// The type of statistics: the agent's own message.
pub(crate) const STATS_TYPE: &str = "bulkhead.agent.GetStatsResponse";

const SERVICE_V2: &str = "containerd.task.v2.Task";
const SERVICE_V3: &str = "containerd.task.v3.Task";

/// How long the last answers may take to be sent.
const LAST_ANSWERS: Duration = Duration::from_secs(2);

/// A server of the Task API on one socket.
pub(crate) struct TaskServer {
    server: Server,
    calls: Calls,
}

impl TaskServer {
    /// Serves the calls for one container.
    pub(super) async fn of_container(
        listener: std::os::unix::net::UnixListener,
        container: &Arc<Container>,
    ) -> std::io::Result<Self> {
        let calls = Calls::default();
        let service = Arc::new(TaskService { container: Arc::clone(container), calls: calls.clone() });
        Self::start_with(listener, service, agent_service::service(container, &calls), calls).await
    }

    /// Serves a service and those of other names, whose calls under way `calls` counts.
    pub(crate) async fn start_with(
        listener: std::os::unix::net::UnixListener,
        service: Arc<dyn Task + Send + Sync>,
        others: HashMap<String, Service>,
        calls: Calls,
    ) -> std::io::Result<Self> {
        listener.set_nonblocking(true)?;
        let listener = Listener::from(tokio::net::UnixListener::from_std(listener)?);
        let mut v2 = create_task(Arc::clone(&service));
        let v2 = v2.remove(SERVICE_V3).map(|methods| (SERVICE_V2.to_owned(), methods)).into_iter().collect();
        let mut server = Server::new()
            .add_listener(listener)
            .register_service(v2)
            .register_service(create_task(service))
            .register_service(others);
        server.start().await.map_err(std::io::Error::other)?;
        Ok(Self { server, calls })
    }

    /// Ends it once the calls under way have been answered.
    pub(crate) async fn stop(mut self) {
        let _ = timeout(LAST_ANSWERS, self.calls.0.write()).await;
        let _ = timeout(LAST_ANSWERS, self.server.shutdown()).await;
    }
}

/// The calls under way: each holds the lock for reading until its answer is on its way.
#[derive(Debug, Clone, Default)]
pub(crate) struct Calls(Arc<RwLock<()>>);

impl Calls {
    /// Marks a call as under way, until what it returns is dropped.
    pub(crate) async fn enter(&self) -> RwLockReadGuard<'_, ()> {
        self.0.read().await
    }

    /// Does a call's work to its end, whether its caller waits or not.
    pub(crate) async fn finish<T: Send + 'static>(
        &self,
        work: impl Future<Output = Result<T, CallError>> + Send + 'static,
    ) -> ttrpc::Result<T> {
        let _under_way = self.enter().await;
        match tokio::spawn(work).await {
            Ok(result) => result.map_err(status),
            Err(panic) => Err(ttrpc::Error::RpcStatus(ttrpc::get_status(Code::INTERNAL, panic))),
        }
    }
}

/// The calls for one container.
#[derive(Debug, Clone)]
struct TaskService {
    container: Arc<Container>,
    calls: Calls,
}

impl TaskService {
    /// Whether a call is for this container.
    fn check(&self, id: &str) -> Result<Arc<Container>, CallError> {
        if id == self.container.id() {
            Ok(Arc::clone(&self.container))
        } else {
            Err(CallError::NoSuchContainer(id.to_owned()))
        }
    }

    async fn call<T, F>(&self, id: &str, work: impl FnOnce(Arc<Container>) -> F) -> ttrpc::Result<T>
    where
        T: Send + 'static,
        F: Future<Output = Result<T, CallError>> + Send + 'static,
    {
        self.calls.finish(work(self.check(id).map_err(status)?)).await
    }
}

/// The status of a failure: a code that containerd understands, and a line for a person.
pub(crate) fn status(error: CallError) -> ttrpc::Error {
    let code = match &error {
        CallError::NoSuchContainer(_)
        | CallError::NoSuchProcess(_)
        | CallError::Finished
        | CallError::Agent(AgentError::Refused { kind: Refusal::Finished, .. }) => Code::NOT_FOUND,
        CallError::ProcessExists(_) | CallError::ContainerExists(_) => Code::ALREADY_EXISTS,
        CallError::StartWhileCreating
        | CallError::StartRunning
        | CallError::StartPaused
        | CallError::StartStopped
        | CallError::NotRunning
        | CallError::Creating
        | CallError::NotPaused
        | CallError::ExecStopped
        | CallError::ExecWhileCreating
        | CallError::NotStarted(_)
        | CallError::DeleteRunning(_) => Code::FAILED_PRECONDITION,
        CallError::BadRequest(_) | CallError::BelowUse { .. } | CallError::Memory(GrowError::TooMuch { .. }) => {
            Code::INVALID_ARGUMENT
        }
        CallError::NotSupported(_) => Code::UNIMPLEMENTED,
        CallError::Create(_) | CallError::Network(_) => Code::UNKNOWN,
        CallError::Cgroup(_)
        | CallError::Memory(_)
        | CallError::Cpus(_)
        | CallError::Hook(_)
        | CallError::Agent(AgentError::Refused { kind: Refusal::Other, .. }) => Code::INTERNAL,
        CallError::Agent(AgentError::Refused { .. }) => Code::INVALID_ARGUMENT,
        CallError::Agent(AgentError::Timeout) => Code::DEADLINE_EXCEEDED,
        CallError::Agent(AgentError::Lost) => Code::UNAVAILABLE,
    };
    ttrpc::Error::RpcStatus(ttrpc::get_status(code, text::chain(&error)))
}

pub(crate) fn timestamp(ended: &Ended) -> MessageField<Timestamp> {
    timestamp_of(ended.at)
}

/// A time since 1970.
pub(crate) fn timestamp_of(time: Duration) -> MessageField<Timestamp> {
    let (seconds, nanos) = (i64::try_from(time.as_secs()).unwrap_or(i64::MAX), time.subsec_nanos().cast_signed());
    MessageField::some(Timestamp { seconds, nanos, ..Timestamp::default() })
}

fn task_status(status: Status) -> EnumOrUnknown<TaskStatus> {
    let status = match status {
        // The Task API has no word for it.
        Status::Creating | Status::Created => TaskStatus::CREATED,
        Status::Running => TaskStatus::RUNNING,
        Status::Paused => TaskStatus::PAUSED,
        Status::Stopped => TaskStatus::STOPPED,
    };
    status.into()
}

pub(crate) fn container_state(container: &Container) -> StateResponse {
    let record = container.record();
    let ended = container.ended();
    StateResponse {
        id: record.id,
        bundle: record.bundle.to_string_lossy().into_owned(),
        pid: record.pid,
        status: task_status(record.status),
        exit_status: ended.as_ref().map_or(0, |ended| u32::from(ended.status)),
        exited_at: ended.as_ref().map(timestamp).unwrap_or_default(),
        ..StateResponse::default()
    }
}

pub(crate) fn exec_state(container: &Container, exec_id: &str) -> Result<StateResponse, CallError> {
    let exec = container.execs.get(exec_id)?;
    let ended = exec.ended();
    let status = match (exec.pid(), &ended) {
        (_, Some(_)) => TaskStatus::STOPPED,
        // It is frozen with its container.
        (Some(_), None) if container.status() == Status::Paused => TaskStatus::PAUSED,
        (Some(_), None) => TaskStatus::RUNNING,
        (None, None) => TaskStatus::CREATED,
    };
    let name = |number: u32| if number == 0 { String::new() } else { format!("{STREAM}{number}") };
    // What is preserved follows stderr, for which the message has the last name.
    let stderr = match exec.streams {
        StreamIds { stderr, preserved: (_, 0), .. } => name(stderr),
        StreamIds { stderr, preserved: (first, _), .. } => format!("{STREAM}{stderr},{first}"),
    };
    Ok(StateResponse {
        id: container.id().to_owned(),
        exec_id: exec_id.to_owned(),
        pid: exec.pid().unwrap_or(0),
        status: status.into(),
        stdin: name(exec.streams.stdin),
        stdout: name(exec.streams.stdout),
        stderr,
        terminal: exec.terminal,
        exit_status: ended.as_ref().map_or(0, |ended| u32::from(ended.status)),
        exited_at: ended.as_ref().map(timestamp).unwrap_or_default(),
        ..StateResponse::default()
    })
}

pub(crate) fn any(type_url: &str, message: &impl Message) -> Result<Any, CallError> {
    let value = message.write_to_bytes().map_err(|error| CallError::BadRequest(error.to_string()))?;
    Ok(Any { type_url: type_url.to_owned(), value, ..Any::default() })
}

/// Describes a further process, of which those streams are to be carried.
pub(crate) fn add_exec(
    container: &Container,
    request: &ExecProcessRequest,
    wanted: [bool; 3],
) -> Result<(), CallError> {
    let mut process =
        spec::process_from_json(&request.spec.value).map_err(|error| CallError::BadRequest(text::chain(&error)))?;
    process.terminal |= request.terminal;
    container.confine(&mut process);
    container.execs.add(&request.exec_id, process, wanted)
}

/// Changes the limits.
pub(crate) async fn update(container: &Container, request: &UpdateTaskRequest) -> Result<(), CallError> {
    let refused = |error: PartError| CallError::BadRequest(text::chain(&error));
    let limits = spec::new_limits_from_json(&request.resources.value).map_err(refused)?;
    container.update(limits).await
}

#[async_trait]
impl Task for TaskService {
    async fn state(&self, _: &TtrpcContext, request: StateRequest) -> ttrpc::Result<StateResponse> {
        let container = self.check(&request.id).map_err(status)?;
        if request.exec_id.is_empty() {
            return Ok(container_state(&container));
        }
        exec_state(&container, &request.exec_id).map_err(status)
    }

    async fn start(&self, _: &TtrpcContext, request: StartRequest) -> ttrpc::Result<StartResponse> {
        self.call(&request.id, move |container| async move {
            let pid = if request.exec_id.is_empty() {
                container.start().await?;
                container.record().pid
            } else {
                container.require_exec()?;
                execs::start(&container, &request.exec_id).await?
            };
            Ok(StartResponse { pid, ..StartResponse::default() })
        })
        .await
    }

    async fn exec(&self, _: &TtrpcContext, request: ExecProcessRequest) -> ttrpc::Result<Empty> {
        self.call(&request.id.clone(), move |container| async move {
            container.require_exec()?;
            let carried = |stream: &str| match stream {
                "" => Ok(false),
                STREAM => Ok(true),
                _ => Err(CallError::NotSupported("streams other than the guest's own")),
            };
            let wanted = [carried(&request.stdin)?, carried(&request.stdout)?, carried(&request.stderr)?];
            add_exec(&container, &request, wanted)?;
            Ok(Empty::default())
        })
        .await
    }

    async fn wait(&self, _: &TtrpcContext, request: WaitRequest) -> ttrpc::Result<WaitResponse> {
        // Not in a task of its own: that a caller no longer waits is to be noticed.
        let _under_way = self.calls.enter().await;
        let container = self.check(&request.id).map_err(status)?;
        let ended = if request.exec_id.is_empty() {
            container.wait().await
        } else {
            execs::wait(&container, &request.exec_id).await
        };
        let ended = ended.map_err(status)?;
        let (exit_status, exited_at) = (u32::from(ended.status), timestamp(&ended));
        Ok(WaitResponse { exit_status, exited_at, ..WaitResponse::default() })
    }

    async fn kill(&self, _: &TtrpcContext, request: KillRequest) -> ttrpc::Result<Empty> {
        self.call(&request.id, move |container| async move {
            if request.exec_id.is_empty() {
                container.kill(request.signal, request.all).await?;
            } else {
                container.execs.get(&request.exec_id)?;
                container.agent.signal(&request.exec_id, request.signal, false).await?;
            }
            Ok(Empty::default())
        })
        .await
    }

    async fn delete(&self, _: &TtrpcContext, request: DeleteRequest) -> ttrpc::Result<DeleteResponse> {
        self.call(&request.id, move |container| async move {
            let ended = if request.exec_id.is_empty() {
                container.ended().ok_or_else(|| CallError::DeleteRunning(container.id().to_owned()))?
            } else {
                execs::delete(&container, &request.exec_id).await?
            };
            let (exit_status, exited_at) = (u32::from(ended.status), timestamp(&ended));
            Ok(DeleteResponse { exit_status, exited_at, ..DeleteResponse::default() })
        })
        .await
    }

    async fn resize_pty(&self, _: &TtrpcContext, request: ResizePtyRequest) -> ttrpc::Result<Empty> {
        self.call(&request.id, move |container| async move {
            let size = Size { rows: request.height, columns: request.width };
            execs::resize(&container, &request.exec_id, size).await.map(|()| Empty::default())
        })
        .await
    }

    async fn pause(&self, _: &TtrpcContext, request: PauseRequest) -> ttrpc::Result<Empty> {
        self.call(&request.id, |container| async move { container.pause().await.map(|()| Empty::default()) }).await
    }

    async fn resume(&self, _: &TtrpcContext, request: ResumeRequest) -> ttrpc::Result<Empty> {
        self.call(&request.id, |container| async move { container.resume().await.map(|()| Empty::default()) }).await
    }

    async fn pids(&self, _: &TtrpcContext, request: PidsRequest) -> ttrpc::Result<PidsResponse> {
        self.call(&request.id, |container| async move {
            container.require_alive()?;
            let processes = match container.heard(container.agent.processes().await) {
                // It has no more, but its output is still being read.
                Err(CallError::NotRunning) => Vec::new(),
                processes => processes?,
            };
            let processes = processes.into_iter().map(|process| {
                let info = MessageField::some(any(PROCESS_INFO_TYPE, &process)?);
                let pid = u32::try_from(process.pid).unwrap_or(0);
                Ok(ProcessInfo { pid, info, ..ProcessInfo::default() })
            });
            let processes = processes.collect::<Result<_, CallError>>()?;
            Ok(PidsResponse { processes, ..PidsResponse::default() })
        })
        .await
    }

    async fn update(&self, _: &TtrpcContext, request: UpdateTaskRequest) -> ttrpc::Result<Empty> {
        self.call(&request.id.clone(), move |container| async move {
            update(&container, &request).await.map(|()| Empty::default())
        })
        .await
    }

    async fn stats(&self, _: &TtrpcContext, request: StatsRequest) -> ttrpc::Result<StatsResponse> {
        self.call(&request.id, |container| async move {
            let stats = any(STATS_TYPE, &container.stats().await?)?;
            Ok(StatsResponse { stats: MessageField::some(stats), ..StatsResponse::default() })
        })
        .await
    }

    async fn close_io(&self, _: &TtrpcContext, request: CloseIORequest) -> ttrpc::Result<Empty> {
        // Who pumps a stdin closes it by ending the stream.
        self.check(&request.id).map_err(status)?;
        Ok(Empty::default())
    }

    async fn connect(&self, _: &TtrpcContext, request: ConnectRequest) -> ttrpc::Result<ConnectResponse> {
        let container = self.check(&request.id).map_err(status)?;
        let (shim_pid, task_pid) = (std::process::id(), container.record().pid);
        let version = env!("CARGO_PKG_VERSION").to_owned();
        Ok(ConnectResponse { shim_pid, task_pid, version, ..ConnectResponse::default() })
    }
}
