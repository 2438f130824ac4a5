// SPDX-License-Identifier: Apache-2.0
//! The host's side: an open block device, or a file in its place.

use std::fs::File;
use std::io::{self, Seek, SeekFrom};
use std::os::fd::AsFd;
use std::os::unix::fs::FileTypeExt;

use rustix::fs::{FallocateFlags, fallocate, fdatasync, ioctl_blksszget};

use super::wire::SECTOR;
use crate::buffers::Segments;

/// Sizes of a block that a guest takes: from a sector to a page.
const BLOCK_SIZES: std::ops::RangeInclusive<u32> = 512..=4096;

/// A disk.
#[derive(Debug)]
pub struct Disk {
    file: File,
    read_only: bool,
    sectors: u64,
    block_size: u32,
}

impl Disk {
    /// A disk on an open block device of the host, or on a file. Its size is that of this moment.
    ///
    /// # Errors
    ///
    /// When the host does not tell its size.
    pub fn new(mut file: File, read_only: bool) -> io::Result<Self> {
        let sectors = file.seek(SeekFrom::End(0))? / SECTOR;
        let block_size = if file.metadata()?.file_type().is_block_device() { ioctl_blksszget(&file)? } else { 512 };
        // A guest would refuse others. Smaller accesses are the host's page cache's to make right.
        let is_one = block_size.is_power_of_two() && BLOCK_SIZES.contains(&block_size);
        Ok(Self { file, read_only, sectors, block_size: if is_one { block_size } else { 512 } })
    }

    /// Whether nothing is ever written to it.
    pub(super) fn is_read_only(&self) -> bool {
        self.read_only
    }

    /// How many sectors it has.
    pub(super) fn sectors(&self) -> u64 {
        self.sectors
    }

    /// Bytes of one of its own blocks.
    pub(super) fn block_size(&self) -> u32 {
        self.block_size
    }

    /// Fills `length` bytes of the buffers from `offset` on.
    pub(super) fn read(&self, buffers: &Segments<'_>, length: usize, offset: i64) -> io::Result<()> {
        whole(length, |done| buffers.read_from(self.file.as_fd(), done, length - done, offset + done as i64))
    }

    /// Writes `length` bytes of what lies `skip` bytes into the buffers.
    pub(super) fn write(&self, buffers: &Segments<'_>, skip: usize, length: usize, offset: i64) -> io::Result<()> {
        whole(length, |done| buffers.write_to(self.file.as_fd(), skip + done, length - done, offset + done as i64))
    }

    /// Has all that was written on the device itself.
    pub(super) fn flush(&self) -> io::Result<()> {
        Ok(fdatasync(&self.file)?)
    }

    /// Gives a range up: what is read there is not known from then on.
    pub(super) fn discard(&self, offset: u64, length: u64) -> io::Result<()> {
        Ok(fallocate(&self.file, FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE, offset, length)?)
    }

    /// Makes a range zero.
    pub(super) fn write_zeroes(&self, offset: u64, length: u64) -> io::Result<()> {
        Ok(fallocate(&self.file, FallocateFlags::ZERO_RANGE | FallocateFlags::KEEP_SIZE, offset, length)?)
    }
}

/// Transfers in as many steps as it takes. A device that has become smaller than it was ends it early, which is an error.
fn whole(length: usize, mut step: impl FnMut(usize) -> io::Result<usize>) -> io::Result<()> {
    let mut done = 0;
    while done < length {
        match step(done)? {
            0 => return Err(io::ErrorKind::UnexpectedEof.into()),
            count => done += count,
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_is_as_many_whole_sectors_as_it_has() {
        let file = tempfile::tempfile().unwrap();
        file.set_len(5 * SECTOR + 511).unwrap();

        let disk = Disk::new(file, false).unwrap();

        assert_eq!((disk.sectors(), disk.block_size(), disk.is_read_only()), (5, 512, false));
    }

    #[test]
    fn transfers_end_where_the_device_does() {
        let mut steps = vec![3, 4, 0];
        assert!(whole(7, |_| Ok(steps.remove(0))).is_ok());
        let error = whole(1, |_| Ok(steps.remove(0))).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::UnexpectedEof);
    }

    #[test]
    fn what_has_no_size_is_no_disk() {
        let (reader, _writer) = io::pipe().unwrap();
        assert!(Disk::new(File::from(std::os::fd::OwnedFd::from(reader)), true).is_err());
    }
}
