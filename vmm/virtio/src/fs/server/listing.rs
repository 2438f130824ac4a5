// SPDX-License-Identifier: Apache-2.0
//! The part of a directory that an open handle has read from the host and the guest may still ask for.
//!
//! The guest asks on from any entry that it was last given: what did not fit its program's buffer it drops, and asks for
//! again. Seeking there is no answer: on some file systems, such as a tmpfs before Linux 6.6, an entry's offset is but a
//! count, so that after a removal it stands for a later entry, and one is skipped. So the entries are kept from
//! the first one that the last request gave, and the host's directory is read on without a seek.
//!
//! Offsets are the host's own, for the requests that go elsewhere: there the directory is as good as the host's.

use std::ffi::CStr;
use std::os::fd::OwnedFd;

use rustix::fs::{FileType, RawDir, SeekFrom, seek};
use rustix::io::Errno;

/// Least bytes to read entries into: the host refuses less than its longest entry, of 280 bytes.
const MIN_READ_LEN: usize = 1024;

/// Entries that were read and may be asked for (again).
#[derive(Debug)]
pub(super) struct Listing {
    /// The first entry's offset; [`None`] if it is not known where the host's descriptor stands.
    start: Option<u64>,
    /// Whether the host's directory has been read since it was at its beginning.
    is_begun: bool,
    entries: Vec<Record>,
    /// The entries' names, each with its NUL.
    names: Vec<u8>,
}

#[derive(Debug)]
struct Record {
    inode: u64,
    next_offset: u64,
    kind: u32,
    name_start: usize,
}

/// An entry of a directory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Entry<'a> {
    pub(super) inode: u64,
    /// The next entry's offset.
    pub(super) next_offset: u64,
    /// A file mode's type, shifted right by 12; 0 if unknown.
    pub(super) kind: u32,
    pub(super) name: &'a CStr,
}

impl Listing {
    /// That of a directory that has just been opened.
    pub(super) fn new() -> Self {
        Self { start: Some(0), is_begun: false, entries: Vec::new(), names: Vec::new() }
    }

    /// That of a directory whose entries were given up: the next request has to seek.
    pub(super) fn lost() -> Self {
        Self { start: None, is_begun: true, entries: Vec::new(), names: Vec::new() }
    }

    /// Bytes of memory that it takes.
    pub(super) fn size(&self) -> usize {
        self.entries.capacity() * size_of::<Record>() + self.names.capacity()
    }

    /// The entry so many behind the one that was gone to.
    pub(super) fn get(&self, index: usize) -> Option<Entry<'_>> {
        let record = self.entries.get(index)?;
        let name = CStr::from_bytes_until_nul(self.names.get(record.name_start..)?).ok()?;
        Some(Entry { inode: record.inode, next_offset: record.next_offset, kind: record.kind, name })
    }

    /// Makes the entry at `offset` the first one, and drops those before it. Offset 0 begins a new listing.
    pub(super) fn go_to(&mut self, directory: &OwnedFd, offset: u64) -> Result<(), Errno> {
        if offset == 0 && !self.is_begun {
            return Ok(());
        }
        match self.index_of(offset) {
            Some(index) if offset != 0 => self.drop_first(index),
            _ => {
                *self = Self::lost();
                seek(directory, SeekFrom::Start(offset))?;
                self.is_begun = offset != 0;
            }
        }
        self.start = Some(offset);
        Ok(())
    }

    fn index_of(&self, offset: u64) -> Option<usize> {
        if self.start == Some(offset) {
            return Some(0);
        }
        Some(self.entries.iter().position(|record| record.next_offset == offset)? + 1)
    }

    fn drop_first(&mut self, count: usize) {
        if count >= self.entries.len() {
            // Most directories end here, so their memory goes too.
            (self.entries, self.names) = (Vec::new(), Vec::new());
        } else if let Some(cut) = self.entries.get(count).map(|record| record.name_start) {
            self.entries.drain(..count);
            self.names.drain(..cut);
            self.entries.iter_mut().for_each(|record| record.name_start -= cut);
        }
    }

    /// Reads on from the host, about `length` bytes. False at the directory's end.
    pub(super) fn read_on(&mut self, directory: &OwnedFd, scratch: &mut Vec<u8>, length: usize) -> Result<bool, Errno> {
        let length = length.max(MIN_READ_LEN);
        scratch.clear();
        scratch.reserve(length);
        let buffer = scratch.spare_capacity_mut();
        let mut entries = RawDir::new(directory, buffer.get_mut(..length).unwrap_or_default());
        self.is_begun = true;
        let mut is_any = false;
        while let Some(entry) = entries.next() {
            let entry = entry?;
            is_any = true;
            let kind = match entry.file_type() {
                FileType::Unknown => 0,
                kind => kind.as_raw_mode() >> 12,
            };
            let (inode, next_offset) = (entry.ino(), entry.next_entry_cookie());
            self.entries.push(Record { inode, next_offset, kind, name_start: self.names.len() });
            self.names.extend_from_slice(entry.file_name().to_bytes_with_nul());
            if entries.is_buffer_empty() {
                break;
            }
        }
        Ok(is_any)
    }
}

#[cfg(test)]
mod tests {
    use std::fs::{self, File};

    use super::*;

    fn listing_of(count: usize) -> (tempfile::TempDir, OwnedFd, Listing) {
        let folder = tempfile::tempdir().unwrap();
        for number in 0..count {
            fs::write(folder.path().join(format!("file-{number:03}")), "").unwrap();
        }
        let directory = File::open(folder.path()).unwrap().into();
        (folder, directory, Listing::new())
    }

    fn read_all(listing: &mut Listing, directory: &OwnedFd) {
        while listing.read_on(directory, &mut Vec::new(), 0).unwrap() {}
    }

    fn names(listing: &Listing) -> Vec<&CStr> {
        (0..).map_while(|index| listing.get(index)).map(|entry| entry.name).collect()
    }

    #[test]
    fn entries_stay_where_they_were_when_files_are_removed() {
        let (folder, directory, mut listing) = listing_of(100);
        read_all(&mut listing, &directory);
        let before: Vec<_> = names(&listing).into_iter().map(CStr::to_owned).collect();
        let offset = listing.get(49).unwrap().next_offset;

        for number in 0..100 {
            fs::remove_file(folder.path().join(format!("file-{number:03}"))).unwrap();
        }
        listing.go_to(&directory, offset).unwrap();

        assert_eq!(before.len(), 102);
        assert!(names(&listing).into_iter().eq(before.iter().skip(50).map(|name| name.as_c_str())));
    }

    #[test]
    fn the_beginning_is_read_anew() {
        let (folder, directory, mut listing) = listing_of(3);
        read_all(&mut listing, &directory);

        fs::write(folder.path().join("new"), "").unwrap();
        listing.go_to(&directory, 0).unwrap();
        read_all(&mut listing, &directory);

        assert_eq!(names(&listing).len(), 6);
        assert!(names(&listing).contains(&c"new"));
    }

    #[test]
    fn what_was_lost_is_sought_on_the_host() {
        let (_folder, directory, mut listing) = listing_of(20);
        read_all(&mut listing, &directory);
        let (offset, next) = (listing.get(9).unwrap().next_offset, listing.get(10).unwrap().name.to_owned());

        let mut listing = Listing::lost();
        listing.go_to(&directory, offset).unwrap();
        read_all(&mut listing, &directory);

        assert_eq!(names(&listing).len(), 12);
        assert_eq!(names(&listing).first(), Some(&next.as_c_str()));
    }

    #[test]
    fn a_listing_at_its_end_takes_no_memory() {
        let (_folder, directory, mut listing) = listing_of(20);
        read_all(&mut listing, &directory);
        let offset = listing.get(21).unwrap().next_offset;

        listing.go_to(&directory, offset).unwrap();

        assert_eq!(listing.size(), 0);
        assert!(!listing.read_on(&directory, &mut Vec::new(), 0).unwrap());
    }
}
