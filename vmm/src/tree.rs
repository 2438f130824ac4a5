// SPDX-License-Identifier: Apache-2.0
//! A shared tree on its way into the jail: a copy of its mounts, made by whoever may, and mounted nowhere yet.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use bulkhead_virtio::fs::is_tree_name;
use rustix::fs::{AtFlags, FileType};
use rustix::mount::{MountAttrFlags, OpenTreeFlags, open_tree};

use crate::config::ShareTree;

/// A copy of a tree's mounts that is mounted nowhere yet.
#[derive(Debug)]
pub struct DetachedTree {
    mount: OwnedFd,
    is_dir: bool,
}

impl DetachedTree {
    /// Copies the tree's mounts, with what is mounted below if it is recursive, and gives them their attributes:
    /// read-only if asked, and never programs, devices or set-user-id for the VMM itself. Needs `CAP_SYS_ADMIN`.
    ///
    /// # Errors
    ///
    /// When the tree is absent or neither a directory nor a regular file, or has a name that is none.
    pub fn open(tree: &ShareTree) -> io::Result<Self> {
        if !is_tree_name(&tree.name) {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "its name in the share is not valid"));
        }
        let mut flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
        flags.set(OpenTreeFlags::AT_RECURSIVE, tree.recursive && !tree.follows);
        Self::lock(open_tree(rustix::fs::CWD, &tree.source, flags)?, tree.read_only)
    }

    /// As [`Self::open`], of the one mount that `place` is in, from there on.
    ///
    /// # Errors
    ///
    /// When it is neither a directory nor a regular file.
    pub fn of_place(place: impl AsFd, read_only: bool) -> io::Result<Self> {
        let flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC | OpenTreeFlags::AT_EMPTY_PATH;
        Self::lock(open_tree(place, c"", flags)?, read_only)
    }

    fn lock(mount: OwnedFd, read_only: bool) -> io::Result<Self> {
        let status = rustix::fs::statat(&mount, c"", AtFlags::EMPTY_PATH)?;
        let is_dir = match FileType::from_raw_mode(status.st_mode) {
            FileType::Directory => true,
            FileType::RegularFile => false,
            _ => {
                let reason = "neither a directory nor a regular file";
                return Err(io::Error::new(io::ErrorKind::InvalidInput, reason));
            }
        };
        let mut attributes =
            MountAttrFlags::MOUNT_ATTR_NOSUID | MountAttrFlags::MOUNT_ATTR_NODEV | MountAttrFlags::MOUNT_ATTR_NOEXEC;
        attributes.set(MountAttrFlags::MOUNT_ATTR_RDONLY, read_only);
        mount_setattr(mount.as_fd(), true, attributes)?;
        Ok(Self { mount, is_dir })
    }

    /// Whether its top is a directory, and not a file.
    #[must_use]
    pub fn is_dir(&self) -> bool {
        self.is_dir
    }

    /// The mount.
    #[must_use]
    pub fn mount(&self) -> BorrowedFd<'_> {
        self.mount.as_fd()
    }
}

/// Sets attributes of the mount that `mount` refers to, and of those below it if `recursive`; makes them private to their
/// mount namespace.
///
/// # Errors
///
/// As mount_setattr(2).
pub fn mount_setattr(mount: BorrowedFd<'_>, recursive: bool, set: MountAttrFlags) -> io::Result<()> {
    let attributes =
        libc::mount_attr { attr_set: u64::from(set.bits()), attr_clr: 0, propagation: libc::MS_PRIVATE, userns_fd: 0 };
    let flags = libc::AT_EMPTY_PATH | if recursive { libc::AT_RECURSIVE } else { 0 };
    // SAFETY: the path is a constant C string, and the kernel only reads `attributes`, of which it is told the size.
    let result = unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            mount.as_raw_fd(),
            c"".as_ptr(),
            flags,
            &raw const attributes,
            size_of::<libc::mount_attr>(),
        )
    };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn open(name: &str, source: &str) -> io::Error {
        let tree = ShareTree {
            name: name.to_owned(),
            source: source.into(),
            read_only: true,
            recursive: true,
            follows: false,
        };
        DetachedTree::open(&tree).unwrap_err()
    }

    #[test]
    fn names_that_are_none_and_absent_places_are_refused() {
        assert_eq!(open("a/b", "/").kind(), io::ErrorKind::InvalidInput);
        // Without privileges the kernel says no before it looks.
        let absent = open("a", "/no/such");
        assert!(matches!(absent.raw_os_error(), Some(libc::ENOENT | libc::EPERM)), "{absent}");
    }
}
