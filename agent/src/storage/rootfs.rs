// SPDX-License-Identifier: Apache-2.0
//! The container's root file system: taken from its shared tree, put in place, and in the end made the root.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
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
            let mount = clone_tree(shares, from)?;
            tree::attach(mount.as_fd(), resolve::own_directory(place)?.as_fd())?;
            Ok(mount)
        };
        let mount = attach().map_err(|error| Failure::new(Stage::Rootfs, describe(from), error))?;
        Ok(Self { mount })
    }

    /// Attaches at `place` a file system that shows the tree and can be written, without the tree being: what is
    /// missing for mounts can be made in it.
    pub(crate) fn attach_writable(shares: &ShareRoots, from: &SharedTree, place: &Path) -> Result<Self, Failure> {
        let failed =
            |error: io::Error| Failure::new(Stage::Rootfs, format!("{}, made writable", describe(from)), error);
        let explained = |error: tree::FileSystemError| {
            Failure::explained(Stage::Rootfs, format!("{}, made writable: {error}", describe(from)))
        };
        let scratch = tree::make("tmpfs", "tmpfs", 0, "mode=755").map_err(explained)?;
        let attach = |mount: &OwnedFd, place: &Path| -> io::Result<()> {
            tree::attach(mount.as_fd(), resolve::own_directory(place)?.as_fd())
        };
        attach(&scratch, place).map_err(failed)?;
        let [lower, upper, work, merged] = ["lower", "upper", "work", "merged"].map(|name| place.join(name));
        [&lower, &upper, &work, &merged].into_iter().try_for_each(std::fs::create_dir).map_err(failed)?;
        clone_tree(shares, from).and_then(|mount| attach(&mount, &lower)).map_err(failed)?;
        copy_top_attributes(&lower, &upper).map_err(failed)?;
        let data = format!("lowerdir={},upperdir={},workdir={}", lower.display(), upper.display(), work.display());
        let mount = tree::make("overlay", "overlay", 0, &data).map_err(explained)?;
        attach(&mount, &merged).map_err(failed)?;
        Ok(Self { mount })
    }

    /// Takes the tree away again from `place`, with everything that has been mounted on it.
    pub(crate) fn detach(self, place: &Path) -> Result<(), Failure> {
        rustix::mount::unmount(place, UnmountFlags::DETACH)
            .map_err(|error| Failure::new(Stage::Rootfs, "take it away again", error))
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

fn describe(tree: &SharedTree) -> String {
    format!("tree {:?}, path {:?}", tree.tree, tree.path)
}

fn clone_tree(shares: &ShareRoots, from: &SharedTree) -> io::Result<OwnedFd> {
    tree::clone_at(shares.open(from)?.as_fd(), true)
}

/// An overlay's top directory has the upper layer's owner and permissions.
fn copy_top_attributes(from: &Path, to: &Path) -> io::Result<()> {
    let metadata = std::fs::metadata(from)?;
    std::os::unix::fs::chown(to, Some(metadata.uid()), Some(metadata.gid()))?;
    std::fs::set_permissions(to, metadata.permissions())
}
