// SPDX-License-Identifier: Apache-2.0
//! What the host mounts below a device's trees while it runs.
//!
//! Each is a mount that is mounted nowhere, as a tree's is, and stands in the place of the file or directory that it covers
//! on the host: wherever the guest looks that up, it finds the top of the mount. So nothing of the host's is ever busy on
//! account of a guest: what the host unmounts is closed here, and stale for the guest.

use std::collections::HashMap;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use rustix::fs::FileType;
use rustix::io::Errno;

use super::server::host;
use super::server::inode::Identity;
use super::trees::{Membership, TreeError, is_tree_name};

/// Most of them on a device at a time.
pub const MAX_SUBMOUNTS: usize = 4096;

/// Those of a device.
#[derive(Debug, Default)]
pub(super) struct Submounts {
    by_place: HashMap<Identity, Submount>,
    /// Their places.
    by_name: HashMap<String, Identity>,
}

#[derive(Debug)]
struct Submount {
    /// The tree that it is in.
    tree: String,
    /// What it covers. Held, so that no other file gets its number.
    _covered: OwnedFd,
    top: OwnedFd,
    /// The mount that `top` is the top of.
    mount: u64,
    is_over: Arc<AtomicBool>,
    /// Whether it covers all of the tree.
    is_whole: bool,
}

/// What stands in the place of another file.
#[derive(Debug)]
pub(super) struct Cover {
    pub(super) top: OwnedFd,
    pub(super) mount: u64,
    pub(super) membership: Membership,
}

impl Submount {
    fn cover(&self) -> rustix::io::Result<Cover> {
        let top = rustix::io::fcntl_dupfd_cloexec(&self.top, 0)?;
        Ok(Cover { top, mount: self.mount, membership: Membership::new(&self.is_over) })
    }
}

impl Submounts {
    /// Adds the mount whose top is `top`, over `covered`; `base` is the top of the tree or of the mount that this lies in.
    pub(super) fn add(
        &mut self,
        (name, tree): (&str, &str),
        base: &OwnedFd,
        covered: OwnedFd,
        top: OwnedFd,
        is_in_tree: bool,
    ) -> Result<(), TreeError> {
        if !is_tree_name(name) {
            return Err(TreeError::Name(name.to_owned()));
        }
        let stat = |file: &OwnedFd| host::stat(file).map_err(|errno| TreeError::Stat(name.to_owned(), errno.into()));
        let (base, below, over) = (stat(base)?, stat(&covered)?, stat(&top)?);
        let kind = |mode: u16| FileType::from_raw_mode(u32::from(mode));
        let is_fit = matches!(kind(over.stx_mode), FileType::Directory | FileType::RegularFile);
        if !is_fit || kind(below.stx_mode) != kind(over.stx_mode) {
            return Err(TreeError::Kind(name.to_owned()));
        }
        // Whoever has found the place has done so in a mount of its own.
        let place = Identity::of(&below).in_mount(base.stx_mnt_id);
        if self.by_name.contains_key(name) || self.by_place.contains_key(&place) {
            return Err(TreeError::Exists(name.to_owned()));
        }
        if self.by_name.len() >= MAX_SUBMOUNTS {
            return Err(TreeError::TooManyMounts);
        }
        let submount = Submount {
            tree: tree.to_owned(),
            _covered: covered,
            top,
            mount: over.stx_mnt_id,
            is_over: Arc::default(),
            is_whole: is_in_tree && place == Identity::of(&base),
        };
        self.by_place.insert(place, submount);
        self.by_name.insert(name.to_owned(), place);
        Ok(())
    }

    /// Takes one away; false if there is none of that name.
    pub(super) fn remove(&mut self, name: &str) -> bool {
        let submount = self.by_name.remove(name).and_then(|place| self.by_place.remove(&place));
        submount.inspect(|submount| submount.is_over.store(true, Ordering::Release)).is_some()
    }

    /// Takes those of a tree away.
    pub(super) fn remove_of(&mut self, tree: &str) {
        let is_of = |place: &Identity| self.by_place.get(place).is_some_and(|submount| submount.tree == tree);
        let names = self.by_name.iter().filter(|(_, place)| is_of(place)).map(|(name, _)| name.clone());
        for name in names.collect::<Vec<_>>() {
            self.remove(&name);
        }
    }

    pub(super) fn is_empty(&self) -> bool {
        self.by_place.is_empty()
    }

    /// The top of one.
    pub(super) fn top(&self, name: &str) -> Option<&OwnedFd> {
        Some(&self.by_place.get(self.by_name.get(name)?)?.top)
    }

    /// Whether something is mounted over a file.
    pub(super) fn covers(&self, file: &Identity) -> bool {
        self.by_place.contains_key(file)
    }

    /// What stands in a file's place, unless that is the top of a tree.
    pub(super) fn over(&self, file: &Identity) -> Option<Result<Cover, Errno>> {
        self.by_place.get(file).filter(|submount| !submount.is_whole).map(Submount::cover)
    }

    /// Those that cover whole trees, by the trees' tops.
    pub(super) fn over_trees(&self) -> Vec<(Identity, Result<Cover, Errno>)> {
        let whole = self.by_place.iter().filter(|(_, submount)| submount.is_whole);
        whole.map(|(place, submount)| (*place, submount.cover())).collect()
    }
}
