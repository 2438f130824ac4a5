// SPDX-License-Identifier: Apache-2.0
//! What the guest has open.

use std::os::fd::OwnedFd;
use std::sync::Arc;

use rustix::io::Errno;

use super::super::trees::Membership;
use super::listing::Listing;

/// Most open files and directories of a session.
pub(super) const MAX_HANDLES: usize = 1 << 16;
/// Most bytes of a session's listings that are kept between requests: those of some 900 large directories at once.
const MAX_LISTINGS_LEN: usize = 8 << 20;

/// An open file or directory. Its number to the guest is an index and one: 0 means "by node".
#[derive(Debug)]
pub(super) enum Handle {
    /// A regular file.
    File(Arc<OwnedFd>),
    /// A directory.
    Directory {
        /// Open for reading.
        descriptor: Arc<OwnedFd>,
        listing: Listing,
    },
}

/// A handle, and the added tree that its file is in.
#[derive(Debug)]
struct Open {
    handle: Handle,
    membership: Option<Membership>,
}

impl Open {
    fn is_removed(&self) -> bool {
        self.membership.as_ref().is_some_and(Membership::is_over)
    }
}

/// All that is open.
#[derive(Debug, Default)]
pub(super) struct HandleTable {
    slots: Vec<Option<Open>>,
    free: Vec<usize>,
    /// Bytes of all listings.
    listings_len: usize,
}

impl HandleTable {
    /// Adds one, of a file in that added tree; `ENFILE` if there are [`MAX_HANDLES`].
    pub(super) fn insert(&mut self, handle: Handle, membership: Option<Membership>) -> Result<u64, Errno> {
        let index = match self.free.pop() {
            Some(index) => index,
            None if self.slots.len() >= MAX_HANDLES => return Err(Errno::NFILE),
            None => {
                self.slots.push(None);
                self.slots.len() - 1
            }
        };
        *self.slots.get_mut(index).ok_or(Errno::NFILE)? = Some(Open { handle, membership });
        Ok(index as u64 + 1)
    }

    fn get(&self, number: u64) -> Option<&Handle> {
        let open = index_of(number).and_then(|index| self.slots.get(index)?.as_ref())?;
        Some(&open.handle).filter(|_| !open.is_removed())
    }

    /// The open file; `EBADF` if there is none of this number.
    pub(super) fn file(&self, number: u64) -> Result<Arc<OwnedFd>, Errno> {
        match self.get(number) {
            Some(Handle::File(descriptor)) => Ok(Arc::clone(descriptor)),
            _ => Err(Errno::BADF),
        }
    }

    /// The open directory; `EBADF` if there is none of this number.
    pub(super) fn directory(&self, number: u64) -> Result<Arc<OwnedFd>, Errno> {
        match self.get(number) {
            Some(Handle::Directory { descriptor, .. }) => Ok(Arc::clone(descriptor)),
            _ => Err(Errno::BADF),
        }
    }

    /// Takes an open directory's listing out, to work with it.
    pub(super) fn take_listing(&mut self, number: u64) -> Listing {
        self.exchange_listing(number, Listing::lost())
    }

    /// Puts an open directory's listing back. Beyond [`MAX_LISTINGS_LEN`] it is dropped: the next request then seeks.
    pub(super) fn keep_listing(&mut self, number: u64, listing: Listing) {
        let fits = self.listings_len.saturating_add(listing.size()) <= MAX_LISTINGS_LEN;
        self.exchange_listing(number, if fits { listing } else { Listing::lost() });
    }

    fn exchange_listing(&mut self, number: u64, new: Listing) -> Listing {
        match index_of(number).and_then(|index| Some(&mut self.slots.get_mut(index)?.as_mut()?.handle)) {
            Some(Handle::Directory { listing, .. }) => {
                self.listings_len = self.listings_len.saturating_add(new.size()).saturating_sub(listing.size());
                std::mem::replace(listing, new)
            }
            _ => Listing::lost(),
        }
    }

    /// Closes one; a number that is not there is the guest's own business.
    pub(super) fn remove(&mut self, number: u64) {
        self.take_listing(number);
        if let Some(index) = index_of(number)
            && self.slots.get_mut(index).and_then(Option::take).is_some()
        {
            self.free.push(index);
        }
    }

    /// Closes those of files whose tree is gone.
    pub(super) fn retire(&mut self) {
        let numbers = (1_u64..).zip(&self.slots);
        let removed = numbers.filter(|(_, open)| open.as_ref().is_some_and(Open::is_removed)).map(|(number, _)| number);
        for number in removed.collect::<Vec<_>>() {
            self.remove(number);
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

        let first = table.insert(handle(), None).unwrap();
        let second = table.insert(handle(), None).unwrap();
        table.remove(first);
        let third = table.insert(handle(), None).unwrap();

        assert_eq!((first, second, third), (1, 2, 1));
    }

    #[test]
    fn a_closed_or_unknown_number_is_refused() {
        let mut table = HandleTable::default();
        let number = table.insert(handle(), None).unwrap();

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
        let number = table.insert(handle(), None).unwrap();

        assert!(table.file(number).is_ok());
        assert_eq!(table.directory(number).err(), Some(Errno::BADF));
    }

    #[test]
    fn listings_are_kept_while_there_is_room() {
        let folder = tempfile::tempdir().unwrap();
        for number in 0..1000 {
            std::fs::write(folder.path().join(format!("{number:0200}")), "").unwrap();
        }
        let descriptor: Arc<OwnedFd> = Arc::new(std::fs::File::open(folder.path()).unwrap().into());
        let mut table = HandleTable::default();
        let mut list = || {
            let listing = Listing::new();
            let handle = Handle::Directory { descriptor: Arc::clone(&descriptor), listing };
            let number = table.insert(handle, None).unwrap();
            let mut listing = table.take_listing(number);
            listing.go_to(&descriptor, 1).unwrap();
            listing.go_to(&descriptor, 0).unwrap();
            while listing.read_on(&descriptor, &mut Vec::new(), 1 << 16).unwrap() {}
            table.keep_listing(number, listing);
            number
        };

        let numbers: Vec<_> = (0..100).map(|_| list()).collect();
        let kept = |table: &mut HandleTable, number: u64| table.take_listing(number).size() > 0;

        assert!(table.listings_len <= MAX_LISTINGS_LEN);
        assert!(kept(&mut table, numbers[0]));
        assert!(!kept(&mut table, numbers[99]));
        numbers.iter().for_each(|number| table.remove(*number));
        assert_eq!(table.listings_len, 0);
    }
}
