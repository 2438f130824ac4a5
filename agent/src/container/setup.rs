// SPDX-License-Identifier: Apache-2.0
//! What a container's first process does to itself, from clone3 to execve. The order matters: each step needs what later
//! ones take away. What every process does is in [`super::attributes`].

use std::os::fd::{AsFd, OwnedFd};

use nix::sched::CloneFlags;
use rustix::fs::{CWD, Mode, OFlags};
use rustix::process::{DumpableBehavior, set_dumpable_behavior};

use super::attributes::{self, Program};
use super::channel::ChildEnd;
use super::{ContainerSpec, EngineConfig, Failure, HostSockets, Stage, devices, sandbox, sysctl};
use crate::network;
use crate::process::{credentials, stdio, terminal};
use crate::storage::hidden;
use crate::storage::mounts::{self, MountContext};
use crate::storage::resolve::{self, Kind};
use crate::storage::rootfs::Rootfs;

/// What the process needs of the agent's.
#[derive(Debug)]
pub(crate) struct Setup<'a> {
    pub(crate) spec: &'a ContainerSpec,
    pub(crate) config: &'a EngineConfig,
    pub(crate) channel: &'a ChildEnd,
    /// What it has beside a terminal.
    pub(crate) stdio: &'a stdio::ChildStdio,
    /// The container's cgroup, as the agent names it.
    pub(crate) cgroup: Option<&'a std::path::Path>,
    /// For each mount of the spec whose ids are mapped: what is to be mounted.
    pub(crate) mapped: &'a [Option<OwnedFd>],
    /// Those that are to be bound.
    pub(crate) sockets: &'a HostSockets,
}

impl Setup<'_> {
    /// Sets the calling process up and executes its program. Returns only if that failed.
    pub(crate) fn run(&self) -> Failure {
        let process = &self.spec.process;
        match self.prepare() {
            Ok(program) => match self.spec.start_hooks.run() {
                Ok(()) => program.execute(process, self.stdio),
                Err(failure) => failure,
            },
            Err(failure) => failure,
        }
    }

    /// Everything but execve.
    fn prepare(&self) -> Result<Program, Failure> {
        let process = &self.spec.process;
        if self.spec.namespaces.user {
            self.channel.wait_for_mappings()?;
            credentials::become_root()?;
            // The change of user has hidden the process from itself: /proc/self would be the guest's root's. Nobody else
            // is there to look into it.
            set_dumpable_behavior(DumpableBehavior::Dumpable)
                .map_err(|error| Failure::new(Stage::Process, "let it see itself", error))?;
        } else {
            attributes::set_oom_score(process, None)?;
        }
        attributes::begin()?;
        self.enter_namespaces()?;
        let (rootfs, terminal) = self.make_root()?;
        rootfs.enter()?;
        rootfs.seal(self.spec.rootfs_readonly, self.spec.rootfs_propagation)?;
        attributes::finish(process, self.spec.namespaces, self.channel, self.stdio, terminal.as_ref())
    }

    fn enter_namespaces(&self) -> Result<(), Failure> {
        if self.spec.namespaces.cgroup {
            nix::sched::unshare(CloneFlags::CLONE_NEWCGROUP)
                .map_err(|error| Failure::new(Stage::Namespace, "cgroup", error))?;
        }
        if self.spec.namespaces.time {
            self.make_time_namespace()?;
        }
        sandbox::set_names(&self.spec.hostname, &self.spec.domainname)?;
        // Without a network namespace of its own it has the guest's, which is not its to change.
        if self.spec.namespaces.network || !self.spec.namespaces.user {
            network::bring_loopback_up()?;
        }
        sysctl::apply(&self.spec.sysctls)
    }

    /// Makes a time namespace for the program: offsets can be given until somebody is in it.
    fn make_time_namespace(&self) -> Result<(), Failure> {
        nix::sched::unshare(CloneFlags::from_bits_retain(libc::CLONE_NEWTIME))
            .map_err(|error| Failure::new(Stage::Namespace, "time", error))?;
        let offsets = &self.spec.time_offsets;
        if offsets.is_empty() {
            return Ok(());
        }
        std::fs::write("/proc/self/timens_offsets", offsets)
            .map_err(|error| Failure::new(Stage::Namespace, format!("time, with the offsets {offsets:?}"), error))
    }

    /// Makes the root file system, and the container's end of its terminal in it.
    ///
    /// The host shares the tree of a read-only root read-only. If something is missing in it that a mount needs, it is
    /// made in a file system over the tree, which becomes read-only in the end.
    fn make_root(&self) -> Result<(Rootfs, Option<OwnedFd>), Failure> {
        let (shares, tree, place) = (&self.config.shares, &self.spec.rootfs, &self.config.rootfs_mount_point);
        let rootfs = Rootfs::attach(shares, tree, place)?;
        match self.populate(&rootfs) {
            Err(failure) if failure.errno == libc::EROFS && self.spec.rootfs_readonly => {
                rootfs.detach(place)?;
                let rootfs = Rootfs::attach_writable(shares, tree, place)?;
                self.populate(&rootfs).map(|terminal| (rootfs, terminal))
            }
            result => result.map(|terminal| (rootfs, terminal)),
        }
    }

    /// Puts into the root file system what the spec wants there. Returns the container's end of its terminal.
    fn populate(&self, rootfs: &Rootfs) -> Result<Option<OwnedFd>, Failure> {
        let root = rootfs.mount.as_fd();
        let context = MountContext {
            root,
            shares: &self.config.shares,
            tmpfs: &self.config.sandbox_tmpfs,
            sockets: self.sockets,
            cgroup: if self.spec.namespaces.cgroup { None } else { self.cgroup },
            sysfs: (self.spec.namespaces.user && !self.spec.namespaces.network).then_some(&*self.config.sysfs),
        };
        let mut late = Vec::new();
        for (mount, mapped) in self.spec.mounts.iter().zip(self.mapped) {
            late.extend(mounts::make(&context, mount, mapped.as_ref())?);
        }
        devices::make(root, self.spec, &self.config.device_scratch, &self.config.sysfs)?;
        let terminal = match self.spec.process.stdio.terminal {
            Some(size) => {
                let terminal = terminal::make(root, size)?;
                terminal::bind_console(root, terminal.device.as_fd())?;
                self.channel.send_terminal(terminal.controller.as_fd())?;
                Some(terminal.device)
            }
            None => None,
        };
        resolve::existing_or_made(root, &self.spec.process.cwd, Kind::Directory)
            .map_err(|error| Failure::new(Stage::WorkingDirectory, self.spec.process.cwd.clone(), error))?;
        for mount in late {
            mount.apply()?;
        }
        for path in &self.spec.readonly_paths {
            hidden::make_readonly(root, path)?;
        }
        if !self.spec.masked_paths.is_empty() {
            let null = rustix::fs::openat(CWD, "/dev/null", OFlags::PATH | OFlags::CLOEXEC, Mode::empty())
                .map_err(|error| Failure::new(Stage::MaskedPath, "open the guest's /dev/null", error))?;
            for path in &self.spec.masked_paths {
                hidden::mask(root, path, null.as_fd())?;
            }
        }
        Ok(terminal)
    }
}
