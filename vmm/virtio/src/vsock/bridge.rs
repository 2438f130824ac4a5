// SPDX-License-Identifier: Apache-2.0
//! A connection's protocol and the host's socket, joined: bytes go straight from one to the other as far as both let them.

use std::io::{self, IoSlice};

use vm_memory::VolatileSlice;

use super::connection::{Connection, Outcome};
use super::host_socket::{HostSocket, Transfer};
use super::packet::Header;
use super::tx_buffer::TxBuffer;
use crate::worker::{Interest, Poller};

/// What becomes of a connection after something has happened to it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Fate {
    /// It goes on.
    Keep,
    /// It has ended, and both sides know.
    Forget,
    /// It has ended, and the guest is to be told by a reset.
    Reset,
}

/// A connection.
#[derive(Debug)]
pub(super) struct Bridge {
    pub(super) connection: Connection,
    socket: HostSocket,
    /// The guest's bytes that the socket has not yet taken.
    tx: TxBuffer,
    /// The guest broke the protocol, or the host's kernel refuses to watch the socket.
    broken: bool,
    writing_ended: bool,
    reading_ended: bool,
    /// In the queue of those that have something for the guest.
    pub(super) queued: bool,
}

impl Bridge {
    pub(super) fn new(connection: Connection, socket: HostSocket) -> Self {
        Self {
            connection,
            socket,
            tx: TxBuffer::default(),
            broken: false,
            writing_ended: false,
            reading_ended: false,
            queued: false,
        }
    }

    /// A packet from the guest, with its data, if it has any, in pieces.
    pub(super) fn receive(&mut self, header: &Header, data: &[VolatileSlice<'_>]) {
        let len: usize = data.iter().map(VolatileSlice::len).sum();
        match self.connection.receive(header, u32::try_from(len).unwrap_or(u32::MAX)) {
            Outcome::Connected => {
                let answer = format!("OK {}\n", header.dst_port);
                // Nothing else is in the socket yet, so a line goes in as a whole or the client is gone.
                if self.socket.write_vectored(&[IoSlice::new(answer.as_bytes())]) != Transfer::Moved(answer.len()) {
                    self.host_stops_receiving();
                }
            }
            Outcome::Data => data.iter().for_each(|piece| self.forward(piece)),
            Outcome::Violation => self.broken = true,
            Outcome::Noted | Outcome::ShutDown | Outcome::Gone => {}
        }
    }

    /// Bytes of the guest's stream are lost.
    pub(super) fn break_off(&mut self) {
        self.broken = true;
    }

    /// A piece of the guest's data goes to the socket, and what the socket does not take into the buffer.
    fn forward(&mut self, data: &VolatileSlice<'_>) {
        let mut rest = *data;
        while self.connection.host_receives() && self.tx.is_empty() && !rest.is_empty() {
            match self.socket.write(&rest) {
                Transfer::Moved(count) => {
                    self.connection.forwarded(count);
                    let Ok(after) = rest.offset(count) else { return };
                    rest = after;
                }
                Transfer::WouldBlock => break,
                Transfer::Ended => self.host_stops_receiving(),
            }
        }
        if !self.connection.host_receives() {
            self.connection.forwarded(rest.len());
        } else if self.tx.push(&rest) < rest.len() {
            // The credit is never larger than the buffer, so this would be our own mistake; lose no byte silently.
            self.broken = true;
        }
    }

    /// What epoll says about the socket.
    pub(super) fn note(&mut self, flags: Interest, poller: &Poller) {
        self.socket.note(flags, poller);
        if self.socket.is_hung_up() {
            self.host_stops_receiving();
            if !self.connection.guest_receives() {
                self.connection.host_stops_sending();
            }
        } else if flags.contains(Interest::OUT) {
            self.flush();
        }
    }

    /// Writes from the buffer what the socket takes.
    fn flush(&mut self) {
        while !self.tx.is_empty() {
            match self.socket.write_vectored(&self.tx.as_io_slices()) {
                Transfer::Moved(count) => {
                    self.tx.consume(count);
                    self.connection.forwarded(count);
                }
                Transfer::WouldBlock => return,
                Transfer::Ended => self.host_stops_receiving(),
            }
        }
    }

    fn host_stops_receiving(&mut self) {
        self.tx.clear();
        self.connection.host_stops_receiving();
    }

    /// Whether [`Self::next_packet`] has something to send, or would find out by reading the socket.
    pub(super) fn has_packet(&self) -> bool {
        self.wants_to_read() || self.connection.due(self.socket.is_readable()).is_some()
    }

    fn wants_to_read(&self) -> bool {
        self.socket.is_readable() && self.connection.data_allowance() > 0
    }

    /// The next packet for the guest. Its data, if it has any, has been put at the start of `room`.
    pub(super) fn next_packet(&mut self, room: &VolatileSlice<'_>) -> Option<Header> {
        if self.wants_to_read() {
            let allowance = usize::try_from(self.connection.data_allowance()).unwrap_or(usize::MAX);
            if let Ok(mut room) = room.subslice(0, room.len().min(allowance)) {
                match self.socket.read(&mut room) {
                    Transfer::Moved(count) => return Some(self.connection.send_data(count as u32)),
                    Transfer::WouldBlock => {}
                    Transfer::Ended => self.connection.host_stops_sending(),
                }
            }
        }
        let operation = self.connection.due(self.socket.is_readable())?;
        Some(self.connection.send(operation))
    }

    /// Passes on what the guest has shut down, asks epoll for what matters now, and says what becomes of the connection.
    pub(super) fn settle(&mut self, poller: &Poller) -> Fate {
        if self.broken {
            return if self.connection.is_known_to_guest() { Fate::Reset } else { Fate::Forget };
        }
        if !self.connection.guest_receives() && !self.reading_ended {
            self.reading_ended = true;
            self.socket.end_reading();
        }
        if !self.connection.guest_sends() && self.tx.is_empty() {
            if self.reading_ended {
                return if self.connection.guest_is_gone() { Fate::Forget } else { Fate::Reset };
            }
            if !self.writing_ended {
                self.writing_ended = true;
                self.socket.end_writing();
            }
        }
        if self.watch(poller).is_err() {
            self.broken = true;
            return self.settle(poller);
        }
        Fate::Keep
    }

    fn watch(&mut self, poller: &Poller) -> io::Result<()> {
        self.socket.watch(poller, self.connection.may_read_host(), !self.tx.is_empty())
    }
}

impl Drop for Bridge {
    fn drop(&mut self) {
        if !self.reading_ended {
            self.socket.end_reading();
        }
    }
}
