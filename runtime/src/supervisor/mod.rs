// SPDX-License-Identifier: Apache-2.0
//! A sandbox's life on the host, from `bulkhead run` to its exit.
//!
//! ```text
//!  checked ──> booting ──> starting ──> running ──> draining ──> gone
//!     │           │            │           │            │
//!     └───────────┴────────────┴───────────┴────────────┴──> failed
//! ```
//!
//! | state | what happens | what ends it early |
//! | --- | --- | --- |
//! | checked | configuration, parts and terminal are looked at; nothing exists yet | any fault of theirs |
//! | booting | state directory and VMM exist, the guest boots; the request to create the container is on its way | a signal, the VMM's end, the deadline |
//! | starting | the agent has answered; streams are opened, the container is created and its program executed | as above |
//! | running | bytes are pumped, signals and sizes forwarded | the VMM's end, an agent that does not answer |
//! | draining | init has ended; its output is delivered, its files written back | as above, and a second of the ending signals |
//! | gone, failed | everything is undone, in reverse | |
//!
//! Each step of the set-up is undone by the drop of the value that stands for it, so that a failure, a panic, and the
//! ordinary end take the same way: the terminal's mode comes back, the VMM is killed, the state directory is removed.

mod agent;
mod error;
mod pid_file;
mod signals;
mod state_dir;
mod streams;
mod terminal;
mod vmm;

use std::cell::Cell;
use std::path::PathBuf;
use std::time::Duration;

use bulkhead_protocol::agent::{CreateContainerRequest, WaitProcessResponse};
use nix::sys::signal::Signal;
use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel};
use tokio::time::{Instant, sleep_until, timeout};

use self::agent::{Agent, AgentError};
pub(crate) use self::error::RunError;
use self::error::{Loss, Phase};
use self::signals::{BlockedSignals, SignalStream};
pub(crate) use self::state_dir::{StateDir, sweep};
use self::streams::{Outputs, StreamIds};
use self::terminal::{RawTerminal, Size};
use self::vmm::{Vmm, VmmEvent, VmmOptions, VmmSockets};
use crate::cgroup::HostCgroup;
use crate::hooks::{self, Hook, Hooks, State, Status};
use crate::install::Install;
use crate::logging;
use crate::spec;
use crate::storage::Shares;
use crate::storage::mount_points::{self, Kind};
use crate::trace::{Trace, Track, now_ns};

/// How long a VMM may take to be gone after its connections are.
const GONE_TIMEOUT: Duration = Duration::from_secs(2);

/// What `run` is asked to do.
#[derive(Debug)]
pub(crate) struct Options {
    pub(crate) id: String,
    pub(crate) bundle: PathBuf,
    pub(crate) root: PathBuf,
    pub(crate) pid_file: Option<PathBuf>,
    pub(crate) trace: Option<PathBuf>,
}

/// Runs a container in a sandbox of its own and returns its exit status.
///
/// # Errors
///
/// Why it could not be started, or was lost; nothing of it is left on the host.
pub(crate) fn run(options: Options) -> Result<u8, RunError> {
    let mut trace = Trace::create(options.trace.clone())
        .map_err(|source| RunError::Trace { path: options.trace.clone().unwrap_or_default(), source })?;
    let result = run_traced(&options, &mut trace);
    if let Err((path, error)) = trace.write() {
        logging::warn(format_args!("cannot write the trace {}: {error}", path.display()));
    }
    result
}

fn run_traced(options: &Options, trace: &mut Trace) -> Result<u8, RunError> {
    let begin_ns = now_ns();
    let signals = BlockedSignals::block().map_err(RunError::Signals)?;
    state_dir::check_id(&options.id)?;
    let translated = spec::load(&options.bundle)?;
    let mut request = translated.request;
    let terminal = request.process.terminal;
    if terminal {
        terminal::require()?;
    }
    let install = Install::find()?;
    let parts = install.open()?;
    trace.since("spec", begin_ns);

    let begin_ns = now_ns();
    make_mount_points(&request, &translated.shares)?;
    let state = StateDir::create(&options.root, &options.id)?;
    let cgroup = HostCgroup::create(&translated.cgroup, &options.id)?;
    if let Some(cgroup) = &cgroup {
        state.record_cgroup(cgroup.paths())?;
        cgroup.join()?;
    }
    let vmm_options = VmmOptions {
        id: &options.id,
        machine: &translated.machine,
        shares: &translated.shares,
        vsock: state.bind_vsock()?,
        console: state.create_console_log()?,
        trace: trace.enabled(),
    };
    let (vmm, sockets) = Vmm::spawn(&install, parts, vmm_options)?;
    trace.since("vmm spawn", begin_ns);

    let streams = StreamIds::choose(terminal);
    request.id.clone_from(&options.id);
    request.start = true;
    let hook_state = State::new(&options.id, &translated.bundle, translated.annotations);
    let hook_state = hook_state.at(Status::Creating, Some(std::process::id()));
    if !request.start_hooks.is_empty() {
        request.start_hook_state = hook_state.at(Status::Created, Some(std::process::id())).to_text();
    }
    let size = terminal::size().filter(|_| terminal);
    if let Some(process) = request.process.as_mut() {
        process.stdin_stream = streams.stdin;
        process.stdout_stream = streams.stdout;
        process.stderr_stream = streams.stderr;
        if let Some(size) = size {
            (process.terminal_rows, process.terminal_columns) = (size.rows, size.columns);
        }
    }
    // From here on the guest boots; what is done meanwhile costs nothing.
    state.record_vmm(vmm.pid())?;
    sweep(&options.root);
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(RunError::EventLoop)?;
    let poststop = translated.hooks.poststop.clone();
    let stopped = hook_state.at(Status::Stopped, None);
    let sandbox = Sandbox {
        raw: None,
        vmm,
        cgroup,
        state,
        hooks: translated.hooks,
        hook_state,
        terminal,
        size,
        streams,
        outputs: None,
        phase: Phase::Booting,
    };
    let result = runtime.block_on(sandbox.supervise(options, &request, sockets, signals, install.boot_timeout, trace));
    runtime.block_on(hooks::run_all(&poststop, &stopped));
    result
}

/// In a root file system that is read-only for the guest, the host makes the mount points, and the working directory.
fn make_mount_points(request: &CreateContainerRequest, shares: &Shares) -> Result<(), RunError> {
    let Some(rootfs) = shares.private.first().filter(|tree| tree.read_only) else {
        return Ok(());
    };
    let mounts = request.mounts.iter().map(|mount| {
        let file = mount.share.is_some() && !mount.source_is_dir;
        (mount.destination.as_str(), if file { Kind::File } else { Kind::Folder })
    });
    let points = mounts.chain([(request.process.cwd.as_str(), Kind::Folder)]);
    mount_points::make(&rootfs.source, points).map_err(|(path, source)| RunError::MountPoint {
        path,
        rootfs: rootfs.source.clone(),
        source,
    })
}

/// What there is of a running sandbox, in the order in which it is undone.
#[derive(Debug)]
struct Sandbox {
    raw: Option<RawTerminal>,
    vmm: Vmm,
    #[expect(dead_code, reason = "its drop is what it is for")]
    cgroup: Option<HostCgroup>,
    state: StateDir,
    hooks: Hooks,
    /// What hooks are told of the container.
    hook_state: State,
    terminal: bool,
    /// The size that the container's terminal has.
    size: Option<Size>,
    streams: StreamIds,
    outputs: Option<Outputs>,
    phase: Phase,
}

/// Where things come from that a sandbox reacts to in every state.
struct Events<'a> {
    vmm: UnboundedReceiver<VmmEvent>,
    signals: SignalStream,
    /// Signals that did not arrive.
    failures: UnboundedReceiver<AgentError>,
    failed: UnboundedSender<AgentError>,
    trace: &'a mut Trace,
}

impl Sandbox {
    async fn supervise(
        mut self,
        options: &Options,
        request: &CreateContainerRequest,
        sockets: VmmSockets,
        signals: BlockedSignals,
        boot_timeout: Duration,
        trace: &mut Trace,
    ) -> Result<u8, RunError> {
        let spawned_ns = now_ns();
        let (vmm_sender, vmm_events) = unbounded_channel();
        let (failed, failures) = unbounded_channel();
        let signals = signals.into_stream().map_err(RunError::Signals)?;
        let mut events = Events { vmm: vmm_events, signals, failures, failed, trace };
        sockets.report.set_nonblocking(true).map_err(RunError::EventLoop)?;
        let report = tokio::net::UnixStream::from_std(sockets.report).map_err(RunError::EventLoop)?;
        tokio::spawn(vmm::follow(report, self.vmm.watch().map_err(RunError::EventLoop)?, vmm_sender));
        let agent = Agent::new(sockets.agent, options.id.clone()).map_err(RunError::EventLoop)?;

        let hooks = std::mem::take(&mut self.hooks);
        let hook_state = self.hook_state.clone();
        self.run_hooks(&hooks.create, &hook_state, None, &mut events).await?;
        self.start(&agent, request, &mut events, boot_timeout, spawned_ns).await?;
        self.phase = Phase::Running;
        let started_ns = now_ns();
        if let Some(path) = &options.pid_file {
            pid_file::write(path).map_err(|source| RunError::PidFile { path: path.clone(), source })?;
        }
        let hook_state = hook_state.at(Status::Running, Some(std::process::id()));
        self.run_hooks(&hooks.poststart, &hook_state, Some(&agent), &mut events).await?;
        let exit = self.wait(&agent, &mut events).await?;
        let exited_ns = events.trace.guest_to_host(exit.exited_at_ns);
        events.trace.add(Track::Supervisor, "running", started_ns, now_ns());

        self.phase = Phase::Draining;
        let begin_ns = now_ns();
        self.drain(&agent, &mut events).await?;
        let trace = events.trace;
        if let Some(first_ns) = self.outputs.as_ref().and_then(Outputs::first_output_ns) {
            trace.add(Track::Supervisor, "first output", first_ns, first_ns);
        }
        trace.add_guest(&exit.trace);
        trace.add(Track::Guest, "exit", exited_ns, exited_ns);
        trace.since("drain", begin_ns);
        let begin_ns = now_ns();
        drop(self);
        trace.since("teardown", begin_ns);
        if exit.oom_killed {
            logging::warn(format_args!("the guest's kernel killed a process of the container: out of memory"));
        }
        // The guest's word is only believed as far as an exit status goes.
        Ok(u8::try_from(exit.exit_status).unwrap_or(u8::MAX))
    }

    /// Runs hooks. Signals are the container's, if there is an agent to pass them on to; else they end the start.
    async fn run_hooks(
        &mut self,
        hooks: &[Hook],
        state: &State,
        agent: Option<&Agent>,
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
                    match agent {
                        Some(agent) => self.forward(agent, signal, &events.failed),
                        None if signals::ends_a_start(signal) => return Err(RunError::Interrupted(signal)),
                        None => {}
                    }
                }
            }
        }
    }

    /// From a booting machine to a container whose program runs.
    async fn start(
        &mut self,
        agent: &Agent,
        request: &CreateContainerRequest,
        events: &mut Events<'_>,
        boot_timeout: Duration,
        spawned_ns: u64,
    ) -> Result<(), RunError> {
        let agent_up_ns = Cell::new(0);
        let (vsock, ids, terminal) = (self.state.vsock_path(), self.streams, self.terminal);
        let result = {
            let answer = async {
                let info = agent.get_info().await.map_err(RunError::Agent)?;
                agent_up_ns.set(now_ns());
                // The agent listens for streams before it connects.
                let raw = terminal.then(RawTerminal::enter).transpose()?;
                Ok((info, raw, streams::open(&vsock, ids).await?))
            };
            let created = async { agent.create(request).await.map_err(RunError::Create) };
            let start = async { tokio::try_join!(answer, created) };
            tokio::pin!(start);
            let mut deadline = Instant::now() + boot_timeout;
            loop {
                tokio::select! {
                    result = &mut start => break result,
                    event = events.vmm.recv() => self.on_vmm_event(event, events.trace)?,
                    signal = events.signals.next() => {
                        let signal = signal.map_err(RunError::Signals)?;
                        if signals::ends_a_start(signal) {
                            return Err(RunError::Interrupted(signal));
                        }
                    }
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
        let (info, raw, outputs) = match result {
            Ok(((info, raw, outputs), created)) => {
                let up_ns = agent_up_ns.get();
                events.trace.set_guest_clock(info.now_ns, up_ns);
                events.trace.add(Track::Supervisor, "boot", spawned_ns, up_ns);
                events.trace.since("create container", up_ns);
                events.trace.add_guest(&created.trace);
                (info, raw, outputs)
            }
            Err(error) => return Err(self.explain(error, events).await),
        };
        events.trace.add_guest(&info.trace);
        self.raw = raw;
        self.outputs = Some(outputs);
        logging::debug(format_args!("agent {} on Linux {}", clean(&info.agent_version), clean(&info.kernel_release)));
        Ok(())
    }

    /// Until init has ended.
    async fn wait(&mut self, agent: &Agent, events: &mut Events<'_>) -> Result<WaitProcessResponse, RunError> {
        // A change of size while the container was being made has been missed.
        self.resize(agent);
        let wait = agent.wait();
        tokio::pin!(wait);
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
                    self.forward(agent, signal.map_err(RunError::Signals)?, &events.failed);
                    continue;
                }
                Some(error) = events.failures.recv() => RunError::Agent(error),
            };
            return Err(self.explain(error, events).await);
        }
    }

    /// After init's end: until its output is delivered and its files are written back.
    async fn drain(&mut self, agent: &Agent, events: &mut Events<'_>) -> Result<(), RunError> {
        let mut outputs = self.outputs.take();
        let drained = async {
            if let Some(outputs) = &mut outputs {
                outputs.drained().await;
            }
            Ok(())
        };
        let deleted = async { agent.delete().await.map_err(RunError::Delete) };
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

    fn forward(&mut self, agent: &Agent, signal: Signal, failed: &UnboundedSender<AgentError>) {
        if signal == Signal::SIGWINCH && self.terminal {
            self.resize(agent);
            return;
        }
        let (agent, failed) = (agent.clone(), failed.clone());
        tokio::spawn(async move {
            match agent.signal(signal).await {
                // A process that has just ended is no failure.
                Ok(()) => {}
                Err(AgentError::Refused { message, .. }) => {
                    logging::debug(format_args!("{signal} was not delivered: {message}"));
                }
                Err(error) => {
                    let _ = failed.send(error);
                }
            }
        });
    }

    fn resize(&mut self, agent: &Agent) {
        let size = terminal::size().filter(|_| self.terminal);
        if let Some(size) = size.filter(|size| self.size != Some(*size)) {
            self.size = Some(size);
            let agent = agent.clone();
            tokio::spawn(async move {
                if let Err(error) = agent.resize(size).await {
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
        Err(RunError::Lost(Loss { phase: self.phase, cause, console: self.vmm.console_tail() }))
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
            Err(_) => {
                let cause = "the guest's agent ended its connection".to_owned();
                RunError::Lost(Loss { phase: self.phase, cause, console: self.vmm.console_tail() })
            }
        }
    }
}

fn clean(text: &str) -> String {
    crate::text::one_line(text)
}
