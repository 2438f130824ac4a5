// SPDX-License-Identifier: Apache-2.0
//! What a pair of queues hangs on: frames are read from it and written to it, one a call, each behind the header that the guest's
//! frames have.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};

use libc::c_uint;

use super::filter::TapFilter;
use super::pieces::Pieces;
use super::stream::Stream;
use super::tap::Tap;

/// A host side of either kind.
#[derive(Debug)]
pub enum Link {
    /// A queue of a tap.
    Tap(Tap),
    /// A socket, which knows no header, and so nothing of checksums and segments that are left to the receiver.
    Stream(Stream),
}

impl Link {
    /// Makes it one that never blocks, for a guest that takes `offloads` as they are; `is_first` of the links of a device.
    ///
    /// # Errors
    ///
    /// Those of [`Tap::configure`].
    pub(super) fn prepare(&self, offloads: c_uint, is_first: bool) -> io::Result<()> {
        match self {
            Self::Tap(tap) => {
                tap.never_block()?;
                if is_first { tap.configure(offloads) } else { Ok(()) }
            }
            // Each call on it says so.
            Self::Stream(_) => Ok(()),
        }
    }

    /// Makes it take part in the traffic of a device with several, or takes it out.
    ///
    /// # Errors
    ///
    /// Those of [`Tap::take_part`].
    pub(super) fn take_part(&self, part: bool) -> io::Result<()> {
        match self {
            Self::Tap(tap) => tap.take_part(part),
            Self::Stream(_) => Ok(()),
        }
    }

    /// Keeps frames from coming that the guest does not want, where that can be had.
    pub(super) fn filter(&self, filter: &TapFilter) {
        if let Self::Tap(tap) = self {
            let _ = tap.filter(filter);
        }
    }

    /// Reads one frame into the first `count` of `pieces` and returns its length with the header; what does not fit is lost.
    ///
    /// # Errors
    ///
    /// `EAGAIN` when there is none, others when it is of no use any more.
    pub(super) fn read(&self, pieces: &Pieces, count: usize) -> io::Result<usize> {
        match self {
            Self::Tap(tap) => tap.read(pieces, count),
            Self::Stream(stream) => stream.read(pieces, count),
        }
    }

    /// Whether there is a frame that the poller does not tell of.
    pub(super) fn has_frame(&self) -> bool {
        match self {
            Self::Tap(_) => false,
            Self::Stream(stream) => stream.has_frame(),
        }
    }

    /// Writes what is in `pieces` as one frame, which may wait until [`Self::flush`].
    ///
    /// # Errors
    ///
    /// `EAGAIN` when there is no room for it, others when it is dropped.
    pub(super) fn write(&self, pieces: &Pieces) -> io::Result<()> {
        match self {
            Self::Tap(tap) => tap.write(pieces).map(drop),
            Self::Stream(stream) => stream.write(pieces),
        }
    }

    /// Sends what waits, as far as that can be; whether nothing waits any more.
    pub(super) fn flush(&self) -> bool {
        match self {
            Self::Tap(_) => true,
            Self::Stream(stream) => stream.flush(),
        }
    }

    /// It is of no use any more; whoever has made it may be to know.
    pub(super) fn is_lost(&self, error: &io::Error) {
        if let Self::Stream(stream) = self {
            stream.is_lost(error);
        }
    }
}

impl AsFd for Link {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match self {
            Self::Tap(tap) => tap.as_fd(),
            Self::Stream(stream) => stream.as_fd(),
        }
    }
}
