// SPDX-License-Identifier: Apache-2.0
//! A network namespace of the host, and work done in it.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process;

use super::own;

/// A network namespace; it lives at least as long as this does.
#[derive(Debug)]
pub(crate) struct NetworkNamespace {
    path: PathBuf,
    file: File,
    /// By which namespaces are told apart.
    inode: u64,
}

impl NetworkNamespace {
    /// The network namespace at `path`.
    ///
    /// # Errors
    ///
    /// There is nothing, or something else.
    pub(crate) fn open(path: &Path) -> io::Result<Self> {
        let file = File::open(path)?;
        // SAFETY: the descriptor is open, and the request takes no argument.
        let kind = unsafe { libc::ioctl(file.as_raw_fd(), libc::NS_GET_NSTYPE) };
        if kind != libc::CLONE_NEWNET {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "it is not a network namespace"));
        }
        let inode = file.metadata()?.ino();
        Ok(Self { path: path.to_owned(), file, inode })
    }

    /// A new one, with a loopback interface that is on, which this process is in from then on: who knows the process can find
    /// it, and set it up. To be called by the first thread.
    ///
    /// # Errors
    ///
    /// It cannot be made.
    pub(crate) fn enter_new() -> io::Result<Self> {
        let file = own::enter_new()?;
        let inode = file.metadata()?.ino();
        Ok(Self { path: format!("/proc/{}/ns/net", process::id()).into(), file, inode })
    }

    /// Enters it with this process, so that who knows the process can find it. To be called by the first thread.
    ///
    /// # Errors
    ///
    /// It cannot be entered.
    pub(crate) fn enter(&self) -> io::Result<()> {
        own::enter(&self.file)
    }

    /// Lets go of what is mounted at the path, so that whoever made it can unmount it; keeps the namespace.
    pub(super) fn let_go_of_path(&mut self) -> io::Result<()> {
        self.file = self.inside(|| File::open("/proc/thread-self/ns/net"))??;
        Ok(())
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    pub(super) fn inode(&self) -> u64 {
        self.inode
    }

    /// Whether it is the host's own.
    pub(crate) fn is_host(&self) -> io::Result<bool> {
        Ok(own::host_inode()? == self.inode)
    }

    /// Does `work` in it.
    ///
    /// # Errors
    ///
    /// It cannot be entered.
    pub(super) fn inside<T: Send>(&self, work: impl FnOnce() -> T + Send) -> io::Result<T> {
        own::inside(&self.file, work)
    }
}

impl AsFd for NetworkNamespace {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_no_network_namespace_is_refused() {
        assert_eq!(NetworkNamespace::open(Path::new("/no/such")).unwrap_err().kind(), io::ErrorKind::NotFound);
        for path in ["/proc/self/ns/mnt", "/proc/self/stat"] {
            assert_eq!(
                NetworkNamespace::open(Path::new(path)).unwrap_err().to_string(),
                "it is not a network namespace"
            );
        }
    }

    #[test]
    fn the_hosts_own_is_known() {
        assert!(NetworkNamespace::open(Path::new("/proc/self/ns/net")).unwrap().is_host().unwrap());
    }
}
