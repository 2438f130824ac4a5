// SPDX-License-Identifier: Apache-2.0
//! Names: looking them up, removing them, giving a file another.

use std::os::fd::OwnedFd;

use rustix::fs::{AtFlags, FileType, RenameFlags, Statx, linkat, renameat_with, unlinkat};
use rustix::io::Errno;

use super::super::reply::Entry;
use super::super::request::Name;
use super::super::wire::{ATTR_SUBMOUNT, ROOT_NODE};
use super::inode::{Access, Inode, Origin};
use super::{PRIVATE_ABSENT, Server, host};
use crate::fs::{CachePolicy, PART_PREFIX};

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
        if directory == ROOT_NODE && name.as_c_str().to_bytes().starts_with(PART_PREFIX.as_bytes()) {
            origin.mount = stat.stx_mnt_id;
        }
        Ok((self.admit(origin, descriptor, Access::Path, &stat)?, stat))
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
        Ok(Entry { node: id.node, generation: id.generation, valid, attr_valid, attr_flags })
    }

    pub(super) fn unlink(&mut self, directory: u64, name: Name<'_>) -> Result<(), Errno> {
        unlinkat(&self.changeable(directory)?.descriptor, name.as_c_str(), AtFlags::empty())
    }

    pub(super) fn rmdir(&mut self, directory: u64, name: Name<'_>) -> Result<(), Errno> {
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
