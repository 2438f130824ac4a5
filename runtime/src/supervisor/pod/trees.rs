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
use tokio::sync::{Mutex, watch};
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
    /// Whether the guest sees what was mounted below when it got the tree; closed without where it is not going to.
    is_whole: watch::Receiver<bool>,
}

impl SharedTree {
    fn is_given_up(&self) -> bool {
        // In this order: once nobody can change it, it is what it is.
        self.is_whole.has_changed().is_err() && !*self.is_whole.borrow()
    }
}

/// A tree that a container has, which another one has added.
#[derive(Debug)]
struct Joined<'a> {
    wanted: &'a ShareTree,
    /// The other one's name for it.
    name: String,
    is_whole: watch::Receiver<bool>,
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
        let mut wanted: Vec<&ShareTree> = shares.shared.iter().collect();
        while !wanted.is_empty() {
            let joined = self.add_shared(&wanted, taken).await?;
            wanted = self.await_whole(joined, taken).await;
        }
        Ok(())
    }

    /// Adds the trees of the shared device that the machine does not have yet, and returns the others.
    async fn add_shared<'a>(
        &self,
        wanted: &[&'a ShareTree],
        taken: &mut Taken,
    ) -> Result<Vec<Joined<'a>>, ControlError> {
        // Before the lock: a file system that does not answer is to hold up this container alone.
        let mut trees = Vec::with_capacity(wanted.len());
        for tree in wanted {
            trees.push((*tree, Found::open_apart(tree).await?));
        }
        let (mut followed, mut joined) = (Vec::new(), Vec::new());
        // Held over the requests, so that no two containers add one folder twice.
        let mut shared = self.shared.lock().await;
        for (tree, Found { opened, identity }) in trees {
            let is_same = |known: &&mut SharedTree| {
                serves(&known.tree, tree) && known.identity == identity && !known.is_given_up()
            };
            if let Some(known) = shared.iter_mut().find(is_same) {
                known.users += 1;
                let (name, is_whole) = (known.tree.name.clone(), known.is_whole.clone());
                taken.shared.push(name.clone());
                taken.renamed.push((tree.name.clone(), name.clone()));
                joined.push(Joined { wanted: tree, name, is_whole });
                continue;
            }
            self.control.add_tree(ShareDevice::Shared, tree, &opened).await?;
            let (whole, is_whole) = watch::channel(!tree.follows);
            shared.push(SharedTree { tree: tree.clone(), identity, users: 1, following: None, is_whole });
            taken.shared.push(tree.name.clone());
            followed.extend(tree.follows.then_some((tree, whole)));
        }
        drop(shared);
        // Where one fails, the others are given up too: `whole` is dropped.
        for (tree, whole) in followed {
            let following = Following::start(tree, &self.control).await?;
            let mut shared = self.shared.lock().await;
            if let Some(known) = shared.iter_mut().find(|known| known.tree.name == tree.name) {
                known.following = Some(tokio::spawn(following.run()));
            }
            whole.send_replace(true);
        }
        Ok(joined)
    }

    /// Waits until trees that others have added are what they are to be; gives those back that are not going to be, and returns what is
    /// wanted in their place.
    async fn await_whole<'a>(&self, joined: Vec<Joined<'a>>, taken: &mut Taken) -> Vec<&'a ShareTree> {
        let mut missing = Vec::new();
        for Joined { wanted, name, mut is_whole } in joined {
            if is_whole.wait_for(|is_whole| *is_whole).await.is_ok() {
                continue;
            }
            if let Some(at) = taken.shared.iter().position(|known| *known == name) {
                taken.shared.swap_remove(at);
            }
            taken.renamed.retain(|(own, _)| *own != wanted.name);
            self.take_back(Taken { shared: vec![name], ..Taken::default() }).await;
            missing.push(wanted);
        }
        missing
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
        drop(shared);
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
    use bulkhead_vmm::control;

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

    /// A tree that two containers have, and what tells whether it is whole.
    async fn shared(trees: &PodTrees) -> watch::Sender<bool> {
        let (whole, is_whole) = watch::channel(false);
        let identity = Identity { device: 1, inode: 1, mounts: Vec::new() };
        let known = SharedTree { tree: tree(false, true), identity, users: 2, following: None, is_whole };
        trees.shared.lock().await.push(known);
        whole
    }

    /// What a second container has of it.
    async fn joined<'a>(trees: &PodTrees, wanted: &'a ShareTree) -> (Vec<Joined<'a>>, Taken) {
        let is_whole = trees.shared.lock().await[0].is_whole.clone();
        let renamed = vec![(wanted.name.clone(), "t".to_owned())];
        let taken = Taken { shared: vec!["t".to_owned()], renamed, ..Taken::default() };
        (vec![Joined { wanted, name: "t".to_owned(), is_whole }], taken)
    }

    #[tokio::test]
    async fn a_tree_is_not_used_before_the_mounts_below_are_there() {
        let trees = PodTrees::new(VmmControl::new(control::pair().unwrap().0));
        let whole = shared(&trees).await;
        let wanted = ShareTree { name: "own".into(), ..tree(false, true) };
        let (joined, mut taken) = joined(&trees, &wanted).await;
        let mut waiting = Box::pin(trees.await_whole(joined, &mut taken));

        tokio::select! {
            biased;
            missing = &mut waiting => panic!("{missing:?}"),
            () = std::future::ready(()) => {}
        }
        whole.send_replace(true);
        drop(whole);

        assert!(waiting.await.is_empty());
        assert_eq!((taken.shared, taken.renamed), (vec!["t".to_owned()], vec![("own".to_owned(), "t".to_owned())]));
        assert!(!trees.shared.lock().await[0].is_given_up());
    }

    #[tokio::test]
    async fn a_tree_that_is_not_followed_after_all_is_used_by_no_other() {
        let trees = PodTrees::new(VmmControl::new(control::pair().unwrap().0));
        let whole = shared(&trees).await;
        let wanted = ShareTree { name: "own".into(), ..tree(false, true) };
        let (joined, mut taken) = joined(&trees, &wanted).await;
        drop(whole);

        let missing = trees.await_whole(joined, &mut taken).await;

        assert_eq!(missing.iter().map(|tree| tree.name.as_str()).collect::<Vec<_>>(), ["own"]);
        assert!(taken.shared.is_empty() && taken.renamed.is_empty(), "{taken:?}");
        let shared = trees.shared.lock().await;
        assert!(shared[0].is_given_up() && shared[0].users == 1);
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
