// SPDX-License-Identifier: Apache-2.0
//! Reading directories. An entry's offset is the host file system's own cookie, so that a directory can be read on from
//! any entry, whatever happened to it meanwhile, as well as the host can.

use std::os::fd::OwnedFd;
use std::sync::Arc;

use rustix::fs::{FileType, OFlags, RawDir, SeekFrom, seek};
use rustix::io::Errno;

use super::super::buffers::Buffers;
use super::super::reply::{DIRENT_LEN, ENTRY_LEN};
use super::super::request::{Name, Transfer};
use super::super::wire::{FOPEN_CACHE_DIR, FOPEN_KEEP_CACHE, MAX_DIRECTORY_LEN, OUT_HEADER_LEN};
use super::Server;
use super::handle::Handle;
use super::io_requests::synchronize;
use crate::fs::CachePolicy;

/// Least bytes to read entries into: the host refuses less than its longest entry, of 280 bytes.
const MIN_READ_LEN: usize = 1024;

impl Server {
    pub(super) fn opendir(&mut self, node: u64) -> Result<(), Errno> {
        let inode = self.nodes.get(node)?;
        if inode.kind != FileType::Directory {
            return Err(Errno::NOTDIR);
        }
        let descriptor = Arc::new(self.reopen(&inode.descriptor, OFlags::RDONLY | OFlags::DIRECTORY)?);
        let handle = self.handles.insert(Handle::Directory { descriptor, position: Some(0) })?;
        let flags = match self.cache {
            CachePolicy::Private => FOPEN_CACHE_DIR | FOPEN_KEEP_CACHE,
            CachePolicy::Shared => 0,
        };
        self.reply.open_out(handle, flags);
        Ok(())
    }

    pub(super) fn readdir(&mut self, transfer: Transfer, buffers: &Buffers<'_>) -> Result<(), Errno> {
        let limit = limit(transfer, buffers);
        // An answer's entry is at most a third longer than the host's. All that is read has to fit: to read the rest again
        // would mean seeking, and a tmpfs that loses entries meanwhile counts the others anew.
        self.read_entries(transfer, limit, limit / 4 * 3, |server, entry| {
            let needed = DIRENT_LEN + entry.name.len().next_multiple_of(8);
            if server.reply.body_len() + needed > limit {
                return false;
            }
            server.reply.dirent(entry.inode, entry.next_offset, entry.kind, entry.name);
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
        // An answer's entry is at most seven times as long as the host's; as above.
        self.read_entries(transfer, limit, limit / 7, |server, entry| {
            let needed = ENTRY_LEN + DIRENT_LEN + entry.name.len().next_multiple_of(8);
            if server.reply.body_len() + needed > limit {
                return false;
            }
            // `.` and `..` are not looked up, nor is what has just vanished: node 0 says so.
            let name = std::ffi::CStr::from_bytes_with_nul(entry.name_with_nul).ok();
            let found = name.and_then(|name| Name::new(name).ok()).and_then(|name| server.find(directory, name).ok());
            match found {
                Some((node, stat)) => server.reply.entry(node, &stat),
                None => server.reply.zeros(ENTRY_LEN),
            }
            server.reply.dirent(entry.inode, entry.next_offset, entry.kind, entry.name);
            true
        })
    }

    pub(super) fn fsyncdir(&mut self, handle: u64, flags: u32) -> Result<(), Errno> {
        let (descriptor, _) = self.handles.directory(handle)?;
        synchronize(descriptor, flags)
    }

    /// Reads entries once and hands them to `put` until it has no room for one.
    fn read_entries(
        &mut self,
        transfer: Transfer,
        limit: usize,
        read_len: usize,
        mut put: impl FnMut(&mut Self, &DirectoryEntry<'_>) -> bool,
    ) -> Result<(), Errno> {
        let (descriptor, position) = self.handles.directory(transfer.handle)?;
        if position.take() != Some(transfer.offset) {
            seek(&descriptor, SeekFrom::Start(transfer.offset))?;
        }
        let mut scratch = std::mem::take(&mut self.scratch);
        scratch.reserve(read_len.max(MIN_READ_LEN));
        let reached = self.put_entries(&descriptor, &mut scratch, read_len.max(MIN_READ_LEN), &mut put);
        self.scratch = scratch;
        // What did not fit is read again; where everything fitted, the next request goes on without seeking.
        let reached = reached?;
        let is_all_put = reached.is_all_put;
        if is_all_put {
            *self.handles.directory(transfer.handle)?.1 = Some(reached.offset.unwrap_or(transfer.offset));
        } else if self.reply.body_len() == 0 && limit < DIRENT_LEN + 8 + ENTRY_LEN + 256 {
            return Err(Errno::INVAL);
        }
        Ok(())
    }

    fn put_entries(
        &mut self,
        descriptor: &OwnedFd,
        scratch: &mut Vec<u8>,
        read_len: usize,
        put: &mut impl FnMut(&mut Self, &DirectoryEntry<'_>) -> bool,
    ) -> Result<Reached, Errno> {
        let buffer = scratch.spare_capacity_mut();
        let read_len = read_len.min(buffer.len());
        let mut entries = RawDir::new(descriptor, buffer.get_mut(..read_len).unwrap_or_default());
        let mut reached = Reached { offset: None, is_all_put: true };
        while let Some(entry) = entries.next() {
            let entry = entry?;
            let kind = match entry.file_type() {
                FileType::Unknown => 0,
                kind => kind.as_raw_mode() >> 12,
            };
            let entry = DirectoryEntry {
                inode: entry.ino(),
                next_offset: entry.next_entry_cookie(),
                kind,
                name: entry.file_name().to_bytes(),
                name_with_nul: entry.file_name().to_bytes_with_nul(),
            };
            if !put(self, &entry) {
                reached.is_all_put = false;
                break;
            }
            reached.offset = Some(entry.next_offset);
            if entries.is_buffer_empty() {
                break;
            }
        }
        Ok(reached)
    }
}

/// How far entries were put into an answer.
struct Reached {
    /// The last one's `next_offset`; [`None`] at the directory's end.
    offset: Option<u64>,
    is_all_put: bool,
}

/// An entry of a directory as the host gives it.
struct DirectoryEntry<'a> {
    inode: u64,
    next_offset: u64,
    /// A file mode's type, shifted right by 12; 0 if unknown.
    kind: u32,
    name: &'a [u8],
    name_with_nul: &'a [u8],
}

/// Most bytes of entries in the answer.
fn limit(transfer: Transfer, buffers: &Buffers<'_>) -> usize {
    let room = buffers.writable.len().saturating_sub(OUT_HEADER_LEN);
    usize::try_from(transfer.size.min(MAX_DIRECTORY_LEN)).map_or(room, |size| size.min(room))
}
