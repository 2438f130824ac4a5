// SPDX-License-Identifier: Apache-2.0
//! Containerd's calls: each is looked up, done to its end whether its caller waits or not, and never waits for another.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use async_trait::async_trait;
use containerd_shim_protos::api::{
    CheckpointTaskRequest, CloseIORequest, ConnectRequest, ConnectResponse, CreateTaskRequest, CreateTaskResponse,
    DeleteRequest, DeleteResponse, Empty, ExecProcessRequest, KillRequest, PauseRequest, PidsRequest, PidsResponse,
    ProcessInfo, ResizePtyRequest, ResumeRequest, ShutdownRequest, StartRequest, StartResponse, StateRequest,
    StateResponse, StatsRequest, StatsResponse, UpdateTaskRequest, WaitRequest, WaitResponse,
};
use containerd_shim_protos::events::task::{TaskCreate, TaskDelete, TaskExecAdded, TaskIO};
use containerd_shim_protos::sandbox_api::CreateSandboxRequest;
use containerd_shim_protos::shim::oci::ProcessDetails;
use containerd_shim_protos::shim_async::Task as TaskApi;
use protobuf::MessageField;
use tokio::sync::{mpsc, oneshot, watch};
use tokio::time::timeout;
use ttrpc::asynchronous::TtrpcContext;

use super::events::Publisher;
use super::exec::ExecProcess;
use super::logger::Source;
use super::metrics;
use super::pod::Role;
use super::rootfs::Rootfs;
use super::sandbox::{self, Sandbox};
use super::stdio::Stdio;
use super::task::{Task, topics};
use crate::apart::apart;
use crate::spec;
use crate::supervisor::container::{CallError, Container};
use crate::supervisor::execs;
use crate::supervisor::pod::{Member, Pod};
use crate::supervisor::state::Status;
use crate::supervisor::streams::{GivenEnds, InputCloser};
use crate::supervisor::task_service::{Calls, any, status, timestamp, update};
use crate::supervisor::terminal::Size;
use crate::supervisor::{Caller, Mode, Options};
use crate::text;

/// How long a guest may take to list processes.
const LIST_PATIENCE: Duration = Duration::from_secs(2);

/// The type by which containerd calls the details of a process.
const PROCESS_DETAILS_TYPE: &str = "containerd.runc.v1.ProcessDetails";

/// A machine to be made by the loop that supervises it.
#[derive(Debug)]
pub(super) struct Order {
    pub(super) options: Options,
    pub(super) kind: OrderKind,
    /// Told when nothing is left of it on the host.
    pub(super) gone: watch::Sender<bool>,
}

/// What is to be in the machine.
#[derive(Debug)]
pub(super) enum OrderKind {
    /// One container.
    Container { ends: GivenEnds, caller: Caller },
    /// A pod's, which are put into it later.
    Pod { ready: oneshot::Sender<Result<Arc<Pod>, String>> },
}

/// A container of a server, from its making to its deletion.
#[derive(Debug)]
enum Life {
    /// Until that ends.
    Creating(watch::Receiver<()>),
    Made(Arc<Task>),
}

/// The containers of a server.
#[derive(Debug, Default)]
struct Containers {
    lives: HashMap<String, Life>,
    /// A server has one machine in its life.
    has_machine: bool,
    /// The pod whose machine that is.
    pod: Option<Arc<Pod>>,
    /// Its sandbox, where that was made by the Sandbox service and so is no task.
    sandbox: Option<Arc<Sandbox>>,
}

/// What the calls share.
#[derive(Debug)]
pub(super) struct Shared {
    root: PathBuf,
    events: Arc<Publisher>,
    orders: mpsc::Sender<Order>,
    containers: Mutex<Containers>,
    /// Whether the server is to end.
    end: watch::Sender<bool>,
}

impl Shared {
    pub(super) fn new(
        root: PathBuf,
        events: Arc<Publisher>,
        orders: mpsc::Sender<Order>,
        end: watch::Sender<bool>,
    ) -> Self {
        Self { root, events, orders, containers: Mutex::default(), end }
    }

    fn containers(&self) -> MutexGuard<'_, Containers> {
        // Nothing panics while the lock is held.
        self.containers.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A container, once it is created, and until it is deleted.
    fn task(&self, id: &str) -> Result<Arc<Task>, CallError> {
        match self.containers().lives.get(id) {
            Some(Life::Made(task)) => Ok(Arc::clone(task)),
            _ => Err(CallError::NoSuchContainer(id.to_owned())),
        }
    }

    /// Waits until a container is no longer in the making. A create whose caller has given up goes on: what is deleted then is
    /// what it makes.
    async fn made(&self, id: &str) {
        let mut over = match self.containers().lives.get(id) {
            Some(Life::Creating(over)) => over.clone(),
            _ => return,
        };
        // Nothing is ever sent: it ends with the sender.
        let _ = over.changed().await;
    }

    async fn create(&self, request: CreateTaskRequest) -> Result<CreateTaskResponse, CallError> {
        if !request.checkpoint.is_empty() {
            return Err(CallError::NotSupported("checkpoint: a container cannot be restored"));
        }
        let bundle = PathBuf::from(&request.bundle);
        let annotations = apart("bundle", move || spec::load_annotations(&bundle)).await;
        let annotations = annotations.map_err(|error| CallError::Create(text::chain(&error)))?;
        let annotations = annotations.map_err(|error| CallError::BadRequest(text::chain(&error)))?;
        let role = Role::of(&annotations);
        let _making = self.begin(&request.id, &role)?;
        let made = self.make(&request, role.clone()).await;
        {
            let mut containers = self.containers();
            match &made {
                Ok(task) => drop(containers.lives.insert(request.id.clone(), Life::Made(Arc::clone(task)))),
                Err(_) => {
                    containers.lives.remove(&request.id);
                    containers.has_machine &= matches!(role, Role::Member(_));
                }
            }
        }
        let task = made?;
        let pid = task.container.record().pid;
        let io = TaskIO {
            stdin: request.stdin,
            stdout: request.stdout,
            stderr: request.stderr,
            terminal: request.terminal,
            ..TaskIO::default()
        };
        let event = TaskCreate {
            container_id: request.id,
            bundle: request.bundle,
            rootfs: request.rootfs,
            io: MessageField::some(io),
            pid,
            ..TaskCreate::default()
        };
        self.events.publish(topics::CREATE, &event);
        task.follow(&self.events);
        Ok(CreateTaskResponse { pid, ..CreateTaskResponse::default() })
    }

    /// Keeps an id from being used twice, and a server from a second machine. What is returned is dropped when the container is
    /// made, or could not be.
    fn begin(&self, id: &str, role: &Role) -> Result<watch::Sender<()>, CallError> {
        let mut containers = self.containers();
        let is_member = matches!(role, Role::Member(_));
        if containers.lives.contains_key(id) || (containers.has_machine && !is_member) {
            return Err(CallError::ContainerExists(id.to_owned()));
        }
        if let Role::Member(sandbox) = role
            && containers.pod.as_ref().is_none_or(|pod| pod.sandbox.id() != sandbox)
        {
            return Err(CallError::Create(format!("the sandbox {sandbox:?}, into which {id:?} belongs, is not there")));
        }
        let (making, over) = watch::channel(());
        containers.has_machine = true;
        containers.lives.insert(id.to_owned(), Life::Creating(over));
        Ok(making)
    }

    async fn make(&self, request: &CreateTaskRequest, role: Role) -> Result<Arc<Task>, CallError> {
        let stdio = Stdio {
            stdin: request.stdin.clone(),
            stdout: request.stdout.clone(),
            stderr: request.stderr.clone(),
            terminal: request.terminal,
        };
        let bundle = Path::new(&request.bundle);
        // Nobody looks into a sandbox's root file system.
        let mounts = if role == Role::Sandbox { &[] } else { request.rootfs.as_slice() };
        let mounted = Rootfs::mount_apart(bundle, mounts).await;
        let rootfs = mounted.map_err(|error| CallError::Create(text::chain(&error)))?;
        match self.make_in(request, role, &stdio).await {
            Ok((container, stdin, gone)) => Ok(Arc::new(Task::new(container, stdio, stdin, rootfs, gone))),
            Err(error) => {
                rootfs.unmount_apart().await;
                Err(error)
            }
        }
    }

    /// Makes the container, whose root file system is mounted: with what closes its stdin, and what tells when it is gone.
    async fn make_in(
        &self,
        request: &CreateTaskRequest,
        role: Role,
        stdio: &Stdio,
    ) -> Result<(Arc<Container>, Option<InputCloser>, watch::Receiver<bool>), CallError> {
        let options = self.options(&request.id, Path::new(&request.bundle));
        if role == Role::Sandbox {
            let (container, gone) = self.order_pod(options).await?;
            return Ok((container, None, gone));
        }
        let source = Source { namespace: self.events.namespace(), id: &request.id };
        let (ends, stdin) = stdio.open(source).await.map_err(|error| CallError::BadRequest(text::chain(&error)))?;
        let pod = self.containers().pod.clone().filter(|_| role != Role::Alone);
        let (container, gone) = match pod {
            Some(pod) => {
                let made = pod.create(&options, ends).await;
                let Member { container, gone } = made.map_err(|error| CallError::Create(text::chain(&error)))?;
                (container, gone)
            }
            None => self.order_container(options, ends).await?,
        };
        Ok((container, stdin, gone))
    }

    fn options(&self, id: &str, bundle: &Path) -> Options {
        Options {
            id: id.to_owned(),
            bundle: bundle.to_owned(),
            root: self.root.clone(),
            pid_file: None,
            console_socket: None,
            trace: None,
            preserve_fds: 0,
            mode: Mode::Served,
        }
    }

    /// Has a machine made by the loop that supervises it; what tells when it is gone.
    async fn order(&self, options: Options, kind: OrderKind) -> Result<watch::Receiver<bool>, CallError> {
        let (gone, is_gone) = watch::channel(false);
        self.orders.send(Order { options, kind, gone }).await.map_err(|_| ending())?;
        Ok(is_gone)
    }

    async fn order_container(
        &self,
        options: Options,
        ends: GivenEnds,
    ) -> Result<(Arc<Container>, watch::Receiver<bool>), CallError> {
        let (reply, made) = oneshot::channel();
        let gone = self.order(options, OrderKind::Container { ends, caller: Caller::Call(reply) }).await?;
        Ok((made.await.map_err(|_| ending())?.map_err(CallError::Create)?, gone))
    }

    async fn order_pod(&self, options: Options) -> Result<(Arc<Container>, watch::Receiver<bool>), CallError> {
        let (ready, made) = oneshot::channel();
        let gone = self.order(options, OrderKind::Pod { ready }).await?;
        let pod = made.await.map_err(|_| ending())?.map_err(CallError::Create)?;
        let sandbox = Arc::clone(&pod.sandbox);
        self.containers().pod = Some(pod);
        Ok((sandbox, gone))
    }

    /// Whether there is something here that is not the sandbox of that id, made or in the making.
    pub(super) fn serves_other_than(&self, id: &str) -> bool {
        let containers = self.containers();
        containers.sandbox.is_some() || containers.lives.keys().any(|other| other != id)
    }

    /// Makes a pod's machine as the Sandbox service asks for it.
    pub(super) async fn create_sandbox(&self, request: CreateSandboxRequest) -> Result<(), CallError> {
        let written = sandbox::config::write(self.events.namespace(), &request);
        written.map_err(|error| CallError::Create(text::chain(&error)))?;
        let _making = self.begin(&request.sandbox_id, &Role::Sandbox)?;
        let options = self.options(&request.sandbox_id, Path::new(&request.bundle_path));
        let made = self.order_pod(options).await;
        let mut containers = self.containers();
        containers.lives.remove(&request.sandbox_id);
        containers.has_machine = made.is_ok();
        let (container, gone) = made?;
        containers.sandbox = Some(Arc::new(Sandbox::new(container, gone)));
        Ok(())
    }

    /// The sandbox that the Sandbox service has made.
    pub(super) fn sandbox(&self, id: &str) -> Result<Arc<Sandbox>, CallError> {
        let sandbox = self.containers().sandbox.clone().filter(|sandbox| sandbox.id() == id);
        sandbox.ok_or_else(|| CallError::NoSuchContainer(id.to_owned()))
    }

    /// The sandbox, whoever has made it, or the one container, that the machine is for.
    pub(super) fn holder_of_machine(&self, id: &str) -> Result<Arc<Container>, CallError> {
        if let Ok(sandbox) = self.sandbox(id) {
            return Ok(sandbox.container());
        }
        let task = self.task(id)?;
        let is_member = self.containers().pod.as_ref().is_some_and(|pod| pod.sandbox.id() != id);
        if is_member {
            return Err(CallError::NotSupported(
                "what a container of a pod uses of the host: the machine is the pod's",
            ));
        }
        Ok(Arc::clone(&task.container))
    }

    /// Ends the server.
    pub(super) fn end(&self) {
        self.end.send_replace(true);
    }

    async fn delete(&self, id: &str) -> Result<DeleteResponse, CallError> {
        self.made(id).await;
        let task = self.task(id)?;
        let answer = task.delete().await?;
        if self.containers().lives.remove(id).is_none() {
            // Another call was faster.
            return Err(CallError::NoSuchContainer(id.to_owned()));
        }
        let event = TaskDelete {
            container_id: id.to_owned(),
            pid: answer.pid,
            exit_status: answer.exit_status,
            exited_at: answer.exited_at.clone(),
            ..TaskDelete::default()
        };
        self.events.publish(topics::DELETE, &event);
        Ok(answer)
    }
}

fn ending() -> CallError {
    CallError::Create("the shim is about to end".to_owned())
}

/// The calls.
#[derive(Debug, Clone)]
pub(super) struct ShimService {
    shared: Arc<Shared>,
    calls: Calls,
}

impl ShimService {
    pub(super) fn new(shared: Arc<Shared>, calls: Calls) -> Self {
        Self { shared, calls }
    }

    /// Does what a call asks of a container.
    async fn call<T, F>(&self, id: &str, work: impl FnOnce(Arc<Task>, Arc<Publisher>) -> F) -> ttrpc::Result<T>
    where
        T: Send + 'static,
        F: Future<Output = Result<T, CallError>> + Send + 'static,
    {
        let task = self.shared.task(id).map_err(status)?;
        self.calls.finish(work(task, Arc::clone(&self.shared.events))).await
    }
}

#[async_trait]
impl TaskApi for ShimService {
    async fn create(&self, _: &TtrpcContext, request: CreateTaskRequest) -> ttrpc::Result<CreateTaskResponse> {
        let shared = Arc::clone(&self.shared);
        self.calls.finish(async move { shared.create(request).await }).await
    }

    async fn state(&self, _: &TtrpcContext, request: StateRequest) -> ttrpc::Result<StateResponse> {
        let task = self.shared.task(&request.id).map_err(status)?;
        if request.exec_id.is_empty() {
            return Ok(task.state());
        }
        task.exec(&request.exec_id).and_then(|exec| exec.state(&task.container)).map_err(status)
    }

    async fn start(&self, _: &TtrpcContext, request: StartRequest) -> ttrpc::Result<StartResponse> {
        let exec_id = request.exec_id;
        self.call(&request.id, |task, events| async move {
            let pid = if exec_id.is_empty() {
                task.start(&events).await?
            } else {
                task.exec(&exec_id)?.start(&task, &events).await?
            };
            Ok(StartResponse { pid, ..StartResponse::default() })
        })
        .await
    }

    async fn exec(&self, _: &TtrpcContext, request: ExecProcessRequest) -> ttrpc::Result<Empty> {
        self.call(&request.id.clone(), |task, events| async move {
            let exec = ExecProcess::add(&task.container, events.namespace(), &request).await?;
            task.add(&request.exec_id, exec);
            let (container_id, exec_id) = (request.id, request.exec_id);
            let event = TaskExecAdded { container_id, exec_id, ..TaskExecAdded::default() };
            events.publish(topics::EXEC_ADDED, &event);
            Ok(Empty::default())
        })
        .await
    }

    async fn wait(&self, _: &TtrpcContext, request: WaitRequest) -> ttrpc::Result<WaitResponse> {
        let exec_id = request.exec_id;
        self.call(&request.id, |task, _| async move {
            let ended = if exec_id.is_empty() { task.wait().await? } else { task.exec(&exec_id)?.wait(&task).await? };
            let (exit_status, exited_at) = (u32::from(ended.status), timestamp(&ended));
            Ok(WaitResponse { exit_status, exited_at, ..WaitResponse::default() })
        })
        .await
    }

    async fn kill(&self, _: &TtrpcContext, request: KillRequest) -> ttrpc::Result<Empty> {
        let KillRequest { id, exec_id, signal, all, .. } = request;
        self.call(&id, |task, _| async move { task.kill(&exec_id, signal, all).await.map(|()| Empty::default()) }).await
    }

    async fn delete(&self, _: &TtrpcContext, request: DeleteRequest) -> ttrpc::Result<DeleteResponse> {
        if request.exec_id.is_empty() {
            let shared = Arc::clone(&self.shared);
            return self.calls.finish(async move { shared.delete(&request.id).await }).await;
        }
        self.call(&request.id, |task, _| async move {
            let ended = task.exec(&request.exec_id)?.delete(&task.container).await?;
            task.forget(&request.exec_id);
            let (exit_status, exited_at) = (u32::from(ended.status), timestamp(&ended));
            Ok(DeleteResponse { exit_status, exited_at, ..DeleteResponse::default() })
        })
        .await
    }

    async fn pids(&self, _: &TtrpcContext, request: PidsRequest) -> ttrpc::Result<PidsResponse> {
        self.call(&request.id, |task, _| async move {
            // An ended task has its process until it is deleted: containerd (from 1.7 on) takes a server that knows of no
            // process, or answers with an error, for one that was never given a task, and when it starts again ends that, exit
            // status and all. Init may be ending, or the guest not answer: it is a task all the same.
            let is_apart = task.container.is_sandbox() || task.container.status() == Status::Stopped;
            let listed = async { if is_apart { Ok(Vec::new()) } else { task.container.agent.processes().await } };
            let listed = timeout(LIST_PATIENCE, listed).await.ok().and_then(Result::ok).unwrap_or_default();
            if listed.is_empty() {
                let pid = task.container.record().pid;
                let processes = vec![ProcessInfo { pid, ..ProcessInfo::default() }];
                return Ok(PidsResponse { processes, ..PidsResponse::default() });
            }
            let mut processes = Vec::new();
            for process in listed {
                let pid = u32::try_from(process.pid).unwrap_or(0);
                let info = match process.exec_id.as_str() {
                    "" => MessageField::none(),
                    exec_id => {
                        let details = ProcessDetails { exec_id: exec_id.to_owned(), ..ProcessDetails::default() };
                        MessageField::some(any(PROCESS_DETAILS_TYPE, &details)?)
                    }
                };
                processes.push(ProcessInfo { pid, info, ..ProcessInfo::default() });
            }
            Ok(PidsResponse { processes, ..PidsResponse::default() })
        })
        .await
    }

    async fn pause(&self, _: &TtrpcContext, request: PauseRequest) -> ttrpc::Result<Empty> {
        self.call(&request.id, |task, events| async move { task.pause(&events).await.map(|()| Empty::default()) }).await
    }

    async fn resume(&self, _: &TtrpcContext, request: ResumeRequest) -> ttrpc::Result<Empty> {
        self.call(&request.id, |task, events| async move { task.resume(&events).await.map(|()| Empty::default()) })
            .await
    }

    async fn checkpoint(&self, _: &TtrpcContext, _: CheckpointTaskRequest) -> ttrpc::Result<Empty> {
        Err(status(CallError::NotSupported("checkpoint: a container cannot be saved")))
    }

    async fn resize_pty(&self, _: &TtrpcContext, request: ResizePtyRequest) -> ttrpc::Result<Empty> {
        self.call(&request.id, |task, _| async move {
            let size = Size { rows: request.height, columns: request.width };
            execs::resize(&task.container, &request.exec_id, size).await.map(|()| Empty::default())
        })
        .await
    }

    async fn close_io(&self, _: &TtrpcContext, request: CloseIORequest) -> ttrpc::Result<Empty> {
        let task = self.shared.task(&request.id).map_err(status)?;
        if !request.stdin {
            return Ok(Empty::default());
        }
        if request.exec_id.is_empty() {
            task.close_stdin();
        } else {
            task.exec(&request.exec_id).map_err(status)?.close_stdin();
        }
        Ok(Empty::default())
    }

    async fn update(&self, _: &TtrpcContext, request: UpdateTaskRequest) -> ttrpc::Result<Empty> {
        self.call(&request.id.clone(), |task, _| async move {
            update(&task.container, &request).await.map(|()| Empty::default())
        })
        .await
    }

    async fn stats(&self, _: &TtrpcContext, request: StatsRequest) -> ttrpc::Result<StatsResponse> {
        self.call(&request.id, |task, _| async move {
            let metrics = metrics::translate(&task.container.stats().await?);
            let stats = MessageField::some(any(metrics::TYPE, &metrics)?);
            Ok(StatsResponse { stats, ..StatsResponse::default() })
        })
        .await
    }

    async fn connect(&self, _: &TtrpcContext, request: ConnectRequest) -> ttrpc::Result<ConnectResponse> {
        let task_pid = self.shared.task(&request.id).map_or(0, |task| task.container.record().pid);
        let (shim_pid, version) = (std::process::id(), env!("CARGO_PKG_VERSION").to_owned());
        Ok(ConnectResponse { shim_pid, task_pid, version, ..ConnectResponse::default() })
    }

    async fn shutdown(&self, _: &TtrpcContext, request: ShutdownRequest) -> ttrpc::Result<Empty> {
        let is_in_use = {
            let containers = self.shared.containers();
            // Each container of a pod is followed by such a call: the last one's is meant, or the Sandbox service's own.
            !containers.lives.is_empty() || containers.sandbox.is_some()
        };
        if request.now || !is_in_use {
            self.shared.end();
        }
        Ok(Empty::default())
    }
}
