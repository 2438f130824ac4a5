// SPDX-License-Identifier: Apache-2.0
//! Names: looking them up, removing them, giving a file another.

use std::os::fd::OwnedFd;

use rustix::fs::{AtFlags, FileType, RenameFlags, Statx, linkat, renameat_with, unlinkat};
use rustix::io::Errno;

use super::super::reply::Entry;
use super::super::request::Name;
use super::super::wire::{ATTR_SUBMOUNT, ROOT_NODE};
use super::inode::{Access, Identity, Inode, Origin};
use super::{PRIVATE_ABSENT, Server, host};
use crate::fs::{AddedTrees, CachePolicy, PART_PREFIX};

impl Server {
    pub(super) fn lookup(&mut self, directory: u64, name: Name<'_>) -> Result<(), Errno> {
        match self.find(directory, name) {
            Ok((entry, stat)) => self.reply.entry(entry, &stat),
            // Trees may yet be added to the top directory.
            Err(Errno::NOENT) if self.cache == CachePolicy::Private && directory != ROOT_NODE => {
                self.reply.negative_entry(PRIVATE_ABSENT);
            }
            Err(errno) => return Err(errno),
        }
        Ok(())
    }

    /// Finds a name in a directory and counts a lookup of its node.
    pub(super) fn find(&mut self, directory: u64, name: Name<'_>) -> Result<(Entry, Statx), Errno> {
        let parent = self.nodes.get(directory)?;
        let mut origin = parent.origin();
        let added = self.added.as_ref().filter(|_| directory == ROOT_NODE);
        let descriptor = match added.and_then(|added| added.find(name.as_c_str().to_bytes())) {
            Some(tree) => {
                let (top, membership) = tree.map_err(host::too_many)?;
                origin.membership = Some(membership);
                top
            }
            None => host::open_path(&parent.descriptor, name.as_c_str())?,
        };
        let stat = host::stat(&descriptor)?;
        if directory == ROOT_NODE {
            if name.as_c_str().to_bytes().starts_with(PART_PREFIX.as_bytes()) {
                origin.mount = stat.stx_mnt_id;
            }
            return self.find_tree(origin, descriptor, &stat);
        }
        match self.added.as_ref().and_then(|added| added.over(&Identity::of(&stat))) {
            Some(cover) => {
                let cover = cover.map_err(host::too_many)?;
                origin.membership = Some(cover.membership);
                let stat = host::stat(&cover.top)?;
                Ok((self.admit(origin, cover.top, Access::Path, &stat)?, stat))
            }
            None => Ok((self.admit(origin, descriptor, Access::Path, &stat)?, stat)),
        }
    }

    /// A tree, by its top, which may be covered by now.
    fn find_tree(&mut self, origin: Origin, top: OwnedFd, stat: &Statx) -> Result<(Entry, Statx), Errno> {
        let entry = self.admit(origin, top, Access::Path, stat)?;
        if !self.added.as_ref().is_some_and(AddedTrees::have_mounts) {
            return Ok((entry, *stat));
        }
        self.cover_trees();
        let shown = self.nodes.get(entry.node).and_then(|inode| host::stat(&inode.descriptor));
        Ok((entry, shown.unwrap_or(*stat)))
    }

    /// Refuses to have a name taken from what the host has mounted something over, as its kernel does.
    fn expect_no_mount(&self, directory: u64, name: Name<'_>) -> Result<(), Errno> {
        let Some(added) = self.added.as_ref().filter(|added| added.have_mounts()) else { return Ok(()) };
        let named = host::open_path(&self.nodes.get(directory)?.descriptor, name.as_c_str());
        let is_covered =
            named.and_then(|named| host::stat(&named)).map(|stat| added.are_mounted_over(&Identity::of(&stat)));
        if is_covered == Ok(true) { Err(Errno::BUSY) } else { Ok(()) }
    }

    /// Makes a node of a descriptor, or finds the one that there is, and counts a lookup of it. `origin` is the directory
    /// that it was found in.
    pub(super) fn admit(
        &mut self,
        origin: Origin,
        descriptor: OwnedFd,
        access: Access,
        stat: &Statx,
    ) -> Result<Entry, Errno> {
        let id = match self.nodes.look_up(stat) {
            Some(id) => id,
            None => self.nodes.insert(Inode::new(descriptor, access, stat, origin.membership))?,
        };
        let is_directory = FileType::from_raw_mode(u32::from(stat.stx_mode)) == FileType::Directory;
        let attr_flags = if is_directory && stat.stx_mnt_id != origin.mount { ATTR_SUBMOUNT } else { 0 };
        let (valid, attr_valid) = (self.name_valid(stat), self.attr_valid(stat));
        // Linux keeps no generation of the place of a submount (6.12): with another than 0, it would take the place for another file
        // whenever it looks, and mount it anew. Its node is not another's as long as the guest knows it.
        let generation = if attr_flags == 0 { id.generation } else { 0 };
        Ok(Entry { node: id.node, generation, valid, attr_valid, attr_flags })
    }

    pub(super) fn unlink(&mut self, directory: u64, name: Name<'_>) -> Result<(), Errno> {
        self.expect_no_mount(directory, name)?;
        unlinkat(&self.changeable(directory)?.descriptor, name.as_c_str(), AtFlags::empty())
    }

    pub(super) fn rmdir(&mut self, directory: u64, name: Name<'_>) -> Result<(), Errno> {
        self.expect_no_mount(directory, name)?;
        unlinkat(&self.changeable(directory)?.descriptor, name.as_c_str(), AtFlags::REMOVEDIR)
    }

    pub(super) fn rename(
        &mut self,
        (old_directory, old_name): (u64, Name<'_>),
        (new_directory, new_name): (u64, Name<'_>),
        flags: u32,
    ) -> Result<(), Errno> {
        let allowed = RenameFlags::NOREPLACE | RenameFlags::EXCHANGE | RenameFlags::WHITEOUT;
        let flags = RenameFlags::from_bits(flags).filter(|flags| allowed.contains(*flags)).ok_or(Errno::INVAL)?;
        self.expect_no_mount(old_directory, old_name)?;
        self.expect_no_mount(new_directory, new_name)?;
        renameat_with(
            &self.changeable(old_directory)?.descriptor,
            old_name.as_c_str(),
            &self.changeable(new_directory)?.descriptor,
            new_name.as_c_str(),
            flags,
        )
    }

    pub(super) fn link(&mut self, target: u64, directory: u64, name: Name<'_>) -> Result<(), Errno> {
        let target = self.changeable(target)?;
        let origin = self.changeable(directory)?.origin();
        // The magic link is followed, the file that it leads to is not.
        linkat(
            &self.proc_self_fd,
            host::DescriptorName::new(&target.descriptor).as_c_str(),
            &self.changeable(directory)?.descriptor,
            name.as_c_str(),
            AtFlags::SYMLINK_FOLLOW,
        )?;
        let descriptor = host::open_path(&self.changeable(directory)?.descriptor, name.as_c_str())?;
        let stat = host::stat(&descriptor)?;
        let entry = self.admit(origin, descriptor, Access::Path, &stat)?;
        self.reply.entry(entry, &stat);
        Ok(())
    }
}
