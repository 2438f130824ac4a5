// SPDX-License-Identifier: Apache-2.0
//! The file server: carries typed requests out on the host's files.
//!
//! # What the guest can reach
//!
//! Only what lies below the device's top directory. A file is found by opening one name, never a path, in a directory
//! that the guest has been told of; `.` and `..` are refused before they come here. So when the host moves a directory
//! out of the share, the guest keeps what is below it and gets no further up. Symlinks are never followed here. The top
//! directory itself cannot be changed: its children are the shared trees, those that were added among them.
//!
//! Only regular files and directories are opened; fifos, sockets and devices are names and attributes to the guest.
//! Files are opened again through `/proc/self/fd`, by identity, so a name that changes meanwhile leads nowhere else.
//!
//! # Permissions and ownership
//!
//! The guest's kernel checks permissions; the server acts with its own rights and gives what it creates to the user who
//! asked. Read-only trees are read-only mounts, so the host's kernel refuses whatever gets this far.
//!
//! # Fates
//!
//! What the host's kernel refuses is passed on with its error number. A descriptor too many is `ENFILE`. A node that is
//! not there is `ESTALE`, a handle `EBADF`. A request before INIT is `EIO`.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Duration;

use rustix::fs::{FileType, Mode, Statx};
use rustix::io::Errno;
use vmm_sys_util::eventfd::EventFd;

use self::handle::HandleTable;
use self::inode::{Access, Inode, InodeTable};
use super::reply::Reply;
use super::request::{DecodeError, Header, Request, decode};
use super::wire::{IN_HEADER_LEN, MAX_REQUEST_LEN, OUT_HEADER_LEN, ROOT_NODE, WRITE_IN_LEN, opcode};
use super::{AddedTrees, CachePolicy};
use crate::buffers::Buffers;

mod attributes;
mod create;
mod directory;
mod handle;
pub(super) mod host;
pub(super) mod inode;
mod io_requests;
mod listing;
mod names;
mod open;
mod session;
#[cfg(test)]
mod tests;
#[cfg(test)]
mod tests_by_kernel;
mod xattr;

/// How long names and attributes of a tree that nobody else changes hold: a day.
const PRIVATE_VALID: Duration = Duration::from_hours(24);
/// How long it holds in such a tree that a name is not there. Short, so that a file that someone puts into a running
/// container's tree is found after all; a program start asks for the same absent name many times within it.
const PRIVATE_ABSENT: Duration = Duration::from_secs(1);
/// How long attributes, and the names of directories, of a shared tree hold: as short as the guest's kernel can tell, a
/// tick or two of its clock, 8 ms.
///
/// That spares asking for the attributes that a LOOKUP has just answered with, and for each directory of a path again
/// and again. All other names hold no time, and finding one brings the attributes: so what is opened is the file, of the
/// size, that the host has at that moment.
const SHARED_VALID: Duration = Duration::from_nanos(1);
/// Mode bits that give a program its file's user or group.
const SET_ID_BITS: u32 = 0o6000;

/// A request that cannot even be answered with an error: the device needs a reset.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub(super) enum Unanswerable {
    /// The driver's buffers end within the request's header.
    #[error("a request of {given} bytes has no header")]
    NoHeader { given: usize },
    /// The driver left no room for an answer's header.
    #[error("request {opcode} has {room} bytes for its answer")]
    NoRoom { opcode: u32, room: usize },
}

/// How the guest reads and writes files.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Opens {
    /// It opens them first.
    ByHandle,
    /// By node, without OPEN and RELEASE; the server opens a node's file when it is first read or written.
    ///
    /// Only sound where opening for writing is never refused by the host, since the guest would learn of it from a
    /// later write: where no tree is read-only.
    ByNode,
}

/// A session with the guest. It belongs to one thread.
#[derive(Debug)]
pub(super) struct Server {
    /// `/proc/self/fd`.
    proc_self_fd: Arc<OwnedFd>,
    cache: CachePolicy,
    /// The trees that come and go, if any can.
    added: Option<AddedTrees>,
    /// Changes of these that have been seen to.
    seen_changes: u64,
    /// Owner of what the server creates, before it is given away.
    uid: u32,
    is_started: bool,
    opens: Opens,
    nodes: InodeTable,
    handles: HandleTable,
    reply: Reply,
    request: Vec<u8>,
    scratch: Vec<u8>,
}

impl Server {
    /// Makes a server; the thread that is going to run it then calls [`Self::enter_thread`].
    pub(super) fn new(
        root: &OwnedFd,
        proc_self_fd: Arc<OwnedFd>,
        cache: CachePolicy,
        added: Option<AddedTrees>,
    ) -> io::Result<Self> {
        let root = rustix::io::fcntl_dupfd_cloexec(root, 0)?;
        let stat = host::stat(&root)?;
        let root = Inode::new(root, Access::Path, &stat, None);
        if root.kind != FileType::Directory {
            return Err(Errno::NOTDIR.into());
        }
        Ok(Self {
            proc_self_fd,
            cache,
            seen_changes: added.as_ref().map_or(0, AddedTrees::changes),
            added,
            uid: rustix::process::geteuid().as_raw(),
            is_started: false,
            opens: Opens::ByHandle,
            nodes: InodeTable::new(root),
            handles: HandleTable::default(),
            reply: Reply::default(),
            request: Vec::new(),
            scratch: Vec::new(),
        })
    }

    /// Gives the calling thread file system attributes of its own, for good: a file mode mask of 0, since the guest
    /// applies its masks itself, and `/proc/self/fd` as its working directory, since some calls on a descriptor's file
    /// only take a path.
    pub(super) fn enter_thread(&self) -> io::Result<()> {
        nix::sched::unshare(nix::sched::CloneFlags::CLONE_FS)?;
        rustix::process::umask(Mode::empty());
        rustix::process::fchdir(&self.proc_self_fd)?;
        Ok(())
    }

    /// What is written to when something is taken away, or mounted; the thread then calls [`Self::catch_up`].
    pub(super) fn change_event(&self) -> Option<&EventFd> {
        self.added.as_ref().map(AddedTrees::wake)
    }

    /// Closes what is open of trees and mounts that were taken away, and has those that are covered show what covers them.
    pub(super) fn catch_up(&mut self) {
        let changes = self.added.as_ref().map_or(0, AddedTrees::changes);
        if changes != self.seen_changes {
            self.seen_changes = changes;
            self.nodes.retire(&self.proc_self_fd);
            self.handles.retire();
            self.cover_trees();
        }
    }

    /// A tree's top is a node that the guest does not look up again: it becomes what is mounted over it.
    fn cover_trees(&mut self) {
        for (top, cover) in self.added.as_ref().map(AddedTrees::over_trees).unwrap_or_default() {
            // Without a descriptor for it, the guest goes on to see what is below.
            if let Ok(cover) = cover {
                self.nodes.cover(&top, cover);
            }
        }
    }

    /// Serves the request in `buffers`, and says how many bytes of answer there are in them.
    ///
    /// # Errors
    ///
    /// [`Unanswerable`]; then nothing has been done.
    pub(super) fn serve(&mut self, buffers: &Buffers<'_>) -> Result<u32, Unanswerable> {
        self.catch_up();
        // Taken out so that the request can borrow from it while the server works.
        let mut request = std::mem::take(&mut self.request);
        let outcome = self.serve_with(buffers, &mut request);
        self.request = request;
        outcome
    }

    fn serve_with(&mut self, buffers: &Buffers<'_>, bytes: &mut Vec<u8>) -> Result<u32, Unanswerable> {
        let given = buffers.readable.len();
        bytes.clear();
        // WRITE's data stays where it is.
        bytes.resize(given.min(IN_HEADER_LEN + WRITE_IN_LEN), 0);
        buffers.readable.copy_to(0, bytes);
        let header = Header::decode(bytes).ok_or(Unanswerable::NoHeader { given })?;
        if header.opcode != opcode::WRITE && given > bytes.len() {
            let copied = bytes.len();
            bytes.resize(given.min(MAX_REQUEST_LEN), 0);
            buffers.readable.copy_to(copied, bytes.get_mut(copied..).unwrap_or_default());
        }
        let request = decode(&header, bytes.get(IN_HEADER_LEN..).unwrap_or_default(), given);
        // FORGET and BATCH_FORGET have no answer, well-formed or not.
        if matches!(header.opcode, opcode::FORGET | opcode::BATCH_FORGET) {
            if let Ok(request) = request {
                self.forget(&header, request);
            }
            return Ok(0);
        }
        let room = buffers.writable.len();
        if room < OUT_HEADER_LEN {
            return Err(Unanswerable::NoRoom { opcode: header.opcode, room });
        }
        Ok(self.answer(&header, request, buffers, room))
    }

    fn answer(
        &mut self,
        header: &Header,
        request: Result<Request<'_>, DecodeError>,
        buffers: &Buffers<'_>,
        room: usize,
    ) -> u32 {
        self.reply.begin();
        let mut outcome = request.map_err(DecodeError::errno).and_then(|request| match request {
            Request::Init { .. } => self.execute(header, request, buffers),
            _ if !self.is_started => Err(Errno::IO),
            _ => self.execute(header, request, buffers),
        });
        // Only READ, GETXATTR and the like have answers of a length that the guest chose, and these keep to its room.
        if outcome.is_ok() && OUT_HEADER_LEN + self.reply.body_len() + self.reply.in_place > room {
            outcome = Err(Errno::INVAL);
        }
        let written = buffers.writable.copy_from(self.reply.finish(header.unique, outcome));
        u32::try_from(written + self.reply.in_place).unwrap_or(u32::MAX)
    }

    fn forget(&mut self, header: &Header, request: Request<'_>) {
        match request {
            Request::Forget { lookups } => self.nodes.forget(header.node, lookups),
            Request::BatchForget { forgets } => {
                forgets.iter().for_each(|(node, lookups)| self.nodes.forget(node, lookups));
            }
            _ => {}
        }
    }

    fn execute(&mut self, header: &Header, request: Request<'_>, buffers: &Buffers<'_>) -> Result<(), Errno> {
        let node = header.node;
        match request {
            Request::Init { major, minor, max_readahead, flags } => self.init(major, minor, max_readahead, flags),
            Request::Destroy => self.destroy(),
            // The guest has written its own pages back before it asks. More would write back the whole of a host's file
            // system, whoever's it is, at each container's end; fsync(2) reaches the disk.
            Request::SyncFs => Err(Errno::NOSYS),
            // Nothing waits for long: an interrupted request is answered all the same.
            Request::Interrupt | Request::Forget { .. } | Request::BatchForget { .. } => Ok(()),
            Request::Unsupported => Err(Errno::NOSYS),

            Request::Lookup { name } => self.lookup(node, name),
            Request::Symlink { name, target } => self.symlink(header, name, target),
            Request::MkNod { name, mode, rdev } => self.mknod(header, name, mode, rdev),
            Request::MkDir { name, mode } => self.mkdir(header, name, mode),
            Request::Unlink { name } => self.unlink(node, name),
            Request::RmDir { name } => self.rmdir(node, name),
            Request::Rename { name, new_directory, new_name, flags } => {
                self.rename((node, name), (new_directory, new_name), flags)
            }
            Request::Link { target, name } => self.link(target, node, name),

            Request::GetAttr => self.getattr(node),
            Request::SetAttr(change) => self.setattr(node, change),
            Request::ReadLink => self.readlink(node),
            Request::StatFs => self.statfs(node),
            Request::SetXattr { name, value, flags, setxattr_flags } => {
                self.setxattr(node, name, value, flags, setxattr_flags)
            }
            Request::GetXattr { name, size } => self.getxattr(node, name, size),
            Request::ListXattr { size } => self.listxattr(node, size),
            Request::RemoveXattr { name } => self.removexattr(node, name),

            Request::Open { flags, open_flags } => self.open(node, flags, open_flags),
            Request::Create { name, flags, mode, open_flags } => self.create(header, name, flags, mode, open_flags),
            Request::TmpFile { flags, mode } => self.tmpfile(header, flags, mode),
            Request::Release { handle } | Request::ReleaseDir { handle } => {
                self.handles.remove(handle);
                Ok(())
            }
            Request::Read(transfer) => self.read(node, transfer, buffers),
            Request::Write(transfer) => self.write(node, transfer, buffers),
            Request::Fsync { handle, flags } => self.fsync(node, handle, flags),
            Request::Fallocate { handle, offset, length, mode } => self.fallocate(node, handle, (offset, length), mode),
            Request::Lseek { handle, offset, whence } => self.lseek(node, handle, offset, whence),
            Request::CopyFileRange(copy) => self.copy_file_range(node, copy),

            Request::OpenDir => self.opendir(node),
            Request::ReadDir(transfer) => self.readdir(transfer, buffers),
            Request::ReadDirPlus(transfer) => self.readdirplus(node, transfer, buffers),
            Request::FsyncDir { handle, flags } => self.fsyncdir(handle, flags),
        }
    }

    /// The node, if it may be changed, or may be the directory of a change: any but the top directory.
    fn changeable(&self, node: u64) -> Result<&Inode, Errno> {
        if node == ROOT_NODE { Err(Errno::ROFS) } else { self.nodes.get(node) }
    }

    /// How long a file's attributes hold.
    ///
    /// When the guest writes to a file with set-id bits, the server clears them, of which the guest learns nothing: so
    /// it has to ask for these files' attributes each time, or it would run one with rights that it no longer gives.
    fn attr_valid(&self, stat: &Statx) -> Duration {
        let mode = u32::from(stat.stx_mode);
        let has_set_id = FileType::from_raw_mode(mode) == FileType::RegularFile && mode & SET_ID_BITS != 0;
        match self.cache {
            _ if has_set_id => Duration::ZERO,
            CachePolicy::Private => PRIVATE_VALID,
            CachePolicy::Shared => SHARED_VALID,
        }
    }

    /// How long a file's name holds.
    fn name_valid(&self, stat: &Statx) -> Duration {
        let is_directory = FileType::from_raw_mode(u32::from(stat.stx_mode)) == FileType::Directory;
        match self.cache {
            CachePolicy::Private => PRIVATE_VALID,
            CachePolicy::Shared if is_directory => SHARED_VALID,
            CachePolicy::Shared => Duration::ZERO,
        }
    }
}
