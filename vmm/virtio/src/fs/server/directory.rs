// SPDX-License-Identifier: Apache-2.0
//! Reading directories; what is kept of them between two requests is in [`super::listing`].

use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

use rustix::fs::{FileType, OFlags, fstatfs};
use rustix::io::Errno;

use super::super::reply::{DIRENT_LEN, ENTRY_LEN};
use super::super::request::{Name, Transfer};
use super::super::wire::{FOPEN_CACHE_DIR, FOPEN_KEEP_CACHE, MAX_DIRECTORY_LEN, OUT_HEADER_LEN};
use super::Server;
use super::handle::Handle;
use super::io_requests::synchronize;
use super::listing::{Entry, Listing};
use crate::buffers::Buffers;
use crate::fs::CachePolicy;

/// File systems (`f_type`) whose directory offsets belong to an entry for good: ext4, XFS, Btrfs.
const LASTING_OFFSETS: [u32; 3] = [0xef53, 0x5846_5342, 0x9123_683e];

impl Server {
    pub(super) fn opendir(&mut self, node: u64) -> Result<(), Errno> {
        let inode = self.nodes.get(node)?;
        if inode.kind != FileType::Directory {
            return Err(Errno::NOTDIR);
        }
        let descriptor = Arc::new(self.reopen(&inode.descriptor, OFlags::RDONLY | OFlags::DIRECTORY)?);
        let flags = match self.cache {
            CachePolicy::Private if has_lasting_offsets(&descriptor) => FOPEN_CACHE_DIR | FOPEN_KEEP_CACHE,
            CachePolicy::Private | CachePolicy::Shared => 0,
        };
        let membership = inode.membership();
        let handle = self.handles.insert(Handle::Directory { descriptor, listing: Listing::new() }, membership)?;
        self.reply.open_out(handle, flags);
        Ok(())
    }

    pub(super) fn readdir(&mut self, transfer: Transfer, buffers: &Buffers<'_>) -> Result<(), Errno> {
        let limit = limit(transfer, buffers);
        self.list(transfer, limit, |server, entry| {
            if server.reply.body_len() + dirent_len(entry) > limit {
                return false;
            }
            server.reply.dirent(entry.inode, entry.next_offset, entry.kind, entry.name.to_bytes());
            true
        })
    }

    /// As READDIR, with a lookup of each entry.
    pub(super) fn readdirplus(
        &mut self,
        directory: u64,
        transfer: Transfer,
        buffers: &Buffers<'_>,
    ) -> Result<(), Errno> {
        let limit = limit(transfer, buffers);
        self.list(transfer, limit, |server, entry| {
            if server.reply.body_len() + ENTRY_LEN + dirent_len(entry) > limit {
                return false;
            }
            // `.` and `..` are not looked up, nor is what has just vanished: node 0 says so.
            let found = Name::new(entry.name).ok().and_then(|name| server.find(directory, name).ok());
            match found {
                Some((node, stat)) => server.reply.entry(node, &stat),
                None => server.reply.zeros(ENTRY_LEN),
            }
            server.reply.dirent(entry.inode, entry.next_offset, entry.kind, entry.name.to_bytes());
            true
        })
    }

    pub(super) fn fsyncdir(&mut self, handle: u64, flags: u32) -> Result<(), Errno> {
        synchronize(self.handles.directory(handle)?, flags)
    }

    /// Hands entries to `put` until it has no room for one.
    fn list(
        &mut self,
        transfer: Transfer,
        limit: usize,
        mut put: impl FnMut(&mut Self, &Entry<'_>) -> bool,
    ) -> Result<(), Errno> {
        let descriptor = self.handles.directory(transfer.handle)?;
        let mut listing = self.handles.take_listing(transfer.handle);
        let outcome = self.put_entries(&descriptor, &mut listing, (transfer.offset, limit), &mut put);
        self.handles.keep_listing(transfer.handle, listing);
        outcome
    }

    fn put_entries(
        &mut self,
        descriptor: &OwnedFd,
        listing: &mut Listing,
        (offset, limit): (u64, usize),
        put: &mut impl FnMut(&mut Self, &Entry<'_>) -> bool,
    ) -> Result<(), Errno> {
        listing.go_to(descriptor, offset)?;
        let mut index = 0;
        loop {
            while let Some(entry) = listing.get(index) {
                if !put(self, &entry) {
                    return if index == 0 { Err(Errno::INVAL) } else { Ok(()) };
                }
                index += 1;
            }
            match listing.read_on(descriptor, &mut self.scratch, limit) {
                Ok(true) => {}
                // What was put has been looked up: it has to reach the guest. The next request fails again.
                Err(errno) if index == 0 => return Err(errno),
                Ok(false) | Err(_) => return Ok(()),
            }
        }
    }
}

/// Whether an offset that one listing of a directory gave means the same to every other one, whatever was removed
/// meanwhile. The guest's cache mixes them: it fills from one handle, and sends another on from there.
fn has_lasting_offsets(directory: impl AsFd) -> bool {
    fstatfs(directory).is_ok_and(|stat| LASTING_OFFSETS.iter().any(|kind| i128::from(*kind) == i128::from(stat.f_type)))
}

/// Bytes of an entry in an answer to READDIR.
fn dirent_len(entry: &Entry<'_>) -> usize {
    DIRENT_LEN + entry.name.count_bytes().next_multiple_of(8)
}

/// Most bytes of entries in the answer.
fn limit(transfer: Transfer, buffers: &Buffers<'_>) -> usize {
    let room = buffers.writable.len().saturating_sub(OUT_HEADER_LEN);
    usize::try_from(transfer.size.min(MAX_DIRECTORY_LEN)).map_or(room, |size| size.min(room))
}
