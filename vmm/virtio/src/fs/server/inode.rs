// SPDX-License-Identifier: Apache-2.0
//! The nodes that the guest knows: each is one file of the host, held by a descriptor, so that no path is ever resolved
//! twice and a file stays the same one however the host moves it.

use std::collections::HashMap;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use rustix::fs::{FileType, Statx};
use rustix::io::Errno;

use super::super::submounts::Cover;
use super::super::trees::Membership;
use super::super::wire::ROOT_NODE;

/// Most nodes of a table. Each holds a descriptor, so the process' limit of these usually comes first.
pub(super) const MAX_NODES: usize = 1 << 20;

/// What makes a file the same one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(in crate::fs) struct Identity {
    device: (u32, u32),
    inode: u64,
    /// One file that is seen through two mounts, of which only one may be writable, is two nodes.
    mount: u64,
}

impl Identity {
    pub(in crate::fs) fn of(stat: &Statx) -> Self {
        Self { device: (stat.stx_dev_major, stat.stx_dev_minor), inode: stat.stx_ino, mount: stat.stx_mnt_id }
    }

    /// The same file as seen through another mount.
    pub(in crate::fs) fn in_mount(self, mount: u64) -> Self {
        Self { mount, ..self }
    }
}

/// What a node's descriptor can do.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Access {
    /// `O_PATH`: stands for the file, reads nothing.
    Path,
    /// A regular file, open for reading.
    Read,
    /// A regular file, open for reading and writing.
    ReadWrite,
}

/// Where a file was found: what it has of the directory that it was found in.
#[derive(Debug, Clone)]
pub(super) struct Origin {
    /// The directory's mount.
    pub(super) mount: u64,
    /// The added tree that it is in.
    pub(super) membership: Option<Membership>,
}

/// A file of the host that the guest knows.
#[derive(Debug)]
pub(super) struct Inode {
    identity: Identity,
    pub(super) kind: FileType,
    pub(super) descriptor: Arc<OwnedFd>,
    pub(super) access: Access,
    /// The mount that what is found in it is expected in.
    mount: u64,
    /// The added tree, or mount, that it is in.
    membership: Option<Membership>,
    /// What it was before the host mounted something over it.
    covered: Option<Covered>,
    /// How often the guest has been told of it and not forgotten it since.
    lookups: u64,
}

/// What of a node changes when something is mounted over it.
#[derive(Debug)]
struct Covered {
    descriptor: Arc<OwnedFd>,
    mount: u64,
    membership: Option<Membership>,
}

impl Inode {
    /// Wraps a descriptor, `stat` being that of its file, and `membership` the added tree that it is in.
    pub(super) fn new(descriptor: OwnedFd, access: Access, stat: &Statx, membership: Option<Membership>) -> Self {
        Self {
            identity: Identity::of(stat),
            kind: FileType::from_raw_mode(u32::from(stat.stx_mode)),
            descriptor: Arc::new(descriptor),
            access,
            mount: stat.stx_mnt_id,
            membership,
            covered: None,
            lookups: 1,
        }
    }

    /// What files that are found in it have of it.
    pub(super) fn origin(&self) -> Origin {
        Origin { mount: self.mount, membership: self.membership.clone() }
    }

    /// The added tree that it is in.
    pub(super) fn membership(&self) -> Option<Membership> {
        self.membership.clone()
    }

    fn is_removed(&self) -> bool {
        self.membership.as_ref().is_some_and(Membership::is_over)
    }

    /// Becomes the top of what has been mounted over it. To the guest it is the same node.
    fn cover(&mut self, cover: Cover) {
        self.uncover();
        let descriptor = std::mem::replace(&mut self.descriptor, Arc::new(cover.top));
        let membership = self.membership.replace(cover.membership);
        self.covered = Some(Covered { descriptor, mount: self.mount, membership });
        self.mount = cover.mount;
    }

    fn uncover(&mut self) {
        if let Some(Covered { descriptor, mount, membership }) = self.covered.take() {
            (self.descriptor, self.mount, self.membership) = (descriptor, mount, membership);
        }
    }
}

/// A node's name to the guest: which slot, and the how manieth node in it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct NodeId {
    pub(super) node: u64,
    pub(super) generation: u64,
}

#[derive(Debug)]
struct Slot {
    generation: u64,
    inode: Option<Inode>,
}

/// All nodes. A node id is an index and one, so that the top directory, the first, has [`ROOT_NODE`].
#[derive(Debug)]
pub(super) struct InodeTable {
    slots: Vec<Slot>,
    free: Vec<usize>,
    by_identity: HashMap<Identity, usize>,
}

impl InodeTable {
    /// A table that knows the top directory alone; it is never forgotten.
    pub(super) fn new(root: Inode) -> Self {
        let by_identity = HashMap::from([(root.identity, 0)]);
        Self { slots: vec![Slot { generation: 0, inode: Some(root) }], free: Vec::new(), by_identity }
    }

    /// Forgets all but the top directory, as at the end of a session.
    pub(super) fn clear(&mut self) {
        for node in ROOT_NODE + 1..=self.slots.len() as u64 {
            self.forget(node, u64::MAX);
        }
    }

    /// Closes the files of the nodes whose tree is gone, and puts `stand_in` in their place. The nodes stay until the guest
    /// forgets them, so that none of their numbers comes to mean another file to it.
    pub(super) fn retire(&mut self, stand_in: &Arc<OwnedFd>) {
        for (index, slot) in self.slots.iter_mut().enumerate() {
            let Some(inode) = slot.inode.as_mut().filter(|inode| inode.is_removed()) else { continue };
            inode.uncover();
            if !inode.is_removed() {
                continue;
            }
            inode.descriptor = Arc::clone(stand_in);
            if self.by_identity.get(&inode.identity) == Some(&index) {
                self.by_identity.remove(&inode.identity);
            }
        }
    }

    /// Puts what is mounted over a file in its place, if the guest knows that.
    pub(super) fn cover(&mut self, file: &Identity, cover: Cover) {
        let index = self.by_identity.get(file);
        if let Some(inode) = index.and_then(|index| self.slots.get_mut(*index)?.inode.as_mut()) {
            inode.cover(cover);
        }
    }

    /// How many nodes there are.
    #[cfg(test)]
    pub(super) fn len(&self) -> usize {
        self.by_identity.len()
    }

    /// The node; `ESTALE` if the guest has no such node, or its tree is gone.
    pub(super) fn get(&self, node: u64) -> Result<&Inode, Errno> {
        let inode = index_of(node).and_then(|index| self.slots.get(index)?.inode.as_ref());
        inode.filter(|inode| !inode.is_removed()).ok_or(Errno::STALE)
    }

    /// The node, to change it.
    pub(super) fn get_mut(&mut self, node: u64) -> Result<&mut Inode, Errno> {
        let inode = index_of(node).and_then(|index| self.slots.get_mut(index)?.inode.as_mut());
        inode.filter(|inode| !inode.is_removed()).ok_or(Errno::STALE)
    }

    /// Counts one more lookup of the file, if it is known.
    pub(super) fn look_up(&mut self, stat: &Statx) -> Option<NodeId> {
        let index = *self.by_identity.get(&Identity::of(stat))?;
        let slot = self.slots.get_mut(index)?;
        let inode = slot.inode.as_mut()?;
        inode.lookups = inode.lookups.saturating_add(1);
        Some(NodeId { node: node_of(index), generation: slot.generation })
    }

    /// Adds a file that is not known yet, with one lookup. `ENFILE` if the table is full.
    pub(super) fn insert(&mut self, inode: Inode) -> Result<NodeId, Errno> {
        let identity = inode.identity;
        let index = match self.free.pop() {
            Some(index) => index,
            None if self.slots.len() >= MAX_NODES => return Err(Errno::NFILE),
            None => {
                self.slots.push(Slot { generation: 0, inode: None });
                self.slots.len() - 1
            }
        };
        let slot = self.slots.get_mut(index).ok_or(Errno::NFILE)?;
        slot.inode = Some(inode);
        self.by_identity.insert(identity, index);
        Ok(NodeId { node: node_of(index), generation: slot.generation })
    }

    /// Takes back `lookups` of a node; the last one closes it. A node that is not there, and more lookups than there
    /// were, are the guest's own business.
    pub(super) fn forget(&mut self, node: u64, lookups: u64) {
        let Some(index) = index_of(node).filter(|index| *index != 0) else { return };
        let Some(slot) = self.slots.get_mut(index) else { return };
        let Some(inode) = slot.inode.as_mut() else { return };
        inode.lookups = inode.lookups.saturating_sub(lookups);
        if inode.lookups == 0 {
            // That of a retired node may be another's by now.
            if self.by_identity.get(&inode.identity) == Some(&index) {
                self.by_identity.remove(&inode.identity);
            }
            slot.inode = None;
            slot.generation += 1;
            self.free.push(index);
        }
    }
}

fn index_of(node: u64) -> Option<usize> {
    usize::try_from(node).ok()?.checked_sub(1)
}

fn node_of(index: usize) -> u64 {
    index as u64 + 1
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use rustix::fs::{AtFlags, CWD, Mode, OFlags, StatxFlags, openat, statx};

    use super::*;

    fn open(path: &Path) -> (Inode, Statx) {
        let descriptor = openat(CWD, path, OFlags::PATH | OFlags::NOFOLLOW, Mode::empty()).unwrap();
        let stat = statx(&descriptor, c"", AtFlags::EMPTY_PATH, StatxFlags::BASIC_STATS | StatxFlags::MNT_ID).unwrap();
        (Inode::new(descriptor, Access::Path, &stat, None), stat)
    }

    fn table_with(name: &str) -> (tempfile::TempDir, InodeTable, Statx) {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join(name), "").unwrap();
        let mut table = InodeTable::new(open(folder.path()).0);
        let (inode, stat) = open(&folder.path().join(name));
        table.insert(inode).unwrap();
        (folder, table, stat)
    }

    #[test]
    fn a_node_lives_until_its_last_lookup_is_forgotten() {
        let (_folder, mut table, stat) = table_with("file");

        let again = table.look_up(&stat);
        table.forget(2, 1);
        let held = table.get(2).is_ok();
        table.forget(2, 1);

        assert_eq!(again, Some(NodeId { node: 2, generation: 0 }));
        assert!(held);
        assert_eq!(table.get(2).err(), Some(Errno::STALE));
        assert_eq!(table.look_up(&stat), None);
    }

    #[test]
    fn a_slot_used_again_has_another_generation() {
        let (folder, mut table, _) = table_with("file");

        table.forget(2, u64::MAX);
        let id = table.insert(open(&folder.path().join("file")).0).unwrap();

        assert_eq!(id, NodeId { node: 2, generation: 1 });
    }

    #[test]
    fn the_root_and_unknown_nodes_cannot_be_forgotten() {
        let (_folder, mut table, _) = table_with("file");

        for node in [0, 1, 3, u64::MAX] {
            table.forget(node, u64::MAX);
        }

        assert!(table.get(ROOT_NODE).is_ok());
        assert_eq!(table.len(), 2);
        for node in [0, 3, u64::MAX] {
            assert_eq!(table.get(node).err(), Some(Errno::STALE));
        }
    }

    #[test]
    fn clearing_leaves_the_root() {
        let (_folder, mut table, _) = table_with("file");

        table.clear();

        assert_eq!(table.len(), 1);
        assert!(table.get(ROOT_NODE).is_ok());
    }
}
