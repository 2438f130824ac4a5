// SPDX-License-Identifier: Apache-2.0
//! The buffers that a descriptor chain names: where a request is read from, and where its answer goes. File data moves
//! between the host's kernel and these buffers without being copied in the VMM.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

use virtio_queue::desc::split::Descriptor;
use vm_memory::{GuestMemory as _, Permissions, VolatileSlice};

use crate::device::GuestMemory;

/// Most buffers that a chain may name, both directions counted; the most that one `preadv` takes (`IOV_MAX`).
/// A guest of the negotiated sizes needs 260.
pub(crate) const MAX_BUFFERS: usize = 1024;

/// A chain whose buffers cannot be used.
#[derive(Debug, thiserror::Error)]
pub(crate) enum GatherError {
    #[error("a descriptor chain names memory that is not the guest's")]
    Memory(#[from] vm_memory::GuestMemoryError),
    #[error("a descriptor chain has a readable buffer behind a writable one")]
    Order,
    #[error("a descriptor chain names more than {MAX_BUFFERS} buffers")]
    TooMany,
}

/// A chain's buffers, in order. They are reused from request to request.
#[derive(Debug, Default)]
pub(crate) struct Buffers<'m> {
    /// What the device reads.
    pub(crate) readable: Segments<'m>,
    /// What the device writes.
    pub(crate) writable: Segments<'m>,
}

impl<'m> Buffers<'m> {
    /// Finds a chain's buffers in memory; those that there were are forgotten.
    pub(crate) fn gather(
        &mut self,
        chain: impl Iterator<Item = Descriptor>,
        memory: &'m GuestMemory,
    ) -> Result<(), GatherError> {
        self.clear();
        for descriptor in chain {
            let (direction, access) = if descriptor.is_write_only() {
                (&mut self.writable, Permissions::Write)
            } else if self.writable.is_empty() {
                (&mut self.readable, Permissions::Read)
            } else {
                return Err(GatherError::Order);
            };
            let length = usize::try_from(descriptor.len()).unwrap_or(usize::MAX);
            for slice in memory.get_slices(descriptor.addr(), length, access)? {
                direction.push(slice?);
            }
            if self.count() > MAX_BUFFERS {
                return Err(GatherError::TooMany);
            }
        }
        Ok(())
    }

    /// Forgets the buffers, not their space.
    pub(crate) fn clear(&mut self) {
        self.readable.slices.clear();
        self.writable.slices.clear();
    }

    /// How many buffers there are, both directions counted.
    pub(crate) fn count(&self) -> usize {
        self.readable.slices.len() + self.writable.slices.len()
    }
}

/// The buffers of one direction.
#[derive(Debug, Default)]
pub(crate) struct Segments<'m> {
    slices: Vec<VolatileSlice<'m>>,
}

impl<'m> Segments<'m> {
    /// Adds a buffer at the end.
    pub(crate) fn push(&mut self, slice: VolatileSlice<'m>) {
        self.slices.push(slice);
    }

    /// Whether there are no buffers.
    pub(crate) fn is_empty(&self) -> bool {
        self.slices.is_empty()
    }

    /// Bytes of all buffers together; a chain has less than 4 GiB.
    pub(crate) fn len(&self) -> usize {
        self.slices.iter().map(VolatileSlice::len).sum()
    }

    /// Fills `bytes` with what lies `offset` bytes into the buffers, and says how many bytes there were.
    pub(crate) fn copy_to(&self, offset: usize, bytes: &mut [u8]) -> usize {
        let mut done = 0;
        for slice in self.from(offset) {
            let Some(rest) = bytes.get_mut(done..).filter(|rest| !rest.is_empty()) else { break };
            done += slice.copy_to(rest);
        }
        done
    }

    /// Writes `bytes` to the start of the buffers, and says how many of them there was room for.
    pub(crate) fn copy_from(&self, bytes: &[u8]) -> usize {
        self.copy_from_at(0, bytes)
    }

    /// The same to what lies `offset` bytes into the buffers.
    pub(crate) fn copy_from_at(&self, offset: usize, bytes: &[u8]) -> usize {
        let mut done = 0;
        for slice in self.from(offset) {
            let Some(rest) = bytes.get(done..).filter(|rest| !rest.is_empty()) else { break };
            let count = slice.len().min(rest.len());
            slice.copy_from(rest.get(..count).unwrap_or_default());
            done += count;
        }
        done
    }

    /// Reads up to `length` bytes at `offset` of a file to what lies `skip` bytes into the buffers.
    ///
    /// # Errors
    ///
    /// Those of `preadv`.
    pub(crate) fn read_from(&self, file: BorrowedFd<'_>, skip: usize, length: usize, offset: i64) -> io::Result<usize> {
        let iovecs = self.iovecs(skip, length);
        transfer(|| {
            // SAFETY: each iovec is a part of guest memory that stays mapped while `self` borrows it. The guest may
            // change the bytes at any time, which is nothing to the kernel, and nothing in the VMM refers to them.
            unsafe { libc::preadv(file.as_raw_fd(), iovecs.as_ptr(), iovec_count(&iovecs), offset) }
        })
    }

    /// Writes `length` bytes of what lies `skip` bytes into the buffers at `offset` of a file.
    ///
    /// # Errors
    ///
    /// Those of `pwritev`.
    pub(crate) fn write_to(&self, file: BorrowedFd<'_>, skip: usize, length: usize, offset: i64) -> io::Result<usize> {
        let iovecs = self.iovecs(skip, length);
        transfer(|| {
            // SAFETY: as in `read_from`; the kernel only reads.
            unsafe { libc::pwritev(file.as_raw_fd(), iovecs.as_ptr(), iovec_count(&iovecs), offset) }
        })
    }

    /// The buffers from `offset` bytes on.
    fn from(&self, mut offset: usize) -> impl Iterator<Item = VolatileSlice<'m>> + '_ {
        self.slices.iter().filter_map(move |slice| {
            let skipped = offset.min(slice.len());
            offset -= skipped;
            slice.offset(skipped).ok().filter(|rest| !rest.is_empty())
        })
    }

    /// The iovecs of `length` bytes from `skip` on; neighbours in memory become one.
    fn iovecs(&self, skip: usize, length: usize) -> Vec<libc::iovec> {
        let mut iovecs: Vec<libc::iovec> = Vec::with_capacity(self.slices.len());
        let mut left = length;
        for slice in self.from(skip) {
            if left == 0 {
                break;
            }
            let count = slice.len().min(left);
            left -= count;
            let start = slice.ptr_guard_mut().as_ptr();
            match iovecs.last_mut() {
                Some(last) if last.iov_base.wrapping_byte_add(last.iov_len) == start.cast() => last.iov_len += count,
                _ => iovecs.push(libc::iovec { iov_base: start.cast(), iov_len: count }),
            }
        }
        iovecs
    }
}

/// The count as the system call takes it. At most [`MAX_BUFFERS`], which the worker sees to.
fn iovec_count(iovecs: &[libc::iovec]) -> libc::c_int {
    libc::c_int::try_from(iovecs.len().min(MAX_BUFFERS)).unwrap_or(0)
}

/// Calls until it is not interrupted.
fn transfer(call: impl Fn() -> isize) -> io::Result<usize> {
    loop {
        if let Ok(count) = usize::try_from(call()) {
            return Ok(count);
        }
        let error = io::Error::last_os_error();
        if error.kind() != io::ErrorKind::Interrupted {
            return Err(error);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Seek, SeekFrom, Write};
    use std::os::fd::AsFd;

    use super::*;

    fn segments<'m>(parts: &'m mut [&mut [u8]]) -> Segments<'m> {
        let mut segments = Segments::default();
        for part in parts {
            segments.push(VolatileSlice::from(&mut **part));
        }
        segments
    }

    #[test]
    fn copies_across_buffer_borders() {
        let (mut first, mut second) = ([0; 3], [0; 4]);
        let mut parts: [&mut [u8]; 2] = [&mut first, &mut second];
        let segments = segments(&mut parts);

        let written = segments.copy_from(b"abcdefghi");
        let mut middle = [0; 4];
        let read = segments.copy_to(2, &mut middle);

        assert_eq!((written, read, &middle), (7, 4, b"cdef"));
        assert_eq!(segments.copy_to(7, &mut middle), 0);
    }

    #[test]
    fn reads_and_writes_files_in_place() {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(b"0123456789").unwrap();
        let (mut first, mut second) = (*b"....", *b"....");
        let mut parts: [&mut [u8]; 2] = [&mut first, &mut second];
        let segments = segments(&mut parts);

        let read = segments.read_from(file.as_fd(), 2, 5, 1).unwrap();
        let written = segments.write_to(file.as_fd(), 2, 4, 10).unwrap();

        let mut content = String::new();
        file.seek(SeekFrom::Start(0)).unwrap();
        file.read_to_string(&mut content).unwrap();
        assert_eq!((read, written, content.as_str()), (5, 4, "01234567891234"));
    }

    #[test]
    fn an_error_is_passed_on() {
        let (_reader, writer) = io::pipe().unwrap();
        let mut buffer = [0; 4];
        let mut parts: [&mut [u8]; 1] = [&mut buffer];

        let result = segments(&mut parts).read_from(writer.as_fd(), 0, 4, 0);

        assert!(result.is_err());
    }
}
