// SPDX-License-Identifier: Apache-2.0
//! Extended attributes. The calls that take a descriptor do not take one that only stands for a file, so these go
//! through its name in the thread's working directory, `/proc/self/fd`. Which attributes may be written is decided by
//! the host's kernel and the process' capabilities.

use std::ffi::CStr;

use rustix::fs::{XattrFlags, getxattr, getxattr_query, listxattr, listxattr_query, removexattr, setxattr};
use rustix::io::Errno;

use super::super::wire::{MAX_XATTR_LEN, SETXATTR_ACL_KILL_SGID};
use super::Server;
use super::host::{self, DescriptorName};

impl Server {
    pub(super) fn getxattr(&mut self, node: u64, name: &CStr, size: u32) -> Result<(), Errno> {
        let path = DescriptorName::new(&self.nodes.get(node)?.descriptor);
        if size == 0 {
            let needed = getxattr_query(path.as_c_str(), name)?;
            return self.put_size(needed);
        }
        self.reply.fill(bounded(size), |value| getxattr(path.as_c_str(), name, value))
    }

    pub(super) fn listxattr(&mut self, node: u64, size: u32) -> Result<(), Errno> {
        let path = DescriptorName::new(&self.nodes.get(node)?.descriptor);
        if size == 0 {
            let needed = listxattr_query(path.as_c_str())?;
            return self.put_size(needed);
        }
        self.reply.fill(bounded(size), |list| listxattr(path.as_c_str(), list))
    }

    pub(super) fn setxattr(
        &mut self,
        node: u64,
        name: &CStr,
        value: &[u8],
        flags: u32,
        setxattr_flags: u32,
    ) -> Result<(), Errno> {
        let path = DescriptorName::new(&self.changeable(node)?.descriptor);
        let flags = XattrFlags::from_bits(flags).ok_or(Errno::INVAL)?;
        let set = || setxattr(path.as_c_str(), name, value, flags);
        if setxattr_flags & SETXATTR_ACL_KILL_SGID == 0 { set() } else { host::without_fsetid(set) }
    }

    pub(super) fn removexattr(&mut self, node: u64, name: &CStr) -> Result<(), Errno> {
        removexattr(DescriptorName::new(&self.changeable(node)?.descriptor).as_c_str(), name)
    }

    /// `fuse_getxattr_out`: how many bytes there would be.
    fn put_size(&mut self, needed: usize) -> Result<(), Errno> {
        self.reply.u32(u32::try_from(needed).map_err(|_| Errno::RANGE)?);
        self.reply.zeros(4);
        Ok(())
    }
}

/// No value and no list is longer than [`MAX_XATTR_LEN`].
fn bounded(size: u32) -> usize {
    usize::try_from(size).map_or(MAX_XATTR_LEN, |size| size.min(MAX_XATTR_LEN))
}
