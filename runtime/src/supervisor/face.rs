// SPDX-License-Identifier: Apache-2.0
//! The container's files, where engines look for them: in the mount namespace of the process that stands for the container.
//! podman enters it to copy files in and out, and in the host's it would take those of the host.
//!
//! The first thread of the process, by which it is known, is the one that is there. All work is another thread's, which stays
//! with the host.

use std::any::Any;
use std::io;
use std::path::PathBuf;
use std::sync::mpsc;
use std::{panic, thread};

use bulkhead_protocol::agent::CreateContainerRequest;
use bulkhead_vmm::config::ShareTree;
use bulkhead_vmm::tree::DetachedTree;
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, unshare};
use nix::unistd::pivot_root;
use rustix::fs::CWD;
use rustix::io::Errno;
use rustix::mount::{MoveMountFlags, move_mount};

use super::error::RunError;
use super::proc_view::{self, ProcMount, ProcPlace};
use crate::storage::Shares;

/// A folder that every host has, to be covered for a moment.
const STAGE: &str = "/proc";

/// The trees of a container.
#[derive(Debug)]
pub(super) struct Face {
    root: ShareTree,
    /// By their places in the container.
    binds: Vec<(PathBuf, ShareTree)>,
    /// What will show its processes, if it has a /proc and this host has FUSE.
    processes: Option<ProcMount>,
}

impl Face {
    /// Finds a container's trees.
    pub(super) fn new(request: &CreateContainerRequest, shares: &Shares) -> io::Result<Self> {
        let root = shares.private.first().ok_or(io::ErrorKind::NotFound)?;
        let mut binds = Vec::new();
        for mount in &request.mounts {
            if let Some(tree) = mount.share.as_ref().and_then(|share| find(&shares.shared, &share.tree)) {
                // What is there when it is created.
                let tree = ShareTree { follows: false, ..tree.clone() };
                binds.push((PathBuf::from(&mount.destination), tree));
            }
        }
        let has_proc =
            request.mounts.iter().any(|mount| mount.destination == proc_view::PLACE && mount.fs_type == "proc");
        let processes = if has_proc { ProcMount::open() } else { None };
        Ok(Self { root: root.clone(), binds, processes })
    }

    /// Does `work` on a thread of its own, once this one, which has to be the first of its process, is in a mount namespace
    /// that has these trees and nothing else: for this one, a path leads into the container ever after. Whoever does the work
    /// gets what is to show the processes there.
    pub(super) fn show<T: Send>(
        self,
        work: impl FnOnce(Option<ProcPlace>) -> Result<T, RunError> + Send,
    ) -> Result<T, RunError> {
        let (shown, is_shown) = mpsc::channel();
        thread::scope(|scope| {
            // Dropped here when something fails: the worker is waited for, and waits for this.
            let shown = shown;
            // It is made before, and so is where this one was.
            let worker = thread::Builder::new().name("supervisor".to_owned()).spawn_scoped(scope, move || {
                // What has failed is told by the other thread.
                is_shown.recv().ok().map(work)
            });
            let worker = worker.map_err(RunError::Face)?;
            let processes = self.enter().map_err(RunError::Face)?;
            let _ = shown.send(processes);
            let done = worker.join().unwrap_or_else(|panic: Box<dyn Any + Send>| panic::resume_unwind(panic));
            done.unwrap_or_else(|| Err(RunError::Face(io::ErrorKind::BrokenPipe.into())))
        })
    }

    fn enter(self) -> io::Result<Option<ProcPlace>> {
        unshare(CloneFlags::CLONE_NEWNS)?;
        mount(None::<&str>, "/", None::<&str>, MsFlags::MS_REC | MsFlags::MS_PRIVATE, None::<&str>)?;
        // Each mounted nowhere yet. In a mount namespace of its own user namespace this process may.
        let open = |(place, tree): (PathBuf, ShareTree)| Ok((place, DetachedTree::open(&tree)?));
        let binds = self.binds.into_iter().map(open).collect::<io::Result<Vec<_>>>()?;
        let flags = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH;
        move_mount(DetachedTree::open(&self.root)?.mount(), "", CWD, STAGE, flags)?;
        nix::unistd::chdir(STAGE)?;
        pivot_root(".", ".")?;
        umount2(".", MntFlags::MNT_DETACH)?;
        nix::unistd::chdir("/")?;
        // From here on every path ends in the container's root, wherever its links lead; the guest follows them too.
        let flags = flags | MoveMountFlags::MOVE_MOUNT_T_SYMLINKS;
        for (place, tree) in &binds {
            match move_mount(tree.mount(), "", CWD, place, flags) {
                // The guest makes the place, or has something else there: a file for a folder is `EINVAL`.
                Ok(()) | Err(Errno::NOENT | Errno::NOTDIR | Errno::INVAL | Errno::LOOP) => {}
                Err(error) => return Err(error.into()),
            }
        }
        Ok(self.processes.and_then(ProcMount::mount))
    }
}

fn find<'a>(trees: &'a [ShareTree], name: &str) -> Option<&'a ShareTree> {
    trees.iter().find(|tree| tree.name == name)
}
