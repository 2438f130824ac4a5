// SPDX-License-Identifier: Apache-2.0
//! The host's side: an open tap, from which frames are read and to which they are written, one a call.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use libc::{c_int, c_uint};

use super::HEADER_LEN;
use super::pieces::Pieces;

/// An open tap (`IFF_TAP | IFF_NO_PI | IFF_VNET_HDR`), or what stands for one in a test.
#[derive(Debug)]
pub struct Tap(OwnedFd);

impl Tap {
    /// Frames go one a call through `fd`, which never blocks once [`Self::configure`] has been called.
    #[must_use]
    pub fn new(fd: OwnedFd) -> Self {
        Self(fd)
    }

    /// Makes the tap one that never blocks, speaks of frames in the device's own headers, and leaves `offloads` to the
    /// guest.
    ///
    /// # Errors
    ///
    /// `EINVAL` when the offloads do not go together, `EBADFD` when the tap has lost its interface, `ENOTTY` when it is
    /// none.
    pub(super) fn configure(&self, offloads: c_uint) -> io::Result<()> {
        rustix::io::ioctl_fionbio(&self.0, true)?;
        let header_len = HEADER_LEN as c_int;
        // SAFETY: the descriptor is open, and the kernel reads one int at the address, which outlives the call.
        succeeded(unsafe { libc::ioctl(self.0.as_raw_fd(), libc::TUNSETVNETHDRSZ, &raw const header_len) })?;
        // SAFETY: the descriptor is open, and the argument is a number.
        succeeded(unsafe { libc::ioctl(self.0.as_raw_fd(), libc::TUNSETOFFLOAD, libc::c_ulong::from(offloads)) })
    }

    /// Reads one frame into the first `count` of `pieces` and returns its length; what does not fit is lost.
    ///
    /// # Errors
    ///
    /// `EAGAIN` when there is none, others when the tap has gone.
    pub(super) fn read(&self, pieces: &Pieces, count: usize) -> io::Result<usize> {
        let iovecs = pieces.first(count);
        transferred(|| {
            // SAFETY: each iovec is guest memory, which `Pieces` keeps to. The guest may look at it meanwhile; nothing in
            // the VMM refers to it.
            unsafe { libc::readv(self.0.as_raw_fd(), iovecs.as_ptr(), iovecs.len() as c_int) }
        })
    }

    /// Writes what is in `pieces` as one frame.
    ///
    /// # Errors
    ///
    /// `EAGAIN` when there is no room for it, others when the frame is not to the kernel's liking or the tap has gone.
    pub(super) fn write(&self, pieces: &Pieces) -> io::Result<usize> {
        let iovecs = pieces.all();
        transferred(|| {
            // SAFETY: as in `read`; the kernel only reads.
            unsafe { libc::writev(self.0.as_raw_fd(), iovecs.as_ptr(), iovecs.len() as c_int) }
        })
    }
}

impl AsFd for Tap {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

fn succeeded(result: c_int) -> io::Result<()> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// Calls until it is not interrupted.
fn transferred(call: impl Fn() -> isize) -> io::Result<usize> {
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
