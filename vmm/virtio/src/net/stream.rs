// SPDX-License-Identifier: Apache-2.0
//! The host's side as a connected stream socket, as QEMU's `-netdev stream` and passt(1) speak on it: each frame comes behind
//! its length, 4 bytes of which the first is the most significant.
//!
//! A stream may be cut anywhere. What has come of a frame waits here for its rest, and what the socket does not take at once
//! waits here until it does; both in buffers whose size is fixed. They are the socket's and not the queues': the other end
//! would take anything for a length if a frame ended early because the guest resets its device.

use std::io;
use std::ops::RangeInclusive;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Mutex, MutexGuard, PoisonError};

use rustix::io::{Errno, retry_on_intr};
use rustix::net::{RecvFlags, SendFlags, recv, send};

use super::HEADER_LEN;
use super::notice::Notice;
use super::pieces::Pieces;

/// Bytes of a length.
const LENGTH_LEN: usize = 4;
/// What a frame may have: at least an Ethernet header, at most what passt takes (`ETH_MAX_MTU`).
const FRAME_LEN: RangeInclusive<usize> = 14..=65_535;
/// Room in each direction: a few of the longest frames.
const BUFFER_LEN: usize = 256 << 10;

/// A socket that carries frames.
#[derive(Debug)]
pub struct Stream {
    socket: OwnedFd,
    incoming: Mutex<Incoming>,
    outgoing: Mutex<Outgoing>,
    /// Told when nothing comes any more.
    lost: Notice,
}

impl Stream {
    /// Frames go through `socket`, a connected stream socket; `lost` is told when that is of no use any more.
    #[must_use]
    pub fn new(socket: OwnedFd, lost: Notice) -> Self {
        let incoming = Incoming { bytes: vec![0; BUFFER_LEN].into(), start: 0, end: 0 };
        Self { socket, incoming: Mutex::new(incoming), outgoing: Mutex::default(), lost }
    }

    /// Reads one frame, behind an empty header, into the first `count` of `pieces` and returns its length with the header;
    /// what does not fit is lost.
    ///
    /// # Errors
    ///
    /// `EAGAIN` when there is none yet; others when none will come any more, and why.
    pub(super) fn read(&self, pieces: &Pieces, count: usize) -> io::Result<usize> {
        let mut incoming = lock(&self.incoming);
        loop {
            if let Some(len) = incoming.frame_len()? {
                let filled = pieces.write_first(count, 0, &[0; HEADER_LEN]);
                return Ok(filled + pieces.write_first(count, HEADER_LEN, incoming.take(len)));
            }
            incoming.fill(&self.socket)?;
        }
    }

    /// Whether there is a frame that needs no waiting for the socket.
    pub(super) fn has_frame(&self) -> bool {
        // What is malformed is found out by whoever reads it.
        lock(&self.incoming).frame_len().is_ok_and(|len| len.is_some())
    }

    /// Takes what is in `pieces`, behind a header, as one frame. It may wait here until [`Self::flush`].
    ///
    /// # Errors
    ///
    /// `EAGAIN` when there is no room for it, others when it is none, or nothing can be sent any more.
    pub(super) fn write(&self, pieces: &Pieces) -> io::Result<()> {
        let len = pieces.len().saturating_sub(HEADER_LEN);
        if !FRAME_LEN.contains(&len) {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        let mut outgoing = lock(&self.outgoing);
        if !outgoing.has_room(len) {
            outgoing.send(&self.socket)?;
        }
        if !outgoing.has_room(len) {
            return Err(io::ErrorKind::WouldBlock.into());
        }
        // At most 65,535.
        outgoing.0.extend((len as u32).to_be_bytes());
        pieces.append_to(&mut outgoing.0, HEADER_LEN);
        Ok(())
    }

    /// Sends what waits here, as far as the socket takes it; whether nothing is left.
    pub(super) fn flush(&self) -> bool {
        let mut outgoing = lock(&self.outgoing);
        // Where nothing can be sent any more, nothing waits: that is told by the poller, or by who reads.
        let _ = outgoing.send(&self.socket);
        outgoing.0.is_empty()
    }

    /// Tells that the socket is of no use any more.
    pub(super) fn is_lost(&self, error: &io::Error) {
        self.lost.tell(error);
    }
}

impl AsFd for Stream {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

/// Only a pair's one thread uses a stream; a panic ends the process.
fn lock<T>(buffer: &Mutex<T>) -> MutexGuard<'_, T> {
    buffer.lock().unwrap_or_else(PoisonError::into_inner)
}

/// What has come and was not handed on: the bytes from `start` to `end`, with a length in front.
#[derive(Debug)]
struct Incoming {
    bytes: Box<[u8]>,
    start: usize,
    end: usize,
}

impl Incoming {
    /// The length of the frame at the front, if all of it is there.
    fn frame_len(&self) -> io::Result<Option<usize>> {
        let Some((len, rest)) = self.bytes[self.start..self.end].split_first_chunk::<LENGTH_LEN>() else {
            return Ok(None);
        };
        let len = usize::try_from(u32::from_be_bytes(*len)).unwrap_or(usize::MAX);
        if !FRAME_LEN.contains(&len) {
            let (min, max) = FRAME_LEN.into_inner();
            let message = format!("a frame of {len} bytes was announced, which may have {min} to {max}");
            return Err(io::Error::new(io::ErrorKind::InvalidData, message));
        }
        Ok((rest.len() >= len).then_some(len))
    }

    /// Takes the frame at the front, which has that length.
    fn take(&mut self, len: usize) -> &[u8] {
        let begin = self.start + LENGTH_LEN;
        self.start = begin + len;
        &self.bytes[begin..self.start]
    }

    /// Reads what the socket has, behind a frame that is not whole.
    fn fill(&mut self, socket: &OwnedFd) -> io::Result<()> {
        self.bytes.copy_within(self.start..self.end, 0);
        (self.start, self.end) = (0, self.end - self.start);
        // There is room: the longest frame does not fill it.
        let room = &mut self.bytes[self.end..];
        let count = retry_on_intr(|| recv(socket, &mut *room, RecvFlags::DONTWAIT).map(|(_, count)| count))?;
        if count == 0 {
            let message = "the other end of its socket was closed";
            return Err(io::Error::new(io::ErrorKind::UnexpectedEof, message));
        }
        self.end += count;
        Ok(())
    }
}

/// What was taken and not sent yet: frames behind their lengths, of which the first may have gone in part.
#[derive(Debug, Default)]
struct Outgoing(Vec<u8>);

impl Outgoing {
    fn has_room(&self, len: usize) -> bool {
        self.0.len() + LENGTH_LEN + len <= BUFFER_LEN
    }

    /// Sends as much as the socket takes. After an error that is final, nothing is left.
    fn send(&mut self, socket: &OwnedFd) -> io::Result<()> {
        let mut sent = 0;
        while sent < self.0.len() {
            match retry_on_intr(|| send(socket, &self.0[sent..], SendFlags::DONTWAIT | SendFlags::NOSIGNAL)) {
                Ok(count) => sent += count,
                Err(Errno::AGAIN) => break,
                Err(error) => {
                    self.0.clear();
                    return Err(error.into());
                }
            }
        }
        self.0.drain(..sent);
        Ok(())
    }
}
