// SPDX-License-Identifier: Apache-2.0
//! The mounts that a container's spec asks for, made in the spec's order.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;

use rustix::fs::OFlags;

use super::resolve::{self, Kind};
use super::{ShareRoots, copy_up, tree};
use crate::container::{Failure, Mount, MountSource, Stage};

/// Where mounts are made, and from what.
#[derive(Debug)]
pub(crate) struct MountContext<'a> {
    /// The container's root file system (`O_PATH`).
    pub(crate) root: BorrowedFd<'a>,
    /// The shared trees.
    pub(crate) shares: &'a ShareRoots,
    /// The container's cgroup, if it has no cgroup namespace: it then sees its own part of the tree by a bind mount.
    pub(crate) cgroup: Option<&'a Path>,
}

/// A mount that becomes read-only only when everything that belongs in it has been made.
#[derive(Debug)]
pub(crate) struct LateReadonly {
    mount: OwnedFd,
    destination: String,
}

impl LateReadonly {
    /// Makes the mount read-only.
    pub(crate) fn apply(&self) -> Result<(), Failure> {
        tree::change(self.mount.as_fd(), false, libc::MS_RDONLY, 0)
            .map_err(|error| Failure::new(Stage::ReadonlyPath, self.destination.clone(), error))
    }
}

/// Makes one mount.
pub(crate) fn make(context: &MountContext<'_>, mount: &Mount) -> Result<Option<LateReadonly>, Failure> {
    match &mount.source {
        MountSource::Share { .. } => bind(context, mount).map(|()| None),
        MountSource::FileSystem { fs_type, .. } if fs_type == "cgroup2" && context.cgroup.is_some() => {
            bind_cgroup(context, mount).map(|()| None)
        }
        MountSource::FileSystem { fs_type, source } => file_system(context, mount, fs_type, source),
    }
}

fn describe(mount: &Mount) -> String {
    match &mount.source {
        MountSource::Share { place, .. } if place.path.is_empty() => {
            format!("tree {:?} at {}", place.tree, mount.destination)
        }
        MountSource::Share { place, .. } => {
            format!("{:?} of tree {:?} at {}", place.path, place.tree, mount.destination)
        }
        MountSource::FileSystem { fs_type, .. } => format!("{fs_type} at {}", mount.destination),
    }
}

fn bind(context: &MountContext<'_>, mount: &Mount) -> Result<(), Failure> {
    let MountSource::Share { place, is_directory } = &mount.source else { return Ok(()) };
    let kind = if *is_directory { Kind::Directory } else { Kind::File };
    let make = || -> io::Result<()> {
        let source = context.shares.open(place)?;
        attach_bind(context, mount, source.as_fd(), kind)
    };
    make().map_err(|error| Failure::new(Stage::Mount, describe(mount), error))
}

fn bind_cgroup(context: &MountContext<'_>, mount: &Mount) -> Result<(), Failure> {
    let Some(cgroup) = context.cgroup else { return Ok(()) };
    let make = || -> io::Result<()> {
        let source = resolve::own_directory(cgroup)?;
        attach_bind(context, mount, source.as_fd(), Kind::Directory)
    };
    make().map_err(|error| Failure::new(Stage::Mount, describe(mount), error))
}

fn attach_bind(context: &MountContext<'_>, mount: &Mount, source: BorrowedFd<'_>, kind: Kind) -> io::Result<()> {
    let place = resolve::existing_or_made(context.root, &mount.destination, kind)?;
    let bound = tree::clone_at(source, mount.flags & libc::MS_REC != 0)?;
    tree::change(bound.as_fd(), false, mount.flags, 0)?;
    tree::change(bound.as_fd(), true, mount.recursive_set, mount.recursive_clear)?;
    tree::attach(bound.as_fd(), place.as_fd())?;
    tree::propagate(bound.as_fd(), mount.propagation)
}

fn file_system(
    context: &MountContext<'_>,
    mount: &Mount,
    fs_type: &str,
    source: &str,
) -> Result<Option<LateReadonly>, Failure> {
    let failed = |error: io::Error| Failure::new(Stage::Mount, describe(mount), error);
    let place = resolve::existing_or_made(context.root, &mount.destination, Kind::Directory).map_err(failed)?;
    let mut data = mount.data.clone();
    let mut flags = mount.flags;
    // Device nodes and the destinations of later mounts have still to be made in a tmpfs.
    let late = fs_type == "tmpfs" && flags & libc::MS_RDONLY != 0;
    if late {
        flags &= !libc::MS_RDONLY;
    }
    if fs_type == "tmpfs" {
        // A tmpfs looks like the directory that it covers, unless the options say otherwise: the last `mode` counts.
        let mode = resolve::permissions(place.as_fd()).map_err(failed)?;
        data = format!("mode={mode:04o},{data}");
    }
    let made = tree::make(fs_type, source, flags, &data)
        .map_err(|error| Failure::explained(Stage::Mount, format!("{}: {error}", describe(mount))))?;
    if mount.copy_up {
        copy_covered(place.as_fd(), made.as_fd()).map_err(failed)?;
    }
    tree::attach(made.as_fd(), place.as_fd()).map_err(failed)?;
    tree::propagate(made.as_fd(), mount.propagation).map_err(failed)?;
    Ok(late.then(|| LateReadonly { mount: made, destination: mount.destination.clone() }))
}

fn copy_covered(covered: BorrowedFd<'_>, cover: BorrowedFd<'_>) -> io::Result<()> {
    let from = resolve::open(covered, ".", OFlags::RDONLY | OFlags::DIRECTORY)?;
    copy_up::copy(from.as_fd(), cover)
}
