// SPDX-License-Identifier: Apache-2.0
//! What is done with files that are open: data, holes, and getting both to the disk.

use std::io;
use std::os::fd::AsFd;

use rustix::fs::{FallocateFlags, SeekFrom, copy_file_range, fallocate, fdatasync, fsync, seek};
use rustix::io::Errno;

use super::super::request::{CopyFileRange, Transfer};
use super::super::wire::{
    FSYNC_FDATASYNC, IN_HEADER_LEN, MAX_IO_LEN, OUT_HEADER_LEN, WRITE_IN_LEN, WRITE_KILL_SUIDGID,
};
use super::inode::Access;
use super::{Server, host};
use crate::buffers::Buffers;

/// Most bytes that one COPY_FILE_RANGE copies, so that the other requests need not wait for long; the guest asks again.
const MAX_COPY_LEN: u64 = 16 << 20;

impl Server {
    pub(super) fn read(&mut self, node: u64, transfer: Transfer, buffers: &Buffers<'_>) -> Result<(), Errno> {
        let file = self.file(node, transfer.handle, Access::Read)?;
        let room = buffers.writable.len().saturating_sub(OUT_HEADER_LEN);
        let length = usize::try_from(transfer.size.min(MAX_IO_LEN)).map_err(|_| Errno::INVAL)?.min(room);
        let offset = i64::try_from(transfer.offset).map_err(|_| Errno::INVAL)?;
        let count = buffers.writable.read_from(file.as_fd(), OUT_HEADER_LEN, length, offset);
        self.reply.in_place = count.map_err(errno_of)?;
        Ok(())
    }

    /// The data begins behind the request's arguments; that there is as much as the request says was seen to before.
    pub(super) fn write(&mut self, node: u64, transfer: Transfer, buffers: &Buffers<'_>) -> Result<(), Errno> {
        let file = self.file(node, transfer.handle, Access::ReadWrite)?;
        let length = usize::try_from(transfer.size).map_err(|_| Errno::INVAL)?;
        let offset = i64::try_from(transfer.offset).map_err(|_| Errno::INVAL)?;
        let data = IN_HEADER_LEN + WRITE_IN_LEN;
        let write = || buffers.readable.write_to(file.as_fd(), data, length, offset).map_err(errno_of);
        let count = if transfer.write_flags & WRITE_KILL_SUIDGID == 0 { write() } else { host::without_fsetid(write) }?;
        self.reply.u32(u32::try_from(count).map_err(|_| Errno::IO)?);
        self.reply.zeros(4);
        Ok(())
    }

    pub(super) fn fsync(&mut self, node: u64, handle: u64, flags: u32) -> Result<(), Errno> {
        let file = self.file(node, handle, Access::Read)?;
        synchronize(file, flags)
    }

    pub(super) fn fallocate(
        &mut self,
        node: u64,
        handle: u64,
        (offset, length): (u64, u64),
        mode: u32,
    ) -> Result<(), Errno> {
        let mode = FallocateFlags::from_bits(mode).ok_or(Errno::OPNOTSUPP)?;
        let file = self.file(node, handle, Access::ReadWrite)?;
        // The request does not say whether its user may keep set-id bits: nobody may.
        host::without_fsetid(|| fallocate(&file, mode, offset, length))
    }

    /// `SEEK_DATA` and `SEEK_HOLE`; the guest does the other kinds itself.
    pub(super) fn lseek(&mut self, node: u64, handle: u64, offset: u64, whence: u32) -> Result<(), Errno> {
        let position = match whence.cast_signed() {
            libc::SEEK_DATA => SeekFrom::Data(offset),
            libc::SEEK_HOLE => SeekFrom::Hole(offset),
            _ => return Err(Errno::INVAL),
        };
        // The descriptor's own position moves, which nothing here uses.
        let offset = seek(self.file(node, handle, Access::Read)?, position)?;
        self.reply.u64(offset);
        Ok(())
    }

    pub(super) fn copy_file_range(&mut self, node: u64, copy: CopyFileRange) -> Result<(), Errno> {
        if copy.flags != 0 {
            return Err(Errno::INVAL);
        }
        let from = self.file(node, copy.handle_in, Access::Read)?;
        let to = self.file(copy.node_out, copy.handle_out, Access::ReadWrite)?;
        let (mut offset_in, mut offset_out) = (copy.offset_in, copy.offset_out);
        let length = usize::try_from(copy.length.min(MAX_COPY_LEN)).map_err(|_| Errno::INVAL)?;
        // As for FALLOCATE.
        let count =
            host::without_fsetid(|| copy_file_range(&from, Some(&mut offset_in), &to, Some(&mut offset_out), length))?;
        self.reply.u32(u32::try_from(count).map_err(|_| Errno::IO)?);
        self.reply.zeros(4);
        Ok(())
    }
}

/// `fsync` or `fdatasync`, as the request's flags ask for.
pub(super) fn synchronize(file: impl AsFd, flags: u32) -> Result<(), Errno> {
    if flags & FSYNC_FDATASYNC == 0 { fsync(file) } else { fdatasync(file) }
}

fn errno_of(error: io::Error) -> Errno {
    Errno::from_io_error(&error).unwrap_or(Errno::IO)
}
