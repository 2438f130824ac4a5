// SPDX-License-Identifier: Apache-2.0
//! The mounts that a container's spec asks for, made in the spec's order.

use std::ffi::CString;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::Path;

use rustix::fs::{AtFlags, CWD, FileType, Mode, OFlags, StatxAttributes, StatxFlags, statx};
use rustix::io::Errno;
use rustix::mount::{MountFlags, mount_remount};

use super::resolve::{self, Kind};
use super::{ShareRoots, copy_up, tree};
use crate::container::{Failure, HostSockets, IdMappings, Mount, MountSource, Stage, TmpfsSpec};

/// Where mounts are made, and from what.
#[derive(Debug)]
pub(crate) struct MountContext<'a> {
    /// The container's root file system (`O_PATH`).
    pub(crate) root: BorrowedFd<'a>,
    /// The shared trees.
    pub(crate) shares: &'a ShareRoots,
    /// Where those are that containers have in common.
    pub(crate) tmpfs: &'a Path,
    /// Those that stand for the host's.
    pub(crate) sockets: &'a HostSockets,
    /// The container's cgroup, if it has no cgroup namespace: it then sees its own part of the tree by a bind mount.
    pub(crate) cgroup: Option<&'a Path>,
    /// A sysfs, if the container cannot mount one, as it has a user namespace and not the network one: then it gets this.
    pub(crate) sysfs: Option<&'a Path>,
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

/// For each mount whose ids are mapped: what is to be mounted. To be called by the guest's own root, for a container that
/// may have a user namespace.
pub(crate) fn map_sources(shares: &ShareRoots, mounts: &[Mount]) -> Result<Vec<Option<OwnedFd>>, Failure> {
    let mut namespaces: Vec<(&IdMappings, OwnedFd)> = Vec::new();
    let mut mapped = Vec::with_capacity(mounts.len());
    for mount in mounts {
        let (MountSource::Share { place, .. }, Some(mappings)) = (&mount.source, &mount.id_mappings) else {
            mapped.push(None);
            continue;
        };
        if !namespaces.iter().any(|(known, _)| *known == mappings) {
            namespaces.push((mappings, mappings.namespace()?));
        }
        let namespace = namespaces.iter().find_map(|(known, namespace)| (*known == mappings).then_some(namespace));
        let make = || -> io::Result<OwnedFd> {
            let source = tree::clone_at(shares.open(place)?.as_fd(), mount.flags & libc::MS_REC != 0)?;
            if let Some(namespace) = namespace {
                tree::map_ids(source.as_fd(), namespace.as_fd())?;
            }
            Ok(source)
        };
        let failed = |error| Failure::new(Stage::Mount, format!("{}, with mapped ids", describe(mount)), error);
        mapped.push(Some(make().map_err(failed)?));
    }
    Ok(mapped)
}

/// Makes one mount; of what is `mapped`, if it has been made already.
pub(crate) fn make(
    context: &MountContext<'_>,
    mount: &Mount,
    mapped: Option<&OwnedFd>,
) -> Result<Option<LateReadonly>, Failure> {
    match &mount.source {
        MountSource::Share { .. } => bind(context, mount, mapped).map(|()| None),
        MountSource::SandboxTmpfs(tmpfs) => bind_tmpfs(context, mount, tmpfs).map(|()| None),
        MountSource::Socket(socket) => {
            bind_socket(context, mount, context.sockets.path(socket.number), Kind::File).map(|()| None)
        }
        MountSource::NotifySocket { is_directory } => {
            let kind = if *is_directory { Kind::Directory } else { Kind::File };
            bind_socket(context, mount, context.sockets.notify_path(*is_directory), kind).map(|()| None)
        }
        MountSource::FileSystem { fs_type, .. } if fs_type == "cgroup2" && context.cgroup.is_some() => {
            bind_own(context, mount, context.cgroup).map(|()| None)
        }
        MountSource::FileSystem { fs_type, .. } if fs_type == "sysfs" && context.sysfs.is_some() => {
            bind_own(context, mount, context.sysfs).map(|()| None)
        }
        MountSource::FileSystem { fs_type, source } => file_system(context, mount, fs_type, source),
        MountSource::Remount => remount(context, mount),
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
        MountSource::SandboxTmpfs(tmpfs) => format!("the sandbox's tmpfs {:?} at {}", tmpfs.name, mount.destination),
        MountSource::Socket(_) => format!("the host's socket at {}", mount.destination),
        MountSource::NotifySocket { .. } => format!("the notification socket at {}", mount.destination),
        MountSource::Remount => format!("what is at {} anew", mount.destination),
    }
}

fn bind(context: &MountContext<'_>, mount: &Mount, mapped: Option<&OwnedFd>) -> Result<(), Failure> {
    let MountSource::Share { place, is_directory } = &mount.source else { return Ok(()) };
    let kind = if *is_directory { Kind::Directory } else { Kind::File };
    let make = || match mapped {
        Some(mapped) => attach_bind(context, mount, mapped, kind),
        None => {
            let source = context.shares.open(place)?;
            attach_bind(context, mount, &tree::clone_at(source.as_fd(), mount.flags & libc::MS_REC != 0)?, kind)
        }
    };
    make().map_err(|error| Failure::new(Stage::Mount, describe(mount), error))
}

/// Binds a directory of the agent's in the place of a file system.
fn bind_own(context: &MountContext<'_>, mount: &Mount, directory: Option<&Path>) -> Result<(), Failure> {
    let Some(directory) = directory else { return Ok(()) };
    let make = || -> io::Result<()> {
        let source = resolve::own_directory(directory)?;
        attach_bind(context, mount, &tree::clone_at(source.as_fd(), false)?, Kind::Directory)
    };
    make().map_err(|error| Failure::new(Stage::Mount, describe(mount), error))
}

fn bind_tmpfs(context: &MountContext<'_>, mount: &Mount, tmpfs: &TmpfsSpec) -> Result<(), Failure> {
    let make = || -> io::Result<()> {
        let top = resolve::own_directory(&context.tmpfs.join(&tmpfs.name))?;
        // Containers may have put links there: none of them leads out of it. What the host takes for a folder, which it has nothing
        // in, may be a file that another container has made.
        let source = match resolve::existing(top.as_fd(), &tmpfs.folder) {
            Ok(source) => source,
            Err(_) => resolve::existing_or_made(top.as_fd(), &tmpfs.folder, Kind::Directory)?,
        };
        let kind = match resolve::file_type(source.as_fd())? {
            FileType::Directory => Kind::Directory,
            _ => Kind::File,
        };
        attach_bind(context, mount, &tree::clone_at(source.as_fd(), false)?, kind)
    };
    make().map_err(|error| Failure::new(Stage::Mount, describe(mount), error))
}

/// Binds a socket of the agent's, or the folder that it is in.
fn bind_socket(context: &MountContext<'_>, mount: &Mount, path: Option<&Path>, kind: Kind) -> Result<(), Failure> {
    let make = || -> io::Result<()> {
        let path = path.ok_or(Errno::NOENT)?;
        let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let source = rustix::fs::openat(CWD, path, flags, Mode::empty())?;
        attach_bind(context, mount, &tree::clone_at(source.as_fd(), false)?, kind)
    };
    make().map_err(|error| Failure::new(Stage::Mount, describe(mount), error))
}

fn attach_bind(context: &MountContext<'_>, mount: &Mount, bound: &OwnedFd, kind: Kind) -> io::Result<()> {
    let place = resolve::existing_or_made(context.root, &mount.destination, kind)?;
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
    let late = fs_type == "tmpfs" && (flags | mount.recursive_set) & libc::MS_RDONLY != 0;
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
    // A file system alone has nothing below: its own attributes are the whole tree's.
    let recursive_set = if late { mount.recursive_set & !libc::MS_RDONLY } else { mount.recursive_set };
    tree::change(made.as_fd(), true, recursive_set, mount.recursive_clear).map_err(failed)?;
    tree::attach(made.as_fd(), place.as_fd()).map_err(failed)?;
    tree::propagate(made.as_fd(), mount.propagation).map_err(failed)?;
    Ok(late.then(|| LateReadonly { mount: made, destination: mount.destination.clone() }))
}

/// Changes what is mounted at the destination. What makes it read-only comes in the end: something of a later mount may have to
/// be made in it.
fn remount(context: &MountContext<'_>, mount: &Mount) -> Result<Option<LateReadonly>, Failure> {
    let failed = |error: io::Error| Failure::new(Stage::Mount, describe(mount), error);
    let place = resolve::existing(context.root, &mount.destination).map_err(failed)?;
    if !is_mounted(place.as_fd()).map_err(failed)? {
        return Err(Failure::explained(Stage::Mount, format!("{}: nothing is mounted there", describe(mount))));
    }
    let late = mount.flags & libc::MS_RDONLY;
    let change = || -> io::Result<()> {
        // The call takes a path, and no link is to be followed.
        let path = format!("/proc/self/fd/{}", place.as_raw_fd());
        let flags = u32::try_from(mount.flags & !late).map_err(|_| Errno::INVAL)?;
        let data = CString::new(mount.data.as_str())?;
        mount_remount(path, MountFlags::from_bits_retain(flags), data.as_c_str())?;
        tree::change(place.as_fd(), true, mount.recursive_set, mount.recursive_clear)?;
        tree::propagate(place.as_fd(), mount.propagation)
    };
    change().map_err(failed)?;
    Ok((late != 0).then(|| LateReadonly { mount: place, destination: mount.destination.clone() }))
}

/// Whether a place is the top of a mount.
fn is_mounted(place: BorrowedFd<'_>) -> io::Result<bool> {
    let status = statx(place, "", AtFlags::EMPTY_PATH, StatxFlags::TYPE)?;
    Ok(status.stx_attributes.contains(StatxAttributes::MOUNT_ROOT))
}

fn copy_covered(covered: BorrowedFd<'_>, cover: BorrowedFd<'_>) -> io::Result<()> {
    let from = resolve::open(covered, ".", OFlags::RDONLY | OFlags::DIRECTORY)?;
    copy_up::copy(from.as_fd(), cover)
}
