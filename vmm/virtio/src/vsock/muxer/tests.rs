// SPDX-License-Identifier: Apache-2.0
//! Real sockets on the host's side, and packets in memory on the guest's.

use std::io::{Read, Write};
use std::net::Shutdown;
use std::path::PathBuf;
use std::time::Duration;

use super::*;
use crate::vsock::RECEIVE_BUFFER_SIZE;
use crate::vsock::packet::{SHUTDOWN_BOTH, SHUTDOWN_RECEIVE, SHUTDOWN_SEND};

const GUEST_CID: u64 = 3;
const AGENT_PORT: u32 = 1024;
const GUEST_BUFFER: u32 = 64 * 1024;

/// A packet that the guest got.
#[derive(Debug, PartialEq, Eq)]
struct Got {
    header: Header,
    data: Vec<u8>,
}

impl Got {
    fn operation(&self) -> Operation {
        Operation::of(&self.header).unwrap()
    }
}

struct Bench {
    muxer: Muxer,
    agent: UnixStream,
    path: PathBuf,
    _dir: tempfile::TempDir,
}

impl Bench {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("vsock.sock");
        let (agent, ours) = UnixStream::pair().unwrap();
        let config = VsockConfig {
            guest_cid: GUEST_CID,
            listener: UnixListener::bind(&path).unwrap(),
            agent: Some(ours),
            agent_port: AGENT_PORT,
        };
        Self { muxer: Muxer::new(config, Poller::new().unwrap()).unwrap(), agent, path, _dir: dir }
    }

    /// Lets the muxer handle what its sockets have; panics if that never ends, as a busy loop.
    fn poll(&mut self) {
        let mut events = Vec::new();
        for _ in 0..10_000 {
            self.muxer.poller().wait(&mut events, Some(Duration::ZERO)).unwrap();
            if events.is_empty() {
                return;
            }
            for event in &events {
                self.muxer.handle(*event);
            }
            if self.muxer.has_packet() {
                return;
            }
        }
        panic!("events without end: {events:?}");
    }

    /// Whether the poller sleeps when nothing happens.
    fn is_quiet(&mut self) -> bool {
        let mut events = Vec::new();
        self.muxer.poller().wait(&mut events, Some(Duration::ZERO)).unwrap();
        events.is_empty()
    }

    /// What the guest gets next, in buffers of `room` bytes.
    fn next_of(&mut self, room: usize) -> Option<Got> {
        self.poll();
        let mut data = vec![0; room];
        let header = self.muxer.next_packet(&VolatileSlice::from(&mut data[..]))?;
        data.truncate(header.len as usize);
        Some(Got { header, data })
    }

    fn next(&mut self) -> Option<Got> {
        self.next_of(4096)
    }

    fn expect(&mut self, operation: Operation) -> Got {
        let got = self.next().unwrap_or_else(|| panic!("no packet, expected {operation:?}"));
        assert_eq!(got.operation(), operation, "{got:?}");
        got
    }

    fn send(&mut self, header: Header, data: &[u8]) {
        let mut data = data.to_vec();
        let header = Header { len: data.len() as u32, ..header };
        // In two pieces, as Linux sends larger ones.
        let middle = data.len() / 3;
        let (first, second) = data.split_at_mut(middle);
        let pieces = vec![VolatileSlice::from(first), VolatileSlice::from(second)];
        assert!(self.muxer.can_receive());
        self.muxer.receive(&FromGuest::Packet(header, pieces));
    }

    /// A client that has written `CONNECT port`.
    fn client(&mut self, port: u32) -> UnixStream {
        let mut client = UnixStream::connect(&self.path).unwrap();
        client.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
        client.write_all(format!("CONNECT {port}\n").as_bytes()).unwrap();
        client
    }

    /// A client that is connected to the guest's port 1025, and the header of the guest's packets on that connection.
    fn connected(&mut self) -> (UnixStream, Header) {
        let mut client = self.client(1025);
        let request = self.expect(Operation::Request).header;
        let guest = answer(&request);
        self.send(with(guest, Operation::Response), &[]);
        let mut line = [0; 64];
        let len = client.read(&mut line).unwrap();
        assert_eq!(line[..len], *format!("OK {}\n", request.src_port).as_bytes());
        (client, guest)
    }
}

/// A header of the guest on the connection of a packet that it got.
fn answer(got: &Header) -> Header {
    Header {
        src_cid: GUEST_CID,
        dst_cid: HOST_CID,
        src_port: got.dst_port,
        dst_port: got.src_port,
        kind: TYPE_STREAM,
        buf_alloc: GUEST_BUFFER,
        ..Header::default()
    }
}

fn with(header: Header, operation: Operation) -> Header {
    Header { op: operation as u16, ..header }
}

fn shutdown(header: Header, flags: u32) -> Header {
    Header { flags, ..with(header, Operation::Shutdown) }
}

fn agent_request() -> Header {
    Header {
        src_cid: GUEST_CID,
        dst_cid: HOST_CID,
        src_port: 50_000,
        dst_port: AGENT_PORT,
        kind: TYPE_STREAM,
        op: Operation::Request as u16,
        buf_alloc: GUEST_BUFFER,
        ..Header::default()
    }
}

fn read_all(stream: &mut UnixStream) -> Vec<u8> {
    stream.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
    let mut bytes = Vec::new();
    stream.read_to_end(&mut bytes).unwrap();
    bytes
}

#[test]
fn a_client_is_connected_and_bytes_flow_both_ways() {
    let mut bench = Bench::new();
    let (mut client, guest) = bench.connected();

    bench.send(with(guest, Operation::ReadWrite), b"from the guest");
    client.write_all(b"from the host").unwrap();

    let mut bytes = [0; 64];
    let len = client.read(&mut bytes).unwrap();
    assert_eq!(&bytes[..len], b"from the guest");
    let got = bench.expect(Operation::ReadWrite);
    assert_eq!(got.data, b"from the host");
    assert_eq!((got.header.src_cid, got.header.dst_cid), (HOST_CID, GUEST_CID));
    assert_eq!(got.header.fwd_cnt, 14);
    assert!(bench.next().is_none() && bench.is_quiet());
}

#[test]
fn bytes_behind_the_connect_line_belong_to_the_stream() {
    let mut bench = Bench::new();
    let mut client = UnixStream::connect(&bench.path).unwrap();
    client.write_all(b"CONNECT 7\nand then a byte").unwrap();
    client.shutdown(Shutdown::Both).unwrap();
    drop(client);

    let request = bench.expect(Operation::Request).header;
    assert_eq!(request.dst_port, 7);
    bench.send(with(answer(&request), Operation::Response), &[]);

    assert_eq!(bench.expect(Operation::ReadWrite).data, b"and then a byte");
    assert_eq!(bench.expect(Operation::Shutdown).header.flags, SHUTDOWN_BOTH);
    bench.send(with(answer(&request), Operation::Reset), &[]);
    assert!(bench.muxer.bridges.is_empty() && bench.next().is_none());
}

#[test]
fn a_client_of_a_port_that_nobody_listens_on_reads_the_end() {
    let mut bench = Bench::new();
    let mut client = bench.client(9);
    client.write_all(b"unread bytes are no reset").unwrap();
    let request = bench.expect(Operation::Request).header;

    bench.send(with(answer(&request), Operation::Reset), &[]);

    assert_eq!(read_all(&mut client), b"");
    assert!(bench.next().is_none(), "a reset is not answered");
}

#[test]
fn the_agent_is_connected_once() {
    let mut bench = Bench::new();
    bench.agent.write_all(b"early").unwrap();
    bench.send(agent_request(), &[]);
    assert_eq!(bench.expect(Operation::Response).header.src_port, AGENT_PORT);
    assert_eq!(bench.expect(Operation::ReadWrite).data, b"early");

    bench.send(Header { src_port: 50_001, ..agent_request() }, &[]);

    let reset = bench.expect(Operation::Reset).header;
    assert_eq!((reset.src_port, reset.dst_port), (AGENT_PORT, 50_001));
    bench.agent.write_all(b"still there").unwrap();
    assert_eq!(bench.expect(Operation::ReadWrite).data, b"still there");
}

#[test]
fn other_ports_and_addresses_of_the_host_are_refused() {
    let mut bench = Bench::new();
    for refused in [
        Header { dst_port: AGENT_PORT + 1, ..agent_request() },
        Header { dst_cid: 5, ..agent_request() },
        Header { kind: 2, ..agent_request() },
        Header { op: Operation::ReadWrite as u16, ..agent_request() },
        Header { op: 0, ..agent_request() },
        Header { op: 77, ..agent_request() },
    ] {
        bench.send(refused, &[]);
        let reset = bench.expect(Operation::Reset).header;
        assert_eq!((reset.src_cid, reset.dst_cid), (refused.dst_cid, refused.src_cid));
        assert_eq!((reset.src_port, reset.dst_port, reset.kind), (refused.dst_port, refused.src_port, refused.kind));
    }
    bench.send(agent_request(), &[]);
    bench.expect(Operation::Response);
}

#[test]
fn packets_from_elsewhere_and_empty_chains_are_ignored() {
    let mut bench = Bench::new();
    bench.send(Header { src_cid: 4, ..agent_request() }, &[]);
    bench.send(Header { src_cid: HOST_CID, ..agent_request() }, &[]);
    bench.send(with(agent_request(), Operation::Reset), &[]);
    bench.muxer.receive(&FromGuest::Nothing);

    assert!(bench.next().is_none());
}

#[test]
fn lost_data_resets_its_connection_only() {
    let mut bench = Bench::new();
    let (mut client, guest) = bench.connected();
    let (mut other, other_guest) = bench.connected();

    bench.muxer.receive(&FromGuest::DataLost(Header { len: 100_000, ..with(guest, Operation::ReadWrite) }));

    assert_eq!(bench.expect(Operation::Reset).header.dst_port, guest.src_port);
    assert_eq!(read_all(&mut client), b"");
    bench.send(with(other_guest, Operation::ReadWrite), b"alive");
    let mut bytes = [0; 8];
    assert_eq!(other.read(&mut bytes).unwrap(), 5);
}

#[test]
fn without_credit_the_host_waits_and_nothing_spins() {
    let mut bench = Bench::new();
    let (mut client, guest) = bench.connected();
    client.write_all(&vec![1; GUEST_BUFFER as usize + 1000]).unwrap();

    let mut sent = 0;
    while sent < GUEST_BUFFER {
        sent += bench.expect(Operation::ReadWrite).header.len;
    }
    assert_eq!(sent, GUEST_BUFFER, "not a byte beyond the credit");
    bench.expect(Operation::CreditRequest);
    assert!(bench.next().is_none() && bench.is_quiet());

    bench.send(Header { fwd_cnt: 300, ..with(guest, Operation::CreditUpdate) }, &[]);
    assert_eq!(bench.expect(Operation::ReadWrite).header.len, 300);
    bench.expect(Operation::CreditRequest);
    bench.send(Header { fwd_cnt: GUEST_BUFFER, ..with(guest, Operation::CreditUpdate) }, &[]);
    assert_eq!(bench.expect(Operation::ReadWrite).header.len, 700);
    assert!(bench.next().is_none() && bench.is_quiet());
}

#[test]
fn a_reader_that_waits_gets_every_byte_and_the_guest_its_credit() {
    let mut bench = Bench::new();
    let (mut client, guest) = bench.connected();
    let sent: Vec<u8> = (0..3 * RECEIVE_BUFFER_SIZE).map(|index| (index / 251) as u8).collect();
    let mut received = Vec::new();
    let (mut at, mut forwarded) = (0_usize, 0_u32);
    client.set_nonblocking(true).unwrap();

    while received.len() < sent.len() {
        while at < sent.len() && (at as u32).wrapping_sub(forwarded) < RECEIVE_BUFFER_SIZE {
            let free = (RECEIVE_BUFFER_SIZE - (at as u32 - forwarded)) as usize;
            let end = sent.len().min(at + free.min(60_000));
            bench.send(with(guest, Operation::ReadWrite), &sent[at..end]);
            at = end;
        }
        let mut piece = [0; 50_000];
        let len = client.read(&mut piece).unwrap();
        received.extend_from_slice(&piece[..len]);
        if let Some(got) = bench.next() {
            assert_eq!(got.operation(), Operation::CreditUpdate);
            forwarded = got.header.fwd_cnt;
        }
    }
    assert!(received == sent);
}

#[test]
fn a_guest_beyond_its_credit_is_reset() {
    let mut bench = Bench::new();
    let (client, guest) = bench.connected();
    // The socket's own buffer takes some; then ours fills.
    let mut resets = 0;
    for _ in 0..200 {
        bench.send(with(guest, Operation::ReadWrite), &vec![0; 65_536]);
        if let Some(got) = bench.next() {
            resets += usize::from(got.operation() == Operation::Reset);
            if resets > 0 {
                break;
            }
        }
    }
    assert_eq!(resets, 1);
    assert!(bench.muxer.bridges.is_empty());
    drop(client);
}

#[test]
fn the_hosts_end_of_stream_arrives_after_the_last_byte() {
    let mut bench = Bench::new();
    let (mut client, guest) = bench.connected();
    client.write_all(b"last words").unwrap();
    client.shutdown(Shutdown::Write).unwrap();

    assert_eq!(bench.next_of(4).unwrap().data, b"last");
    assert_eq!(bench.expect(Operation::ReadWrite).data, b" words");
    assert_eq!(bench.expect(Operation::Shutdown).header.flags, SHUTDOWN_SEND);
    assert!(bench.next().is_none() && bench.is_quiet());

    bench.send(with(guest, Operation::ReadWrite), b"the other way is open");
    bench.send(shutdown(guest, SHUTDOWN_BOTH), &[]);
    assert_eq!(read_all(&mut client), b"the other way is open");
    bench.expect(Operation::Reset);
    assert!(bench.muxer.bridges.is_empty());
}

#[test]
fn the_guests_end_of_stream_arrives_after_the_last_byte() {
    let mut bench = Bench::new();
    let (mut client, guest) = bench.connected();
    let sent = vec![7; RECEIVE_BUFFER_SIZE as usize];
    for piece in sent.chunks(65_536) {
        bench.send(with(guest, Operation::ReadWrite), piece);
    }
    bench.send(shutdown(guest, SHUTDOWN_SEND), &[]);
    let reader = std::thread::spawn(move || {
        let bytes = read_all(&mut client);
        (client, bytes)
    });
    while !reader.is_finished() {
        bench.poll();
    }
    let (mut client, received) = reader.join().unwrap();
    assert!(received == sent);

    client.write_all(b"the other way is open").unwrap();
    assert_eq!(bench.expect(Operation::ReadWrite).data, b"the other way is open");
    client.shutdown(Shutdown::Write).unwrap();
    assert_eq!(bench.expect(Operation::Shutdown).header.flags & SHUTDOWN_SEND, SHUTDOWN_SEND);
}

#[test]
fn a_guest_that_closes_gets_its_reset_when_all_is_delivered() {
    let mut bench = Bench::new();
    let (mut client, guest) = bench.connected();
    client.write_all(b"never read").unwrap();
    let sent = vec![9; RECEIVE_BUFFER_SIZE as usize];
    for piece in sent.chunks(65_536) {
        bench.send(with(guest, Operation::ReadWrite), piece);
    }
    bench.send(shutdown(guest, SHUTDOWN_BOTH), &[]);
    assert!(bench.next().is_none(), "not all is delivered");
    assert_eq!(client.write(b"x").unwrap_err().kind(), ErrorKind::BrokenPipe);

    let reader = std::thread::spawn(move || read_all(&mut client));
    while !reader.is_finished() {
        bench.poll();
    }

    assert!(reader.join().unwrap() == sent, "and no reset at the end");
    bench.expect(Operation::Reset);
    assert!(bench.muxer.bridges.is_empty());
}

#[test]
fn what_a_guest_sent_before_its_reset_is_delivered() {
    let mut bench = Bench::new();
    let (mut client, guest) = bench.connected();
    let sent = vec![5; RECEIVE_BUFFER_SIZE as usize];
    for piece in sent.chunks(65_536) {
        bench.send(with(guest, Operation::ReadWrite), piece);
    }
    bench.send(with(guest, Operation::Reset), &[]);
    let reader = std::thread::spawn(move || read_all(&mut client));
    while !reader.is_finished() {
        bench.poll();
    }

    assert!(reader.join().unwrap() == sent);
    assert!(bench.next().is_none() && bench.muxer.bridges.is_empty());
}

#[test]
fn a_client_that_closes_ends_both_directions() {
    let mut bench = Bench::new();
    let (mut client, guest) = bench.connected();
    client.write_all(b"bye").unwrap();
    drop(client);

    assert_eq!(bench.expect(Operation::ReadWrite).data, b"bye");
    assert_eq!(bench.expect(Operation::Shutdown).header.flags, SHUTDOWN_BOTH);
    assert!(bench.next().is_none() && bench.is_quiet());

    bench.send(with(guest, Operation::ReadWrite), b"in flight");
    assert!(bench.next().is_none());
    bench.send(with(guest, Operation::Reset), &[]);
    assert!(bench.muxer.bridges.is_empty());
}

#[test]
fn a_client_that_closes_is_told_to_a_guest_that_has_no_credit_left_to_give() {
    let mut bench = Bench::new();
    let (mut client, guest) = bench.connected();
    bench.send(Header { buf_alloc: 0, ..with(guest, Operation::CreditUpdate) }, &[]);
    client.write_all(b"later").unwrap();
    drop(client);

    assert_eq!(bench.expect(Operation::Shutdown).header.flags, SHUTDOWN_RECEIVE, "writers need not wait");
    bench.expect(Operation::CreditRequest);
    assert!(bench.next().is_none() && bench.is_quiet());
    bench.send(with(guest, Operation::CreditUpdate), &[]);
    assert_eq!(bench.expect(Operation::ReadWrite).data, b"later");
    assert_eq!(bench.expect(Operation::Shutdown).header.flags, SHUTDOWN_BOTH);
}

#[test]
fn a_reader_that_goes_away_stops_the_guests_writer() {
    let mut bench = Bench::new();
    let (client, guest) = bench.connected();
    client.shutdown(Shutdown::Read).unwrap();

    bench.send(with(guest, Operation::ReadWrite), b"nobody reads this");

    assert_eq!(bench.expect(Operation::Shutdown).header.flags, SHUTDOWN_RECEIVE);
    bench.send(with(guest, Operation::ReadWrite), &vec![0; 60_000]);
    assert!(bench.next().is_none());
    drop(client);
    assert_eq!(bench.expect(Operation::Shutdown).header.flags, SHUTDOWN_BOTH);
}

#[test]
fn a_guest_that_stops_reading_stops_the_clients_writer() {
    let mut bench = Bench::new();
    let (mut client, guest) = bench.connected();
    client.write_all(b"thrown away").unwrap();
    bench.send(shutdown(guest, SHUTDOWN_RECEIVE), &[]);

    assert_eq!(client.write(b"x").unwrap_err().kind(), ErrorKind::BrokenPipe);
    bench.send(with(guest, Operation::ReadWrite), b"the other way is open");
    bench.send(shutdown(guest, SHUTDOWN_SEND), &[]);
    assert_eq!(read_all(&mut client), b"the other way is open");
    bench.expect(Operation::Reset);
}

#[test]
fn a_supervisor_that_leaves_ends_the_agents_connection() {
    let mut bench = Bench::new();
    bench.send(agent_request(), &[]);
    bench.expect(Operation::Response);
    let (other, ours) = UnixStream::pair().unwrap();
    drop(ours);
    drop(std::mem::replace(&mut bench.agent, other));

    assert_eq!(bench.expect(Operation::Shutdown).header.flags, SHUTDOWN_BOTH);
    assert!(bench.next().is_none() && bench.is_quiet());
}

#[test]
fn a_client_that_leaves_before_it_is_connected_ends_it_in_order() {
    let mut bench = Bench::new();
    let client = bench.client(1025);
    let request = bench.expect(Operation::Request).header;
    drop(client);
    bench.poll();
    assert!(bench.next().is_none() && bench.is_quiet());

    bench.send(with(answer(&request), Operation::Response), &[]);

    assert_eq!(bench.expect(Operation::Shutdown).header.flags & SHUTDOWN_RECEIVE, SHUTDOWN_RECEIVE);
}

#[test]
fn data_before_the_response_resets() {
    let mut bench = Bench::new();
    let mut client = bench.client(1025);
    let request = bench.expect(Operation::Request).header;

    bench.send(with(answer(&request), Operation::ReadWrite), b"too early");

    bench.expect(Operation::Reset);
    assert_eq!(read_all(&mut client), b"");
}

#[test]
fn bad_lines_are_turned_away_and_slow_ones_waited_for() {
    let mut bench = Bench::new();
    let mut slow = UnixStream::connect(&bench.path).unwrap();
    slow.write_all(b"CONN").unwrap();
    for line in ["GET /\n", "CONNECT -1\n", "CONNECT 111111111111111111111111111111111111"] {
        let mut bad = UnixStream::connect(&bench.path).unwrap();
        bad.write_all(line.as_bytes()).unwrap();
        assert!(bench.next().is_none());
        // Bytes beyond the longest line stay unread, so that such a client may see a reset in place of the end.
        assert!(bad.read(&mut [0; 8]).map_or(true, |len| len == 0), "{line}");
    }
    assert!(bench.is_quiet());
    slow.write_all(b"ECT 1025\n").unwrap();

    assert_eq!(bench.expect(Operation::Request).header.dst_port, 1025);
}

#[test]
fn clients_beyond_the_bound_wait_for_a_place() {
    let mut bench = Bench::new();
    // All the places are taken without the sockets of so many clients.
    let mut places = Vec::new();
    while bench.muxer.bridges.len() + 2 <= MAX_CONNECTIONS {
        let (stream, other) = UnixStream::pair().unwrap();
        drop(other);
        let id = ConnectionId { host_port: 7, guest_port: places.len() as u32 };
        let socket = HostSocket::new(stream, token(id)).unwrap();
        bench.muxer.bridges.insert(id, Bridge::new(Connection::from_host(id, GUEST_CID), socket));
        places.push(id);
    }
    let _last = bench.client(1);
    bench.expect(Operation::Request);
    let _waiting = bench.client(2);
    assert!(bench.next().is_none() && bench.is_quiet(), "no busy loop");
    bench.send(agent_request(), &[]);
    bench.expect(Operation::Reset);

    let gone = Header { src_port: 5, dst_port: 7, ..agent_request() };
    bench.send(with(gone, Operation::Reset), &[]);

    assert_eq!(bench.expect(Operation::Request).header.dst_port, 2);
}

#[test]
fn nothing_is_taken_while_resets_wait() {
    let mut bench = Bench::new();
    for port in 0..MAX_WAITING_RESETS as u32 {
        assert!(bench.muxer.can_receive());
        bench.send(Header { dst_port: 5, src_port: port, ..agent_request() }, &[]);
    }
    assert!(!bench.muxer.can_receive());
    bench.expect(Operation::Reset);
    assert!(bench.muxer.can_receive());
}

#[test]
fn connections_take_turns() {
    let mut bench = Bench::new();
    let (mut one, _) = bench.connected();
    let (mut two, _) = bench.connected();
    one.write_all(&[1; 30_000]).unwrap();
    two.write_all(&[2; 30_000]).unwrap();

    let turns: Vec<u8> = (0..6).map(|_| bench.expect(Operation::ReadWrite).data[0]).collect();

    assert!(turns == [1, 2, 1, 2, 1, 2] || turns == [2, 1, 2, 1, 2, 1], "{turns:?}");
}

#[test]
fn a_reset_device_keeps_its_listener_and_an_agent_that_was_never_connected() {
    let bench = Bench::new();
    let config = bench.muxer.into_config();
    assert!(config.agent.is_some());
    let mut muxer = Muxer::new(config, Poller::new().unwrap()).unwrap();
    muxer.receive(&FromGuest::Packet(agent_request(), Vec::new()));

    assert!(muxer.into_config().agent.is_none());
}
