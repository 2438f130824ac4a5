// SPDX-License-Identifier: Apache-2.0
//! The engine: every operation on containers.

use std::collections::HashMap;
use std::os::fd::AsFd;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Duration;

use tokio::sync::{oneshot, watch};
use tokio::time::timeout;

use super::cgroup::Cgroup;
use super::channel::{self, AgentEnd, ChildEnd, Report};
use super::error::{CreateError, DeleteError, NoSuchContainer, ResizeError, SignalError, StartError};
use super::failure::{Failure, Stage};
use super::instance::{Exit, ExpectedStreams, Instance, Pumps, Waiting};
use super::setup::Setup;
use super::spec::{ContainerSpec, TerminalSize};
use crate::process::stdio::{AgentStdio, ChildStdio};
use crate::process::{ExitStatus, FdStream, Reaper, StreamTable, pump, stdio, terminal};
use crate::storage::ShareRoots;
use crate::sys::{self, Cloned};
use crate::trace::{Trace, now};

/// How long the host may take to open the streams of a process that is ready to start.
const STREAM_DEADLINE: Duration = Duration::from_secs(10);

/// How long a killed container may take to end: its memory has to be given back.
const KILL_DEADLINE: Duration = Duration::from_secs(10);

/// Where the engine works.
#[derive(Clone, Debug)]
pub struct EngineConfig {
    /// The shared trees.
    pub shares: ShareRoots,
    /// The cgroup (version 2) in which each container gets one; `None` to make none.
    pub cgroup_parent: Option<PathBuf>,
    /// An empty directory on which each container, in its own mount namespace, mounts its root file system.
    pub rootfs_mount_point: PathBuf,
    /// A directory in which device nodes can be made.
    pub device_scratch: PathBuf,
}

/// Makes, starts, signals and deletes containers. Needs a process with one thread.
#[derive(Debug)]
pub struct Engine {
    config: EngineConfig,
    reaper: Arc<Reaper>,
    streams: Arc<StreamTable>,
    /// `None` for an id whose container is being made.
    containers: Mutex<HashMap<String, Option<Arc<Instance>>>>,
}

/// Keeps an id from being used twice while its container is being made, and gives it back if that fails.
#[derive(Debug)]
struct Reservation<'a> {
    engine: &'a Engine,
    id: &'a str,
    kept: bool,
}

impl Drop for Reservation<'_> {
    fn drop(&mut self) {
        if !self.kept {
            self.engine.containers().remove(self.id);
        }
    }
}

impl Engine {
    /// An engine without containers.
    pub fn new(config: EngineConfig, reaper: Arc<Reaper>, streams: Arc<StreamTable>) -> Self {
        Self { config, reaper, streams, containers: Mutex::default() }
    }

    fn containers(&self) -> MutexGuard<'_, HashMap<String, Option<Arc<Instance>>>> {
        // Nothing panics while the lock is held.
        self.containers.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn find(&self, id: &str) -> Result<Arc<Instance>, NoSuchContainer> {
        self.containers().get(id).cloned().flatten().ok_or_else(|| NoSuchContainer(id.to_owned()))
    }

    /// Makes a container, and with `start` starts it. Returns its first process's pid. On failure nothing is left of it.
    pub async fn create(&self, spec: &ContainerSpec, start: bool, trace: &mut Trace) -> Result<i32, CreateError> {
        if self.containers().contains_key(&spec.id) {
            return Err(CreateError::IdInUse(spec.id.clone()));
        }
        self.containers().insert(spec.id.clone(), None);
        let mut reservation = Reservation { engine: self, id: &spec.id, kept: false };
        let instance = self.make(spec, trace).await?;
        if start && let Err(error) = self.start_instance(&instance, trace).await {
            self.undo(&instance).await;
            return Err(error.into());
        }
        let pid = instance.pid;
        self.containers().insert(spec.id.clone(), Some(Arc::new(instance)));
        reservation.kept = true;
        Ok(pid)
    }

    async fn make(&self, spec: &ContainerSpec, trace: &mut Trace) -> Result<Instance, CreateError> {
        let begin = now();
        let trees = spec.shared_trees();
        for tree in &trees {
            self.config.shares.enter(tree)?;
        }
        let cgroup = match &self.config.cgroup_parent {
            Some(parent) => Some(Arc::new(Cgroup::create(parent, &spec.id, &spec.cgroup_settings)?)),
            None => None,
        };
        let begin = trace.add("prepare", begin);
        let spawned = self.spawn(spec, cgroup.as_deref());
        let (pid, channel, stdio) = match spawned {
            Ok(spawned) => spawned,
            Err(error) => {
                remove_cgroup(cgroup.as_deref()).await;
                return Err(error);
            }
        };
        let pumps = Arc::new(Pumps::default());
        let started_at = Arc::default();
        let (ended, exit) =
            watch_process(self.reaper.expect(pid), Arc::clone(&pumps), cgroup.clone(), Arc::clone(&started_at));
        let begin = trace.add("clone", begin);
        let mut instance = Instance {
            id: spec.id.clone(),
            pid,
            trees,
            cgroup,
            terminal: None,
            pumps,
            waiting: Mutex::default(),
            started_at,
            exit,
            ended,
        };
        match wait_until_ready(&channel, &instance).await {
            Ok(terminal) => instance.terminal = terminal,
            Err(error) => {
                self.undo(&instance).await;
                return Err(error);
            }
        }
        trace.add("set-up", begin);
        let streams = self.expect_streams(spec);
        instance.waiting = Mutex::new(Some(Waiting { channel, stdio, streams }));
        Ok(instance)
    }

    /// Makes the process and its ends of things.
    fn spawn(&self, spec: &ContainerSpec, cgroup: Option<&Cgroup>) -> Result<(i32, AgentEnd, AgentStdio), CreateError> {
        let (agent_end, child_end) = channel::pair().map_err(CreateError::Channel)?;
        let (child_stdio, agent_stdio) = if spec.process.stdio.terminal.is_some() {
            (None, AgentStdio::default())
        } else {
            let (child, agent) =
                stdio::make_pipes(&spec.process.stdio, spec.process.uid).map_err(CreateError::Stdio)?;
            (Some(child), agent)
        };
        let cgroup_descriptor = cgroup.map(Cgroup::open).transpose()?;
        let flags = spec.namespaces.clone_flags();
        let cloned = sys::clone_process(flags, cgroup_descriptor.as_ref().map(AsFd::as_fd));
        match cloned.map_err(CreateError::Clone)? {
            Cloned::Parent(pid) => Ok((pid, agent_end, agent_stdio)),
            Cloned::Child => {
                // Nothing of the agent's is dropped here: that would take its registrations out of the epoll instance
                // that both processes have.
                run_child(&self.config, spec, &child_end, child_stdio.as_ref(), cgroup)
            }
        }
    }

    fn expect_streams(&self, spec: &ContainerSpec) -> ExpectedStreams {
        let expect = |id: Option<u32>| id.map(|id| (id, self.streams.expect(id)));
        let stdio = &spec.process.stdio;
        ExpectedStreams { stdin: expect(stdio.stdin), stdout: expect(stdio.stdout), stderr: expect(stdio.stderr) }
    }

    /// Starts a container that has been made.
    pub async fn start(&self, id: &str, trace: &mut Trace) -> Result<(), StartError> {
        let instance = self.find(id)?;
        self.start_instance(&instance, trace).await
    }

    async fn start_instance(&self, instance: &Instance, trace: &mut Trace) -> Result<(), StartError> {
        let begin = now();
        let not_created = |state| StartError::NotCreated { id: instance.id.clone(), state };
        if instance.has_ended() {
            return Err(not_created("stopped"));
        }
        let Waiting { channel, stdio, streams } = instance.take_waiting().ok_or_else(|| not_created("running"))?;
        let deadline = tokio::time::Instant::now() + STREAM_DEADLINE;
        let stdin = await_stream(streams.stdin, "stdin", deadline).await?;
        let stdout = await_stream(streams.stdout, "stdout", deadline).await?;
        let stderr = await_stream(streams.stderr, "stderr", deadline).await?;
        let begin = trace.add("streams", begin);
        match &instance.terminal {
            Some(terminal) => {
                instance.pumps.spawn_output(pump::terminal_output(Arc::clone(terminal), stdout));
                if let Some(stdin) = stdin {
                    instance.pumps.spawn_input(pump::terminal_input(stdin, Arc::clone(terminal)));
                }
            }
            None => {
                let to_stream = |pipe| FdStream::new(pipe).map_err(StartError::Stdio);
                if let (Some(stdin), Some(pipe)) = (stdin, stdio.stdin) {
                    instance.pumps.spawn_input(pump::input(stdin, to_stream(pipe)?));
                }
                for (pipe, stream) in [(stdio.stdout, stdout), (stdio.stderr, stderr)] {
                    if let (Some(pipe), Some(stream)) = (pipe, stream) {
                        instance.pumps.spawn_output(pump::output(to_stream(pipe)?, stream));
                    }
                }
            }
        }
        if let Err(error) = channel.start() {
            instance.pumps.abort();
            return Err(StartError::Channel(error));
        }
        match channel.receive().await.map_err(StartError::Channel)? {
            Report::Closed => {
                let end = trace.add("exec", begin);
                // The container is started once: `waiting` has been taken.
                let _ = instance.started_at.set(end);
                Ok(())
            }
            Report::Failed(failure) => Err(failure.into()),
            Report::Ready | Report::Terminal(_) => {
                Err(StartError::Channel(std::io::Error::other("it spoke out of turn")))
            }
        }
    }

    /// Waits for a container's first process. Returns at once if it has ended.
    pub async fn wait(&self, id: &str) -> Result<Exit, NoSuchContainer> {
        let instance = self.find(id)?;
        Ok(instance.wait().await)
    }

    /// Sends a signal (1 to 64) to a container's first process, or with `all` to each of its processes.
    pub fn signal(&self, id: &str, signal: u32, all: bool) -> Result<(), SignalError> {
        let instance = self.find(id)?;
        let number = i32::try_from(signal).ok().filter(|number| (1..=64).contains(number));
        let number = number.ok_or(SignalError::BadSignal(signal))?;
        if all { signal_all(&instance, number) } else { signal_first(&instance, number) }
    }

    /// Sets the size of a container's terminal.
    pub fn resize(&self, id: &str, size: TerminalSize) -> Result<(), ResizeError> {
        let instance = self.find(id)?;
        let controller = instance.terminal.as_ref().ok_or(ResizeError::NoTerminal)?;
        terminal::resize(controller.as_fd(), size).map_err(ResizeError::Resize)
    }

    /// Kills what is left of a container, writes its files back to the host, and forgets it.
    pub async fn delete(&self, id: &str) -> Result<(), DeleteError> {
        let instance = self.find(id)?;
        kill_and_wait(&instance).await?;
        if let Some(cgroup) = &instance.cgroup {
            cgroup.remove().await?;
        }
        self.config.shares.write_back(&instance.trees)?;
        self.containers().remove(id);
        Ok(())
    }

    /// Takes back a container that could not be made. The error to tell of is the one that led here.
    async fn undo(&self, instance: &Instance) {
        if let Err(error) = kill_and_wait(instance).await {
            crate::log::write(crate::log::Level::Warning, &format!("container {}: {error}", instance.id));
        }
        remove_cgroup(instance.cgroup.as_deref()).await;
    }
}

/// The life of the new process in this program; it ends in another program, or here.
fn run_child(
    config: &EngineConfig,
    spec: &ContainerSpec,
    channel: &ChildEnd,
    stdio: Option<&ChildStdio>,
    cgroup: Option<&Cgroup>,
) -> ! {
    crate::init::enter_child();
    let mut kept = vec![channel.as_fd()];
    kept.extend(stdio.iter().flat_map(|stdio| stdio.0.iter().map(AsFd::as_fd)));
    // Other containers' pipes must not be held open by this process while it waits to be started.
    if let Err(error) = sys::close_all_but(&kept) {
        channel.fail(&Failure::new(Stage::Process, "close the agent's descriptors", error));
        sys::exit_now(1);
    }
    let setup = Setup { spec, config, channel, stdio, cgroup: cgroup.map(Cgroup::path) };
    let failure = setup.run();
    channel.fail(&failure);
    sys::exit_now(1)
}

/// Follows the process to its end. Returns where its end shows, and where the end of its output shows.
fn watch_process(
    status: oneshot::Receiver<ExitStatus>,
    pumps: Arc<Pumps>,
    cgroup: Option<Arc<Cgroup>>,
    started_at: Arc<OnceLock<Duration>>,
) -> (watch::Receiver<Option<ExitStatus>>, watch::Receiver<Option<Exit>>) {
    let (ended_sender, ended) = watch::channel(None);
    let (exit_sender, exit) = watch::channel(None);
    tokio::spawn(async move {
        let Ok(status) = status.await else { return };
        ended_sender.send_replace(Some(status));
        pumps.finish().await;
        let oom_killed = cgroup.is_some_and(|cgroup| cgroup.oom_killed());
        exit_sender.send_replace(Some(Exit {
            code: status.code,
            started_at: started_at.get().copied(),
            at: status.at,
            drained_at: now(),
            oom_killed,
        }));
    });
    (ended, exit)
}

/// Waits until the process is set up. Returns the agent's end of its terminal.
async fn wait_until_ready(channel: &AgentEnd, instance: &Instance) -> Result<Option<Arc<FdStream>>, CreateError> {
    let mut terminal = None;
    loop {
        match channel.receive().await.map_err(CreateError::Channel)? {
            Report::Terminal(controller) => {
                terminal = Some(Arc::new(FdStream::new(controller).map_err(CreateError::Stdio)?));
            }
            Report::Ready => return Ok(terminal),
            Report::Failed(failure) => return Err(failure.into()),
            Report::Closed => return Err(CreateError::Ended { code: instance.wait().await.code }),
        }
    }
}

async fn await_stream(
    expected: Option<(u32, oneshot::Receiver<FdStream>)>,
    name: &'static str,
    deadline: tokio::time::Instant,
) -> Result<Option<FdStream>, StartError> {
    let Some((id, receiver)) = expected else { return Ok(None) };
    match tokio::time::timeout_at(deadline, receiver).await {
        Ok(Ok(stream)) => Ok(Some(stream)),
        _ => Err(StartError::NoStream { id, name, seconds: STREAM_DEADLINE.as_secs() }),
    }
}

fn signal_first(instance: &Instance, signal: i32) -> Result<(), SignalError> {
    // Until the reaper has seen it end, nobody else can have its pid.
    if instance.has_ended() {
        return Err(SignalError::Finished);
    }
    sys::kill(instance.pid, signal).map_err(|source| SignalError::Kill { signal, source })
}

fn signal_all(instance: &Instance, signal: i32) -> Result<(), SignalError> {
    let Some(cgroup) = &instance.cgroup else { return signal_first(instance, signal) };
    if signal == libc::SIGKILL {
        return Ok(cgroup.kill()?);
    }
    for pid in cgroup.processes()? {
        match sys::kill(pid, signal) {
            // It has ended since it was listed.
            Err(error) if error.raw_os_error() == Some(libc::ESRCH) => {}
            result => result.map_err(|source| SignalError::Kill { signal, source })?,
        }
    }
    Ok(())
}

async fn kill_and_wait(instance: &Instance) -> Result<(), DeleteError> {
    match signal_all(instance, libc::SIGKILL) {
        Ok(()) | Err(SignalError::Finished) => {}
        Err(error) => return Err(error.into()),
    }
    // A process waiting to be started lets go of its pipes.
    drop(instance.take_waiting());
    let mut ended = instance.ended.clone();
    let result = timeout(KILL_DEADLINE, ended.wait_for(Option::is_some)).await;
    if result.is_err() {
        return Err(DeleteError::StillRunning { seconds: KILL_DEADLINE.as_secs() });
    }
    instance.pumps.abort();
    Ok(())
}

async fn remove_cgroup(cgroup: Option<&Cgroup>) {
    if let Some(cgroup) = cgroup
        && let Err(error) = cgroup.remove().await
    {
        crate::log::write(crate::log::Level::Warning, &error.to_string());
    }
}
