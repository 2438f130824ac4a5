// SPDX-License-Identifier: Apache-2.0
//! Device nodes whose descriptors are for the VMM.
//!
//! Whoever holds a descriptor can reach the node that it was opened by, through `/proc/self/fd`: open it again, or change its owner
//! and mode, which are the host's. A VMM that a guest has taken over is not to: the node is opened by a mount of its own, which
//! is then made read-only and without devices. What is open goes on.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::Path;

use bulkhead_vmm::tree::mount_setattr;
use rustix::fs::CWD;
use rustix::io::Errno;
use rustix::mount::{MountAttrFlags, OpenTreeFlags, open_tree};

/// A node that is being opened.
#[derive(Debug)]
pub(super) struct Node {
    path: &'static Path,
    /// Absent for who may not mount: root of a user namespace, whose node it is not.
    mount: Option<OwnedFd>,
}

impl Node {
    /// Looks the node up.
    pub(super) fn find(path: &'static str) -> io::Result<Self> {
        let flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
        let mount = match open_tree(CWD, path, flags) {
            Ok(mount) => Some(mount),
            Err(Errno::PERM | Errno::INVAL) => None,
            Err(error) => return Err(error.into()),
        };
        Ok(Self { path: Path::new(path), mount })
    }

    /// Opens it, once more.
    pub(super) fn open(&self, options: &OpenOptions) -> io::Result<File> {
        match &self.mount {
            Some(mount) => options.open(format!("/proc/thread-self/fd/{}", mount.as_raw_fd())),
            None => options.open(self.path),
        }
    }

    /// From here on the node itself cannot be reached by what is open.
    pub(super) fn seal(self) -> io::Result<()> {
        let sealed = MountAttrFlags::MOUNT_ATTR_RDONLY | MountAttrFlags::MOUNT_ATTR_NODEV;
        self.mount.map_or(Ok(()), |mount| mount_setattr(mount.as_fd(), false, sealed))
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use rustix::fs::{Mode, chmod};

    use super::*;

    #[test]
    #[ignore = "needs root"]
    fn what_is_open_goes_on_and_leads_nowhere() {
        let before = std::fs::metadata("/dev/null").unwrap().permissions().mode();
        let node = Node::find("/dev/null").unwrap();
        let file = node.open(File::options().read(true).write(true)).unwrap();
        node.seal().unwrap();

        io::copy(&mut &b"gone"[..], &mut &file).unwrap();
        let again = format!("/proc/thread-self/fd/{}", file.as_raw_fd());
        let error = File::options().read(true).open(&again).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::EACCES));
        assert_eq!(chmod(&again, Mode::from_raw_mode(before)), Err(Errno::ROFS));
        assert_eq!(rustix::fs::fchmod(&file, Mode::from_raw_mode(before)), Err(Errno::ROFS));
    }

    #[test]
    fn a_node_that_is_not_there_is_not_found() {
        let opened = Node::find("/dev/bulkhead-absent").and_then(|node| node.open(File::options().read(true)));
        assert_eq!(opened.unwrap_err().kind(), io::ErrorKind::NotFound);
    }
}
