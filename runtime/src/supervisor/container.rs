// SPDX-License-Identifier: Apache-2.0
//! A container as its supervisor knows it: shared by the loop that supervises it and the calls that come in.
//!
//! ```text
//! creating ──> created ──start──> running <──pause, resume──> paused
//!                 └───────────────────┴───────── exit ──────────┴──────> stopped
//! ```

mod exit;
mod update;

use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::atomic::AtomicU32;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, Weak};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use bulkhead_protocol::agent::{GetStatsResponse, Process, TracePoint};
use nix::sys::signal::Signal;
use thiserror::Error;
use tokio::sync::{oneshot, watch};
use tokio::time::timeout;

pub(super) use self::exit::DEFIANT;
use self::exit::LastOutput;
use super::agent::{Agent, AgentError, Refusal};
use super::execs::Execs;
use super::machine_cpus::{CpuClaim, OnlineError};
use super::machine_memory::{Claim, GrowError};
use super::network::Settler;
use super::pod_cpus::CpusClaim;
use super::signals;
use super::state::{self, Record, Status};
use crate::cgroup::{HostCgroup, HostCgroupError};
use crate::hooks::{self, Hook, HookError};
use crate::logging;
use crate::spec::GuestDisk;
use crate::trace::now_ns;

/// The number of the signal that nothing survives.
pub(crate) const SIGKILL: u32 = 9;

/// How long init may take to execute its program: its start hooks run before.
const START_TIMEOUT: Duration = Duration::from_secs(120);

/// How long the end of a container may take whose start has failed.
const END_OF_START: Duration = Duration::from_secs(10);

/// How long a start waits for the network: for a change that is on its way, and for the one that it needs.
const NETWORK_TIMEOUT: Duration = Duration::from_secs(70);

/// A call that does not fit the container's state, or failed. The words are those of runc, which engines look for.
#[derive(Debug, Error)]
pub(crate) enum CallError {
    #[error("container does not exist: {0}")]
    NoSuchContainer(String),
    #[error("process does not exist: {0}")]
    NoSuchProcess(String),
    #[error("process exists already: {0}")]
    ProcessExists(String),
    #[error("process not created: {0}")]
    NotStarted(String),
    #[error("container exists already: {0}")]
    ContainerExists(String),
    #[error("process already finished")]
    Finished,
    /// In the words of who was to make it.
    #[error("{0}")]
    Create(String),
    #[error("cannot start a container that is still being created")]
    StartWhileCreating,
    #[error("cannot start an already running container")]
    StartRunning,
    #[error("cannot start a container in the paused state")]
    StartPaused,
    #[error("cannot start a container that has stopped")]
    StartStopped,
    #[error("cannot set the guest's network up: {0}")]
    Network(String),
    #[error("container not running")]
    NotRunning,
    #[error("container not running: it is still being created")]
    Creating,
    #[error("container not paused")]
    NotPaused,
    #[error("cannot exec in a stopped container")]
    ExecStopped,
    #[error("cannot exec in a container that is still being created")]
    ExecWhileCreating,
    #[error("cannot delete {0}: it has not ended")]
    DeleteRunning(String),
    #[error("the process of the call is wrong: {0}")]
    BadRequest(String),
    #[error("not supported: {0}")]
    NotSupported(&'static str),
    #[error("rejecting {name} limit {limit} <= usage {usage}")]
    BelowUse { name: &'static str, limit: i64, usage: u64 },
    #[error(transparent)]
    Memory(#[from] GrowError),
    #[error(transparent)]
    Cpus(#[from] OnlineError),
    #[error(transparent)]
    Cgroup(#[from] HostCgroupError),
    #[error(transparent)]
    Hook(#[from] HookError),
    #[error(transparent)]
    Agent(#[from] AgentError),
}

/// How a process has ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Ended {
    /// 0 to 255: the exit code, or 128 + n for signal n.
    pub(crate) status: u8,
    /// When, since 1970.
    pub(crate) at: Duration,
}

impl Ended {
    /// An end that is seen at this moment.
    pub(crate) fn now(status: u8) -> Self {
        Self { status, at: SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default() }
    }
}

/// What changes in a container's life.
#[derive(Debug)]
struct Life {
    record: Record,
    /// A start is under way or has been: there is no second one.
    start_taken: bool,
    /// Its program has been executed.
    started: bool,
    /// When it was created, or, later, started, on `CLOCK_MONOTONIC`.
    begin_ns: u64,
    /// When init has ended, as the guest says, on the same clock.
    ended_ns: Option<u64>,
    /// How often memory had run out by then, as the guest says.
    oom_kills: u64,
}

/// The container.
#[derive(Debug)]
pub(crate) struct Container {
    pub(crate) agent: Agent,
    pub(crate) execs: Execs,
    id: String,
    life: Mutex<Life>,
    /// Held while it is started, frozen or thawed in the guest: what is written down last is what was done last.
    turn: tokio::sync::Mutex<()>,
    /// Held while its limits are changed: those on the host are of the same change as those in the guest.
    change: tokio::sync::Mutex<()>,
    /// Where the record is written.
    dir: OwnedFd,
    ended: watch::Sender<Option<Ended>>,
    last_output: watch::Sender<LastOutput>,
    /// Whether init was sent SIGKILL, or was to be.
    killed: watch::Sender<bool>,
    /// The hooks that follow a start by a call.
    poststart: Vec<Hook>,
    /// Whom to ask before the start, so that the guest has what has been put into its network until then.
    network: OnceLock<Settler>,
    /// Further devices of the network that the machine has been given, for the trace.
    late_networks: Mutex<Vec<LateNetwork>>,
    /// The block devices of the host that it has.
    disks: OnceLock<Vec<GuestDisk>>,
    /// The sandbox's, as long as it has one.
    cgroup: Weak<HostCgroup>,
    /// What it may use of the machine's memory; none of a pod's sandbox.
    memory: Option<Claim>,
    /// The same of its processors.
    cpus: Option<CpuClaim>,
    /// Of a container in a pod: its part in which CPUs of the host the machine has.
    host_cpus: Option<CpusClaim>,
    /// Of a pod's sandbox, which runs nothing in the guest: how it is to end, once somebody wants that.
    sandbox_end: Option<watch::Sender<Option<u8>>>,
    /// What a further process has of the container's own, unless it says otherwise.
    init: Process,
}

/// A device of the network that came later: who moves its frames, and when it was joined.
#[derive(Debug, Clone, Copy)]
pub(super) struct LateNetwork {
    pub(super) backend: &'static str,
    pub(super) begin_ns: u64,
    pub(super) end_ns: u64,
}

impl Container {
    /// A container that is being created, with that init. `dir` is its state directory.
    pub(crate) fn new(
        agent: Agent,
        record: Record,
        init: &Process,
        poststart: Vec<Hook>,
        cgroup: Weak<HostCgroup>,
        dir: OwnedFd,
    ) -> Self {
        let id = record.id.clone();
        let life = Mutex::new(Life {
            record,
            start_taken: false,
            started: false,
            begin_ns: now_ns(),
            ended_ns: None,
            oom_kills: 0,
        });
        Self {
            agent,
            execs: Execs::default(),
            id,
            life,
            turn: tokio::sync::Mutex::default(),
            change: tokio::sync::Mutex::default(),
            dir,
            ended: watch::Sender::new(None),
            last_output: watch::Sender::new(LastOutput::NotYet),
            killed: watch::Sender::new(false),
            poststart,
            network: OnceLock::new(),
            late_networks: Mutex::default(),
            disks: OnceLock::new(),
            cgroup,
            memory: None,
            cpus: None,
            host_cpus: None,
            sandbox_end: None,
            init: init.clone(),
        }
    }

    /// A pod's sandbox that is being created: a container that no process in the guest stands for.
    pub(super) fn sandbox(agent: Agent, record: Record, cgroup: Weak<HostCgroup>, dir: OwnedFd) -> Self {
        let container = Self::new(agent, record, &Process::default(), Vec::new(), cgroup, dir);
        Self { sandbox_end: Some(watch::Sender::new(None)), ..container }
    }

    /// Gives streams of further processes the next of these numbers.
    pub(super) fn numbering_streams(self, numbers: Arc<AtomicU32>) -> Self {
        Self { execs: Execs::new(numbers), ..self }
    }

    /// It uses the machine's memory and its processors as these tell.
    pub(super) fn claiming(self, memory: Claim, cpus: CpuClaim) -> Self {
        Self { memory: Some(memory), cpus: Some(cpus), ..self }
    }

    /// It has a say in which CPUs the machine has.
    pub(super) fn claiming_host_cpus(self, cpus: CpusClaim) -> Self {
        Self { host_cpus: Some(cpus), ..self }
    }

    /// It has no say in that any more.
    pub(super) fn release_host_cpus(&self) {
        if let Some(cpus) = &self.host_cpus {
            cpus.release();
        }
    }

    /// It has these block devices of the host; told once.
    pub(super) fn has_disks(&self, disks: Vec<GuestDisk>) {
        let _ = self.disks.set(disks);
    }

    /// Whether it is a pod's sandbox.
    pub(crate) fn is_sandbox(&self) -> bool {
        self.sandbox_end.is_some()
    }

    /// Waits until somebody wants a sandbox to end; its exit status.
    pub(super) async fn end_wanted(&self) -> u8 {
        let Some(wanted) = &self.sandbox_end else { return std::future::pending().await };
        let wanted = wanted.subscribe().wait_for(Option::is_some).await.ok().and_then(|status| *status);
        // The sender is this very container's: it lives.
        wanted.unwrap_or_default()
    }

    /// Ends a sandbox with that exit status, and the machine with it.
    pub(super) fn end(&self, status: u8) {
        if let Some(end) = &self.sandbox_end {
            end.send_replace(Some(status));
        }
    }

    /// Confines a further process as init is: wholly by what is the configuration's and not its process', and as far as the
    /// process says nothing by what runc takes from the container's own then.
    pub(crate) fn confine(&self, process: &mut Process) {
        let init = &self.init;
        process.seccomp.clone_from(&init.seccomp);
        process.personality = init.personality;
        if process.capabilities.is_none() {
            process.capabilities.clone_from(&init.capabilities);
        }
        if process.scheduler.is_none() {
            process.scheduler.clone_from(&init.scheduler);
        }
        if process.initial_cpus.is_empty() && process.final_cpus.is_empty() {
            process.initial_cpus.clone_from(&init.initial_cpus);
            process.final_cpus.clone_from(&init.final_cpus);
        }
        process.io_priority = process.io_priority.or(init.io_priority);
        process.oom_score_adj = process.oom_score_adj.or(init.oom_score_adj);
    }

    /// The path of the vsock's socket, for this process alone.
    pub(crate) fn vsock_path(&self) -> PathBuf {
        state::vsock_path(&self.dir)
    }

    pub(crate) fn id(&self) -> &str {
        &self.id
    }

    pub(crate) fn record(&self) -> Record {
        self.life().record.clone()
    }

    pub(crate) fn status(&self) -> Status {
        self.life().record.status
    }

    fn life(&self) -> MutexGuard<'_, Life> {
        // Nothing panics while the lock is held.
        self.life.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Enters a state and writes it down. A stopped container stays stopped.
    pub(crate) fn enter(&self, status: Status) {
        let mut life = self.life();
        if life.record.status == Status::Stopped {
            return;
        }
        if !life.started {
            life.begin_ns = now_ns();
        }
        life.start_taken |= status == Status::Running;
        life.started |= status == Status::Running;
        life.record.status = status;
        self.write(&life.record);
    }

    fn write(&self, record: &Record) {
        if let Err(error) = record.write(&self.dir) {
            logging::warn(format_args!("cannot write down that the container is {}: {error}", record.status.name()));
        }
    }

    /// The container has ended, or was lost; that is written down if its state is `kept`.
    pub(crate) fn stopped(&self, status: u8, kept: bool) {
        let ended = {
            let mut life = self.life();
            life.record.status = Status::Stopped;
            life.record.exit_status = Some(status);
            if kept {
                self.write(&life.record);
            }
            life.ended_ns.map_or_else(|| Ended::now(status), |at_ns| Ended::told(status, at_ns, life.begin_ns))
        };
        self.memory.iter().for_each(Claim::release);
        self.cpus.iter().for_each(CpuClaim::release);
        self.ended.send_replace(Some(ended));
    }

    /// How it ended, once it has.
    pub(crate) fn ended(&self) -> Option<Ended> {
        self.ended.borrow().clone()
    }

    /// How often the guest's kernel had ended a process for want of memory when init ended; 0 before, and of one that was lost.
    pub(crate) fn oom_kills(&self) -> u64 {
        self.life().oom_kills
    }

    /// Waits for its end.
    pub(crate) async fn wait(&self) -> Result<Ended, CallError> {
        let mut ended = self.ended.subscribe();
        let seen = ended.wait_for(Option::is_some).await.map(|ended| ended.clone());
        // The sender is this very container's: it lives.
        seen.ok().flatten().ok_or(CallError::NotRunning)
    }

    /// Lets init execute its program. Where that fails, the container has ended, or has had the time to, when this returns:
    /// engines look for its end at once.
    pub(crate) async fn start(&self) -> Result<Vec<TracePoint>, CallError> {
        {
            let mut life = self.life();
            match life.record.status {
                Status::Creating => return Err(CallError::StartWhileCreating),
                Status::Created if !life.start_taken => life.start_taken = true,
                Status::Created | Status::Running => return Err(CallError::StartRunning),
                Status::Paused => return Err(CallError::StartPaused),
                Status::Stopped => return Err(CallError::StartStopped),
            }
        }
        if self.is_sandbox() {
            self.enter(Status::Running);
            return Ok(Vec::new());
        }
        let network = self.network_is_there().await;
        let turn = self.turn.lock().await;
        // It may have been frozen meanwhile.
        let frozen = if self.status() == Status::Paused { Err(CallError::StartPaused) } else { Ok(()) };
        if let Err(error) = network.and(frozen) {
            // It may be tried again.
            self.life().start_taken = false;
            return Err(error);
        }
        // Where it fails, init ends, and so the container: whoever waits for init sees it.
        let Ok(started) = timeout(START_TIMEOUT, self.agent.start()).await else {
            // It must not run later, when nobody expects it any more.
            let _ = self.kill_init().await;
            return Err(AgentError::Timeout.into());
        };
        let started = match started {
            Ok(started) => started,
            Err(error) => {
                drop(turn);
                let _ = timeout(END_OF_START, self.wait()).await;
                return Err(error.into());
            }
        };
        self.enter(Status::Running);
        drop(turn);
        if let Err(error) = self.run_poststart_hooks().await {
            // It must not go on: whoever waits for init sees its end.
            self.kill_init().await?;
            let _ = timeout(END_OF_START, self.wait()).await;
            return Err(error.into());
        }
        Ok(started.trace)
    }

    async fn kill_init(&self) -> Result<(), AgentError> {
        self.killed.send_replace(true);
        self.agent.signal("", SIGKILL, true).await
    }

    /// Waits until the guest has the network that the host has.
    async fn network_is_there(&self) -> Result<(), CallError> {
        let Some(network) = self.network.get() else {
            return Ok(());
        };
        let answer = async {
            let (settled, is_settled) = oneshot::channel();
            network.send(settled).await.ok()?;
            is_settled.await.ok()
        };
        match timeout(NETWORK_TIMEOUT, answer).await {
            Ok(Some(Err(why))) => Err(CallError::Network(why)),
            // Nobody follows the network of a machine that has gone: the start itself says so.
            Ok(_) => Ok(()),
            Err(_) => Err(CallError::Network("the guest takes too long".to_owned())),
        }
    }

    /// From here on a start waits for the network.
    pub(super) fn network_settles_by(&self, settler: Settler) {
        // There is one network.
        let _ = self.network.set(settler);
    }

    /// Who moves the frames of a device that the machine has been given, as far as the state does not tell of one yet.
    pub(super) fn network_is_served_by(&self, backend: &'static str, begin_ns: u64) {
        let late = LateNetwork { backend, begin_ns, end_ns: now_ns() };
        // Nothing panics while the lock is held. There is room for a few in a machine.
        self.late_networks.lock().unwrap_or_else(PoisonError::into_inner).push(late);
        let mut life = self.life();
        if life.record.net_backend.is_none() {
            life.record.net_backend = Some(backend.to_owned());
            self.write(&life.record);
        }
    }

    /// The devices that the machine has been given since it was asked for them last.
    pub(super) fn late_networks(&self) -> Vec<LateNetwork> {
        std::mem::take(&mut *self.late_networks.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// The VMM moves frames that vhost-net was to move.
    pub(super) fn network_is_without_vhost(&self) {
        self.network_is_moved_by(crate::network::TAP);
    }

    /// Nobody moves frames any more.
    pub(super) fn network_is_lost(&self) {
        self.network_is_moved_by(crate::network::NOBODY);
    }

    fn network_is_moved_by(&self, backend: &str) {
        let mut life = self.life();
        life.record.net_backend = Some(backend.to_owned());
        self.write(&life.record);
    }

    async fn run_poststart_hooks(&self) -> Result<(), HookError> {
        if self.poststart.is_empty() {
            return Ok(());
        }
        let record = self.record();
        hooks::run(&self.poststart, &record.hook_state().at(hooks::Status::Running, Some(record.pid))).await
    }

    /// Sends a signal to init, or to all processes. After init's end there is nobody to send it to, which is no error for all of
    /// them; but SIGKILL gives up its last output.
    pub(crate) async fn kill(&self, signal: u32, all: bool) -> Result<(), CallError> {
        match self.send(signal, all).await {
            // The guest may know of the end a moment earlier.
            Err(CallError::NotRunning | CallError::Agent(AgentError::Refused { kind: Refusal::Finished, .. })) => {
                let is_delivering = self.status() != Status::Stopped && signal == SIGKILL;
                if is_delivering {
                    self.give_up_output();
                }
                if all || is_delivering { Ok(()) } else { Err(CallError::NotRunning) }
            }
            sent => sent,
        }
    }

    async fn send(&self, signal: u32, all: bool) -> Result<(), CallError> {
        if self.init_has_ended() {
            return Err(CallError::NotRunning);
        }
        if let Some(end) = &self.sandbox_end {
            self.require_alive()?;
            // As the program that other runtimes run for a sandbox: it ends well when asked to, and knows no other signal.
            match Signal::try_from(signal.cast_signed()) {
                Ok(Signal::SIGKILL) => drop(end.send_replace(Some(137))),
                Ok(Signal::SIGTERM | Signal::SIGINT) => drop(end.send_replace(Some(0))),
                _ => {}
            }
            return Ok(());
        }
        let signal = match self.status() {
            Status::Created | Status::Running | Status::Paused if signal == 0 => return Ok(()),
            Status::Creating => return Err(CallError::Creating),
            Status::Stopped => return Err(CallError::NotRunning),
            // The kernel lets an init that handles no signals be ended by SIGKILL alone.
            Status::Created
                if Signal::try_from(signal.cast_signed()).is_ok_and(|signal| signals::ends_a_start(signal.into())) =>
            {
                SIGKILL
            }
            _ => signal,
        };
        if signal == SIGKILL {
            // Whatever the agent says to it.
            self.killed.send_replace(true);
        }
        Ok(self.agent.signal("", signal, all).await?)
    }

    /// Freezes all processes.
    pub(crate) async fn pause(&self) -> Result<(), CallError> {
        self.require_process()?;
        let _turn = self.turn.lock().await;
        match self.status() {
            Status::Running | Status::Created => {}
            Status::Creating => return Err(CallError::Creating),
            Status::Paused | Status::Stopped => return Err(CallError::NotRunning),
        }
        let paused = self.agent.pause().await;
        if matches!(paused, Err(AgentError::Timeout)) {
            // What comes too late is not to stay.
            let _ = self.agent.resume().await;
        }
        self.heard(paused)?;
        // SIGKILL ends what is frozen, or about to be.
        if self.init_has_ended() {
            return Err(CallError::NotRunning);
        }
        self.enter(Status::Paused);
        Ok(())
    }

    /// Lets all processes go on.
    pub(crate) async fn resume(&self) -> Result<(), CallError> {
        let _turn = self.turn.lock().await;
        if self.status() != Status::Paused {
            return Err(CallError::NotPaused);
        }
        self.heard(self.agent.resume().await)?;
        let started = self.life().started;
        self.enter(if started { Status::Running } else { Status::Created });
        Ok(())
    }

    /// What it uses and has used, in the guest; or, of a pod's sandbox, what the pod as a whole does on the host.
    pub(crate) async fn stats(&self) -> Result<GetStatsResponse, CallError> {
        if self.is_sandbox() {
            return self.host_usage();
        }
        self.require_alive()?;
        self.heard(self.agent.stats().await)
    }

    /// What its machine uses and has used of the host.
    pub(crate) fn host_usage(&self) -> Result<GetStatsResponse, CallError> {
        self.require_alive()?;
        let what = "statistics of a sandbox that has no cgroup of its own on the host";
        Ok(self.cgroup.upgrade().ok_or(CallError::NotSupported(what))?.usage())
    }

    /// Fails unless there is an init, frozen or not.
    pub(crate) fn require_alive(&self) -> Result<(), CallError> {
        match self.status() {
            Status::Creating => Err(CallError::Creating),
            Status::Stopped => Err(CallError::NotRunning),
            Status::Created | Status::Running | Status::Paused => Ok(()),
        }
    }

    /// Fails for a pod's sandbox.
    fn require_process(&self) -> Result<(), CallError> {
        if self.is_sandbox() {
            return Err(CallError::NotSupported("a pod's sandbox runs nothing that this could be done to"));
        }
        Ok(())
    }

    /// Fails unless a process can be added.
    pub(crate) fn require_exec(&self) -> Result<(), CallError> {
        self.require_process()?;
        match self.status() {
            Status::Creating => Err(CallError::ExecWhileCreating),
            Status::Stopped => Err(CallError::ExecStopped),
            Status::Created | Status::Running | Status::Paused if self.init_has_ended() => Err(CallError::ExecStopped),
            Status::Created | Status::Running | Status::Paused => Ok(()),
        }
    }
}
