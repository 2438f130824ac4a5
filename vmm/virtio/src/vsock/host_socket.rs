// SPDX-License-Identifier: Apache-2.0
//! The host's end of a connection: a Unix stream socket that never blocks, and what epoll is asked about it.
//!
//! Writing relies on `SIGPIPE` being ignored, as Rust's runtime has it.

use std::io::{self, ErrorKind, IoSlice, Read, Write};
use std::net::Shutdown;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;

use vm_memory::{ReadVolatile, VolatileMemoryError, VolatileSlice, WriteVolatile};

use crate::worker::{Interest, Poller};

/// Most bytes that are thrown away when a socket is closed: more than a socket's queue can hold.
const MAX_DISCARD: usize = 8 * 1024 * 1024;

/// What came of reading or writing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Transfer {
    /// That many bytes went over, at least one.
    Moved(usize),
    /// Not now.
    WouldBlock,
    /// Never again: the end of the stream when reading, nobody there when writing.
    Ended,
}

/// The socket.
#[derive(Debug)]
pub(super) struct HostSocket {
    stream: UnixStream,
    token: u64,
    /// What epoll is asked for; `None` when the socket is not in its set.
    interest: Option<Interest>,
    /// Reading may give something: bytes, or the end. Epoll is not asked again before it has been tried.
    readable: bool,
    /// Both directions are closed: reading gives what is left and then the end, and epoll has nothing more to say.
    hung_up: bool,
}

impl HostSocket {
    /// Takes a socket that is not in epoll's set.
    ///
    /// # Errors
    ///
    /// When it cannot be made non-blocking.
    pub(super) fn new(stream: UnixStream, token: u64) -> io::Result<Self> {
        stream.set_nonblocking(true)?;
        Ok(Self { stream, token, interest: None, readable: false, hung_up: false })
    }

    /// Whether reading may give something.
    pub(super) fn is_readable(&self) -> bool {
        self.readable
    }

    /// Whether both directions are closed.
    pub(super) fn is_hung_up(&self) -> bool {
        self.hung_up
    }

    /// Takes note of what epoll says.
    pub(super) fn note(&mut self, flags: Interest, poller: &Poller) {
        if flags.intersects(Interest::HUP | Interest::ERR) && !self.hung_up {
            self.hung_up = true;
            // It would tell of the hang-up again and again. Not being in the set is what is wanted.
            let _ = poller.remove(&self.stream);
            self.interest = None;
        }
        if self.hung_up || flags.contains(Interest::IN) {
            self.readable = true;
        }
    }

    /// Has epoll tell when the socket can be read or written, as far as that is wanted; about a hang-up it always tells.
    ///
    /// # Errors
    ///
    /// When the host's kernel has no room for it.
    pub(super) fn watch(&mut self, poller: &Poller, read: bool, write: bool) -> io::Result<()> {
        let mut interest = Interest::empty();
        interest.set(Interest::IN, read && !self.readable);
        interest.set(Interest::OUT, write);
        if self.hung_up || self.interest == Some(interest) {
            return Ok(());
        }
        match self.interest {
            None => poller.add(&self.stream, self.token, interest)?,
            Some(_) => poller.modify(&self.stream, self.token, interest)?,
        }
        self.interest = Some(interest);
        Ok(())
    }

    /// Reads into guest memory, `data.len()` bytes (at least one) at most.
    pub(super) fn read(&mut self, data: &mut VolatileSlice<'_>) -> Transfer {
        let wanted = data.len();
        let transfer = loop {
            match (&self.stream).read_volatile(data) {
                Ok(0) => break Transfer::Ended,
                Ok(count) => break Transfer::Moved(count),
                Err(error) => match failure(error) {
                    Some(transfer) => break transfer,
                    None => continue,
                },
            }
        };
        // A short read has emptied the socket; epoll tells of what comes later, but not once there was a hang-up.
        let emptied = matches!(transfer, Transfer::Moved(count) if count < wanted) && !self.hung_up;
        if emptied || transfer == Transfer::WouldBlock {
            self.readable = false;
        }
        transfer
    }

    /// Writes from guest memory.
    pub(super) fn write(&mut self, data: &VolatileSlice<'_>) -> Transfer {
        loop {
            match (&self.stream).write_volatile(data) {
                Ok(0) => return Transfer::WouldBlock,
                Ok(count) => return Transfer::Moved(count),
                Err(error) => match failure(error) {
                    Some(transfer) => return transfer,
                    None => continue,
                },
            }
        }
    }

    /// Writes from our own memory.
    pub(super) fn write_vectored(&mut self, data: &[IoSlice<'_>]) -> Transfer {
        loop {
            match (&self.stream).write_vectored(data) {
                Ok(0) => return Transfer::WouldBlock,
                Ok(count) => return Transfer::Moved(count),
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) if error.kind() == ErrorKind::WouldBlock => return Transfer::WouldBlock,
                Err(_) => return Transfer::Ended,
            }
        }
    }

    /// The guest sends nothing more: the host reads the end of the stream after the last byte.
    pub(super) fn end_writing(&self) {
        // Fails only when the peer is gone, and then there is nobody to tell.
        let _ = self.stream.shutdown(Shutdown::Write);
    }

    /// The guest takes nothing more: who writes to the host's end gets `EPIPE`, and what was written is thrown away.
    pub(super) fn end_reading(&mut self) {
        let _ = self.stream.shutdown(Shutdown::Read);
        self.readable = false;
        // Closing a socket that holds unread bytes would show its peer `ECONNRESET` in place of the end of the stream.
        let mut piece = [0; 16 * 1024];
        let mut discarded = 0;
        while discarded < MAX_DISCARD {
            match (&self.stream).read(&mut piece) {
                Ok(count) if count > 0 => discarded += count,
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                _ => break,
            }
        }
    }
}

impl AsFd for HostSocket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.stream.as_fd()
    }
}

/// What a failed transfer means; `None` says to try again.
fn failure(error: VolatileMemoryError) -> Option<Transfer> {
    match error {
        VolatileMemoryError::IOError(error) => match error.kind() {
            ErrorKind::Interrupted => None,
            ErrorKind::WouldBlock => Some(Transfer::WouldBlock),
            _ => Some(Transfer::Ended),
        },
        _ => Some(Transfer::Ended),
    }
}
