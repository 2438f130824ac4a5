// SPDX-License-Identifier: Apache-2.0
//! All connections: finds the one that a packet or an event belongs to, makes new ones from either side, and picks whose
//! packet the guest gets next, in turn.

use std::collections::hash_map::Entry;
use std::collections::{HashMap, VecDeque};
use std::io::ErrorKind;
use std::os::unix::net::{UnixListener, UnixStream};

use vm_memory::VolatileSlice;

use super::VsockConfig;
use super::bridge::{Bridge, Fate};
use super::connection::{Connection, ConnectionId};
use super::handshake::{Handshake, Progress};
use super::host_socket::HostSocket;
use super::packet::{FromGuest, HOST_CID, Header, Operation, TYPE_STREAM};
use crate::worker::{Event, Interest, Poller};

/// Most connections at once, with the clients that have not yet said which port they want. A quarter of the usual limit
/// of descriptors is left to the rest of the VMM.
pub const MAX_CONNECTIONS: usize = 768;

/// Most resets, for packets that belong to no connection, that wait for room in the receive queue. While that many do, no
/// packet is taken from the guest.
pub const MAX_WAITING_RESETS: usize = 256;

/// The token of the listening socket. Below [`FIRST_HOST_PORT`], so that it is none of those below; smaller ones are free
/// for queues.
const LISTENER_TOKEN: u64 = 0x100;

/// The first of the ports that connections from the host have on their side. Their clients' tokens are these ports; a
/// connection's token is its two ports, the host's, which is never 0, in the upper half.
const FIRST_HOST_PORT: u32 = 0x4000_0000;

/// All connections of one device.
#[derive(Debug)]
pub struct Muxer {
    guest_cid: u64,
    listener: UnixListener,
    /// Whether epoll watches the listener.
    accepting: bool,
    /// The stream for the agent, until it is connected.
    agent: Option<UnixStream>,
    agent_port: u32,
    poller: Poller,
    clients: HashMap<u32, (UnixStream, Handshake)>,
    bridges: HashMap<ConnectionId, Bridge>,
    /// Connections that have something for the guest, each once.
    ready: VecDeque<ConnectionId>,
    resets: VecDeque<Header>,
    next_port: u32,
}

impl Muxer {
    /// No connections; clients of the listener are served once `poller` tells of them.
    ///
    /// # Errors
    ///
    /// When the listener cannot be made non-blocking or watched.
    pub fn new(config: VsockConfig, poller: Poller) -> std::io::Result<Self> {
        config.listener.set_nonblocking(true)?;
        let mut muxer = Self {
            guest_cid: config.guest_cid,
            listener: config.listener,
            accepting: false,
            agent: config.agent,
            agent_port: config.agent_port,
            poller,
            clients: HashMap::new(),
            bridges: HashMap::new(),
            ready: VecDeque::new(),
            resets: VecDeque::new(),
            next_port: FIRST_HOST_PORT,
        };
        muxer.watch_listener()?;
        Ok(muxer)
    }

    /// The descriptors whose events belong to [`Self::handle`], except those that the caller has added.
    #[must_use]
    pub fn poller(&self) -> &Poller {
        &self.poller
    }

    /// Drops all connections, and returns what is left: the listener, and the agent's stream if it was never connected.
    #[must_use]
    pub fn into_config(self) -> VsockConfig {
        VsockConfig {
            guest_cid: self.guest_cid,
            listener: self.listener,
            agent: self.agent,
            agent_port: self.agent_port,
        }
    }

    /// Drops all connections and takes no new ones: the device has failed.
    pub fn close(&mut self) {
        self.agent = None;
        self.clients.clear();
        self.bridges.clear();
        self.ready.clear();
        self.resets.clear();
        if std::mem::take(&mut self.accepting) {
            // Not being in the set is what is wanted.
            let _ = self.poller.remove(&self.listener);
        }
    }

    /// Whether a packet may be taken from the guest. If not, packets for the guest have to go first.
    #[must_use]
    pub fn can_receive(&self) -> bool {
        self.resets.len() < MAX_WAITING_RESETS
    }

    /// What a chain of the transmit queue holds.
    pub fn receive(&mut self, from_guest: &FromGuest<'_>) {
        let (header, data, lost) = match from_guest {
            FromGuest::Packet(header, data) => (header, &data[..], false),
            FromGuest::DataLost(header) => (header, &[][..], true),
            FromGuest::Nothing => return,
        };
        if header.src_cid != self.guest_cid {
            return;
        }
        let id = ConnectionId::of(header);
        // Ports alone name a connection only among streams to the host.
        let is_ours = header.dst_cid == HOST_CID && header.kind == TYPE_STREAM;
        if let Some(bridge) = self.bridges.get_mut(&id).filter(|_| is_ours) {
            if lost {
                bridge.break_off();
            } else {
                bridge.receive(header, data);
            }
        } else if !is_ours || lost || !self.connect_agent(header) {
            return self.refuse(header);
        }
        self.settle(id);
    }

    /// Whether [`Self::next_packet`] may have a packet.
    #[must_use]
    pub fn has_packet(&self) -> bool {
        !self.resets.is_empty() || !self.ready.is_empty()
    }

    /// The next packet for the guest; its data has been put at the start of `room`, which has room for at least a byte.
    pub fn next_packet(&mut self, room: &VolatileSlice<'_>) -> Option<Header> {
        if let Some(reset) = self.resets.pop_front() {
            return Some(reset);
        }
        while let Some(id) = self.ready.pop_front() {
            let Some(bridge) = self.bridges.get_mut(&id) else { continue };
            bridge.queued = false;
            let packet = bridge.next_packet(room);
            self.settle(id);
            if packet.is_some() {
                return packet;
            }
        }
        None
    }

    /// An event of a descriptor that belongs here. Others, and those of connections that are gone, are ignored.
    pub fn handle(&mut self, event: Event) {
        let host_port = (event.token >> 32) as u32;
        let low = (event.token & u64::from(u32::MAX)) as u32;
        if event.token == LISTENER_TOKEN {
            self.accept();
        } else if host_port == 0 {
            self.read_handshake(low, event.flags);
        } else {
            let id = ConnectionId { host_port, guest_port: low };
            if let Some(bridge) = self.bridges.get_mut(&id) {
                bridge.note(event.flags, &self.poller);
                self.settle(id);
            }
        }
    }

    /// Connects the guest to the agent's stream, if that is what a packet asks for and it has not been given away.
    fn connect_agent(&mut self, header: &Header) -> bool {
        if Operation::of(header) != Some(Operation::Request) || header.dst_port != self.agent_port || self.is_full() {
            return false;
        }
        let Some(stream) = self.agent.take() else { return false };
        let id = ConnectionId::of(header);
        let Ok(socket) = HostSocket::new(stream, token(id)) else { return false };
        self.bridges.insert(id, Bridge::new(Connection::from_guest(header), socket));
        true
    }

    /// Answers a packet that belongs to no connection by a reset, unless it is one.
    fn refuse(&mut self, header: &Header) {
        if Operation::of(header) != Some(Operation::Reset) {
            self.resets.push_back(Header {
                src_cid: header.dst_cid,
                dst_cid: header.src_cid,
                src_port: header.dst_port,
                dst_port: header.src_port,
                kind: header.kind,
                op: Operation::Reset as u16,
                ..Header::default()
            });
        }
    }

    /// Draws the consequences of what has happened to a connection.
    fn settle(&mut self, id: ConnectionId) {
        let Entry::Occupied(mut entry) = self.bridges.entry(id) else { return };
        let bridge = entry.get_mut();
        let fate = bridge.settle(&self.poller);
        if fate == Fate::Keep {
            if bridge.has_packet() && !bridge.queued {
                bridge.queued = true;
                self.ready.push_back(id);
            }
            return;
        }
        if fate == Fate::Reset {
            self.resets.push_back(bridge.connection.send(Operation::Reset));
        }
        if entry.remove().queued {
            // At most one entry; a later connection of the same name must not find it.
            self.ready.retain(|&queued| queued != id);
        }
        self.resume_accepting();
    }

    fn is_full(&self) -> bool {
        self.bridges.len() + self.clients.len() >= MAX_CONNECTIONS
    }

    fn watch_listener(&mut self) -> std::io::Result<()> {
        self.poller.add(&self.listener, LISTENER_TOKEN, Interest::IN)?;
        self.accepting = true;
        Ok(())
    }

    fn pause_accepting(&mut self) {
        if std::mem::take(&mut self.accepting) {
            // Fails only when it is not watched, which is what is wanted.
            let _ = self.poller.remove(&self.listener);
        }
    }

    /// A connection or client has gone: there is room again.
    fn resume_accepting(&mut self) {
        if !self.accepting {
            // Should the host's kernel have no room to watch it, the next connection that goes tries again.
            let _ = self.watch_listener();
        }
    }

    /// Takes clients that wait, as long as there is room. Those that find none wait in the listener's backlog.
    fn accept(&mut self) {
        while self.accepting {
            if self.is_full() {
                return self.pause_accepting();
            }
            match self.listener.accept() {
                Ok((stream, _)) => self.greet(stream),
                Err(error) => match error.kind() {
                    ErrorKind::WouldBlock => return,
                    ErrorKind::Interrupted | ErrorKind::ConnectionAborted => {}
                    // No descriptors or memory: waiting for it would be a busy loop.
                    _ => return self.pause_accepting(),
                },
            }
        }
    }

    fn greet(&mut self, stream: UnixStream) {
        let port = self.free_host_port();
        // A client that cannot be watched is turned away by closing its socket.
        if stream.set_nonblocking(true).is_ok() && self.poller.add(&stream, u64::from(port), Interest::IN).is_ok() {
            self.clients.insert(port, (stream, Handshake::new()));
            // Most clients have said their line by now.
            self.read_handshake(port, Interest::IN);
        }
    }

    fn read_handshake(&mut self, port: u32, flags: Interest) {
        let Entry::Occupied(mut entry) = self.clients.entry(port) else { return };
        let (stream, handshake) = entry.get_mut();
        let progress = handshake.read(stream);
        if progress == Progress::Waiting && !flags.intersects(Interest::HUP | Interest::ERR) {
            return;
        }
        let (stream, _) = entry.remove();
        // The connection has a token of its own.
        let _ = self.poller.remove(&stream);
        let Progress::Port(guest_port) = progress else { return self.resume_accepting() };
        let id = ConnectionId { host_port: port, guest_port };
        if let Ok(socket) = HostSocket::new(stream, token(id)) {
            self.bridges.insert(id, Bridge::new(Connection::from_host(id, self.guest_cid), socket));
            self.settle(id);
        }
    }

    /// A port that no connection from the host has; there are far more of them than connections.
    fn free_host_port(&mut self) -> u32 {
        loop {
            let port = self.next_port;
            self.next_port = port.checked_add(1).unwrap_or(FIRST_HOST_PORT);
            let taken = port == self.agent_port
                || self.clients.contains_key(&port)
                || self.bridges.keys().any(|id| id.host_port == port);
            if !taken {
                return port;
            }
        }
    }
}

/// The token of a connection's socket.
fn token(id: ConnectionId) -> u64 {
    u64::from(id.host_port) << 32 | u64::from(id.guest_port)
}

#[cfg(test)]
mod tests;
