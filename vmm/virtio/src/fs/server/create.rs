// SPDX-License-Identifier: Apache-2.0
//! Making files. The server creates as itself and gives the file to the user who asked; when that fails, the file is
//! removed again.

use std::ffi::CStr;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use rustix::fs::{
    AtFlags, FileType, Gid, Mode, OFlags, Statx, Uid, chmodat, chownat, makedev, mkdirat, mknodat, openat, symlinkat,
    unlinkat,
};
use rustix::io::Errno;

use super::super::reply::{Entry, decode_device};
use super::super::request::{Header, Name};
use super::handle::Handle;
use super::host::{self, DescriptorName};
use super::inode::Access;
use super::{Opens, SET_ID_BITS, Server};
use crate::fs::CachePolicy;

impl Server {
    pub(super) fn mkdir(&mut self, header: &Header, name: Name<'_>, mode: u32) -> Result<(), Errno> {
        let directory = self.directory_for(header)?;
        mkdirat(&directory, name.as_c_str(), Mode::from_raw_mode(mode))?;
        self.adopt(header, &directory, name, FileType::Directory)
    }

    pub(super) fn symlink(&mut self, header: &Header, name: Name<'_>, target: &CStr) -> Result<(), Errno> {
        let directory = self.directory_for(header)?;
        symlinkat(target, &directory, name.as_c_str())?;
        self.adopt(header, &directory, name, FileType::Symlink)
    }

    /// Fifos, sockets, regular files, and the device 0:0 that overlayfs takes for a whiteout; no other device.
    pub(super) fn mknod(&mut self, header: &Header, name: Name<'_>, mode: u32, device: u32) -> Result<(), Errno> {
        let kind = FileType::from_raw_mode(mode);
        let (major, minor) = match kind {
            FileType::RegularFile => return self.make_regular(header, name, mode),
            FileType::Fifo | FileType::Socket => (0, 0),
            FileType::CharacterDevice if device == 0 => decode_device(device),
            FileType::CharacterDevice | FileType::BlockDevice => return Err(Errno::PERM),
            _ => return Err(Errno::INVAL),
        };
        let directory = self.directory_for(header)?;
        mknodat(&directory, name.as_c_str(), kind, Mode::from_raw_mode(mode), makedev(major, minor))?;
        self.adopt(header, &directory, name, kind)
    }

    fn make_regular(&mut self, header: &Header, name: Name<'_>, mode: u32) -> Result<(), Errno> {
        let directory = self.directory_for(header)?;
        let file = create_exclusively(&directory, name, OFlags::RDWR, mode)?;
        let (entry, stat) = self.own(header, &directory, file).inspect_err(|_| undo(&directory, name))?;
        self.reply.entry(entry, &stat);
        Ok(())
    }

    pub(super) fn create(
        &mut self,
        header: &Header,
        name: Name<'_>,
        flags: u32,
        mode: u32,
        open_flags: u32,
    ) -> Result<(), Errno> {
        let directory = self.directory_for(header)?;
        let host_flags = self.host_flags(flags)?;
        match create_exclusively(&directory, name, self.access_of_created(host_flags), mode) {
            Ok(file) => {
                let (entry, stat, handle) =
                    self.own_and_open(header, &directory, file).inspect_err(|_| undo(&directory, name))?;
                self.reply.entry(entry, &stat);
                self.reply.open_out(handle, self.file_open_flags());
                Ok(())
            }
            Err(Errno::EXIST) if !OFlags::from_bits_retain(flags).contains(OFlags::EXCL) => {
                let (entry, stat) = self.find(header.node, name)?;
                let opened = self.open_handle(entry.node, flags, open_flags);
                let handle = opened.inspect_err(|_| self.nodes.forget(entry.node, 1))?;
                self.reply.entry(entry, &stat);
                self.reply.open_out(handle, self.file_open_flags());
                Ok(())
            }
            Err(errno) => Err(errno),
        }
    }

    pub(super) fn tmpfile(&mut self, header: &Header, flags: u32, mode: u32) -> Result<(), Errno> {
        let directory = self.directory_for(header)?;
        self.host_flags(flags)?;
        // Without O_EXCL the file may be given a name later.
        let exclusive = OFlags::from_bits_retain(flags) & OFlags::EXCL;
        let file = openat(
            &directory,
            c".",
            OFlags::TMPFILE | OFlags::RDWR | exclusive | host::OPEN,
            Mode::from_raw_mode(mode),
        )
        .map_err(host::too_many)?;
        let (entry, stat, handle) = self.own_and_open(header, &directory, file)?;
        self.reply.entry(entry, &stat);
        self.reply.open_out(handle, self.file_open_flags());
        Ok(())
    }

    /// The directory of a creation, by a user who can own something.
    fn directory_for(&self, header: &Header) -> Result<Arc<OwnedFd>, Errno> {
        if header.uid == u32::MAX || header.gid == u32::MAX {
            return Err(Errno::INVAL);
        }
        Ok(Arc::clone(&self.changeable(header.node)?.descriptor))
    }

    /// A private tree's new file is opened for everything, since its descriptor becomes the node's own.
    fn access_of_created(&self, host_flags: OFlags) -> OFlags {
        match self.cache {
            CachePolicy::Private => OFlags::RDWR | (host_flags & (OFlags::SYNC | OFlags::DSYNC)),
            CachePolicy::Shared => host_flags.difference(OFlags::TRUNC),
        }
    }

    /// Gives what was just made under a name to its user, and answers with its node.
    fn adopt(&mut self, header: &Header, directory: &OwnedFd, name: Name<'_>, kind: FileType) -> Result<(), Errno> {
        let descriptor = host::open_path(directory, name.as_c_str()).inspect_err(|_| remove(directory, name, kind))?;
        let stat = host::stat(&descriptor).inspect_err(|_| remove(directory, name, kind))?;
        // Someone on the host may have put another file there meanwhile: that is not given away, nor removed.
        let is_ours = FileType::from_raw_mode(u32::from(stat.stx_mode)) == kind
            && (kind == FileType::Directory || stat.stx_nlink == 1);
        if !is_ours {
            return Err(Errno::STALE);
        }
        let origin = self.changeable(header.node)?.origin();
        let outcome = self
            .give(header, directory, &descriptor, stat)
            .and_then(|stat| Ok((self.admit(origin, descriptor, Access::Path, &stat)?, stat)));
        let (entry, stat) = outcome.inspect_err(|_| remove(directory, name, kind))?;
        self.reply.entry(entry, &stat);
        Ok(())
    }

    /// Gives a file that was just created to its user, and makes a node of it.
    fn own(&mut self, header: &Header, directory: &OwnedFd, file: OwnedFd) -> Result<(Entry, Statx), Errno> {
        let stat = host::stat(&file)?;
        let stat = self.give(header, directory, &file, stat)?;
        let origin = self.changeable(header.node)?.origin();
        let entry = match self.cache {
            CachePolicy::Private => self.admit(origin, file, Access::ReadWrite, &stat)?,
            // The host may want to run the file: no descriptor stays open for writing longer than the guest's own.
            CachePolicy::Shared => {
                let path = self.reopen(&file, OFlags::PATH)?;
                self.admit(origin, path, Access::Path, &stat)?
            }
        };
        Ok((entry, stat))
    }

    /// As [`Self::own`], with a handle; 0 where the guest needs none.
    fn own_and_open(
        &mut self,
        header: &Header,
        directory: &OwnedFd,
        file: OwnedFd,
    ) -> Result<(Entry, Statx, u64), Errno> {
        if self.opens == Opens::ByNode {
            let (entry, stat) = self.own(header, directory, file)?;
            return Ok((entry, stat, 0));
        }
        let open = rustix::io::fcntl_dupfd_cloexec(&file, 0).map_err(host::too_many)?;
        let (entry, stat) = self.own(header, directory, file)?;
        let membership = self.nodes.get(entry.node)?.membership();
        let handle = self.handles.insert(Handle::File(Arc::new(open)), membership);
        let handle = handle.inspect_err(|_| self.nodes.forget(entry.node, 1))?;
        Ok((entry, stat, handle))
    }

    /// Changes the owner of what was just made, if it is not right already. In a directory with the set-group-id bit,
    /// files get the directory's group, which the host's kernel has seen to.
    fn give(&self, header: &Header, directory: &OwnedFd, file: &OwnedFd, stat: Statx) -> Result<Statx, Errno> {
        let has_group = header.gid == stat.stx_gid || inherits_group(directory)?;
        if header.uid == stat.stx_uid && has_group {
            return Ok(stat);
        }
        if stat.stx_uid != self.uid {
            return Err(Errno::STALE);
        }
        let gid = if has_group { stat.stx_gid } else { header.gid };
        let (uid, gid) = (Uid::from_raw(header.uid), Gid::from_raw(gid));
        chownat(file, c"", Some(uid), Some(gid), AtFlags::EMPTY_PATH)?;
        let mode = u32::from(stat.stx_mode);
        if mode & SET_ID_BITS != 0 && FileType::from_raw_mode(mode) != FileType::Symlink {
            let name = DescriptorName::new(file);
            chmodat(&self.proc_self_fd, name.as_c_str(), Mode::from_raw_mode(mode), AtFlags::empty())?;
        }
        host::stat(file)
    }
}

fn create_exclusively(directory: &OwnedFd, name: Name<'_>, access: OFlags, mode: u32) -> Result<OwnedFd, Errno> {
    let flags = access | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | host::OPEN;
    openat(directory, name.as_c_str(), flags, Mode::from_raw_mode(mode)).map_err(host::too_many)
}

fn inherits_group(directory: &OwnedFd) -> Result<bool, Errno> {
    Ok(Mode::from_raw_mode(u32::from(host::stat(directory)?.stx_mode)).contains(Mode::SGID))
}

fn undo(directory: &OwnedFd, name: Name<'_>) {
    remove(directory, name, FileType::RegularFile);
}

/// Takes back a creation. There is nothing more to be done where that fails too.
fn remove(directory: &OwnedFd, name: Name<'_>, kind: FileType) {
    let flags = if kind == FileType::Directory { AtFlags::REMOVEDIR } else { AtFlags::empty() };
    let _ = unlinkat(directory, name.as_c_str(), flags);
}
