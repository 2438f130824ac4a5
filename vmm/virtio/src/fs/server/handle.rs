// SPDX-License-Identifier: Apache-2.0
//! What the guest has open.

use std::os::fd::OwnedFd;
use std::sync::Arc;

use rustix::io::Errno;

/// Most open files and directories of a session.
pub(super) const MAX_HANDLES: usize = 1 << 16;

/// An open file or directory. Its number to the guest is an index and one: 0 means "by node".
#[derive(Debug)]
pub(super) enum Handle {
    /// A regular file.
    File(Arc<OwnedFd>),
    /// A directory.
    Directory {
        /// Open for reading.
        descriptor: Arc<OwnedFd>,
        /// Where the descriptor stands; [`None`] if that is not known.
        position: Option<u64>,
    },
}

/// All that is open.
#[derive(Debug, Default)]
pub(super) struct HandleTable {
    slots: Vec<Option<Handle>>,
    free: Vec<usize>,
}

impl HandleTable {
    /// Adds one; `ENFILE` if there are [`MAX_HANDLES`].
    pub(super) fn insert(&mut self, handle: Handle) -> Result<u64, Errno> {
        let index = match self.free.pop() {
            Some(index) => index,
            None if self.slots.len() >= MAX_HANDLES => return Err(Errno::NFILE),
            None => {
                self.slots.push(None);
                self.slots.len() - 1
            }
        };
        *self.slots.get_mut(index).ok_or(Errno::NFILE)? = Some(handle);
        Ok(index as u64 + 1)
    }

    /// The open file; `EBADF` if there is none of this number.
    pub(super) fn file(&self, number: u64) -> Result<Arc<OwnedFd>, Errno> {
        match index_of(number).and_then(|index| self.slots.get(index)?.as_ref()) {
            Some(Handle::File(descriptor)) => Ok(Arc::clone(descriptor)),
            _ => Err(Errno::BADF),
        }
    }

    /// The open directory and its position; `EBADF` if there is none of this number.
    pub(super) fn directory(&mut self, number: u64) -> Result<(Arc<OwnedFd>, &mut Option<u64>), Errno> {
        match index_of(number).and_then(|index| self.slots.get_mut(index)?.as_mut()) {
            Some(Handle::Directory { descriptor, position }) => Ok((Arc::clone(descriptor), position)),
            _ => Err(Errno::BADF),
        }
    }

    /// Closes one; a number that is not there is the guest's own business.
    pub(super) fn remove(&mut self, number: u64) {
        if let Some(index) = index_of(number)
            && self.slots.get_mut(index).and_then(Option::take).is_some()
        {
            self.free.push(index);
        }
    }

    /// Closes all.
    pub(super) fn clear(&mut self) {
        *self = Self::default();
    }
}

fn index_of(number: u64) -> Option<usize> {
    usize::try_from(number).ok()?.checked_sub(1)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn handle() -> Handle {
        Handle::File(Arc::new(tempfile::tempfile().unwrap().into()))
    }

    #[test]
    fn numbers_begin_at_one_and_are_used_again() {
        let mut table = HandleTable::default();

        let first = table.insert(handle()).unwrap();
        let second = table.insert(handle()).unwrap();
        table.remove(first);
        let third = table.insert(handle()).unwrap();

        assert_eq!((first, second, third), (1, 2, 1));
    }

    #[test]
    fn a_closed_or_unknown_number_is_refused() {
        let mut table = HandleTable::default();
        let number = table.insert(handle()).unwrap();

        table.remove(number);
        table.remove(number);
        table.remove(u64::MAX);

        for number in [0, number, 2, u64::MAX] {
            assert_eq!(table.file(number).err(), Some(Errno::BADF));
        }
    }

    #[test]
    fn a_file_is_no_directory() {
        let mut table = HandleTable::default();
        let number = table.insert(handle()).unwrap();

        assert!(table.file(number).is_ok());
        assert_eq!(table.directory(number).err(), Some(Errno::BADF));
    }
}
