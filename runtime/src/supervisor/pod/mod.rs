// SPDX-License-Identifier: Apache-2.0
//! A pod: one machine in which containers come and go.
//!
//! | part | what it knows |
//! | --- | --- |
//! | this | the machine's life, from its start to the sandbox's end |
//! | `member` | the life of one container in it |
//! | `trees` | which of the host's files the machine has been given, and for whom |
//! | `disks` | which of its block devices |
//!
//! The sandbox is a container that no process in the guest stands for: it is created with the machine, and its end is the
//! machine's. A container's end is its own.

mod disks;
mod member;
mod trees;

use std::path::PathBuf;
use std::process;
use std::sync::Arc;
use std::sync::atomic::AtomicU32;
use std::time::Duration;

use bulkhead_protocol::agent::{ConfigureNetworkRequest, ConfigureSandboxRequest};
use oci_spec::runtime::Mount;
use tokio::sync::{mpsc, oneshot, watch};
use tokio::task::JoinSet;
use tokio::time::{sleep, timeout};

pub(crate) use self::disks::DiskError;
use self::disks::{MAX_POD_DISKS, PodDisks};
pub(crate) use self::member::Member;
use self::trees::PodTrees;
use super::agent::Agent;
use super::connections::Room;
use super::container::Container;
use super::error::{Loss, Phase, RunError};
use super::execs;
use super::forward::forward;
use super::groundwork;
use super::launch::{self, Booted, Options};
use super::machine_cpus::MachineCpus;
use super::machine_memory::MachineMemory;
use super::network::NetworkTask;
use super::oom_score::VmmScore;
use super::pod_cpus::PodCpus;
use super::signals::{self, BlockedSignals};
use super::state::{self, Record, Status, sweep};
use super::task_service::TaskServer;
use super::vmm::{self, Vmm, VmmEvent};
use super::vmm_control::VmmControl;
use crate::cgroup::HostCgroup;
use crate::install::Install;
use crate::logging;
use crate::network::Follower;
use crate::spec::{self, PodNamespaces, Role};
use crate::storage::Shares;
use crate::text;
use crate::trace::Trace;

/// The status of a sandbox that was lost with its machine.
const LOST: u8 = 137;

/// How long the containers may take to notice the machine's end.
const FAREWELL: Duration = Duration::from_secs(10);

/// A pod's machine, as those see it who put containers into it.
#[derive(Debug)]
pub(crate) struct Pod {
    /// The sandbox.
    pub(crate) sandbox: Arc<Container>,
    root: PathBuf,
    agent: Agent,
    trees: PodTrees,
    disks: PodDisks,
    memory: Arc<MachineMemory>,
    cpus: Arc<MachineCpus>,
    oom_score: Arc<VmmScore>,
    host_cpus: Arc<PodCpus>,
    connections: Room,
    /// Whether the machine grows for a container that comes: not where the sum of all their limits has been told.
    grows: bool,
    namespaces: PodNamespaces,
    /// What containers inherit.
    mounts: Vec<Mount>,
    /// Each container that has its processes to itself holds one.
    own_pids: Arc<()>,
    /// Of streams, each used once.
    numbers: Arc<AtomicU32>,
    boot_timeout: Duration,
    /// Whether the machine is gone.
    gone: watch::Receiver<bool>,
    /// Each container holds one until nothing is left of it.
    alive: mpsc::WeakSender<()>,
}

impl Pod {
    /// Returns when the machine is gone.
    async fn machine_gone(&self) {
        // A sender that is gone says the same.
        let _ = self.gone.clone().wait_for(|gone| *gone).await;
    }
}

/// What a sandbox's machine is set up with.
struct Setup {
    network: Option<ConfigureNetworkRequest>,
    sandbox: ConfigureSandboxRequest,
    control: VmmControl,
}

/// Makes a pod's machine, and supervises it to the sandbox's end; within an event loop. The caller is told once
/// containers can be put into it; a failure after that is logged.
pub(crate) async fn serve(options: &Options, ready: oneshot::Sender<Result<Arc<Pod>, String>>) {
    let mut ready = Some(ready);
    if let Err(error) = make(options, &mut ready).await {
        let message = text::chain(&error);
        match ready {
            // A call that is no longer waited for has nobody to tell.
            Some(ready) => drop(ready.send(Err(message))),
            None => logging::error(format_args!("{message}")),
        }
    }
}

async fn make(
    options: &Options,
    ready: &mut Option<oneshot::Sender<Result<Arc<Pod>, String>>>,
) -> Result<(), RunError> {
    state::check_id(&options.id)?;
    let translated = spec::load_as(&options.bundle, Role::Sandbox)?;
    let install = Install::find()?;
    let (parts, boot_timeout) = (install.open()?, install.boot_timeout);
    let signals = BlockedSignals::block().map_err(RunError::Signals)?;
    let request = translated.request;
    let (spec, shares, network) = (&translated.machine, &Shares::default(), translated.network);
    // It has a namespace's, and no other.
    let (namespaces, user_network, disks, spare_disks) = (None, None, &[], MAX_POD_DISKS);
    let machine =
        launch::Machine { spec, shares, namespaces, network, user_network, trees_grow: true, disks, spare_disks };
    let mut trace = Trace::create(None).map_err(|source| RunError::Trace { path: PathBuf::new(), source })?;
    let (state, cgroup) = groundwork::places(options, &translated.cgroup)?;
    let cgroup = cgroup.map(Arc::new);
    let booted = launch::boot(options, &install, parts, machine, &state, &mut trace)?;
    let Booted { vmm, network, passt: _, net_backend, network_request, follower, sockets } = booted;
    let control = VmmControl::new(sockets.control);
    let setup = Setup {
        network: network_request,
        sandbox: ConfigureSandboxRequest {
            hostname: request.hostname,
            domainname: request.domainname,
            sysctls: request.sysctls,
            ..ConfigureSandboxRequest::default()
        },
        control: control.clone(),
    };
    let grows = !spec::tells_memory_of_pod(&translated.annotations);
    let namespaces = PodNamespaces { pid: process::id(), named: translated.named_namespaces };
    let record = Record {
        id: options.id.clone(),
        pid: process::id(),
        status: Status::Creating,
        bundle: translated.bundle,
        rootfs: PathBuf::new(),
        created: state::now(),
        annotations: translated.annotations,
        kept: false,
        exit_status: None,
        net_backend,
        poststop: Vec::new(),
        sandbox: None,
        notifies: false,
    };
    state.record(&record)?;
    let task = state.bind_task()?;
    sweep(&options.root);

    let agent = Agent::new(sockets.agent, options.id.clone()).map_err(RunError::EventLoop)?;
    let (vmm_sender, vmm_events) = mpsc::unbounded_channel();
    sockets.report.set_nonblocking(true).map_err(RunError::EventLoop)?;
    let report = tokio::net::UnixStream::from_std(sockets.report).map_err(RunError::EventLoop)?;
    let watched = vmm.watch().map_err(RunError::EventLoop)?;
    let (numbers, weak_cgroup) = (execs::stream_numbers(), cgroup.as_ref().map(Arc::downgrade).unwrap_or_default());
    let sandbox = Container::sandbox(agent.clone(), record, weak_cgroup.clone(), state.handle()?);
    let sandbox = Arc::new(sandbox.numbering_streams(Arc::clone(&numbers)));
    let told = Arc::clone(&sandbox);
    let without_vhost = move || told.network_is_without_vhost();
    tokio::spawn(vmm::follow(report, watched, control.clone(), vmm_sender, without_vhost));
    let memory = MachineMemory::new(&translated.machine, control.clone(), agent.clone(), weak_cgroup.clone());
    let cpus = MachineCpus::new(&translated.machine, agent.clone());
    let (gone, is_gone) = watch::channel(false);
    let (alive, all_ended) = mpsc::channel(1);
    let pod = Arc::new(Pod {
        sandbox: Arc::clone(&sandbox),
        root: options.root.clone(),
        disks: PodDisks::new(control.clone(), agent.clone()),
        agent,
        trees: PodTrees::new(control),
        memory,
        cpus,
        oom_score: VmmScore::of(vmm.pid()),
        host_cpus: PodCpus::new(weak_cgroup, translated.cgroup.limits.cpus),
        connections: Room::default(),
        grows,
        namespaces,
        mounts: translated.inherited,
        own_pids: Arc::default(),
        numbers,
        boot_timeout,
        gone: is_gone,
        alive: alive.downgrade(),
    });
    let server = TaskServer::of_container(task, &sandbox).await.map_err(RunError::EventLoop)?;

    let mut tasks = JoinSet::new();
    // While the guest boots: who has run the pod may connect at once.
    if let Some(listening) = network.as_ref().and_then(|network| network.loopback().listen()) {
        tasks.spawn(forward(listening, Arc::clone(&sandbox)));
    }
    let mut life = Life { vmm, phase: Phase::Booting, events: vmm_events, follower, tasks };
    let signals = signals.into_stream().map_err(RunError::Signals)?;
    let result = life.run(&pod, &setup, &signals, ready).await;
    let status = result.as_ref().copied().unwrap_or(LOST);
    // The machine goes first, and its containers with it: who learns of the sandbox's end may rely on it.
    drop(life);
    gone.send_replace(true);
    drop((alive, pod));
    all_members_ended(all_ended).await;
    drop::<(_, Option<Arc<HostCgroup>>, _)>((network, cgroup, state));
    sandbox.stopped(status, false);
    server.stop().await;
    result.map(drop)
}

async fn all_members_ended(mut ended: mpsc::Receiver<()>) {
    // Nothing is ever sent: the channel closes with the last container.
    if timeout(FAREWELL, ended.recv()).await.is_err() {
        logging::warn(format_args!("containers of the pod are still being removed"));
    }
}

/// The machine's life.
struct Life {
    vmm: Vmm,
    phase: Phase,
    events: mpsc::UnboundedReceiver<VmmEvent>,
    /// What changes in the network, until it is followed.
    follower: Option<Follower>,
    /// Work that ends with the machine.
    tasks: JoinSet<()>,
}

impl Life {
    /// To the sandbox's end; its exit status.
    async fn run(
        &mut self,
        pod: &Arc<Pod>,
        setup: &Setup,
        signals: &signals::SignalStream,
        ready: &mut Option<oneshot::Sender<Result<Arc<Pod>, String>>>,
    ) -> Result<u8, RunError> {
        let set_up = async {
            let info = pod.agent.get_info().await.map_err(RunError::Agent)?;
            if let Some(network) = &setup.network {
                pod.agent.configure_network(network).await.map_err(RunError::ConfigureNetwork)?;
            }
            pod.agent.configure_sandbox(&setup.sandbox).await.map_err(RunError::ConfigureSandbox)?;
            Ok::<_, RunError>(info)
        };
        let info = tokio::select! {
            // An agent that goes away goes with its machine, whose end says more.
            biased;
            lost = lost(&mut self.events) => return Err(self.loss(lost)),
            info = set_up => info?,
            () = sleep(pod.boot_timeout) => {
                let (phase, timeout, console) = (self.phase, pod.boot_timeout, self.vmm.console_tail());
                return Err(RunError::Deadline { phase, timeout, console });
            }
        };
        let (agent, kernel) = (text::one_line(&info.agent_version), text::one_line(&info.kernel_release));
        logging::debug(format_args!("agent {agent} on Linux {kernel}"));
        self.phase = Phase::Running;
        if let Some(follower) = self.follower.take() {
            let (container, agent) = (Arc::clone(&pod.sandbox), pod.agent.clone());
            let task = NetworkTask { container, agent, control: setup.control.clone(), forwards: false };
            task.start(follower, &mut self.tasks).map_err(RunError::EventLoop)?;
        }
        pod.sandbox.enter(Status::Created);
        if let Some(ready) = ready.take() {
            // Whoever no longer waits for it finds it all the same.
            let _ = ready.send(Ok(Arc::clone(pod)));
        }
        loop {
            tokio::select! {
                lost = lost(&mut self.events) => return Err(self.loss(lost)),
                status = pod.sandbox.end_wanted() => return Ok(status),
                signal = signals.next() => {
                    let signal = signal.map_err(RunError::Signals)?;
                    if signals::ends_a_start(signal) {
                        return Err(RunError::Interrupted(signal));
                    }
                }
            }
        }
    }

    fn loss(&mut self, end: Option<bulkhead_vmm::report::End>) -> RunError {
        let cause = vmm::describe_end(end, self.vmm.reap(), &self.vmm.stderr());
        RunError::Lost(Loss { phase: self.phase, cause, console: self.vmm.console_tail() })
    }
}

/// Returns when the VMM is gone, with its last word.
async fn lost(events: &mut mpsc::UnboundedReceiver<VmmEvent>) -> Option<bulkhead_vmm::report::End> {
    loop {
        match events.recv().await {
            Some(VmmEvent::Trace { .. }) => {}
            Some(VmmEvent::Gone(end)) => return end,
            None => return None,
        }
    }
}
