// SPDX-License-Identifier: Apache-2.0
//! Bytes that the guest has sent and the host's socket has not yet taken: a ring, there only while it holds something.

use std::io::IoSlice;

use vm_memory::VolatileSlice;

use super::credit::RECEIVE_BUFFER_SIZE;

const CAPACITY: usize = RECEIVE_BUFFER_SIZE as usize;

/// A ring of at most [`RECEIVE_BUFFER_SIZE`] bytes.
#[derive(Debug, Default)]
pub(super) struct TxBuffer {
    ring: Option<Box<[u8]>>,
    start: usize,
    len: usize,
}

impl TxBuffer {
    /// Whether there is nothing in it, and no memory taken.
    pub(super) fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Appends as much of `data` as there is room for, and returns how much that was.
    #[must_use]
    pub(super) fn push(&mut self, data: &VolatileSlice<'_>) -> usize {
        let count = data.len().min(CAPACITY - self.len);
        if count == 0 {
            return 0;
        }
        let ring = self.ring.get_or_insert_with(|| vec![0; CAPACITY].into_boxed_slice());
        let end = (self.start + self.len) % CAPACITY;
        let first = count.min(CAPACITY - end);
        let copied = data.copy_to(&mut ring[end..end + first]);
        debug_assert_eq!(copied, first);
        if let Ok(rest) = data.subslice(first, count - first) {
            rest.copy_to(&mut ring[..count - first]);
        }
        self.len += count;
        count
    }

    /// What is in it, oldest first.
    pub(super) fn as_io_slices(&self) -> [IoSlice<'_>; 2] {
        let ring = self.ring.as_deref().unwrap_or_default();
        let first = self.len.min(ring.len() - self.start);
        [IoSlice::new(&ring[self.start..self.start + first]), IoSlice::new(&ring[..self.len - first])]
    }

    /// Forgets the oldest `count` bytes.
    pub(super) fn consume(&mut self, count: usize) {
        let count = count.min(self.len);
        self.len -= count;
        self.start = (self.start + count) % CAPACITY;
        if self.len == 0 {
            self.clear();
        }
    }

    /// Forgets everything.
    pub(super) fn clear(&mut self) {
        *self = Self::default();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn content(buffer: &TxBuffer) -> Vec<u8> {
        buffer.as_io_slices().iter().flat_map(|slice| slice.iter().copied()).collect()
    }

    fn push(buffer: &mut TxBuffer, bytes: &[u8]) -> usize {
        let mut bytes = bytes.to_vec();
        buffer.push(&VolatileSlice::from(&mut bytes[..]))
    }

    #[test]
    fn bytes_come_out_as_they_went_in() {
        let mut buffer = TxBuffer::default();
        push(&mut buffer, b"abc");
        push(&mut buffer, b"def");
        buffer.consume(2);

        assert_eq!(content(&buffer), b"cdef");
    }

    #[test]
    fn the_ring_wraps_without_losing_a_byte() {
        let mut buffer = TxBuffer::default();
        let (mut written, mut read) = (0_u32, 0_u32);
        for round in 0..200 {
            let piece: Vec<u8> = (0..40_000 + round).map(|index| (written + index) as u8).collect();
            written += push(&mut buffer, &piece) as u32;
            let bytes = content(&buffer);
            let count = bytes.len().min(39_000);
            for (index, &byte) in bytes[..count].iter().enumerate() {
                assert_eq!(byte, (read + index as u32) as u8);
            }
            buffer.consume(count);
            read += count as u32;
        }
        assert!(written > 20 * CAPACITY as u32);
    }

    #[test]
    fn it_takes_no_more_than_its_size() {
        let mut buffer = TxBuffer::default();
        assert_eq!(push(&mut buffer, &vec![1; CAPACITY - 1]), CAPACITY - 1);
        assert_eq!(push(&mut buffer, &[2; 5]), 1);
        assert_eq!(push(&mut buffer, &[3; 5]), 0);
    }

    #[test]
    fn an_empty_ring_holds_no_memory() {
        let mut buffer = TxBuffer::default();
        push(&mut buffer, b"abc");
        buffer.consume(100);

        assert!(buffer.is_empty() && buffer.ring.is_none());
        assert_eq!(content(&buffer), b"");
    }
}
