// SPDX-License-Identifier: Apache-2.0
//! A request as the device understands it (virtio 1.2, section 5.2.6): the guest's numbers, checked against the disk.

use super::disk::Disk;
use super::wire::{
    HEADER_LEN, ID_LEN, RANGE_LEN, RANGE_UNMAP, SECTOR, Status, T_DISCARD, T_FLUSH, T_GET_ID, T_IN, T_OUT,
    T_WRITE_ZEROES,
};
use crate::buffers::Buffers;

/// Most segments of data in a request, and most bytes of each.
pub(super) const MAX_SEGMENTS: u32 = 126;
pub(super) const MAX_SEGMENT_LEN: u32 = 64 << 10;
/// Most bytes of data in a request.
const MAX_DATA_LEN: usize = (MAX_SEGMENTS * MAX_SEGMENT_LEN) as usize;

/// Most ranges of a request, and most sectors of each: 1 GiB, so that none keeps the others waiting for long.
pub(super) const MAX_RANGES: u32 = 16;
pub(super) const MAX_RANGE_SECTORS: u32 = 1 << 21;

/// A chain that holds no request, or has no room for its end to be told.
#[derive(Debug, thiserror::Error)]
#[error("a request has {readable} bytes for its header, and {writable} for its status")]
pub(super) struct Unanswerable {
    readable: usize,
    writable: usize,
}

/// A request that can be carried out: all of its ranges are on the disk.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Request {
    /// Fill the writable buffers but for the status.
    Read { offset: u64, length: usize },
    /// Write what is in the readable buffers behind the header.
    Write { offset: u64, length: usize },
    /// Have all on the device itself.
    Flush,
    /// Tell the serial number.
    GetId,
    /// Give ranges of bytes up.
    Discard(Vec<Range>),
    /// Make ranges of bytes zero.
    WriteZeroes(Vec<Range>),
}

/// Some of the disk, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Range {
    pub(super) offset: u64,
    pub(super) length: u64,
}

/// Where a request's status goes: how many bytes into the writable buffers.
pub(super) fn status_at(buffers: &Buffers<'_>) -> Result<usize, Unanswerable> {
    let (readable, writable) = (buffers.readable.len(), buffers.writable.len());
    if readable < HEADER_LEN || writable == 0 {
        return Err(Unanswerable { readable, writable });
    }
    Ok(writable - 1)
}

impl Request {
    /// The request in the buffers, which [`status_at`] has found to have one; else the status that says what is wrong with it.
    pub(super) fn parse(buffers: &Buffers<'_>, disk: &Disk) -> Result<Self, Status> {
        let mut header = [0; HEADER_LEN];
        buffers.readable.copy_to(0, &mut header);
        let kind = word(&header, 0);
        let sector = u64::from(word(&header, 8)) | u64::from(word(&header, 12)) << 32;
        let given = buffers.readable.len().saturating_sub(HEADER_LEN);
        let room = buffers.writable.len().saturating_sub(1);
        match kind {
            T_IN if given == 0 => {
                let Range { offset, .. } = data(disk, sector, room)?;
                Ok(Self::Read { offset, length: room })
            }
            T_OUT if room == 0 => {
                writable(disk)?;
                let Range { offset, .. } = data(disk, sector, given)?;
                Ok(Self::Write { offset, length: given })
            }
            T_FLUSH if given == 0 && room == 0 => Ok(Self::Flush),
            T_GET_ID if given == 0 && room == ID_LEN => Ok(Self::GetId),
            T_DISCARD if room == 0 => Ok(Self::Discard(ranges(buffers, disk, given, 0)?)),
            T_WRITE_ZEROES if room == 0 => Ok(Self::WriteZeroes(ranges(buffers, disk, given, RANGE_UNMAP)?)),
            T_IN | T_OUT | T_FLUSH | T_GET_ID | T_DISCARD | T_WRITE_ZEROES => Err(Status::IoError),
            _ => Err(Status::Unsupported),
        }
    }
}

/// What `length` bytes of data from a sector on are of the disk.
fn data(disk: &Disk, sector: u64, length: usize) -> Result<Range, Status> {
    if length > MAX_DATA_LEN || !(length as u64).is_multiple_of(SECTOR) {
        return Err(Status::IoError);
    }
    within(disk, sector, length as u64 / SECTOR)
}

/// The ranges behind the header, which may have these flags and no others.
fn ranges(buffers: &Buffers<'_>, disk: &Disk, given: usize, flags: u32) -> Result<Vec<Range>, Status> {
    writable(disk)?;
    if given == 0 || !given.is_multiple_of(RANGE_LEN) || given > MAX_RANGES as usize * RANGE_LEN {
        return Err(Status::IoError);
    }
    let mut bytes = vec![0; given];
    buffers.readable.copy_to(HEADER_LEN, &mut bytes);
    let range = |bytes: &[u8]| {
        let sector = u64::from(word(bytes, 0)) | u64::from(word(bytes, 4)) << 32;
        let (count, given_flags) = (word(bytes, 8), word(bytes, 12));
        if given_flags & !flags != 0 {
            return Err(Status::Unsupported);
        }
        if count == 0 || count > MAX_RANGE_SECTORS {
            return Err(Status::IoError);
        }
        within(disk, sector, count.into())
    };
    bytes.chunks_exact(RANGE_LEN).map(range).collect()
}

fn within(disk: &Disk, sector: u64, count: u64) -> Result<Range, Status> {
    match sector.checked_add(count) {
        Some(end) if end <= disk.sectors() => Ok(Range { offset: sector * SECTOR, length: count * SECTOR }),
        _ => Err(Status::IoError),
    }
}

fn writable(disk: &Disk) -> Result<(), Status> {
    if disk.is_read_only() { Err(Status::IoError) } else { Ok(()) }
}

/// Four bytes as a number, the least significant first; 0 where there are none.
fn word(bytes: &[u8], at: usize) -> u32 {
    bytes.get(at..).and_then(<[u8]>::first_chunk).map_or(0, |word| u32::from_le_bytes(*word))
}
