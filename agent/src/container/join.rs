// SPDX-License-Identifier: Apache-2.0
//! What an exec'd process does, from clone3 to execve.
//!
//! ```text
//! agent ──clone3──> helper: enters the container's namespaces
//!   │                 │
//!   │               clone3, into the container's cgroup, as the agent's child ──> the process
//!   │ <── its pid ────┴─ ends                                                         │
//!   │ <── ready ──────────────────────────────────────────────────────────────────────┘
//! ```
//!
//! A pid namespace is entered only by the processes that one makes after setns(2); and the agent itself is to enter none.
//! Hence the helper. It stays out of the container's cgroup: it is not the container's to freeze or to count.

use std::os::fd::{AsFd, BorrowedFd};

use rustix::fs::{CWD, Mode, OFlags};

use super::attributes::{self, Program};
use super::channel::ChildEnd;
use super::spec::Namespaces;
use super::{Failure, ProcessSpec, Stage};
use crate::process::{credentials, stdio, terminal};
use crate::sys::{self, Cloned, Parent};

/// What the process needs of the agent's.
#[derive(Debug)]
pub(super) struct Join<'a> {
    pub(super) process: &'a ProcessSpec,
    pub(super) channel: &'a ChildEnd,
    /// What it has beside a terminal.
    pub(super) pipes: &'a stdio::ChildStdio,
    /// The container's init.
    pub(super) init: BorrowedFd<'a>,
    /// The container's own namespaces.
    pub(super) namespaces: Namespaces,
    pub(super) cgroup: Option<BorrowedFd<'a>>,
    /// Where init has gone below that, if it has: a container that has handed its controllers on (systemd does) can have no
    /// process in its own cgroup.
    pub(super) inits_cgroup: Option<BorrowedFd<'a>>,
}

impl Join<'_> {
    /// The life of the helper, and of the process up to its program.
    pub(super) fn run(&self) -> ! {
        crate::init::enter_child();
        let failure = match self.enter_and_clone() {
            Ok(Cloned::Parent(child)) => match self.channel.made(&child) {
                Ok(()) => sys::exit_now(0),
                Err(failure) => failure,
            },
            Ok(Cloned::Child) => match self.prepare() {
                Ok(program) => program.execute(self.process, self.pipes),
                Err(failure) => failure,
            },
            Err(failure) => failure,
        };
        self.channel.fail(&failure);
        sys::exit_now(1)
    }

    /// The helper's part.
    fn enter_and_clone(&self) -> Result<Cloned, Failure> {
        self.keep([self.channel.as_fd(), self.init].into_iter().chain(self.cgroup).chain(self.inits_cgroup))?;
        // The container's processes see the new one while it is still the agent's program: they are not to look into it.
        // The program that it executes starts without this.
        rustix::process::set_dumpable_behavior(rustix::process::DumpableBehavior::NotDumpable)
            .map_err(|error| Failure::new(Stage::Process, "hide it while it is being set up", error))?;
        attributes::set_oom_score(self.process, None)?;
        self.process.scheduling.apply_initial_cpus()?;
        sys::enter_namespaces(self.init, self.namespaces.join_flags())
            .map_err(|error| Failure::new(Stage::Namespace, "those of the container", error))?;
        let cloned = match (sys::clone_process(Parent::CallersParent, 0, self.cgroup), self.inits_cgroup) {
            (Err(error), Some(cgroup)) if error.raw_os_error() == Some(libc::EBUSY) => {
                sys::clone_process(Parent::CallersParent, 0, Some(cgroup))
            }
            (cloned, _) => cloned,
        };
        cloned.map_err(|error| Failure::new(Stage::Process, "make it in the container", error))
    }

    /// The process's part, without execve.
    fn prepare(&self) -> Result<Program, Failure> {
        self.process.scheduling.apply_final_cpus()?;
        if self.namespaces.cgroup_flag() != 0 {
            // Not before: from within, the agent's own cgroup could not be left.
            sys::enter_namespaces(self.init, self.namespaces.cgroup_flag())
                .map_err(|error| Failure::new(Stage::Namespace, "cgroup", error))?;
        }
        if self.namespaces.user {
            // Not before: in it, nothing of the agent's could be entered any more, not even the container's cgroup.
            let namespace = u64::from(libc::CLONE_NEWUSER.cast_unsigned());
            sys::enter_namespaces(self.init, namespace)
                .map_err(|error| Failure::new(Stage::Namespace, "user", error))?;
            credentials::become_root()?;
        }
        // No directory of the agent's may be left open: it could be the working directory's way out of the container.
        self.keep([self.channel.as_fd()])?;
        attributes::begin()?;
        let terminal = match self.process.stdio.terminal {
            Some(size) => {
                let root = rustix::fs::openat(CWD, "/", OFlags::PATH | OFlags::CLOEXEC, Mode::empty())
                    .map_err(|error| Failure::new(Stage::Terminal, "open the root directory", error))?;
                let terminal = terminal::make(root.as_fd(), size)?;
                self.channel.send_terminal(terminal.controller.as_fd())?;
                Some(terminal.device)
            }
            None => None,
        };
        attributes::finish(self.process, self.namespaces, self.channel, self.pipes, terminal.as_ref())
    }

    /// Closes everything but these, the pipes and 0, 1, 2.
    fn keep<'b>(&'b self, kept: impl IntoIterator<Item = BorrowedFd<'b>>) -> Result<(), Failure> {
        let mut kept: Vec<BorrowedFd<'_>> = kept.into_iter().collect();
        kept.extend(self.pipes.descriptors());
        sys::close_all_but(&kept).map_err(|error| Failure::new(Stage::Process, "close the agent's descriptors", error))
    }
}
