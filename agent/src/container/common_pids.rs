// SPDX-License-Identifier: Apache-2.0
//! The pid namespace that containers of a pod share, if they are to see each other's processes.
//!
//! It lives as long as its first process, which takes the orphans and does nothing else. A container's init is made by an
//! agent that has entered the namespace for its children, and left it again.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::sync::Mutex;
use std::sync::PoisonError;

use rustix::process::{DumpableBehavior, PidfdFlags, Signal, getpid, pidfd_open};

use super::spec::NEW_PIDS;
use crate::sys::{self, Child, Cloned, Parent};

/// The namespace, made when the first container asks for it.
#[derive(Debug, Default)]
pub(super) struct CommonPids(Mutex<Option<Child>>);

/// While it lives, children of this process are made in the namespace.
#[derive(Debug)]
pub(super) struct Entered {
    own: OwnedFd,
}

impl CommonPids {
    /// Enters the namespace for children. Its first process has `empty` as its root.
    ///
    /// The caller must be the only thread of its process.
    pub(super) fn enter(&self, empty: &Path) -> io::Result<Entered> {
        let own = pidfd_open(getpid(), PidfdFlags::empty())?;
        // Nothing panics while the lock is held.
        let mut first = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let first = match &mut *first {
            Some(first) => first,
            none => none.insert(make(empty)?),
        };
        sys::enter_namespaces(first.pidfd.as_fd(), NEW_PIDS)?;
        Ok(Entered { own })
    }
}

impl Drop for Entered {
    fn drop(&mut self) {
        if let Err(error) = sys::enter_namespaces(self.own.as_fd(), NEW_PIDS) {
            let text = format!("cannot leave the pid namespace of the containers: {error}");
            crate::log::write(crate::log::Level::Warning, &text);
        }
    }
}

/// Makes the namespace with its first process.
fn make(empty: &Path) -> io::Result<Child> {
    match sys::clone_process(Parent::Caller, NEW_PIDS, None)? {
        Cloned::Parent(child) => Ok(child),
        Cloned::Child => {
            crate::init::enter_child();
            let _ = take_orphans(empty);
            sys::exit_now(1)
        }
    }
}

/// The first process: it takes orphans until it is killed, and shows nothing of the agent to those who see it.
fn take_orphans(empty: &Path) -> io::Result<()> {
    // An agent that is no pid 1 takes it along.
    rustix::process::set_parent_process_death_signal(Some(Signal::KILL))?;
    rustix::process::set_dumpable_behavior(DumpableBehavior::NotDumpable)?;
    sys::close_all_but(&[])?;
    rustix::process::chroot(empty)?;
    rustix::process::chdir("/")?;
    rustix::thread::set_name(c"pause")?;
    sys::ignore_children()?;
    loop {
        rustix::event::pause();
    }
}
