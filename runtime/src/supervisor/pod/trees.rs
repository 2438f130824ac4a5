// SPDX-License-Identifier: Apache-2.0
//! The trees that a pod's machine has been given.
//!
//! Containers that bind the same folder get the same tree: so sockets, locks and mapped memory in it are common to them,
//! as they are on a host. The host's kernel refuses writes to a tree that all have read-only; in one that some may write,
//! the guest's does it for the others. A folder that has been replaced since, or has other mounts below, is not the same.

use std::io;
use std::os::fd::AsFd;

use bulkhead_vmm::config::{PART_PREFIX, ShareTree};
use bulkhead_vmm::control::ShareDevice;
use bulkhead_vmm::tree::DetachedTree;
use tokio::sync::Mutex;
use tokio::task::JoinHandle;

use crate::apart::apart;
use crate::logging;
use crate::storage::{self, Shares};
use crate::supervisor::submounts::Following;
use crate::supervisor::vmm_control::{ControlError, VmmControl, open_tree};
use crate::text;

/// The trees.
#[derive(Debug)]
pub(super) struct PodTrees {
    control: VmmControl,
    shared: Mutex<Vec<SharedTree>>,
}

/// A tree of the shared device, and how many containers have it.
#[derive(Debug)]
struct SharedTree {
    tree: ShareTree,
    identity: Identity,
    users: usize,
    /// Has the guest see what the host mounts below, if it is to.
    following: Option<JoinHandle<()>>,
}

/// What tells a tree from an earlier or later one at the same path.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Identity {
    device: u64,
    inode: u64,
    /// What is mounted below, if that is shared too.
    mounts: Vec<Vec<u8>>,
}

impl Identity {
    fn of(top: impl AsFd, mounts: Vec<Vec<u8>>) -> io::Result<Self> {
        let status = rustix::fs::fstat(top)?;
        Ok(Self { device: status.st_dev, inode: status.st_ino, mounts })
    }
}

/// A tree that was mounted for the VMM, which may turn out to have it.
#[derive(Debug)]
struct Found {
    opened: DetachedTree,
    identity: Identity,
}

impl Found {
    fn open(tree: &ShareTree) -> io::Result<Self> {
        // First: a tree into which something is mounted meanwhile is another one for those who come later.
        let mounts = if tree.recursive && !tree.follows { storage::mounts_below(&tree.source)? } else { Vec::new() };
        let opened = DetachedTree::open(tree)?;
        let identity = Identity::of(opened.mount(), mounts)?;
        Ok(Self { opened, identity })
    }

    /// The same while others go on.
    async fn open_apart(tree: &ShareTree) -> Result<Self, ControlError> {
        let wanted = tree.clone();
        let found = apart("tree", move || Self::open(&wanted)).await.flatten();
        found.map_err(|source| ControlError::Share { path: tree.source.display().to_string(), source })
    }
}

/// What one container has of them; given back by [`PodTrees::take_back`].
#[derive(Debug, Default)]
pub(super) struct Taken {
    private: Vec<String>,
    shared: Vec<String>,
    /// The container's names for trees of the shared device that another container has given one.
    pub(super) renamed: Vec<(String, String)>,
}

impl PodTrees {
    pub(super) fn new(control: VmmControl) -> Self {
        Self { control, shared: Mutex::default() }
    }

    /// Gives the machine what a container needs and what it does not have yet.
    ///
    /// # Errors
    ///
    /// The container has none of them then.
    pub(super) async fn give(&self, shares: &Shares) -> Result<Taken, ControlError> {
        let mut taken = Taken::default();
        match self.add_all(shares, &mut taken).await {
            Ok(()) => Ok(taken),
            Err(error) => {
                self.take_back(taken).await;
                Err(error)
            }
        }
    }

    async fn add_all(&self, shares: &Shares, taken: &mut Taken) -> Result<(), ControlError> {
        for tree in &shares.private {
            let opened = open_tree(tree).await?;
            self.control.add_tree(ShareDevice::Private, tree, &opened).await?;
            taken.private.push(tree.name.clone());
        }
        // Before the lock: a file system that does not answer is to hold up this container alone.
        let mut trees = Vec::new();
        for tree in &shares.shared {
            trees.push((tree, Found::open_apart(tree).await?));
        }
        let mut followed = Vec::new();
        // Held over the requests, so that no two containers add one folder twice.
        let mut shared = self.shared.lock().await;
        for (tree, Found { opened, identity }) in trees {
            let is_same = |known: &&mut SharedTree| serves(&known.tree, tree) && known.identity == identity;
            if let Some(known) = shared.iter_mut().find(is_same) {
                known.users += 1;
                taken.shared.push(known.tree.name.clone());
                taken.renamed.push((tree.name.clone(), known.tree.name.clone()));
                continue;
            }
            self.control.add_tree(ShareDevice::Shared, tree, &opened).await?;
            shared.push(SharedTree { tree: tree.clone(), identity, users: 1, following: None });
            taken.shared.push(tree.name.clone());
            followed.extend(tree.follows.then_some(tree));
        }
        drop(shared);
        for tree in followed {
            let following = Following::start(tree, &self.control).await?;
            let mut shared = self.shared.lock().await;
            if let Some(known) = shared.iter_mut().find(|known| known.tree.name == tree.name) {
                known.following = Some(tokio::spawn(following.run()));
            }
        }
        Ok(())
    }

    /// Takes away what a container had, unless another one has it too.
    pub(super) async fn take_back(&self, taken: Taken) {
        for name in &taken.private {
            self.remove(ShareDevice::Private, name).await;
        }
        let mut shared = self.shared.lock().await;
        for name in &taken.shared {
            if let Some(known) = shared.iter_mut().find(|known| known.tree.name == *name) {
                known.users -= 1;
            }
        }
        let (unused, used) = std::mem::take(&mut *shared).into_iter().partition(|known| known.users == 0);
        *shared = used;
        let unused: Vec<SharedTree> = unused;
        for known in unused {
            if let Some(following) = known.following {
                following.abort();
                // What it has open of the host's is closed then.
                let _ = following.await;
            }
            self.remove(ShareDevice::Shared, &known.tree.name).await;
        }
    }

    async fn remove(&self, device: ShareDevice, name: &str) {
        match self.control.remove_tree(device, name).await {
            // With the machine, all of its trees are gone.
            Ok(()) | Err(ControlError::Gone { .. } | ControlError::Send { .. }) => {}
            Err(error) => logging::warn(format_args!("{}", text::chain(&error))),
        }
    }
}

/// Whether a tree that the machine has is as good as another one, if they are the same.
fn serves(known: &ShareTree, wanted: &ShareTree) -> bool {
    known.name.starts_with(PART_PREFIX) == wanted.name.starts_with(PART_PREFIX)
        && known.source == wanted.source
        && known.recursive == wanted.recursive
        && known.follows == wanted.follows
        && (wanted.read_only || !known.read_only)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tree(read_only: bool, recursive: bool) -> ShareTree {
        ShareTree { name: "t".into(), source: "/s".into(), read_only, recursive, follows: false }
    }

    #[test]
    fn a_writable_tree_serves_those_who_only_read_it() {
        assert!(serves(&tree(false, true), &tree(false, true)));
        assert!(serves(&tree(false, true), &tree(true, true)));
        assert!(serves(&tree(true, true), &tree(true, true)));
        assert!(!serves(&tree(true, true), &tree(false, true)));
        assert!(!serves(&tree(false, false), &tree(false, true)));
    }

    #[test]
    fn what_has_been_replaced_or_mounted_into_is_not_the_same() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("volume");
        let identity = |mounts: &[&str]| {
            let mounts = mounts.iter().map(|mount| mount.as_bytes().to_owned()).collect();
            Identity::of(std::fs::File::open(&path).unwrap(), mounts).unwrap()
        };
        std::fs::create_dir(&path).unwrap();
        let before = identity(&[]);

        assert_eq!(identity(&[]), before);
        assert_ne!(identity(&["31 30 0:6 / /volume/sub"]), before);
        // Kept, so that its inode is not used again.
        std::fs::rename(&path, dir.path().join("old")).unwrap();
        std::fs::create_dir(&path).unwrap();
        assert_ne!(identity(&[]), before);
    }
}
