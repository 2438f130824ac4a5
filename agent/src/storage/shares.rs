// SPDX-License-Identifier: Apache-2.0
//! The trees that the host shares, and places in them.

use std::collections::BTreeSet;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};

use bulkhead_protocol::agent as wire;
use rustix::fs::{CWD, Mode, OFlags};
use rustix::io::Errno;
use rustix::mount::UnmountFlags;

use super::resolve;

/// Where the shared trees appear: each is a child of one of these directories.
#[derive(Clone, Debug)]
pub struct ShareRoots {
    /// The trees that nobody but this guest writes.
    pub private: PathBuf,
    /// The trees that the host may change at any time.
    pub shared: PathBuf,
}

/// Which device a tree comes through.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Device {
    /// Cached and written back: nobody else writes it.
    Private,
    /// Not cached.
    Shared,
}

/// A place in a shared tree.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct SharedTree {
    pub(crate) device: Device,
    /// The tree's name: one path component.
    pub(crate) tree: String,
    /// Relative to the tree, without `.`, `..` or empty parts; empty for its top.
    pub(crate) path: String,
}

/// Why a place in a shared tree cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ShareError {
    /// The request names no device, or one that does not exist.
    #[error("the place {tree:?}/{path:?} names no share device")]
    NoDevice {
        /// The tree's name.
        tree: String,
        /// The path in it.
        path: String,
    },
    /// A tree's name is not one clean path component.
    #[error("tree name {0:?} is not one path component")]
    BadTree(String),
    /// A path has `.`, `..` or empty parts.
    #[error("path {0:?} in a shared tree is not clean: it has `.`, `..` or empty parts")]
    BadPath(String),
    /// A tree that a request names cannot be found or entered.
    #[error("cannot enter shared tree {}", place.display())]
    Enter {
        /// The tree.
        place: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// Dirty files of a tree could not be written back to the host.
    #[error("cannot write back the files of shared tree {}", place.display())]
    WriteBack {
        /// The tree.
        place: PathBuf,
        /// Why.
        source: io::Error,
    },
}

impl SharedTree {
    /// The place that a request names, checked.
    pub fn from_wire(wire: &wire::SharePath) -> Result<Self, ShareError> {
        let device = match wire.device.enum_value() {
            Ok(wire::ShareDevice::PRIVATE) => Device::Private,
            Ok(wire::ShareDevice::SHARED) => Device::Shared,
            _ => return Err(ShareError::NoDevice { tree: wire.tree.clone(), path: wire.path.clone() }),
        };
        if !is_clean_component(&wire.tree) || wire.tree.contains('\0') {
            return Err(ShareError::BadTree(wire.tree.clone()));
        }
        let clean = wire.path.is_empty() || wire.path.split('/').all(is_clean_component);
        if !clean || wire.path.contains('\0') {
            return Err(ShareError::BadPath(wire.path.clone()));
        }
        Ok(Self { device, tree: wire.tree.clone(), path: wire.path.clone() })
    }
}

impl SharedTree {
    /// The top of the tree that it is in.
    pub(crate) fn top(&self) -> Self {
        Self { path: String::new(), ..self.clone() }
    }
}

fn is_clean_component(part: &str) -> bool {
    !matches!(part, "" | "." | "..") && !part.contains('/')
}

impl ShareRoots {
    fn root(&self, device: Device) -> &Path {
        match device {
            Device::Private => &self.private,
            Device::Shared => &self.shared,
        }
    }

    /// Enters the tree once in the agent's own mount namespace.
    ///
    /// A tree is a submount that the kernel makes when it is first entered. Were that left to a container, each would
    /// make its own, with its own cache: two containers would see different contents of one file.
    pub(crate) fn enter(&self, tree: &SharedTree) -> Result<(), ShareError> {
        let place = self.root(tree.device).join(&tree.tree);
        match resolve::own_directory(&place) {
            Ok(_) => Ok(()),
            // A tree may be a single file.
            Err(error) if error.raw_os_error() == Some(libc::ENOTDIR) => Ok(()),
            Err(source) => Err(ShareError::Enter { place, source }),
        }
    }

    /// Opens the place, in the mount namespace that the caller is in, without its contents (`O_PATH`). Links in the tree
    /// do not lead out of it.
    pub(crate) fn open(&self, place: &SharedTree) -> io::Result<OwnedFd> {
        let tree = self.root(place.device).join(&place.tree);
        let top = match resolve::own_directory(&tree) {
            Err(error) if error.raw_os_error() == Some(libc::ENOTDIR) && place.path.is_empty() => {
                rustix::fs::openat(CWD, &tree, OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC, Mode::empty())?
            }
            result => result?,
        };
        if place.path.is_empty() { Ok(top) } else { resolve::existing(top.as_fd(), &place.path) }
    }

    /// Leaves a tree that no container is in any more: unmounts it, so that the kernel forgets its files.
    pub(crate) fn leave(&self, tree: &SharedTree) {
        let place = self.root(tree.device).join(&tree.tree);
        // A tree that was not entered, or that the host has taken away, is not mounted.
        let _ = rustix::mount::unmount(&place, UnmountFlags::DETACH | UnmountFlags::NOFOLLOW);
    }

    /// Where those are that have something to be written back.
    pub(crate) fn to_write_back(&self, trees: &[SharedTree]) -> Vec<PathBuf> {
        let private: BTreeSet<&str> =
            trees.iter().filter(|tree| tree.device == Device::Private).map(|tree| tree.tree.as_str()).collect();
        private.into_iter().map(|tree| self.private.join(tree)).collect()
    }

    /// Writes what is dirty in the trees of the private device back to the host. The other device writes through.
    pub(crate) fn write_back(&self, trees: &[SharedTree]) -> Result<(), ShareError> {
        for place in self.to_write_back(trees) {
            sync(&place).map_err(|source| ShareError::WriteBack { place, source })?;
        }
        Ok(())
    }
}

/// Writes what is dirty in a tree back to the host.
pub(crate) fn sync(place: &Path) -> io::Result<()> {
    let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::CLOEXEC;
    match rustix::fs::openat(CWD, place, flags, Mode::empty()) {
        Ok(file) => Ok(rustix::fs::syncfs(file)?),
        // A tree that the host has taken away has nothing left to be written back to.
        Err(Errno::NOENT | Errno::STALE) => Ok(()),
        Err(error) => Err(error.into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn wire(tree: &str, path: &str) -> wire::SharePath {
        wire::SharePath {
            device: wire::ShareDevice::PRIVATE.into(),
            tree: tree.to_owned(),
            path: path.to_owned(),
            ..Default::default()
        }
    }

    #[test]
    fn clean_places_are_accepted() {
        for path in ["", "a", "a/b..c"] {
            SharedTree::from_wire(&wire("rootfs", path)).unwrap();
        }
    }

    #[test]
    fn unclean_places_are_refused() {
        for path in ["/", "/a", "a/", "a//b", "..", "a/../b", "./a", "a\0"] {
            let result = SharedTree::from_wire(&wire("rootfs", path));
            assert!(matches!(result, Err(ShareError::BadPath(_))), "{path:?}");
        }
        for tree in ["", ".", "..", "a/b"] {
            let result = SharedTree::from_wire(&wire(tree, ""));
            assert!(matches!(result, Err(ShareError::BadTree(_))), "{tree:?}");
        }
    }

    #[test]
    fn unset_device_is_refused() {
        let place = wire::SharePath { tree: "rootfs".to_owned(), ..Default::default() };
        assert!(matches!(SharedTree::from_wire(&place), Err(ShareError::NoDevice { .. })));
    }

    #[test]
    fn links_in_a_tree_stay_in_it() {
        let folder = tempfile::tempdir().unwrap();
        std::fs::create_dir_all(folder.path().join("tree/etc")).unwrap();
        std::fs::write(folder.path().join("tree/etc/passwd"), "the tree's").unwrap();
        std::os::unix::fs::symlink("/etc", folder.path().join("tree/link")).unwrap();
        let roots = ShareRoots { private: folder.path().into(), shared: folder.path().into() };

        let place = SharedTree::from_wire(&wire("tree", "link/passwd")).unwrap();
        let file = roots.open(&place).unwrap();

        use std::os::fd::AsRawFd;
        let content = std::fs::read(format!("/proc/self/fd/{}", file.as_raw_fd())).unwrap();
        assert_eq!(content, b"the tree's");
    }

    #[test]
    fn absent_tree_is_named() {
        let roots = ShareRoots { private: "/nonexistent".into(), shared: "/nonexistent".into() };
        let place = SharedTree::from_wire(&wire("tree", "")).unwrap();
        let error = roots.enter(&place).unwrap_err();
        assert!(error.to_string().contains("/nonexistent/tree"));
    }
}
