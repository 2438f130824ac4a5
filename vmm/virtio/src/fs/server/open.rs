// SPDX-License-Identifier: Apache-2.0
//! Opening regular files: on the guest's request, or when a node is first read or written.

use std::os::fd::OwnedFd;
use std::sync::Arc;

use rustix::fs::{FileType, Mode, OFlags, openat};
use rustix::io::Errno;

use super::super::wire::{FOPEN_KEEP_CACHE, OPEN_KILL_SUIDGID};
use super::handle::Handle;
use super::host::{self, DescriptorName};
use super::inode::{Access, Inode};
use super::{Opens, Server};
use crate::fs::CachePolicy;

impl Server {
    pub(super) fn open(&mut self, node: u64, flags: u32, open_flags: u32) -> Result<(), Errno> {
        if self.opens == Opens::ByNode {
            // Tells the guest to open nothing from now on.
            return Err(Errno::NOSYS);
        }
        let handle = self.open_handle(node, flags, open_flags)?;
        self.reply.open_out(handle, self.file_open_flags());
        Ok(())
    }

    /// Opens a node as a guest's flags ask for; 0 where the guest needs no handle.
    pub(super) fn open_handle(&mut self, node: u64, flags: u32, open_flags: u32) -> Result<u64, Errno> {
        let inode = self.nodes.get(node)?;
        require_regular(inode)?;
        let host_flags = self.host_flags(flags)?;
        let reopen = || match self.reopen(&inode.descriptor, host_flags) {
            // The guest has checked what it asked for; reading as well was the server's idea.
            Err(Errno::ACCESS) if OFlags::from_bits_retain(flags) & OFlags::ACCMODE == OFlags::WRONLY => {
                self.reopen(&inode.descriptor, host_flags.difference(OFlags::ACCMODE) | OFlags::WRONLY)
            }
            outcome => outcome,
        };
        let file = if open_flags & OPEN_KILL_SUIDGID != 0 && host_flags.contains(OFlags::TRUNC) {
            host::without_fsetid(reopen)?
        } else {
            reopen()?
        };
        if self.opens == Opens::ByNode {
            return Ok(0);
        }
        let membership = inode.membership();
        self.handles.insert(Handle::File(Arc::new(file)), membership)
    }

    /// The host's flags for a guest's: those that have a meaning here.
    ///
    /// With a write-back cache the guest reads what it writes only a part of, and finds the end of the file itself.
    pub(super) fn host_flags(&self, flags: u32) -> Result<OFlags, Errno> {
        let flags = OFlags::from_bits_retain(flags);
        let mut access = flags & OFlags::ACCMODE;
        if access == OFlags::ACCMODE {
            return Err(Errno::INVAL);
        }
        let mut kept = flags & (OFlags::TRUNC | OFlags::SYNC | OFlags::DSYNC);
        match self.cache {
            CachePolicy::Private if access == OFlags::WRONLY => access = OFlags::RDWR,
            CachePolicy::Private => {}
            CachePolicy::Shared => kept |= flags & OFlags::APPEND,
        }
        Ok(access | kept)
    }

    /// What OPEN tells the guest of its cache.
    pub(super) fn file_open_flags(&self) -> u32 {
        match self.cache {
            CachePolicy::Private => FOPEN_KEEP_CACHE,
            CachePolicy::Shared => 0,
        }
    }

    /// Opens the file of a descriptor once more.
    pub(super) fn reopen(&self, descriptor: &OwnedFd, flags: OFlags) -> Result<OwnedFd, Errno> {
        let name = DescriptorName::new(descriptor);
        openat(&self.proc_self_fd, name.as_c_str(), flags | host::OPEN, Mode::empty()).map_err(host::too_many)
    }

    /// The file that a request reads or writes: that of its handle, or, where the guest has none, the node's own.
    pub(super) fn file(&mut self, node: u64, handle: u64, access: Access) -> Result<Arc<OwnedFd>, Errno> {
        if handle != 0 || self.opens == Opens::ByHandle {
            return self.handles.file(handle);
        }
        let inode = self.nodes.get(node)?;
        require_regular(inode)?;
        if inode.access >= access {
            return Ok(Arc::clone(&inode.descriptor));
        }
        let flags = if access == Access::ReadWrite { OFlags::RDWR } else { OFlags::RDONLY };
        let file = Arc::new(self.reopen(&inode.descriptor, flags)?);
        let inode = self.nodes.get_mut(node)?;
        inode.descriptor = Arc::clone(&file);
        inode.access = access;
        Ok(file)
    }
}

/// Nothing but regular files is opened for its content: what opening a fifo or a device does is not for the guest.
pub(super) fn require_regular(inode: &Inode) -> Result<(), Errno> {
    match inode.kind {
        FileType::RegularFile => Ok(()),
        FileType::Directory => Err(Errno::ISDIR),
        _ => Err(Errno::NXIO),
    }
}
