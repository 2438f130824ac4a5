// SPDX-License-Identifier: Apache-2.0
//! An answer's bytes. Everything but READ's data is laid out here and then written to the guest's buffers at once.

use std::time::Duration;

use rustix::fs::{Statx, StatxTimestamp};
use rustix::io::Errno;

use super::wire::OUT_HEADER_LEN;

/// Bytes of `fuse_entry_out`.
pub(super) const ENTRY_LEN: usize = 128;
/// Bytes of `fuse_dirent` before the name.
pub(super) const DIRENT_LEN: usize = 24;

/// An answer in the making. Its bytes are reused from request to request.
#[derive(Debug, Default)]
pub(super) struct Reply {
    bytes: Vec<u8>,
    /// Bytes that READ has put behind the header in the guest's buffers.
    pub(super) in_place: usize,
}

/// What a node is to the guest.
#[derive(Debug, Clone, Copy)]
pub(super) struct Entry {
    /// 0: there is no such name, and the guest may remember that.
    pub(super) node: u64,
    pub(super) generation: u64,
    /// How long the name holds.
    pub(super) valid: Duration,
    /// How long the attributes hold.
    pub(super) attr_valid: Duration,
    /// [`super::wire::ATTR_SUBMOUNT`] or 0.
    pub(super) attr_flags: u32,
}

impl Reply {
    /// Begins an answer: room for the header, nothing else.
    pub(super) fn begin(&mut self) {
        self.bytes.clear();
        self.bytes.resize(OUT_HEADER_LEN, 0);
        self.in_place = 0;
    }

    /// Bytes of the answer without its header.
    pub(super) fn body_len(&self) -> usize {
        self.bytes.len().saturating_sub(OUT_HEADER_LEN)
    }

    /// Drops what is behind `body_len` bytes of body.
    pub(super) fn truncate(&mut self, body_len: usize) {
        self.bytes.truncate(OUT_HEADER_LEN + body_len);
    }

    pub(super) fn u16(&mut self, number: u16) {
        self.bytes.extend_from_slice(&number.to_le_bytes());
    }

    pub(super) fn u32(&mut self, number: u32) {
        self.bytes.extend_from_slice(&number.to_le_bytes());
    }

    pub(super) fn u64(&mut self, number: u64) {
        self.bytes.extend_from_slice(&number.to_le_bytes());
    }

    pub(super) fn bytes(&mut self, bytes: &[u8]) {
        self.bytes.extend_from_slice(bytes);
    }

    pub(super) fn zeros(&mut self, count: usize) {
        self.bytes.resize(self.bytes.len() + count, 0);
    }

    /// Lends `count` bytes of body for `fill` to write to, and keeps as many as it says.
    pub(super) fn fill<E>(&mut self, count: usize, fill: impl FnOnce(&mut [u8]) -> Result<usize, E>) -> Result<(), E> {
        let start = self.bytes.len();
        self.bytes.resize(start + count, 0);
        let filled = fill(self.bytes.get_mut(start..).unwrap_or_default());
        self.bytes.truncate(start + filled.as_ref().map_or(0, |filled| (*filled).min(count)));
        filled.map(|_| ())
    }

    /// `fuse_entry_out`.
    pub(super) fn entry(&mut self, entry: Entry, stat: &Statx) {
        self.u64(entry.node);
        self.u64(entry.generation);
        self.u64(entry.valid.as_secs());
        self.u64(entry.attr_valid.as_secs());
        self.u32(entry.valid.subsec_nanos());
        self.u32(entry.attr_valid.subsec_nanos());
        self.attr(stat, entry.attr_flags);
    }

    /// `fuse_entry_out` of a name that is not there. It holds for `valid`.
    pub(super) fn negative_entry(&mut self, valid: Duration) {
        self.zeros(16);
        self.u64(valid.as_secs());
        self.zeros(8);
        self.u32(valid.subsec_nanos());
        self.zeros(ENTRY_LEN - 36);
    }

    /// `fuse_attr_out`.
    pub(super) fn attr_out(&mut self, valid: Duration, stat: &Statx) {
        self.u64(valid.as_secs());
        self.u32(valid.subsec_nanos());
        self.zeros(4);
        self.attr(stat, 0);
    }

    /// `fuse_open_out`.
    pub(super) fn open_out(&mut self, handle: u64, open_flags: u32) {
        self.u64(handle);
        self.u32(open_flags);
        self.zeros(4);
    }

    /// `fuse_dirent` with its name, padded to 8 bytes.
    pub(super) fn dirent(&mut self, inode: u64, next_offset: u64, kind: u32, name: &[u8]) {
        self.u64(inode);
        self.u64(next_offset);
        self.u32(u32::try_from(name.len()).unwrap_or(0));
        self.u32(kind);
        self.bytes(name);
        self.zeros(name.len().next_multiple_of(8) - name.len());
    }

    /// `fuse_attr`.
    fn attr(&mut self, stat: &Statx, flags: u32) {
        self.u64(stat.stx_ino);
        self.u64(stat.stx_size);
        self.u64(stat.stx_blocks);
        let times = [stat.stx_atime, stat.stx_mtime, stat.stx_ctime];
        times.iter().for_each(|time: &StatxTimestamp| self.u64(time.tv_sec.cast_unsigned()));
        times.iter().for_each(|time: &StatxTimestamp| self.u32(time.tv_nsec));
        self.u32(u32::from(stat.stx_mode));
        self.u32(stat.stx_nlink);
        self.u32(stat.stx_uid);
        self.u32(stat.stx_gid);
        self.u32(encode_device(stat.stx_rdev_major, stat.stx_rdev_minor));
        self.u32(stat.stx_blksize);
        self.u32(flags);
    }

    /// Ends the answer with its header, and returns what goes to the guest (without what is in place there already).
    pub(super) fn finish(&mut self, unique: u64, outcome: Result<(), Errno>) -> &[u8] {
        let error = match outcome {
            Ok(()) => 0,
            Err(errno) => {
                self.truncate(0);
                self.in_place = 0;
                -errno.raw_os_error()
            }
        };
        let length = u32::try_from(self.bytes.len() + self.in_place).unwrap_or(u32::MAX);
        if let Some((header, _)) = self.bytes.split_first_chunk_mut::<OUT_HEADER_LEN>() {
            let (head, tail) = header.split_at_mut(8);
            head.copy_from_slice(&(u64::from(length) | u64::from(error.cast_unsigned()) << 32).to_le_bytes());
            tail.copy_from_slice(&unique.to_le_bytes());
        }
        &self.bytes
    }
}

/// A device number as the protocol has it: 12 bits of major between 8 low and 12 high bits of minor.
fn encode_device(major: u32, minor: u32) -> u32 {
    (minor & 0xff) | (major & 0xfff) << 8 | (minor & 0xf_ff00) << 12
}

/// The parts of a device number of the protocol: major, minor.
pub(super) fn decode_device(device: u32) -> (u32, u32) {
    (device >> 8 & 0xfff, device & 0xff | device >> 12 & 0xf_ff00)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_error_drops_the_body() {
        let mut reply = Reply::default();
        reply.begin();
        reply.u64(7);

        let bytes = reply.finish(0x1122, Err(Errno::NOENT)).to_vec();

        assert_eq!(bytes, [16, 0, 0, 0, 0xfe, 0xff, 0xff, 0xff, 0x22, 0x11, 0, 0, 0, 0, 0, 0]);
    }

    #[test]
    fn the_length_counts_what_is_in_place() {
        let mut reply = Reply::default();
        reply.begin();
        reply.in_place = 4096;

        let bytes = reply.finish(1, Ok(())).to_vec();

        assert_eq!(bytes.get(..4), Some(&4112_u32.to_le_bytes()[..]));
    }

    #[test]
    fn structures_have_the_protocols_sizes() {
        let stat =
            rustix::fs::statx(rustix::fs::CWD, ".", rustix::fs::AtFlags::empty(), rustix::fs::StatxFlags::BASIC_STATS)
                .unwrap();
        let mut reply = Reply::default();
        let entry = Entry { node: 1, generation: 0, valid: Duration::ZERO, attr_valid: Duration::ZERO, attr_flags: 0 };
        let mut measure = |write: &dyn Fn(&mut Reply)| {
            reply.begin();
            write(&mut reply);
            reply.body_len()
        };

        assert_eq!(measure(&|reply| reply.entry(entry, &stat)), ENTRY_LEN);
        assert_eq!(measure(&|reply| reply.negative_entry(Duration::ZERO)), ENTRY_LEN);
        assert_eq!(measure(&|reply| reply.attr_out(Duration::ZERO, &stat)), 104);
        assert_eq!(measure(&|reply| reply.open_out(1, 0)), 16);
        assert_eq!(measure(&|reply| reply.dirent(1, 2, 3, b"name")), DIRENT_LEN + 8);
    }

    #[test]
    fn device_numbers_go_both_ways() {
        for device in [(0, 0), (8, 1), (259, 0x1_2345), (0xfff, 0xf_ffff)] {
            assert_eq!(decode_device(encode_device(device.0, device.1)), device);
        }
    }
}
