// SPDX-License-Identifier: Apache-2.0
//! A shared tree on its way into the jail.

use std::io;
use std::os::fd::{AsFd, OwnedFd};

use rustix::fs::{AtFlags, FileType, Mode, OFlags};
use rustix::mount::{MountAttrFlags, MoveMountFlags, OpenTreeFlags, move_mount, open_tree};

use super::{JailError, sys};
use crate::config::ShareTree;

/// Longest name of a tree.
const NAME_MAX: usize = 64;

/// A copy of a tree's mounts that is mounted nowhere yet.
#[derive(Debug)]
pub(super) struct DetachedTree<'a> {
    tree: &'a ShareTree,
    mount: OwnedFd,
    is_dir: bool,
}

impl<'a> DetachedTree<'a> {
    /// Copies the tree's mounts, with what is mounted below if it is recursive, and gives them their attributes: read-only if asked, and
    /// never programs, devices or set-user-id for the VMM itself.
    ///
    /// # Errors
    ///
    /// When the tree is absent or neither a directory nor a regular file.
    pub(super) fn open(tree: &'a ShareTree) -> Result<Self, JailError> {
        let failed = |source: io::Error| JailError::new(format!("share {}", tree.source.display()), source);
        let valid = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'_' || byte == b'-';
        if tree.name.is_empty() || tree.name.len() > NAME_MAX || !tree.name.bytes().all(valid) {
            return Err(failed(io::Error::new(io::ErrorKind::InvalidInput, "its name in the share is not valid")));
        }
        let mut flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
        flags.set(OpenTreeFlags::AT_RECURSIVE, tree.recursive);
        let mount = open_tree(rustix::fs::CWD, &tree.source, flags).map_err(|errno| failed(errno.into()))?;
        let status = rustix::fs::statat(&mount, c"", AtFlags::EMPTY_PATH).map_err(|errno| failed(errno.into()))?;
        let is_dir = match FileType::from_raw_mode(status.st_mode) {
            FileType::Directory => true,
            FileType::RegularFile => false,
            _ => {
                let reason = "neither a directory nor a regular file";
                return Err(failed(io::Error::new(io::ErrorKind::InvalidInput, reason)));
            }
        };
        let mut attributes =
            MountAttrFlags::MOUNT_ATTR_NOSUID | MountAttrFlags::MOUNT_ATTR_NODEV | MountAttrFlags::MOUNT_ATTR_NOEXEC;
        attributes.set(MountAttrFlags::MOUNT_ATTR_RDONLY, tree.read_only);
        sys::mount_setattr(mount.as_fd(), true, attributes).map_err(failed)?;
        Ok(Self { tree, mount, is_dir })
    }

    /// Mounts the tree under its name in `directory`.
    ///
    /// # Errors
    ///
    /// When two trees have one name, or the kernel refuses.
    pub(super) fn attach(self, directory: &OwnedFd) -> Result<(), JailError> {
        let name = self.tree.name.as_str();
        let mode = Mode::from_raw_mode(0o755);
        let made = if self.is_dir {
            rustix::fs::mkdirat(directory, name, mode)
        } else {
            let flags = OFlags::CREATE | OFlags::EXCL | OFlags::CLOEXEC;
            rustix::fs::openat(directory, name, flags, Mode::from_raw_mode(0o644)).map(drop)
        };
        made.and_then(|()| move_mount(&self.mount, c"", directory, name, MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH))
            .map_err(|errno| JailError::new(format!("mount {} as {name}", self.tree.source.display()), errno))
    }
}
