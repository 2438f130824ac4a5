// SPDX-License-Identifier: Apache-2.0
//! The engine: a container from its making to its deletion. Further processes in it are in `exec.rs`, the rest of what
//! can be done with it in `control.rs`.

use std::collections::{HashMap, HashSet};
use std::ffi::CString;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::PathBuf;
use std::pin::pin;
use std::sync::atomic::AtomicU64;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use rustix::mount::MountFlags;
use tokio::sync::Notify;
use tokio::time::timeout;

use super::cgroup::Cgroup;
use super::channel::{self, AgentEnd};
use super::common_pids::CommonPids;
use super::error::{
    CreateError, DeleteError, FindError, LaunchError, NoSuchContainer, ResizeError, SignalError, StartError,
};
use super::failure::{Failure, Stage};
use super::instance::Instance;
use super::process::{Exit, Process, Waiting};
use super::setup::Setup;
use super::sockets::HostSockets;
use super::spec::{ContainerSpec, TerminalSize, TmpfsSpec};
use super::trees::{TreeUses, UsedTrees};
use super::{devices, launch};
use crate::process::stdio::AgentStdio;
use crate::process::{Reaper, StreamTable, apart, read_apart};
use crate::storage::{ShareError, ShareRoots, mounts, resolve, shares};
use crate::sys::{self, Child, Cloned, Parent};
use crate::trace::{Trace, now};

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
    /// A sysfs of the agent's network namespace.
    pub sysfs: PathBuf,
    /// An empty directory for what containers can have in common: a tmpfs each.
    pub sandbox_tmpfs: PathBuf,
    /// An empty directory for the sockets at which the agent listens for the host.
    pub sockets: PathBuf,
}

/// Makes, starts, signals and deletes containers. Needs a process with one thread.
#[derive(Debug)]
pub struct Engine {
    config: EngineConfig,
    pub(super) reaper: Arc<Reaper>,
    pub(super) streams: Arc<StreamTable>,
    containers: Mutex<HashMap<String, Slot>>,
    /// Tells of containers that are not being made any more.
    made: Notify,
    tree_uses: Arc<TreeUses>,
    /// The names of those that there are.
    tmpfs: Mutex<HashSet<String>>,
    common_pids: CommonPids,
    /// The next name of a socket.
    socket_names: AtomicU64,
}

/// What an id stands for.
#[derive(Debug)]
enum Slot {
    /// A container that is being made, and that has been deleted meanwhile if it is `unwanted`.
    Making {
        unwanted: bool,
    },
    Made(Arc<Instance>),
}

/// What a container's first process needs.
struct Prepared {
    mapped: Vec<Option<OwnedFd>>,
    sockets: HostSockets,
    cgroup: Option<Arc<Cgroup>>,
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
        self.engine.made.notify_waiters();
    }
}

impl Engine {
    /// An engine without containers.
    pub fn new(config: EngineConfig, reaper: Arc<Reaper>, streams: Arc<StreamTable>) -> Self {
        Self {
            config,
            reaper,
            streams,
            containers: Mutex::default(),
            made: Notify::new(),
            tree_uses: Arc::default(),
            tmpfs: Mutex::default(),
            common_pids: CommonPids::default(),
            socket_names: AtomicU64::new(0),
        }
    }

    fn containers(&self) -> MutexGuard<'_, HashMap<String, Slot>> {
        // Nothing panics while the lock is held.
        self.containers.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The container of this id.
    pub(super) fn find(&self, id: &str) -> Result<Arc<Instance>, NoSuchContainer> {
        match self.containers().get(id) {
            Some(Slot::Made(instance)) => Ok(Arc::clone(instance)),
            _ => Err(NoSuchContainer(id.to_owned())),
        }
    }

    /// Makes a container, and with `start` starts it. Returns its first process's pid. On failure nothing is left of it.
    pub async fn create(&self, spec: &ContainerSpec, start: bool, trace: &mut Trace) -> Result<i32, CreateError> {
        if self.containers().contains_key(&spec.id) {
            return Err(CreateError::IdInUse(spec.id.clone()));
        }
        self.containers().insert(spec.id.clone(), Slot::Making { unwanted: false });
        let mut reservation = Reservation { engine: self, id: &spec.id, kept: false };
        let instance = self.make(spec, trace).await?;
        if start
            && let Some(waiting) = instance.init.take_waiting()
            && let Err(error) = launch::start(&instance.init, waiting, trace).await
        {
            self.undo(&instance).await;
            return Err(error.into());
        }
        if self.is_unwanted(&spec.id) {
            self.undo(&instance).await;
            return Err(CreateError::Deleted(spec.id.clone()));
        }
        let pid = instance.init.pid();
        self.containers().insert(spec.id.clone(), Slot::Made(Arc::new(instance)));
        reservation.kept = true;
        Ok(pid)
    }

    /// Whether a container that is being made has been deleted meanwhile.
    fn is_unwanted(&self, id: &str) -> bool {
        matches!(self.containers().get(id), Some(Slot::Making { unwanted: true }))
    }

    async fn make(&self, spec: &ContainerSpec, trace: &mut Trace) -> Result<Instance, CreateError> {
        let begin = now();
        let trees = self.tree_uses.begin(spec.shared_trees());
        let Prepared { mapped, sockets, cgroup } = match self.prepare(spec, &trees) {
            Ok(prepared) => prepared,
            Err(error) => {
                self.release(&trees);
                return Err(error);
            }
        };
        let begin = trace.add("prepare", begin);
        let spawned = self.spawn(spec, &mapped, &sockets, cgroup.as_deref());
        drop(mapped);
        let (child, channel, stdio) = match spawned {
            Ok(spawned) => spawned,
            Err(error) => {
                remove_cgroup(cgroup.as_deref()).await;
                self.release(&trees);
                return Err(error);
            }
        };
        let instance = Instance {
            id: spec.id.clone(),
            init: Process::follow(child, &self.reaper, cgroup.clone()),
            namespaces: spec.namespaces,
            id_mappings: spec.id_mappings.clone(),
            trees,
            sockets,
            cgroup,
            execs: Mutex::default(),
            changing: tokio::sync::Mutex::default(),
        };
        let begin = trace.add("clone", begin);
        let ready = launch::wait_until_ready(&channel, &instance.init, Vec::new()).await;
        if let Err(error) = ready.and_then(|()| launch::give(&instance, &instance.init, &spec.process)) {
            self.undo(&instance).await;
            return Err(error.into());
        }
        trace.add("set-up", begin);
        let streams = launch::expect_streams(&self.streams, &spec.process);
        instance.init.set_waiting(Waiting { channel, stdio, streams });
        Ok(instance)
    }

    /// Makes what a container's first process needs. On failure the trees are still to be released.
    fn prepare(&self, spec: &ContainerSpec, trees: &UsedTrees) -> Result<Prepared, CreateError> {
        trees.all().iter().try_for_each(|tree| self.config.shares.enter(tree))?;
        devices::prepare(spec, &self.config.device_scratch).map_err(LaunchError::from)?;
        let mapped = mounts::map_sources(&self.config.shares, &spec.mounts).map_err(LaunchError::from)?;
        spec.sandbox_tmpfs().try_for_each(|tmpfs| self.mount_tmpfs(tmpfs))?;
        let sockets = HostSockets::listen(&spec.mounts, &self.config.sockets, &self.socket_names)?;
        let make = |parent: &PathBuf| Cgroup::create(parent, &spec.id, &spec.cgroup_settings, &spec.device_filter);
        let cgroup = self.config.cgroup_parent.as_ref().map(make).transpose()?.map(Arc::new);
        Ok(Prepared { mapped, sockets, cgroup })
    }

    /// Makes the process and its ends of things.
    fn spawn(
        &self,
        spec: &ContainerSpec,
        mapped: &[Option<OwnedFd>],
        sockets: &HostSockets,
        cgroup: Option<&Cgroup>,
    ) -> Result<(Child, AgentEnd, AgentStdio), CreateError> {
        let (agent_end, child_end) = channel::pair().map_err(LaunchError::Channel)?;
        let (child_stdio, agent_stdio) = launch::make_pipes(&spec.process, spec.id_mappings.as_ref())?;
        let cgroup_descriptor = cgroup.map(Cgroup::open).transpose()?;
        let entered = spec.namespaces.common_pids.then(|| self.common_pids.enter(&self.config.rootfs_mount_point));
        let entered = entered.transpose().map_err(CreateError::CommonPids)?;
        let flags = spec.namespaces.clone_flags();
        let cloned = sys::clone_process(Parent::Caller, flags, cgroup_descriptor.as_ref().map(AsFd::as_fd));
        match cloned.map_err(LaunchError::Clone)? {
            Cloned::Parent(child) => {
                drop(entered);
                if let Err(error) = launch::map_ids(spec, &child, &agent_end) {
                    // It may have ended by itself, which is as good.
                    let _ = sys::pidfd_kill(child.pidfd.as_fd(), libc::SIGKILL);
                    return Err(error.into());
                }
                Ok((child, agent_end, agent_stdio))
            }
            Cloned::Child => {
                // Nothing of the agent's is dropped here: that would take its registrations out of the epoll instance
                // that both processes have.
                let cgroup = cgroup.map(Cgroup::path);
                let stdio = &child_stdio;
                run_child(&Setup { spec, config: &self.config, channel: &child_end, stdio, cgroup, mapped, sockets })
            }
        }
    }

    /// Starts a container that has been made.
    pub async fn start(&self, id: &str, trace: &mut Trace) -> Result<(), StartError> {
        let instance = self.find(id)?;
        let not_created = |state| StartError::NotCreated { id: instance.id.clone(), state };
        if instance.init.has_ended() {
            return Err(not_created("stopped"));
        }
        let waiting = instance.init.take_waiting().ok_or_else(|| not_created("running"))?;
        Ok(launch::start(&instance.init, waiting, trace).await?)
    }

    /// Waits until a process has ended, whatever is still to be handed on of its output; `exec_id` empty is the container's
    /// init, here and below.
    pub async fn ended(&self, id: &str, exec_id: &str) -> Result<(), FindError> {
        let instance = self.find(id)?;
        if exec_id.is_empty() {
            instance.init.ended().await;
        } else {
            instance.exec(exec_id)?.ended().await;
        }
        Ok(())
    }

    /// Waits for a process, and until its output has been handed on. Returns at once if it has.
    pub async fn wait(&self, id: &str, exec_id: &str) -> Result<Exit, FindError> {
        let instance = self.find(id)?;
        if !exec_id.is_empty() {
            return Ok(instance.exec(exec_id)?.wait().await);
        }
        instance.init.ended().await;
        if instance.namespaces.common_pids
            && let Err(error) = signal_all(&instance, libc::SIGKILL)
            && !matches!(error, SignalError::Finished)
        {
            // The kernel does it where init is the first process of a namespace.
            crate::log::write(crate::log::Level::Warning, &format!("cannot end what {id} has left: {error}"));
        }
        Ok(instance.init.wait().await)
    }

    /// Sends a signal (1 to 64) to a process, or with `all` to each process of its container.
    pub fn signal(&self, id: &str, exec_id: &str, signal: u32, all: bool) -> Result<(), SignalError> {
        let instance = self.find(id).map_err(FindError::from)?;
        let number = i32::try_from(signal).ok().filter(|number| (1..=64).contains(number));
        let number = number.ok_or(SignalError::BadSignal(signal))?;
        if all {
            return signal_all(&instance, number);
        }
        if exec_id.is_empty() {
            return instance.init.signal(number);
        }
        instance.exec(exec_id).map_err(FindError::from)?.signal(number)
    }

    /// Sets the size of a process's terminal.
    pub fn resize(&self, id: &str, exec_id: &str, size: TerminalSize) -> Result<(), ResizeError> {
        let instance = self.find(id).map_err(FindError::from)?;
        if exec_id.is_empty() {
            return instance.init.resize(size);
        }
        instance.exec(exec_id).map_err(FindError::from)?.resize(size)
    }

    /// Kills what is left of a container, writes its files back to the host, and forgets it. With `release`, trees that no
    /// other container uses are unmounted: the guest lives on without them. One that is being made is taken back by those who make
    /// it, which this waits for.
    pub async fn delete(&self, id: &str, release: bool) -> Result<(), DeleteError> {
        loop {
            let mut made = pin!(self.made.notified());
            made.as_mut().enable();
            match self.containers().get_mut(id) {
                Some(Slot::Making { unwanted }) => *unwanted = true,
                _ => break,
            }
            made.await;
            if !self.containers().contains_key(id) {
                return Ok(());
            }
        }
        let instance = self.find(id)?;
        kill_and_wait(&instance).await?;
        // First, as nothing of this may keep the host from what the container has written.
        if release {
            self.write_back(&instance).await?;
        } else {
            // There is no other container whose calls could wait for it.
            self.config.shares.write_back(instance.trees.all())?;
        }
        if let Some(cgroup) = &instance.cgroup {
            cgroup.remove().await?;
        }
        if release {
            self.release(&instance.trees);
        }
        self.containers().remove(id);
        Ok(())
    }

    /// Gives the host what a container has written. Others are answered meanwhile.
    pub(super) async fn write_back(&self, instance: &Instance) -> Result<(), ShareError> {
        for place in self.config.shares.to_write_back(instance.trees.all()) {
            let written = apart(&self.reaper, || shares::sync(&place)).await;
            written.map_err(|source| ShareError::WriteBack { place, source })?;
        }
        Ok(())
    }

    /// Does something that may wait for a device of the host while others are answered.
    pub(crate) async fn apart(&self, work: impl FnOnce() -> io::Result<()>) -> io::Result<()> {
        apart(&self.reaper, work).await
    }

    /// The same for a text, of at most a page.
    pub(crate) async fn read_apart(&self, read: impl FnOnce() -> io::Result<String>) -> io::Result<String> {
        read_apart(&self.reaper, read).await
    }

    /// Takes back a container that could not be made. The error to tell of is the one that led here.
    async fn undo(&self, instance: &Instance) {
        if let Err(error) = kill_and_wait(instance).await {
            crate::log::write(crate::log::Level::Warning, &format!("container {}: {error}", instance.id));
        }
        remove_cgroup(instance.cgroup.as_deref()).await;
        self.release(&instance.trees);
    }

    /// Lets go of the trees that no other container uses.
    fn release(&self, trees: &UsedTrees) {
        trees.own().into_iter().for_each(|tree| self.config.shares.leave(tree));
    }

    /// Makes a tmpfs that containers have in common, when the first one names it, and the folder in it that is wanted.
    fn mount_tmpfs(&self, tmpfs: &TmpfsSpec) -> Result<(), CreateError> {
        let failed = |source| CreateError::Tmpfs { name: tmpfs.name.clone(), source };
        let place = self.config.sandbox_tmpfs.join(&tmpfs.name);
        // Nothing panics while the lock is held.
        let mut mounted = self.tmpfs.lock().unwrap_or_else(PoisonError::into_inner);
        if !mounted.contains(&tmpfs.name) {
            let mount = || -> io::Result<()> {
                std::fs::create_dir_all(&place)?;
                let (flags, options) = (u32::try_from(tmpfs.flags).unwrap_or(0), CString::new(tmpfs.options.as_str())?);
                let flags = MountFlags::from_bits_retain(flags);
                Ok(rustix::mount::mount(tmpfs.name.as_str(), &place, "tmpfs", flags, Some(options.as_c_str()))?)
            };
            mount().map_err(failed)?;
            mounted.insert(tmpfs.name.clone());
        }
        resolve::make_folder(&place, &tmpfs.folder).map_err(failed)
    }
}

/// The life of the new process in this program; it ends in another program, or here.
fn run_child(setup: &Setup<'_>) -> ! {
    crate::init::enter_child();
    let channel = setup.channel;
    let mut kept = vec![channel.as_fd()];
    kept.extend(setup.stdio.descriptors());
    kept.extend(setup.mapped.iter().flatten().map(AsFd::as_fd));
    // Other containers' pipes must not be held open by this process while it waits to be started.
    if let Err(error) = sys::close_all_but(&kept) {
        channel.fail(&Failure::new(Stage::Process, "close the agent's descriptors", error));
        sys::exit_now(1);
    }
    let failure = setup.run();
    channel.fail(&failure);
    sys::exit_now(1)
}

fn signal_all(instance: &Instance, signal: i32) -> Result<(), SignalError> {
    let Some(cgroup) = &instance.cgroup else { return instance.init.signal(signal) };
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

/// Ends the container, also while it is paused: frozen processes can be killed. Init's end takes those with it that were
/// exec'd.
async fn kill_and_wait(instance: &Instance) -> Result<(), DeleteError> {
    match signal_all(instance, libc::SIGKILL) {
        Ok(()) | Err(SignalError::Finished) => {}
        Err(error) => return Err(error.into()),
    }
    // A process waiting to be started lets go of its pipes.
    drop(instance.init.take_waiting());
    if timeout(KILL_DEADLINE, instance.init.ended()).await.is_err() {
        return Err(DeleteError::StillRunning { seconds: KILL_DEADLINE.as_secs() });
    }
    instance.init.pumps().abort();
    instance.execs().values().flatten().for_each(|process| process.pumps().abort());
    Ok(())
}

async fn remove_cgroup(cgroup: Option<&Cgroup>) {
    if let Some(cgroup) = cgroup
        && let Err(error) = cgroup.remove().await
    {
        crate::log::write(crate::log::Level::Warning, &error.to_string());
    }
}
