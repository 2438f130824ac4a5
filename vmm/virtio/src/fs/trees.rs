// SPDX-License-Identifier: Apache-2.0
//! Trees that a device gets, and loses, while it runs.
//!
//! A tree is a descriptor of its top: a mount that is mounted nowhere. The guest finds it by its name in the device's top
//! directory, which does not list it. When it is taken away, whatever the guest still has of it is stale, and the host's
//! descriptors are closed: a guest cannot keep a tree that it is no longer to have.

use std::collections::{HashMap, HashSet};
use std::ffi::CString;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use rustix::fs::FileType;
use rustix::io::Errno;
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::server::host;
use super::server::inode::Identity;
use super::submounts::{Cover, MAX_SUBMOUNTS, Submounts};

/// Most trees that a device can have been given at a time.
pub const MAX_ADDED_TREES: usize = 1024;

/// Longest name of a tree.
pub const MAX_TREE_NAME_LEN: usize = 64;

/// Whether a tree may have this name: 1 to [`MAX_TREE_NAME_LEN`] of `[A-Za-z0-9_-]`.
#[must_use]
pub fn is_tree_name(name: &str) -> bool {
    let valid = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'_' || byte == b'-';
    !name.is_empty() && name.len() <= MAX_TREE_NAME_LEN && name.bytes().all(valid)
}

/// A tree that cannot be added or taken away.
#[derive(Debug, thiserror::Error)]
pub enum TreeError {
    /// Its name cannot be one.
    #[error("the name {0:?} has other characters than A-Z a-z 0-9 _ -, or not 1 to {MAX_TREE_NAME_LEN} of them")]
    Name(String),
    /// Another tree has that name.
    #[error("there is a tree {0:?} already")]
    Exists(String),
    /// No tree that was added has that name.
    #[error("there is no tree {0:?} that was added")]
    Absent(String),
    /// There are too many.
    #[error("there are {MAX_ADDED_TREES} added trees already")]
    TooMany,
    /// There is too much mounted below them.
    #[error("there are {MAX_SUBMOUNTS} mounts below the trees already")]
    TooManyMounts,
    /// It is nothing that can be shared, or, mounted over another, not of its kind.
    #[error("the tree {0:?} is neither a directory nor a regular file, or covers what is not of its kind")]
    Kind(String),
    /// Its top cannot be looked at.
    #[error("cannot look at the top of the tree {0:?}")]
    Stat(String, #[source] io::Error),
}

/// What a file server's nodes know of the added tree that they were found in: whether it is still there.
#[derive(Debug, Clone)]
pub(super) struct Membership(Arc<AtomicBool>);

impl Membership {
    pub(super) fn new(is_over: &Arc<AtomicBool>) -> Self {
        Self(Arc::clone(is_over))
    }

    pub(super) fn is_over(&self) -> bool {
        self.0.load(Ordering::Acquire)
    }
}

/// The trees that a device has been given; a handle, of which all copies mean the same.
#[derive(Debug, Clone)]
pub struct AddedTrees(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    /// The names of those that the device has had from the beginning.
    fixed: HashSet<String>,
    /// Where those are.
    root: OnceLock<OwnedFd>,
    trees: Mutex<HashMap<String, Tree>>,
    /// What the host has mounted below all of them.
    submounts: Mutex<Submounts>,
    changes: AtomicU64,
    /// Written to at each change that closes something.
    wake: EventFd,
}

#[derive(Debug)]
struct Tree {
    top: OwnedFd,
    is_over: Arc<AtomicBool>,
}

impl AddedTrees {
    /// None yet, for a device that has had the trees of the names `fixed` from the beginning.
    ///
    /// # Errors
    ///
    /// When no descriptor is left.
    pub fn new(fixed: impl IntoIterator<Item = String>) -> io::Result<Self> {
        Ok(Self(Arc::new(Inner {
            fixed: fixed.into_iter().collect(),
            root: OnceLock::new(),
            trees: Mutex::default(),
            submounts: Mutex::default(),
            changes: AtomicU64::new(0),
            wake: EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?,
        })))
    }

    /// Tells where the device's top directory is, for mounts in the trees that it has had from the beginning.
    ///
    /// # Errors
    ///
    /// When no descriptor is left.
    pub fn lie_in(&self, root: &OwnedFd) -> io::Result<()> {
        let root = rustix::io::fcntl_dupfd_cloexec(root, 0)?;
        // It is told once, when the device is made.
        self.0.root.get_or_init(|| root);
        Ok(())
    }

    fn submounts(&self) -> MutexGuard<'_, Submounts> {
        // As below.
        self.0.submounts.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn trees(&self) -> MutexGuard<'_, HashMap<String, Tree>> {
        // Nothing panics while the lock is held.
        self.0.trees.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Adds a tree by its top, which may be `O_PATH`.
    ///
    /// # Errors
    ///
    /// [`TreeError`]; then nothing is added.
    pub fn add(&self, name: &str, top: OwnedFd) -> Result<(), TreeError> {
        if !is_tree_name(name) {
            return Err(TreeError::Name(name.to_owned()));
        }
        let stat = host::stat(&top).map_err(|errno| TreeError::Stat(name.to_owned(), errno.into()))?;
        match FileType::from_raw_mode(u32::from(stat.stx_mode)) {
            FileType::Directory | FileType::RegularFile => {}
            _ => return Err(TreeError::Kind(name.to_owned())),
        }
        let mut trees = self.trees();
        if self.0.fixed.contains(name) || trees.contains_key(name) {
            return Err(TreeError::Exists(name.to_owned()));
        }
        if trees.len() >= MAX_ADDED_TREES {
            return Err(TreeError::TooMany);
        }
        trees.insert(name.to_owned(), Tree { top, is_over: Arc::default() });
        Ok(())
    }

    /// Takes a tree away that was added. The guest's use of it fails from here on.
    ///
    /// # Errors
    ///
    /// [`TreeError::Absent`].
    pub fn remove(&self, name: &str) -> Result<(), TreeError> {
        let tree = self.trees().remove(name).ok_or_else(|| TreeError::Absent(name.to_owned()))?;
        self.submounts().remove_of(name);
        tree.is_over.store(true, Ordering::Release);
        self.has_changed();
        Ok(())
    }

    /// Adds a mount that lies over `covered` in a tree, or in the mount `parent` that was added to it before. `top` is the mount's
    /// top. Both may be `O_PATH`.
    ///
    /// # Errors
    ///
    /// [`TreeError`]; then nothing is added.
    pub fn add_mount(
        &self,
        (name, tree, parent): (&str, &str, Option<&str>),
        covered: OwnedFd,
        top: OwnedFd,
    ) -> Result<(), TreeError> {
        let base = self.base(tree, parent)?;
        self.submounts().add((name, tree), &base, covered, top, parent.is_none())?;
        self.has_changed();
        Ok(())
    }

    /// Takes a mount away that was added. The guest's use of it fails from here on.
    ///
    /// # Errors
    ///
    /// [`TreeError::Absent`].
    pub fn remove_mount(&self, name: &str) -> Result<(), TreeError> {
        if !self.submounts().remove(name) {
            return Err(TreeError::Absent(name.to_owned()));
        }
        self.has_changed();
        Ok(())
    }

    /// The top of a tree, or of a mount in it.
    fn base(&self, tree: &str, parent: Option<&str>) -> Result<OwnedFd, TreeError> {
        let named = parent.unwrap_or(tree);
        let absent = || TreeError::Absent(named.to_owned());
        let unseen = |errno: Errno| TreeError::Stat(named.to_owned(), errno.into());
        let again = |top: &OwnedFd| rustix::io::fcntl_dupfd_cloexec(top, 0).map_err(unseen);
        if let Some(parent) = parent {
            return again(self.submounts().top(parent).ok_or_else(absent)?);
        }
        if let Some(added) = self.trees().get(tree) {
            return again(&added.top);
        }
        let root = self.0.root.get().filter(|_| self.0.fixed.contains(tree)).ok_or_else(absent)?;
        let name = CString::new(tree).map_err(|_| absent())?;
        host::open_path(root, &name).map_err(unseen)
    }

    fn has_changed(&self) {
        self.0.changes.fetch_add(1, Ordering::Release);
        // An eventfd's write fails only when it has been written to before.
        let _ = self.0.wake.write(1);
    }

    /// Whether the host has mounted anything below the trees.
    pub(super) fn have_mounts(&self) -> bool {
        !self.submounts().is_empty()
    }

    /// Whether something is mounted over a file.
    pub(super) fn are_mounted_over(&self, file: &Identity) -> bool {
        self.submounts().covers(file)
    }

    /// What is mounted over a file that is not a tree's top.
    pub(super) fn over(&self, file: &Identity) -> Option<Result<Cover, Errno>> {
        self.submounts().over(file)
    }

    /// What is mounted over whole trees, by their tops.
    pub(super) fn over_trees(&self) -> Vec<(Identity, Result<Cover, Errno>)> {
        self.submounts().over_trees()
    }

    /// A descriptor of a tree's top, and its membership; [`None`] if there is no such tree.
    pub(super) fn find(&self, name: &[u8]) -> Option<rustix::io::Result<(OwnedFd, Membership)>> {
        let trees = self.trees();
        let tree = trees.get(std::str::from_utf8(name).ok()?)?;
        let membership = Membership(Arc::clone(&tree.is_over));
        Some(rustix::io::fcntl_dupfd_cloexec(&tree.top, 0).map(|top| (top, membership)))
    }

    /// How often something has been taken away, or mounted, so far.
    pub(super) fn changes(&self) -> u64 {
        self.0.changes.load(Ordering::Acquire)
    }

    /// Becomes readable at each change.
    pub(super) fn wake(&self) -> &EventFd {
        &self.0.wake
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;

    use super::*;

    fn trees() -> AddedTrees {
        AddedTrees::new(["rootfs".to_owned()]).unwrap()
    }

    fn directory() -> OwnedFd {
        File::open("/proc/self").unwrap().into()
    }

    #[test]
    fn a_tree_is_there_until_it_is_taken_away() {
        let trees = trees();

        trees.add("c1", directory()).unwrap();
        let (_top, membership) = trees.find(b"c1").unwrap().unwrap();
        assert!(!membership.is_over());
        trees.remove("c1").unwrap();

        assert!(membership.is_over());
        assert!(trees.find(b"c1").is_none());
        assert_eq!(trees.changes(), 1);
        assert!(matches!(trees.remove("c1"), Err(TreeError::Absent(_))));
    }

    #[test]
    fn what_cannot_be_a_tree_is_refused() {
        let trees = trees();
        trees.add("c1", directory()).unwrap();
        let (pipe, _other) = rustix::pipe::pipe().unwrap();

        assert!(matches!(trees.add("rootfs", directory()), Err(TreeError::Exists(_))));
        assert!(matches!(trees.add("c1", directory()), Err(TreeError::Exists(_))));
        assert!(matches!(trees.add("pipe", pipe), Err(TreeError::Kind(_))));
        for name in ["", ".", "..", "a/b", "a\0", "é", &"x".repeat(MAX_TREE_NAME_LEN + 1)] {
            assert!(matches!(trees.add(name, directory()), Err(TreeError::Name(_))), "{name:?}");
        }
    }

    #[test]
    fn there_is_a_most() {
        let trees = trees();
        let file = File::from(directory());
        for number in 0..MAX_ADDED_TREES {
            let top = file.try_clone().unwrap();
            trees.trees().insert(format!("t{number}"), Tree { top: top.into(), is_over: Arc::default() });
        }

        assert!(matches!(trees.add("more", file.into()), Err(TreeError::TooMany)));
    }
}
