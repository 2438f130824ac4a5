// SPDX-License-Identifier: Apache-2.0
//! The host's side: an open tap, from which frames are read and to which they are written, one a call.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use libc::{c_int, c_uint};

use super::HEADER_LEN;
use super::filter::TapFilter;
use super::pieces::Pieces;

/// A queue of an open tap (`IFF_TAP | IFF_NO_PI | IFF_VNET_HDR`), or what stands for one in a test.
#[derive(Debug)]
pub struct Tap(OwnedFd);

impl Tap {
    /// Frames go one a call through `fd`, which must never block.
    #[must_use]
    pub fn new(fd: OwnedFd) -> Self {
        Self(fd)
    }

    /// Makes the descriptor one that never blocks.
    ///
    /// # Errors
    ///
    /// None that are known.
    pub(super) fn never_block(&self) -> io::Result<()> {
        Ok(rustix::io::ioctl_fionbio(&self.0, true)?)
    }

    /// Makes the tap, with all of its queues, one that speaks of frames in the device's own headers, and leaves `offloads`
    /// to the guest.
    ///
    /// # Errors
    ///
    /// `EINVAL` when the offloads do not go together, `EBADFD` when the tap has lost its interface, `ENOTTY` when it is
    /// none.
    pub(super) fn configure(&self, offloads: c_uint) -> io::Result<()> {
        let header_len = HEADER_LEN as c_int;
        // SAFETY: the descriptor is open, and the kernel reads one int at the address, which outlives the call.
        succeeded(unsafe { libc::ioctl(self.0.as_raw_fd(), libc::TUNSETVNETHDRSZ, &raw const header_len) })?;
        // SAFETY: the descriptor is open, and the argument is a number.
        succeeded(unsafe { libc::ioctl(self.0.as_raw_fd(), libc::TUNSETOFFLOAD, libc::c_ulong::from(offloads)) })
    }

    /// Makes this descriptor's queue, of a tap that has several, one that the host's frames are given to, or takes it out.
    ///
    /// # Errors
    ///
    /// `EINVAL` when the tap has a single queue, or is none.
    pub(super) fn take_part(&self, part: bool) -> io::Result<()> {
        // SAFETY: an all-zero `ifreq` is valid: it is plain data.
        let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
        let flags = if part { libc::IFF_ATTACH_QUEUE } else { libc::IFF_DETACH_QUEUE };
        request.ifr_ifru.ifru_flags = flags as libc::c_short;
        // SAFETY: the descriptor is open, and the kernel reads one `ifreq` at the address, which outlives the call.
        succeeded(unsafe { libc::ioctl(self.0.as_raw_fd(), libc::TUNSETQUEUE, &raw const request) })
    }

    /// Makes the host's kernel drop the frames that the guest does not want.
    ///
    /// # Errors
    ///
    /// `ENOTTY` when it is no tap.
    pub(super) fn filter(&self, filter: &TapFilter) -> io::Result<()> {
        let bytes = filter.to_bytes();
        // SAFETY: the descriptor is open, and the kernel reads a `tun_filter` and as many addresses as that says, all of
        // which `bytes` holds (`TapFilter::to_bytes`), at the address.
        succeeded(unsafe { libc::ioctl(self.0.as_raw_fd(), libc::TUNSETTXFILTER, bytes.as_ptr()) })
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
