// SPDX-License-Identifier: Apache-2.0
//! The container's root file system: taken from its shared tree, put in place, and in the end made the root.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;

use rustix::fs::{CWD, Mode, OFlags};
use rustix::mount::UnmountFlags;

use super::{ShareRoots, SharedTree, resolve, tree};
use crate::container::{Failure, Stage};

/// The root file system of the container that is being made, mounted but not yet the root.
#[derive(Debug)]
pub(crate) struct Rootfs {
    /// The mount's root (`O_PATH`).
    pub(crate) mount: OwnedFd,
}

impl Rootfs {
    /// Takes the tree and attaches it at `place`, a directory of the agent's. To be called in the container's mount
    /// namespace, which from then on neither sends mounts to the agent's nor, unless asked for, gets any.
    pub(crate) fn attach(shares: &ShareRoots, from: &SharedTree, place: &Path) -> Result<Self, Failure> {
        let attach = || -> io::Result<OwnedFd> {
            // pivot_root(2) refuses where a parent mount is shared.
            let root = resolve::own_directory(Path::new("/"))?;
            tree::propagate(root.as_fd(), libc::MS_PRIVATE | libc::MS_REC)?;
            let source = shares.open(from)?;
            let mount = tree::clone_at(source.as_fd(), true)?;
            tree::attach(mount.as_fd(), resolve::own_directory(place)?.as_fd())?;
            Ok(mount)
        };
        let mount = attach().map_err(|error| {
            Failure::new(Stage::Rootfs, format!("tree {:?}, path {:?}", from.tree, from.path), error)
        })?;
        Ok(Self { mount })
    }

    /// Makes this the root of the calling process's mount namespace, and leaves nothing of the old one.
    pub(crate) fn enter(&self) -> Result<(), Failure> {
        let step = |what: &'static str| move |error: rustix::io::Errno| Failure::new(Stage::Rootfs, what, error);
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let old = rustix::fs::openat(CWD, "/", flags, Mode::empty()).map_err(step("open the old root"))?;
        rustix::process::fchdir(&self.mount).map_err(step("enter it"))?;
        // The old root ends up on top of the new one, from where it is taken away.
        rustix::process::pivot_root(".", ".").map_err(step("pivot_root"))?;
        rustix::process::fchdir(&old).map_err(step("return to the old root"))?;
        rustix::mount::unmount(".", UnmountFlags::DETACH).map_err(step("unmount the old root"))?;
        rustix::process::chdir("/").map_err(step("enter the new root"))
    }

    /// Applies what the spec says of the whole mount: read-only, and how mounts in it spread (MS_*, 0 for private).
    pub(crate) fn seal(&self, readonly: bool, propagation: u64) -> Result<(), Failure> {
        let seal = || -> io::Result<()> {
            if readonly {
                tree::change(self.mount.as_fd(), false, libc::MS_RDONLY, 0)?;
            }
            tree::propagate(self.mount.as_fd(), propagation)
        };
        seal().map_err(|error| Failure::new(Stage::Rootfs, "set its mount's attributes", error))
    }
}
