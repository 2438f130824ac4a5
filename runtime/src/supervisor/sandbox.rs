// SPDX-License-Identifier: Apache-2.0
//! The supervising loop: everything that a sandbox reacts to, from its VMM's start to its end.

use std::cell::Cell;
use std::mem;
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::Arc;
use std::time::Duration;

use bulkhead_protocol::agent::{
    ConfigureNetworkRequest, ConfigureSandboxRequest, CreateContainerRequest, WaitProcessResponse,
};
use bulkhead_vmm::config::ShareTree;
use nix::sys::signal::Signal;
use tokio::io::AsyncReadExt;
use tokio::sync::Notify;
use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel};
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep_until, timeout};

use super::agent::{Agent, AgentError};
use super::caller::Caller;
use super::connections::{Connections, Room};
use super::container::{CallError, Container, DEFIANT, LateNetwork};
use super::disks::Disks;
use super::error::{Loss, Phase, RunError};
use super::launch::Options;
use super::machine_cpus::{CpuClaim, MachineCpus};
use super::machine_memory::{Claim, MachineMemory};
use super::network::NetworkTask;
use super::pid_file;
use super::proc_view::ProcPlace;
use super::ready;
use super::signals::{self, BlockedSignals, Received, SignalStream};
use super::state::{Record, StateDir, Status};
use super::streams::{self, Ends, Outputs, StreamIds};
use super::submounts::{self, Following};
use super::task_service::TaskServer;
use super::terminal::{self, RawTerminal, Size};
use super::vmm::{self, Vmm, VmmEvent, VmmSockets};
use super::vmm_control::VmmControl;
use crate::cgroup::HostCgroup;
use crate::hooks::{self, Hook, Hooks, State};
use crate::logging;
use crate::network::user::Passt;
use crate::network::{Follower, Network};
use crate::notify::Notice;
use crate::pidfd;
use crate::resctrl::ResctrlGroup;
use crate::spec::{CpuLimit, Machine};
use crate::storage::HostSocket;
use crate::text;
use crate::trace::{Trace, Track, now_ns};

/// How long a VMM may take to be gone after its connections are.
pub(super) const GONE_TIMEOUT: Duration = Duration::from_secs(2);

/// What a sandbox is started with besides what it owns.
pub(super) struct Launched {
    pub(super) start: Start,
    pub(super) record: Record,
    pub(super) machine: Machine,
    /// What the container may use of its processors.
    pub(super) cpu_limit: CpuLimit,
    pub(super) sockets: VmmSockets,
    /// Those of the host that the container may connect to.
    pub(super) host_sockets: Vec<HostSocket>,
    pub(super) resctrl: Option<ResctrlGroup>,
    pub(super) signals: BlockedSignals,
    pub(super) task: UnixListener,
    pub(super) ends: Ends,
    /// What changes in the network.
    pub(super) follower: Option<Follower>,
    /// What the network is instead.
    pub(super) passt: Option<Passt>,
    /// Who is told that the container is ready.
    pub(super) notice: Option<Notice>,
}

/// What is to be made.
pub(super) struct Start {
    /// Where it has block devices, with the numbers that they have on the host.
    pub(super) request: CreateContainerRequest,
    /// The block devices of the host that it has.
    pub(super) disks: Disks,
    /// The trees in which what the host mounts is to be seen.
    pub(super) followed: Vec<ShareTree>,
    /// What the guest's network is to be; `None` for a loopback of the container's own.
    pub(super) network: Option<ConfigureNetworkRequest>,
    /// What is to be set in the guest's own namespaces before, if anything.
    pub(super) shared: Option<ConfigureSandboxRequest>,
    pub(super) hooks: Hooks,
    /// What hooks are told of the container.
    pub(super) hook_state: State,
    pub(super) boot_timeout: Duration,
}

/// What there is of a running sandbox, in the order in which it is undone.
#[derive(Debug)]
pub(super) struct Sandbox {
    raw: Option<RawTerminal>,
    vmm: Vmm,
    passt: Option<Passt>,
    cgroup: Option<Arc<HostCgroup>>,
    resctrl: Option<ResctrlGroup>,
    network: Option<Network>,
    state: StateDir,
    terminal: bool,
    /// The size that the container's terminal has.
    size: Option<Size>,
    streams: StreamIds,
    /// Until the streams are opened.
    ends: Ends,
    outputs: Option<Outputs>,
    /// Until they are served.
    host_sockets: Vec<HostSocket>,
    connections: Connections,
    phase: Phase,
    follower: Option<Follower>,
    /// Where the container's processes are to be seen, until they are.
    processes: Option<ProcPlace>,
    /// Who is to be told that the container is ready, until somebody waits for that, and who does.
    notice: Option<Notice>,
    notices: JoinSet<()>,
    /// Work that ends with the sandbox.
    tasks: JoinSet<()>,
}

/// Where things come from that a sandbox reacts to in every state.
struct Events<'a> {
    vmm: UnboundedReceiver<VmmEvent>,
    signals: SignalStream,
    control: VmmControl,
    /// Signals that did not arrive.
    failures: UnboundedReceiver<AgentError>,
    failed: UnboundedSender<AgentError>,
    trace: &'a mut Trace,
}

impl Sandbox {
    /// A sandbox whose VMM has been started.
    pub(super) fn new(
        vmm: Vmm,
        cgroup: Option<HostCgroup>,
        network: Option<Network>,
        state: StateDir,
        terminal: bool,
        size: Option<Size>,
        streams: StreamIds,
    ) -> Self {
        Self {
            raw: None,
            vmm,
            passt: None,
            cgroup: cgroup.map(Arc::new),
            resctrl: None,
            network,
            state,
            terminal,
            size,
            streams,
            ends: Ends::default(),
            outputs: None,
            host_sockets: Vec::new(),
            connections: Connections::default(),
            phase: Phase::Booting,
            follower: None,
            processes: None,
            notice: None,
            notices: JoinSet::new(),
            tasks: JoinSet::new(),
        }
    }

    /// Has the container's processes seen in `place` once there are any.
    pub(super) fn show_processes_in(&mut self, place: Option<ProcPlace>) {
        self.processes = place;
    }

    /// Supervises until the end; the container's exit status. A caller is told when the container is created, or
    /// started, and taken.
    pub(super) async fn supervise(
        mut self,
        options: &Options,
        launched: Launched,
        caller: &mut Option<Caller>,
        trace: &mut Trace,
    ) -> Result<u8, RunError> {
        let Start { hooks, hook_state, .. } = &launched.start;
        let (last_hooks, ended) = (hooks.poststop.clone(), hook_state.at(hooks::Status::Stopped, None));
        let (start, container, server, mut events) = match self.take_over(options, launched, trace).await {
            Ok(parts) => parts,
            Err(error) => {
                let kept = self.state.is_kept();
                drop(self);
                if !kept {
                    hooks::run_all(&last_hooks, &ended).await;
                }
                return Err(error);
            }
        };

        let result = self.live(options, &container, &start, caller, &mut events).await;
        let status = result.as_ref().map_or_else(RunError::exit_status, |status| *status);
        let begin_ns = now_ns();
        // The machine goes first: who learns of the end may rely on it.
        let vmm_end = (!start.disks.is_empty()).then(|| self.vmm.watch());
        let Self { raw, vmm, passt, cgroup, resctrl, network, state, notices, tasks, .. } = self;
        // In this order: a cgroup is removed when it has no process.
        drop((raw, vmm, passt, cgroup, resctrl, network, tasks));
        if let Some(Ok(end)) = vmm_end {
            // Until then it has block devices of the host open, which their owner may be about to take apart.
            let _ = timeout(GONE_TIMEOUT, pidfd::ended(end)).await;
        }
        let kept = state.is_kept();
        // What is kept is let go of when it says how the container ended: without its supervisor it is taken for stopped.
        let state = kept.then_some(state);
        container.stopped(status, kept);
        // Who waits for the container to be ready finds that it has ended.
        drop((state, notices));
        server.stop().await;
        events.trace.since("teardown", begin_ns);
        // `delete` runs those of a container whose state is kept.
        if !kept {
            hooks::run_all(&last_hooks, &ended).await;
        }
        result
    }

    /// What is needed to look after the container: its calls are answered from here on.
    async fn take_over<'a>(
        &mut self,
        options: &Options,
        launched: Launched,
        trace: &'a mut Trace,
    ) -> Result<(Start, Arc<Container>, TaskServer, Events<'a>), RunError> {
        let Launched {
            start,
            record,
            machine,
            cpu_limit,
            sockets,
            host_sockets,
            resctrl,
            signals,
            task,
            ends,
            follower,
            passt,
            notice,
        } = launched;
        (self.ends, self.follower, self.host_sockets) = (ends, follower, host_sockets);
        (self.passt, self.resctrl, self.notice) = (passt, resctrl, notice);
        let (vmm_sender, vmm_events) = unbounded_channel();
        let (failed, failures) = unbounded_channel();
        let signals = signals.into_stream().map_err(RunError::Signals)?;
        let control = VmmControl::new(sockets.control);
        let events = Events { vmm: vmm_events, signals, control: control.clone(), failures, failed, trace };
        sockets.report.set_nonblocking(true).map_err(RunError::EventLoop)?;
        let report = tokio::net::UnixStream::from_std(sockets.report).map_err(RunError::EventLoop)?;
        let agent = Agent::new(sockets.agent, options.id.clone()).map_err(RunError::EventLoop)?;
        let cgroup = self.cgroup.as_ref().map(Arc::downgrade).unwrap_or_default();
        let memory = MachineMemory::new(&machine, control.clone(), agent.clone(), cgroup.clone());
        let cpus = CpuClaim::new(MachineCpus::new(&machine, agent.clone()), cpu_limit);
        let (init, poststart) = (&start.request.process, start.hooks.poststart.clone());
        let container = Container::new(agent, record, init, poststart, cgroup, self.state.handle()?);
        let container = Arc::new(container.claiming(Claim::new(memory), cpus));
        if let Some(place) = self.processes.take() {
            place.serve(container.agent.clone(), &mut self.tasks);
        }
        let (watched, told) = (self.vmm.watch().map_err(RunError::EventLoop)?, Arc::clone(&container));
        tokio::spawn(vmm::follow(report, watched, control, vmm_sender, move || told.network_is_without_vhost()));
        let server = TaskServer::of_container(task, &container).await.map_err(RunError::EventLoop)?;
        Ok((start, container, server, events))
    }

    /// From a booting machine to the container's end, and its exit status.
    async fn live(
        &mut self,
        options: &Options,
        container: &Arc<Container>,
        start: &Start,
        caller: &mut Option<Caller>,
        events: &mut Events<'_>,
    ) -> Result<u8, RunError> {
        let Start { hooks, hook_state, .. } = start;
        self.run_hooks(&hooks.create, hook_state, None, events).await?;
        let parent = caller.as_ref().map(Caller::watch).transpose().map_err(RunError::EventLoop)?.flatten();
        for following in self.create(container, start, events, parent).await? {
            self.tasks.spawn(following.run());
        }
        self.phase = Phase::Running;
        self.connections =
            Connections::serve(Arc::clone(container), mem::take(&mut self.host_sockets), Room::default());
        if let Some(follower) = self.follower.take() {
            let (container, agent, control) = (Arc::clone(container), container.agent.clone(), events.control.clone());
            let task = NetworkTask { container, agent, control, forwards: true };
            task.start(follower, &mut self.tasks).map_err(RunError::EventLoop)?;
        }
        if let Some(passt) = &self.passt {
            let (end, container) = (passt.end().map_err(RunError::EventLoop)?, Arc::clone(container));
            self.tasks.spawn(async move {
                let Some(how) = end.await else { return };
                container.network_is_lost();
                logging::warn(format_args!("the container has no network from here on: {how}"));
            });
        }
        let started_ns = now_ns();
        container.enter(if options.mode.starts() { Status::Running } else { Status::Created });
        if let Some(path) = &options.pid_file {
            pid_file::write(path).map_err(|source| RunError::PidFile { path: path.clone(), source })?;
        }
        let hook_state = hook_state.at(hooks::Status::Running, Some(std::process::id()));
        if options.mode.starts() {
            self.run_hooks(&hooks.poststart, &hook_state, Some(container), events).await?;
        }
        if options.mode.keeps() {
            self.state.keep();
        }
        let notice = self.notice.take();
        match caller.take() {
            Some(caller) if matches!(notice, Some(Notice::Caller)) => {
                drop(self.notices.spawn(ready::report(Arc::clone(container), caller)));
            }
            Some(caller) => caller.succeeded(container),
            None => {}
        }
        if let Some(Notice::Supervisor { manager, with_pid }) = notice {
            self.notices.spawn(ready::tell(Arc::clone(container), manager, with_pid));
        }
        let exit = self.wait(container, events).await?;
        let exited_ns = events.trace.guest_to_host(exit.exited_at_ns);
        events.trace.add(Track::Supervisor, "running", started_ns, now_ns());

        self.phase = Phase::Draining;
        let begin_ns = now_ns();
        self.drain(container, events).await?;
        let trace = &mut events.trace;
        for LateNetwork { backend, begin_ns, end_ns } in container.late_networks() {
            trace.add(Track::Supervisor, &format!("network ({backend})"), begin_ns, end_ns);
        }
        if let Some(first_ns) = self.outputs.as_ref().and_then(Outputs::first_output_ns) {
            trace.add(Track::Supervisor, "first output", first_ns, first_ns);
        }
        trace.add_guest(&exit.trace);
        trace.add(Track::Guest, "exit", exited_ns, exited_ns);
        trace.since("drain", begin_ns);
        if exit.oom_kills > 0 {
            logging::warn(format_args!("the guest's kernel killed a process of the container: out of memory"));
        }
        // The guest's word is only believed as far as an exit status goes.
        Ok(u8::try_from(exit.exit_status).unwrap_or(u8::MAX))
    }

    /// From a booting machine to a container that waits for its start, or whose program runs; its trees that are to be followed.
    async fn create(
        &mut self,
        container: &Container,
        start: &Start,
        events: &mut Events<'_>,
        parent: Option<UnixStream>,
    ) -> Result<Vec<Following>, RunError> {
        let Start { request, disks, followed, network, shared, boot_timeout, .. } = start;
        let (agent, boot_timeout) = (&container.agent, *boot_timeout);
        let spawned_ns = now_ns();
        let (agent_up_ns, machine_runs) = (Cell::new(0), Notify::new());
        let (vsock, ids, terminal) = (self.state.vsock_path(), self.streams, self.terminal);
        let ends = mem::take(&mut self.ends);
        let control = events.control.clone();
        let passt_ready = self.passt.as_ref().map(Passt::ready);
        let result = {
            let answer = async {
                let info = agent.get_info().await.map_err(RunError::Agent)?;
                agent_up_ns.set(now_ns());
                machine_runs.notify_one();
                // The agent listens for streams before it connects.
                let raw = terminal.then(RawTerminal::enter).transpose()?;
                Ok((info, raw, streams::open(&vsock, ids).await?.pump(ends)?))
            };
            let created = async {
                if let Some(ready) = passt_ready {
                    ready.await?;
                }
                if let Some(network) = network {
                    agent.configure_network(network).await.map_err(RunError::ConfigureNetwork)?;
                }
                if let Some(shared) = shared {
                    agent.configure_sandbox(shared).await.map_err(RunError::ConfigureNetwork)?;
                }
                let following = submounts::follow_all(followed, &machine_runs, &control).await?;
                if disks.is_empty() {
                    return Ok((agent.create(request).await.map_err(RunError::Create)?, following));
                }
                let found = disks.find(agent).await.map_err(RunError::FindDisks)?;
                let request = disks.localized(request, &found);
                container.has_disks(found);
                Ok((agent.create(&request).await.map_err(RunError::Create)?, following))
            };
            let create = async { tokio::try_join!(answer, created) };
            let caller_gone = hang_up(parent);
            tokio::pin!(create, caller_gone);
            let mut deadline = Instant::now() + boot_timeout;
            loop {
                tokio::select! {
                    result = &mut create => break result,
                    event = events.vmm.recv() => self.on_vmm_event(event, events.trace)?,
                    signal = events.signals.next() => {
                        let signal = signal.map_err(RunError::Signals)?;
                        if signals::ends_a_start(signal) {
                            return Err(RunError::Interrupted(signal));
                        }
                    }
                    () = &mut caller_gone => return Err(RunError::CallerGone),
                    () = sleep_until(deadline) => {
                        // Once the agent has answered, the container has as much time again.
                        if agent_up_ns.get() == 0 || self.phase == Phase::Starting {
                            let (phase, console) = (self.phase, self.vmm.console_tail());
                            return Err(RunError::Deadline { phase, timeout: boot_timeout, console });
                        }
                        self.phase = Phase::Starting;
                        deadline = Instant::now() + boot_timeout;
                    }
                }
            }
        };
        let (info, raw, outputs, following) = match result {
            Ok(((info, raw, outputs), (created, following))) => {
                let up_ns = agent_up_ns.get();
                events.trace.set_guest_clock(info.now_ns, up_ns);
                events.trace.add(Track::Supervisor, "boot", spawned_ns, up_ns);
                events.trace.since("create container", up_ns);
                events.trace.add_guest(&created.trace);
                (info, raw, outputs, following)
            }
            Err(error) => return Err(self.explain(error, events).await),
        };
        events.trace.add_guest(&info.trace);
        self.raw = raw;
        self.outputs = Some(outputs);
        let (agent, kernel) = (text::one_line(&info.agent_version), text::one_line(&info.kernel_release));
        logging::debug(format_args!("agent {agent} on Linux {kernel}"));
        Ok(following)
    }

    /// Runs hooks. Signals are the container's, if there is one to pass them on to; else they end the start.
    async fn run_hooks(
        &mut self,
        hooks: &[Hook],
        state: &State,
        container: Option<&Arc<Container>>,
        events: &mut Events<'_>,
    ) -> Result<(), RunError> {
        let running = hooks::run(hooks, state);
        tokio::pin!(running);
        loop {
            tokio::select! {
                result = &mut running => return Ok(result?),
                event = events.vmm.recv() => self.on_vmm_event(event, events.trace)?,
                signal = events.signals.next() => {
                    let signal = signal.map_err(RunError::Signals)?;
                    match container {
                        Some(container) => self.forward(container, signal, &events.failed),
                        None if signals::ends_a_start(signal) => return Err(RunError::Interrupted(signal)),
                        None => {}
                    }
                }
            }
        }
    }

    /// Until init has ended.
    async fn wait(
        &mut self,
        container: &Arc<Container>,
        events: &mut Events<'_>,
    ) -> Result<WaitProcessResponse, RunError> {
        // A change of size while the container was being made has been missed.
        self.resize(&container.agent);
        let streams = self.outputs.as_ref().map(Outputs::streams).unwrap_or_default();
        let (wait, defies_kill) = (container.exit(&streams), container.defies_kill(&streams));
        tokio::pin!(wait, defies_kill);
        loop {
            let error = tokio::select! {
                result = &mut wait => match result {
                    Ok(exit) => return Ok(exit),
                    Err(error) => RunError::Agent(error),
                },
                event = events.vmm.recv() => {
                    self.on_vmm_event(event, events.trace)?;
                    continue;
                }
                signal = events.signals.next() => {
                    let signal = signal.map_err(RunError::Signals)?;
                    if container.init_has_ended() && signals::ends_a_start(signal) {
                        return Err(RunError::InterruptedDrain(signal));
                    }
                    self.forward(container, signal, &events.failed);
                    continue;
                }
                () = &mut defies_kill => return Err(self.lost(DEFIANT)),
                Some(error) = events.failures.recv() => match error {
                    AgentError::Timeout => return Err(self.lost("the guest's agent no longer answers")),
                    error => RunError::Agent(error),
                },
            };
            return Err(self.explain(error, events).await);
        }
    }

    /// After init's end: until its output is delivered and its files are written back.
    async fn drain(&mut self, container: &Container, events: &mut Events<'_>) -> Result<(), RunError> {
        let mut outputs = self.outputs.take();
        let mut connections = mem::take(&mut self.connections);
        let mut notices = mem::take(&mut self.notices);
        let drained = async {
            if let Some(outputs) = &mut outputs {
                tokio::select! {
                    () = outputs.drained() => {}
                    () = container.output_given_up() => {}
                }
            }
            Ok(())
        };
        let deleted = async {
            tokio::join!(container.farewell(), connections.finish(), ready::finish(&mut notices));
            container.agent.delete(false).await.map_err(RunError::Delete)
        };
        let result = {
            let done = async { tokio::try_join!(drained, deleted) };
            tokio::pin!(done);
            loop {
                tokio::select! {
                    result = &mut done => break result.map(|_| ()),
                    event = events.vmm.recv() => self.on_vmm_event(event, events.trace)?,
                    signal = events.signals.next() => {
                        let signal = signal.map_err(RunError::Signals)?;
                        if signals::ends_a_start(signal) {
                            return Err(RunError::InterruptedDrain(signal));
                        }
                    }
                }
            }
        };
        self.outputs = outputs;
        match result {
            Ok(()) => Ok(()),
            Err(error) => Err(self.explain(error, events).await),
        }
    }

    fn forward(&mut self, container: &Arc<Container>, signal: Received, failed: &UnboundedSender<AgentError>) {
        if signal.is(Signal::SIGWINCH) && self.terminal {
            self.resize(&container.agent);
            return;
        }
        let (container, failed) = (Arc::clone(container), failed.clone());
        tokio::spawn(async move {
            match container.kill(signal.number(), false).await {
                Ok(()) => {}
                Err(CallError::Agent(error @ (AgentError::Lost | AgentError::Timeout))) => {
                    let _ = failed.send(error);
                }
                // A process that has just ended is no failure.
                Err(error) => logging::debug(format_args!("{signal} was not delivered: {error}")),
            }
        });
    }

    fn resize(&mut self, agent: &Agent) {
        let size = terminal::size().filter(|_| self.terminal);
        if let Some(size) = size.filter(|size| self.size != Some(*size)) {
            self.size = Some(size);
            let agent = agent.clone();
            tokio::spawn(async move {
                if let Err(error) = agent.resize("", size).await {
                    logging::debug(format_args!("the terminal's size was not passed on: {error}"));
                }
            });
        }
    }

    /// Records a trace point; fails when the VMM is gone.
    fn on_vmm_event(&mut self, event: Option<VmmEvent>, trace: &mut Trace) -> Result<(), RunError> {
        let end = match event {
            Some(VmmEvent::Trace { name, begin_ns, end_ns }) => {
                trace.add(Track::Vmm, &name, begin_ns, end_ns);
                return Ok(());
            }
            Some(VmmEvent::Gone(end)) => end,
            None => None,
        };
        let cause = vmm::describe_end(end, self.vmm.reap(), &self.vmm.stderr());
        Err(self.lost(cause))
    }

    fn lost(&self, cause: impl Into<String>) -> RunError {
        RunError::Lost(Loss { phase: self.phase, cause: cause.into(), console: self.vmm.console_tail() })
    }

    /// A lost connection has a cause, which the VMM's end tells; it comes at once, or not at all.
    async fn explain(&mut self, error: RunError, events: &mut Events<'_>) -> RunError {
        if !error.is_lost_connection() {
            return error;
        }
        let cause = async {
            loop {
                let event = events.vmm.recv().await;
                if let Err(loss) = self.on_vmm_event(event, events.trace) {
                    return loss;
                }
            }
        };
        match timeout(GONE_TIMEOUT, cause).await {
            Ok(loss) => loss,
            Err(_) => self.lost("the guest's agent ended its connection"),
        }
    }
}

/// Returns when whoever waits for the report is gone; never where nobody does.
async fn hang_up(parent: Option<UnixStream>) {
    if let Some(parent) = parent
        && parent.set_nonblocking(true).is_ok()
        && let Ok(mut parent) = tokio::net::UnixStream::from_std(parent)
    {
        // It sends nothing: whatever comes is its end.
        let _ = parent.read(&mut [0]).await;
        return;
    }
    std::future::pending::<()>().await;
}
