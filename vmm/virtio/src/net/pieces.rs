// SPDX-License-Identifier: Apache-2.0
//! The pieces of guest memory that descriptor chains name, in the form in which the kernel takes them.

use libc::iovec;
use virtio_queue::desc::split::Descriptor;
use vm_memory::{GuestMemory as _, Permissions, VolatileSlice};

use super::QueueError;
use crate::device::GuestMemory;

/// Most pieces of guest memory that a chain may name: the most that one `readv` takes (`IOV_MAX`). Linux' own chains have
/// at most 19.
pub const MAX_PIECES: usize = 1024;

/// A list of pieces; taken off at the front, added to at the end.
#[derive(Debug)]
pub(super) struct Pieces {
    /// Holds the mapping that the pieces are parts of.
    memory: GuestMemory,
    iovecs: Vec<iovec>,
    /// How many at the front have been taken off.
    start: usize,
}

// SAFETY: the pointers of `iovecs` are addresses within the mapping that `memory` owns a share of; nothing about them
// belongs to a thread.
unsafe impl Send for Pieces {}

/// How much of a list is one chain's.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Extent {
    pub(super) bytes: usize,
    pub(super) pieces: usize,
}

impl Pieces {
    pub(super) fn new(memory: GuestMemory) -> Self {
        Self { memory, iovecs: Vec::new(), start: 0 }
    }

    /// Adds a chain's buffers, which have to allow `access` and nothing else. After an error the list is not to be used.
    pub(super) fn push_chain(
        &mut self,
        chain: impl Iterator<Item = Descriptor>,
        access: Permissions,
    ) -> Result<Extent, QueueError> {
        let mut extent = Extent { bytes: 0, pieces: 0 };
        for descriptor in chain {
            if descriptor.is_write_only() != (access == Permissions::Write) {
                return Err(QueueError::Direction);
            }
            let len = usize::try_from(descriptor.len()).unwrap_or(usize::MAX);
            for slice in self.memory.get_slices(descriptor.addr(), len, access)? {
                let slice = slice?;
                extent.pieces += 1;
                extent.bytes = extent.bytes.saturating_add(slice.len());
                if extent.pieces > MAX_PIECES {
                    return Err(QueueError::TooManyPieces);
                }
                self.iovecs.push(iovec { iov_base: slice.ptr_guard_mut().as_ptr().cast(), iov_len: slice.len() });
            }
        }
        Ok(extent)
    }

    /// How many there are.
    pub(super) fn count(&self) -> usize {
        self.iovecs.len() - self.start
    }

    /// The first `count`, at most [`MAX_PIECES`] of them.
    pub(super) fn first(&self, count: usize) -> &[iovec] {
        let all = self.iovecs.get(self.start..).unwrap_or_default();
        all.get(..count.min(MAX_PIECES)).unwrap_or(all)
    }

    /// All, as far as one call takes them.
    pub(super) fn all(&self) -> &[iovec] {
        self.first(self.count())
    }

    /// Takes the first `count` off.
    pub(super) fn take_off(&mut self, count: usize) {
        self.start = (self.start + count).min(self.iovecs.len());
        if self.start >= MAX_PIECES || self.start == self.iovecs.len() {
            self.iovecs.drain(..self.start);
            self.start = 0;
        }
    }

    /// Forgets all of them.
    pub(super) fn clear(&mut self) {
        self.iovecs.clear();
        self.start = 0;
    }

    /// Bytes of all, as far as one call takes them.
    pub(super) fn len(&self) -> usize {
        self.all().iter().map(|piece| piece.iov_len).sum()
    }

    /// Writes `bytes` to the guest's memory `offset` bytes into the pieces.
    pub(super) fn write_at(&self, offset: usize, bytes: &[u8]) {
        self.write_first(self.count(), offset, bytes);
    }

    /// The same into the first `count`, as far as there is room in them; returns how many bytes that is.
    pub(super) fn write_first(&self, count: usize, offset: usize, bytes: &[u8]) -> usize {
        let mut rest = bytes;
        for slice in self.slices(count, offset) {
            if rest.is_empty() {
                break;
            }
            let (now, later) = rest.split_at(rest.len().min(slice.len()));
            slice.copy_from(now);
            rest = later;
        }
        bytes.len() - rest.len()
    }

    /// Adds what is in the guest's memory from `offset` bytes into the pieces on to `buffer`.
    pub(super) fn append_to(&self, buffer: &mut Vec<u8>, offset: usize) {
        for slice in self.slices(self.count(), offset) {
            let end = buffer.len();
            buffer.resize(end + slice.len(), 0);
            slice.copy_to(&mut buffer[end..]);
        }
    }

    /// The guest's memory in the first `count` pieces, from `offset` bytes on.
    fn slices(&self, count: usize, mut offset: usize) -> impl Iterator<Item = VolatileSlice<'_>> {
        self.first(count).iter().filter_map(move |piece| {
            let skipped = offset.min(piece.iov_len);
            offset -= skipped;
            // SAFETY: an iovec is a part of guest memory (`push_chain`), which `self.memory` keeps mapped.
            let slice = unsafe { VolatileSlice::new(piece.iov_base.cast(), piece.iov_len) };
            slice.offset(skipped).ok()
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use vm_memory::{Bytes, GuestAddress};

    fn pieces(lens: &[u32]) -> (GuestMemory, Pieces) {
        let memory = GuestMemory::from_ranges(&[(GuestAddress(0), 0x1_0000)]).unwrap();
        let mut pieces = Pieces::new(memory.clone());
        let chain: Vec<_> =
            lens.iter().enumerate().map(|(at, len)| Descriptor::new(at as u64 * 0x100, *len, 2, 0)).collect();
        pieces.push_chain(chain.into_iter(), Permissions::Write).unwrap();
        (memory, pieces)
    }

    #[test]
    fn bytes_are_written_across_borders() {
        let (memory, pieces) = pieces(&[3, 1, 8]);

        pieces.write_at(2, &[1, 2, 3]);

        let at = |address| memory.read_obj::<u8>(GuestAddress(address)).unwrap();
        assert_eq!([at(2), at(3), at(0x100), at(0x101), at(0x200), at(0x201)], [1, 0, 2, 0, 3, 0]);
    }

    #[test]
    fn no_more_is_written_than_fits_the_first_pieces() {
        let (memory, pieces) = pieces(&[3, 1, 8]);

        assert_eq!(pieces.write_first(2, 1, &[1, 2, 3, 4]), 3);

        let mut bytes = vec![9];
        pieces.append_to(&mut bytes, 2);
        assert_eq!(bytes, [9, 2, 3, 0, 0, 0, 0, 0, 0, 0, 0]);
        assert_eq!(memory.read_obj::<u8>(GuestAddress(0x200)).unwrap(), 0);
        assert_eq!(pieces.len(), 12);
    }

    #[test]
    fn pieces_are_taken_off_at_the_front() {
        let (_memory, mut pieces) = pieces(&[1, 2, 3]);

        pieces.take_off(2);

        assert_eq!(pieces.all().iter().map(|piece| piece.iov_len).collect::<Vec<_>>(), [3]);
        pieces.take_off(9);
        assert_eq!(pieces.count(), 0);
    }

    #[test]
    fn buffers_have_to_lie_in_memory_and_allow_the_access() {
        let memory = GuestMemory::from_ranges(&[(GuestAddress(0), 0x1_0000)]).unwrap();
        let push = |descriptor| Pieces::new(memory.clone()).push_chain([descriptor].into_iter(), Permissions::Write);

        assert!(matches!(push(Descriptor::new(0, 8, 0, 0)), Err(QueueError::Direction)));
        assert!(matches!(push(Descriptor::new(0xfffc, 8, 2, 0)), Err(QueueError::Memory(_))));
        assert!(matches!(push(Descriptor::new(u64::MAX, 8, 2, 0)), Err(QueueError::Memory(_))));
    }
}
