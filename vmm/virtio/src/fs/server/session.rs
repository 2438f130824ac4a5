// SPDX-License-Identifier: Apache-2.0
//! The beginning and the end of a session with the guest.

use std::os::fd::OwnedFd;

use rustix::fs::{OFlags, RawDir, StatVfsMountFlags, fstatvfs};
use rustix::io::Errno;

use super::super::request::Name;
use super::super::wire::{MAJOR, MAX_IO_LEN, MAX_PAGES, MINOR, MINOR_MIN, ROOT_NODE, init};
use super::{Opens, Server, host};
use crate::fs::CachePolicy;

/// Most requests in the background (readahead, write-back) that the guest keeps under way.
const MAX_BACKGROUND: u16 = 64;
/// So many of them are a congestion to the guest.
const CONGESTION_THRESHOLD: u16 = 48;
/// Times are exact to a nanosecond.
const TIME_GRANULARITY_NS: u32 = 1;

impl Server {
    /// Begins a session, whatever was before.
    pub(super) fn init(&mut self, major: u32, minor: u32, max_readahead: u32, offered: u64) -> Result<(), Errno> {
        if major < MAJOR || (major == MAJOR && minor < MINOR_MIN) {
            return Err(Errno::PROTO);
        }
        self.destroy()?;
        if major > MAJOR {
            // The guest shall begin anew with a version that both know.
            self.reply.u32(MAJOR);
            self.reply.u32(MINOR);
            self.reply.zeros(56);
            return Ok(());
        }
        self.opens = self.choose_opens(offered)?;
        self.is_started = true;
        let flags = self.wanted() & offered;
        let (low, high) = (flags & u64::from(u32::MAX), flags >> 32);
        self.reply.u32(MAJOR);
        self.reply.u32(MINOR.min(minor));
        self.reply.u32(max_readahead.min(MAX_IO_LEN));
        self.reply.u32(u32::try_from(low).unwrap_or(0));
        self.reply.u16(MAX_BACKGROUND);
        self.reply.u16(CONGESTION_THRESHOLD);
        self.reply.u32(MAX_IO_LEN);
        self.reply.u32(TIME_GRANULARITY_NS);
        self.reply.u16(MAX_PAGES);
        self.reply.u16(0);
        self.reply.u32(u32::try_from(high).unwrap_or(0));
        self.reply.zeros(28);
        Ok(())
    }

    /// Ends the session: the guest has unmounted.
    pub(super) fn destroy(&mut self) -> Result<(), Errno> {
        self.is_started = false;
        self.handles.clear();
        self.nodes.clear();
        Ok(())
    }

    fn wanted(&self) -> u64 {
        let always = init::ASYNC_READ
            | init::BIG_WRITES
            | init::DO_READDIRPLUS
            | init::READDIRPLUS_AUTO
            | init::ASYNC_DIO
            | init::PARALLEL_DIROPS
            | init::MAX_PAGES
            | init::SUBMOUNTS
            | init::HANDLE_KILLPRIV_V2
            | init::SETXATTR_EXT
            | init::INIT_EXT
            // Whoever creates something is told as the file system's user then; nobody else is told at all.
            | init::ALLOW_IDMAP;
        let cache = match self.cache {
            CachePolicy::Private => init::WRITEBACK_CACHE | init::CACHE_SYMLINKS,
            CachePolicy::Shared => init::AUTO_INVAL_DATA,
        };
        // Without OPEN nothing would truncate: the guest does it by SETATTR then.
        let opens = match self.opens {
            Opens::ByNode => init::NO_OPEN_SUPPORT,
            Opens::ByHandle => init::ATOMIC_O_TRUNC,
        };
        always | cache | opens
    }

    fn choose_opens(&self, offered: u64) -> Result<Opens, Errno> {
        // A tree that is yet to come may be read-only.
        let may_get_others = self.added.is_some();
        if may_get_others || self.cache == CachePolicy::Shared || offered & init::NO_OPEN_SUPPORT == 0 {
            return Ok(Opens::ByHandle);
        }
        for tree in self.trees()? {
            if fstatvfs(&tree)?.f_flag.contains(StatVfsMountFlags::RDONLY) {
                return Ok(Opens::ByHandle);
            }
        }
        Ok(Opens::ByNode)
    }

    /// The children of the top directory. There are as many as the machine's description names.
    fn trees(&self) -> Result<Vec<OwnedFd>, Errno> {
        let root = self.nodes.get(ROOT_NODE)?;
        let top = self.reopen(&root.descriptor, OFlags::RDONLY | OFlags::DIRECTORY)?;
        let mut buffer = Vec::with_capacity(4096);
        let mut entries = RawDir::new(&top, buffer.spare_capacity_mut());
        let mut trees = Vec::new();
        while let Some(entry) = entries.next() {
            if let Ok(name) = Name::new(entry?.file_name()) {
                trees.push(host::open_path(&top, name.as_c_str())?);
            }
        }
        Ok(trees)
    }
}
