// SPDX-License-Identifier: Apache-2.0
//! What a container's first process does to itself, from clone3 to execve. The order matters: each step needs what later
//! ones take away.

use std::ffi::CString;
use std::os::fd::{AsFd, OwnedFd};

use nix::sched::CloneFlags;
use rustix::fs::{CWD, Mode, OFlags};
use rustix::io::Errno;

use super::channel::ChildEnd;
use super::{ContainerSpec, EngineConfig, Failure, ProcessSpec, Stage, devices, sysctl};
use crate::process::{credentials, exec, rlimits, stdio, terminal, users};
use crate::storage::hidden;
use crate::storage::mounts::{self, MountContext};
use crate::storage::resolve::{self, Kind};
use crate::storage::rootfs::Rootfs;
use crate::{network, sys};

/// What the process needs of the agent's.
#[derive(Debug)]
pub(crate) struct Setup<'a> {
    pub(crate) spec: &'a ContainerSpec,
    pub(crate) config: &'a EngineConfig,
    pub(crate) channel: &'a ChildEnd,
    /// Without a terminal: what becomes 0, 1 and 2.
    pub(crate) stdio: Option<&'a stdio::ChildStdio>,
    /// The container's cgroup, as the agent names it.
    pub(crate) cgroup: Option<&'a std::path::Path>,
}

/// First descriptor that is not a standard stream.
const FIRST_OTHER_DESCRIPTOR: u32 = 3;

impl Setup<'_> {
    /// Sets the calling process up and executes its program. Returns only if that failed.
    pub(crate) fn run(&self) -> Failure {
        match self.prepare() {
            Ok((program, env)) => exec::execute(&program, &self.spec.process.args, &env),
            Err(failure) => failure,
        }
    }

    /// Everything but execve: the program's path and its environment.
    fn prepare(&self) -> Result<(CString, Vec<CString>), Failure> {
        let process = &self.spec.process;
        sys::reset_signals().map_err(|error| Failure::new(Stage::Process, "reset its signals", error))?;
        rustix::process::setsid().map_err(|error| Failure::new(Stage::Terminal, "make a session", error))?;
        rustix::process::umask(Mode::empty());
        if let Some(adjustment) = process.oom_score_adj {
            std::fs::write("/proc/self/oom_score_adj", adjustment.to_string())
                .map_err(|error| Failure::new(Stage::OomScore, adjustment.to_string(), error))?;
        }
        self.enter_namespaces()?;
        let (rootfs, terminal) = self.make_root()?;
        rootfs.enter()?;
        rootfs.seal(self.spec.rootfs_readonly, self.spec.rootfs_propagation)?;
        self.install_stdio(terminal.as_ref())?;
        rlimits::apply(&process.rlimits)?;
        let env = environment(process)?;
        become_user(process)?;
        rustix::process::umask(Mode::from_raw_mode(process.umask));
        let program = exec::find(&process.args[0], &env)?;
        self.close_on_exec()?;
        self.channel.ready()?;
        Ok((program, env))
    }

    fn enter_namespaces(&self) -> Result<(), Failure> {
        if self.spec.namespaces.cgroup {
            nix::sched::unshare(CloneFlags::CLONE_NEWCGROUP)
                .map_err(|error| Failure::new(Stage::Namespace, "cgroup", error))?;
        }
        for (what, value, set) in [
            ("hostname", &self.spec.hostname, set_host_name as fn(&str) -> std::io::Result<()>),
            ("domainname", &self.spec.domainname, sys::set_domain_name),
        ] {
            if !value.is_empty() {
                set(value).map_err(|error| Failure::new(Stage::Hostname, format!("{what} {value:?}"), error))?;
            }
        }
        network::bring_loopback_up()?;
        sysctl::apply(&self.spec.sysctls)
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
            cgroup: if self.spec.namespaces.cgroup { None } else { self.cgroup },
        };
        let mut late = Vec::new();
        for mount in &self.spec.mounts {
            late.extend(mounts::make(&context, mount)?);
        }
        devices::make(root, self.spec, &self.config.device_scratch)?;
        let terminal = match self.spec.process.stdio.terminal {
            Some(size) => {
                let terminal = terminal::make(root, size)?;
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

    fn install_stdio(&self, terminal: Option<&OwnedFd>) -> Result<(), Failure> {
        if let Some(device) = terminal {
            stdio::install_terminal(device, self.spec.process.uid)?;
            return terminal::control(device.as_fd());
        }
        match self.stdio {
            Some(stdio::ChildStdio([stdin, stdout, stderr])) => {
                stdio::install(stdin.as_fd(), stdout.as_fd(), stderr.as_fd())
            }
            None => Ok(()),
        }
    }

    /// All of the agent's descriptors are opened that way; this is for one that was forgotten.
    fn close_on_exec(&self) -> Result<(), Failure> {
        sys::close_on_exec_from(FIRST_OTHER_DESCRIPTOR)
            .map_err(|error| Failure::new(Stage::Process, "keep the agent's descriptors from it", error))
    }
}

fn set_host_name(name: &str) -> std::io::Result<()> {
    Ok(nix::unistd::sethostname(name)?)
}

/// The process's environment, with HOME if the spec has none.
fn environment(process: &ProcessSpec) -> Result<Vec<CString>, Failure> {
    let mut env = process.env.clone();
    if !env.iter().any(|entry| entry.to_bytes().starts_with(b"HOME=")) {
        let home = CString::new(format!("HOME={}", users::home(process.uid))).map_err(|_| {
            Failure::explained(Stage::Process, "the home directory in /etc/passwd has a NUL byte in it")
        })?;
        env.push(home);
    }
    Ok(env)
}

/// Changes directory and user. A working directory that root may not enter (on a network share) may be the user's own.
fn become_user(process: &ProcessSpec) -> Result<(), Failure> {
    let failed = |error: Errno| Failure::new(Stage::WorkingDirectory, process.cwd.clone(), error);
    let entered = match rustix::process::chdir(process.cwd.as_str()) {
        Ok(()) => true,
        Err(Errno::ACCESS | Errno::PERM) => false,
        Err(error) => return Err(failed(error)),
    };
    credentials::apply(process)?;
    if entered { Ok(()) } else { rustix::process::chdir(process.cwd.as_str()).map_err(failed) }
}
