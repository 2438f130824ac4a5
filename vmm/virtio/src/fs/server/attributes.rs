// SPDX-License-Identifier: Apache-2.0
//! Attributes of nodes and of their file systems.

use nix::unistd::truncate;
use rustix::fs::{
    AtFlags, Gid, Mode, Timespec, Timestamps, UTIME_NOW, UTIME_OMIT, Uid, chmodat, chownat, fstatvfs, ftruncate,
    readlinkat_raw, utimensat,
};
use rustix::io::Errno;

use super::super::request::SetAttr;
use super::super::wire::{MAX_TARGET_LEN, setattr};
use super::host::{self, DescriptorName};
use super::inode::{Access, Inode};
use super::open::require_regular;
use super::{Opens, Server};

impl Server {
    pub(super) fn getattr(&mut self, node: u64) -> Result<(), Errno> {
        let stat = host::stat(&self.nodes.get(node)?.descriptor)?;
        self.reply.attr_out(self.attr_valid(&stat), &stat);
        Ok(())
    }

    pub(super) fn setattr(&mut self, node: u64, change: SetAttr) -> Result<(), Errno> {
        let inode = self.changeable(node)?;
        let has = |bits| change.valid & bits != 0;
        // Changing the owner clears set-id bits, so the mode comes after it, as it would in the guest.
        if has(setattr::UID | setattr::GID) {
            let uid = has(setattr::UID).then(|| Uid::from_raw(change.uid));
            let gid = has(setattr::GID).then(|| Gid::from_raw(change.gid));
            chownat(&inode.descriptor, c"", uid, gid, AtFlags::EMPTY_PATH)?;
        }
        let name = DescriptorName::new(&inode.descriptor);
        if has(setattr::MODE) {
            let mode = Mode::from_raw_mode(change.mode & 0o7777);
            chmodat(&self.proc_self_fd, name.as_c_str(), mode, AtFlags::empty())?;
        }
        if has(setattr::SIZE) {
            if has(setattr::KILL_SUIDGID) {
                host::without_fsetid(|| self.resize(inode, change))?;
            } else {
                self.resize(inode, change)?;
            }
        }
        if has(setattr::ATIME | setattr::MTIME) {
            let times = Timestamps {
                last_access: time(has(setattr::ATIME), has(setattr::ATIME_NOW), change.atime),
                last_modification: time(has(setattr::MTIME), has(setattr::MTIME_NOW), change.mtime),
            };
            match utimensat(&self.proc_self_fd, name.as_c_str(), &times, AtFlags::empty()) {
                // The guest writes back what unlinking did to the times. Where the share is an overlay, that has the
                // file copied up, to a name that its whiteout holds; nothing else says so here. Nobody can look at these
                // times any more.
                Err(Errno::EXIST) => {}
                result => result?,
            }
        }
        self.getattr(node)
    }

    fn resize(&self, inode: &Inode, change: SetAttr) -> Result<(), Errno> {
        require_regular(inode)?;
        if change.valid & setattr::FH != 0 && self.opens == Opens::ByHandle {
            return ftruncate(self.handles.file(change.handle)?, change.size);
        }
        if inode.access == Access::ReadWrite {
            return ftruncate(&inode.descriptor, change.size);
        }
        let size = libc::off_t::try_from(change.size).map_err(|_| Errno::FBIG)?;
        // The thread's working directory is /proc/self/fd.
        truncate(DescriptorName::new(&inode.descriptor).as_c_str(), size)
            .map_err(|errno| Errno::from_raw_os_error(errno as i32))
    }

    pub(super) fn readlink(&mut self, node: u64) -> Result<(), Errno> {
        let inode = self.nodes.get(node)?;
        self.reply.fill(MAX_TARGET_LEN, |target| readlinkat_raw(&inode.descriptor, c"", target))
    }

    /// `fuse_statfs_out`.
    pub(super) fn statfs(&mut self, node: u64) -> Result<(), Errno> {
        let stat = fstatvfs(&self.nodes.get(node)?.descriptor)?;
        let limit = |number: u64| u32::try_from(number).unwrap_or(u32::MAX);
        for number in [stat.f_blocks, stat.f_bfree, stat.f_bavail, stat.f_files, stat.f_ffree] {
            self.reply.u64(number);
        }
        for number in [stat.f_bsize, stat.f_namemax, stat.f_frsize] {
            self.reply.u32(limit(number));
        }
        self.reply.zeros(28);
        Ok(())
    }
}

fn time(is_given: bool, is_now: bool, (seconds, nanoseconds): (i64, u32)) -> Timespec {
    match (is_given, is_now) {
        (false, _) => Timespec { tv_sec: 0, tv_nsec: UTIME_OMIT },
        (true, true) => Timespec { tv_sec: 0, tv_nsec: UTIME_NOW },
        (true, false) => Timespec { tv_sec: seconds, tv_nsec: i64::from(nanoseconds) },
    }
}
