// SPDX-License-Identifier: Apache-2.0
//! What the host mounts below a bind mount's source while the guest runs, where the mount is to get it (`rslave`, `rshared`).
//!
//! The tree in the machine gets no mounts by itself: a mount that the kernel had put there would be as the host has it, and
//! writable, and busy for as long as the guest knows a file in it. So the mounts are looked at whenever the kernel says that
//! they have changed; each one is copied, with the attributes of the tree, and handed to the VMM, and taken back when it is
//! gone. What the host unmounts is never busy on account of this.

use std::collections::HashSet;
use std::fmt;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use bulkhead_vmm::config::ShareTree;
use bulkhead_vmm::tree::DetachedTree;
use rustix::fs::{Mode, OFlags, ResolveFlags, open, openat2};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::sync::Notify;

use super::vmm_control::{ControlError, VmmControl};
use crate::apart::apart;
use crate::logging;
use crate::storage::mount_tree::{MountTree, seen_from};
use crate::storage::{mount_id, mount_id_of};
use crate::text;

/// A tree whose mounts are followed.
pub(crate) struct Following {
    source: Arc<Source>,
    control: VmmControl,
    changes: AsyncFd<Watched>,
    /// What the machine has, those in which others lie first.
    given: Vec<Given>,
    /// What it is not to have, or cannot.
    left_out: HashSet<Vec<u8>>,
    /// How many names have been used.
    names: u64,
}

/// What is followed.
#[derive(Debug)]
struct Source {
    tree: ShareTree,
    mounts: Arc<MountTree>,
    /// The mount that the source is in.
    id: u64,
    identity: Vec<u8>,
    /// The machine's tree, as it is without what is mounted there.
    bare: DetachedTree,
}

/// A mount of the host's that the machine has.
#[derive(Debug)]
struct Given {
    identity: Vec<u8>,
    place: PathBuf,
    name: String,
}

/// One that is seen on the host.
#[derive(Debug, Clone)]
struct Seen {
    id: u64,
    identity: Vec<u8>,
    place: PathBuf,
    inside: Option<Inside>,
}

/// The one in which it lies.
#[derive(Debug, Clone)]
struct Inside {
    id: u64,
    identity: Vec<u8>,
    place: PathBuf,
}

#[derive(Debug)]
struct Watched(Arc<MountTree>);

impl AsRawFd for Watched {
    fn as_raw_fd(&self) -> RawFd {
        self.0.0.as_raw_fd()
    }
}

impl fmt::Debug for Following {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        out.debug_struct("Following").field("source", &self.source).field("given", &self.given).finish_non_exhaustive()
    }
}

/// Follows trees of a machine that boots. Its VMM carries no order out before the machine runs: one that is sent now might wait too long.
pub(crate) async fn follow_all(
    trees: &[ShareTree],
    machine_runs: &Notify,
    control: &VmmControl,
) -> Result<Vec<Following>, ControlError> {
    let mut following = Vec::with_capacity(trees.len());
    if !trees.is_empty() {
        machine_runs.notified().await;
    }
    for tree in trees {
        following.push(Following::start(tree, control).await?);
    }
    Ok(following)
}

impl Following {
    /// Begins to follow what is mounted below a tree that the machine has, and gives it what is there already, if that is a part of
    /// the tree.
    ///
    /// # Errors
    ///
    /// The tree cannot be followed.
    pub(crate) async fn start(tree: &ShareTree, control: &VmmControl) -> Result<Self, ControlError> {
        let failed = |source| ControlError::Share { path: tree.source.display().to_string(), source };
        let wanted = tree.clone();
        let source = apart("mounts", move || Source::open(wanted)).await.flatten().map_err(failed)?;
        let watched = Watched(Arc::clone(&source.mounts));
        // SAFETY: `Watched` keeps the file open that it gives the number of, and is dropped after its registration: the
        // `AsyncFd` owns it from here on and never gives it away.
        let changes = unsafe { AsyncFd::register_with_interest(watched, Interest::PRIORITY) }
            .map_err(|error| failed(io::Error::from(error)))?;
        let (source, control) = (Arc::new(source), control.clone());
        let mut following = Self { source, control, changes, given: Vec::new(), left_out: HashSet::new(), names: 0 };
        if tree.recursive {
            following.catch_up().await?;
        } else {
            let seen = following.look().await.map_err(failed)?;
            following.left_out = seen.into_iter().map(|mount| mount.identity).collect();
        }
        Ok(following)
    }

    /// Follows for as long as the machine is there.
    pub(crate) async fn run(mut self) {
        loop {
            match self.changes.ready(Interest::PRIORITY).await {
                Ok(mut ready) => ready.clear_ready(),
                Err(error) => return self.given_up(&error),
            }
            match self.catch_up().await {
                Ok(()) => {}
                // The machine has gone, and whoever waits for it says so.
                Err(ControlError::Gone { .. } | ControlError::Send { .. }) => return,
                Err(error) => return self.given_up(&error),
            }
        }
    }

    fn given_up(&self, error: &(dyn std::error::Error + 'static)) {
        let source = self.source.tree.source.display();
        logging::warn(format_args!("what is mounted below {source} is no longer followed: {}", text::chain(error)));
    }

    async fn look(&self) -> io::Result<Vec<Seen>> {
        let source = Arc::clone(&self.source);
        apart("mounts", move || source.look()).await.flatten()
    }

    /// Has the machine have what is seen on the host.
    async fn catch_up(&mut self) -> Result<(), ControlError> {
        let path = self.source.tree.source.display().to_string();
        let seen = self.look().await.map_err(|source| ControlError::Share { path, source })?;
        self.left_out.retain(|identity| seen.iter().any(|mount| mount.identity == *identity));
        self.take_back(&seen).await?;
        for mount in seen {
            let is_known = self.left_out.contains(&mount.identity);
            if !is_known && !self.given.iter().any(|given| given.identity == mount.identity) {
                self.give(mount).await?;
            }
        }
        Ok(())
    }

    /// Takes back what is gone, or lies in what is; the inner ones first.
    async fn take_back(&mut self, seen: &[Seen]) -> Result<(), ControlError> {
        let is_there = |given: &Given| seen.iter().any(|mount| mount.identity == given.identity);
        let (kept, gone): (Vec<_>, Vec<_>) = std::mem::take(&mut self.given).into_iter().partition(is_there);
        self.given = kept;
        for mount in gone.into_iter().rev() {
            self.control.remove_mount(&mount.name, &mount.place).await?;
            logging::debug(format_args!("{} is no longer mounted for the container", mount.place.display()));
        }
        Ok(())
    }

    async fn give(&mut self, mount: Seen) -> Result<(), ControlError> {
        let parent = match &mount.inside {
            None => None,
            Some(inside) => match self.given.iter().find(|given| given.identity == inside.identity) {
                Some(given) => Some(given.name.clone()),
                None => {
                    // It is left out, and so is what lies in it.
                    self.left_out.insert(mount.identity);
                    return Ok(());
                }
            },
        };
        let (source, wanted) = (Arc::clone(&self.source), mount.clone());
        let (covered, opened) = match apart("mounts", move || source.copy(&wanted)).await.flatten() {
            Ok(copied) => copied,
            Err(error) => {
                self.leave_out(mount, &error);
                return Ok(());
            }
        };
        self.names += 1;
        let name = format!("{}-{}", self.source.tree.name, self.names);
        let names = (self.source.tree.name.as_str(), parent.as_deref(), name.as_str());
        match self.control.add_mount(names, covered.as_fd(), &opened, &mount.place).await {
            Ok(()) => {
                logging::debug(format_args!("{} is mounted for the container", mount.place.display()));
                self.given.push(Given { identity: mount.identity, place: mount.place, name });
                Ok(())
            }
            Err(error @ (ControlError::Gone { .. } | ControlError::Send { .. })) => Err(error),
            Err(error) => {
                self.leave_out(mount, &error);
                Ok(())
            }
        }
    }

    /// Notes that the machine does without a mount; once for each.
    fn leave_out(&mut self, mount: Seen, why: &(dyn std::error::Error + 'static)) {
        let place = mount.place.display();
        logging::warn(format_args!("what is mounted on {place} is not seen in the container: {}", text::chain(why)));
        self.left_out.insert(mount.identity);
    }
}

impl Source {
    fn open(tree: ShareTree) -> io::Result<Self> {
        let mounts = MountTree::open()?;
        let id = mount_id(&tree.source)?;
        let entry = mounts.read()?.into_iter().find(|mount| mount.id == id);
        let identity = entry.ok_or_else(|| io::Error::other("its mount is not in this mount namespace"))?.identity;
        let bare = DetachedTree::open(&tree)?;
        Ok(Self { tree, mounts: Arc::new(mounts), id, identity, bare })
    }

    /// What is seen below, or over, the source; nothing when its own mount has gone.
    fn look(&self) -> io::Result<Vec<Seen>> {
        let mounts = self.mounts.read()?;
        if !mounts.iter().any(|mount| mount.identity == self.identity) {
            return Ok(Vec::new());
        }
        let seen = seen_from(&mounts, self.id, &self.tree.source).into_iter().map(|(mount, inside)| Seen {
            id: mount.id,
            identity: mount.identity.clone(),
            place: mount.place.clone(),
            inside: inside.map(|inside| Inside {
                id: inside.id,
                identity: inside.identity.clone(),
                place: inside.place.clone(),
            }),
        });
        Ok(seen.collect())
    }

    /// What a mount covers in the one in which it lies, and a copy of it with the tree's attributes.
    fn copy(&self, mount: &Seen) -> io::Result<(OwnedFd, DetachedTree)> {
        let top = open_mount(&mount.place, mount.id)?;
        let opened = DetachedTree::of_place(&top, self.tree.read_only)?;
        let covered = match &mount.inside {
            None => find(&self.bare, &mount.place, &self.tree.source)?,
            Some(inside) => {
                let outer = DetachedTree::of_place(open_mount(&inside.place, inside.id)?, true)?;
                find(&outer, &mount.place, &inside.place)?
            }
        };
        Ok((covered, opened))
    }
}

/// Opens the top of a mount, without having anything mounted there.
fn open_mount(place: &Path, id: u64) -> io::Result<OwnedFd> {
    let top = open(place, OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC, Mode::empty())?;
    if mount_id_of(&top)? == id { Ok(top) } else { Err(io::Error::other("something else has been mounted there")) }
}

/// Finds `place` in a copy of the mount that is at `base`.
fn find(copy: &DetachedTree, place: &Path, base: &Path) -> io::Result<OwnedFd> {
    let below = place.strip_prefix(base).map_err(io::Error::other)?;
    let below = if below.as_os_str().is_empty() { Path::new(".") } else { below };
    let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_MAGICLINKS;
    let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    Ok(openat2(copy.mount(), below, flags, Mode::empty(), resolve)?)
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::time::Duration;

    use bulkhead_vmm::control::{self, Order, Received, Request};
    use nix::mount::{MsFlags, mount, umount};
    use nix::sched::{CloneFlags, unshare};

    use super::*;

    /// Gives this thread a mount namespace whose mounts spread, and a file system in a folder that has a folder `below`.
    fn volume() -> tempfile::TempDir {
        let none: Option<&str> = None;
        unshare(CloneFlags::CLONE_NEWNS).unwrap();
        for propagation in [MsFlags::MS_PRIVATE, MsFlags::MS_SHARED] {
            mount(none, "/", none, propagation | MsFlags::MS_REC, none).unwrap();
        }
        let volume = tempfile::tempdir().unwrap();
        mount_on(volume.path());
        fs::create_dir(volume.path().join("below")).unwrap();
        volume
    }

    fn mount_on(place: &Path) {
        mount(Some("tmpfs"), place, Some("tmpfs"), MsFlags::empty(), Some("size=1m")).unwrap();
    }

    /// The next order that the VMM gets, and how many descriptors came with it; it is answered.
    async fn order(control: &VmmControl, vmm: &OwnedFd) -> (Order, usize) {
        loop {
            match control::receive(vmm) {
                Ok(Received::Request(Request { sequence, order }, descriptors)) => {
                    control.answered(sequence, Ok(None));
                    return (order, descriptors.len());
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    tokio::time::sleep(Duration::from_millis(1)).await;
                }
                other => panic!("{other:?}"),
            }
        }
    }

    fn add(parent: Option<&str>, name: &str) -> (Order, usize) {
        (Order::AddMount { tree: "m0".to_owned(), parent: parent.map(str::to_owned), name: name.to_owned() }, 2)
    }

    fn remove(name: &str) -> (Order, usize) {
        (Order::RemoveMount { name: name.to_owned() }, 0)
    }

    #[tokio::test]
    async fn a_machine_that_boots_is_not_asked_for_anything() {
        let (ours, _vmm) = control::pair().unwrap();
        let (control, runs) = (VmmControl::new(ours), Notify::new());
        let source = PathBuf::from("/no/such");
        let tree = ShareTree { name: "m0".into(), source, read_only: true, recursive: true, follows: true };
        let trees = [tree];
        assert!(follow_all(&[], &runs, &control).await.unwrap().is_empty());

        let following = follow_all(&trees, &runs, &control);
        tokio::pin!(following);
        // What is not held back has found by then that there is no such folder.
        let others = async {
            for _ in 0..3 {
                Following::start(&trees[0], &control).await.unwrap_err();
            }
        };
        tokio::select! {
            biased;
            done = &mut following => panic!("{done:?}"),
            () = others => {}
        }
        runs.notify_one();

        assert_eq!(following.await.unwrap_err().to_string(), "cannot share /no/such");
    }

    #[tokio::test]
    #[ignore = "needs root"]
    async fn the_machine_is_given_what_the_host_mounts_and_loses_what_it_unmounts() {
        let volume = volume();
        let (source, below) = (volume.path().to_owned(), volume.path().join("below"));
        let tree =
            ShareTree { name: "m0".into(), source: source.clone(), read_only: true, recursive: true, follows: true };
        let (ours, vmm) = control::pair().unwrap();
        let control = VmmControl::new(ours);
        mount_on(&below);

        let (following, first) = tokio::join!(Following::start(&tree, &control), order(&control, &vmm));
        assert_eq!(first, add(None, "m0-1"));
        let task = tokio::spawn(following.unwrap().run());
        fs::create_dir(below.join("deep")).unwrap();
        mount_on(&below.join("deep"));
        assert_eq!(order(&control, &vmm).await, add(Some("m0-1"), "m0-2"));
        umount(&below.join("deep")).unwrap();
        assert_eq!(order(&control, &vmm).await, remove("m0-2"));
        // What covers all hides the rest, which comes back.
        mount_on(&source);
        assert_eq!(order(&control, &vmm).await, remove("m0-1"));
        assert_eq!(order(&control, &vmm).await, add(None, "m0-3"));
        umount(&source).unwrap();
        assert_eq!(order(&control, &vmm).await, remove("m0-3"));
        assert_eq!(order(&control, &vmm).await, add(None, "m0-4"));
        task.abort();
        let _ = task.await;
        // Nothing of the host's is busy.
        umount(&below).unwrap();
        umount(&source).unwrap();
    }
}
