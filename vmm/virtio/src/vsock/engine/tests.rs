// SPDX-License-Identifier: Apache-2.0
//! The whole device, its thread included, between a driver in memory and clients on real sockets.

use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use virtio_queue::mock::MockSplitQueue;
use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::Engine;
use super::guest::{GUEST_CID, Guest, Habits};
use crate::device::{ActiveQueue, GuestMemory, Interrupt};
use crate::mmio::status::DEVICE_NEEDS_RESET;
use crate::vsock::Muxer;
use crate::vsock::packet::{FromGuest, Header, Operation, SHUTDOWN_BOTH, SHUTDOWN_SEND};
use crate::vsock::{RECEIVE_BUFFER_SIZE, VsockConfig};
use crate::worker::{EventHandler, Poller};

const GUEST_BUFFER: u32 = 256 * 1024;

struct Machine {
    guest: Guest,
    agent: UnixStream,
    path: PathBuf,
    _dir: tempfile::TempDir,
}

impl Machine {
    fn new(habits: Habits) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("vsock.sock");
        let (agent, ours) = UnixStream::pair().unwrap();
        let config = VsockConfig {
            guest_cid: GUEST_CID,
            listener: UnixListener::bind(&path).unwrap(),
            agent: Some(ours),
            agent_port: 1024,
        };
        agent.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
        Self { guest: Guest::new(config, habits), agent, path, _dir: dir }
    }

    fn client(&self) -> UnixStream {
        let mut client = UnixStream::connect(&self.path).unwrap();
        client.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
        client.write_all(b"CONNECT 1025\n").unwrap();
        client
    }

    fn connected(&mut self) -> (UnixStream, Header) {
        let mut client = self.client();
        let header = self.guest.accept(GUEST_BUFFER);
        let mut line = [0; 1];
        while line != *b"\n" {
            client.read_exact(&mut line).unwrap();
        }
        (client, header)
    }
}

fn with(header: Header, operation: Operation) -> Header {
    Header { op: operation as u16, ..header }
}

fn agent_request() -> Header {
    Header {
        src_cid: GUEST_CID,
        dst_cid: 2,
        src_port: 2000,
        dst_port: 1024,
        kind: 1,
        op: Operation::Request as u16,
        buf_alloc: GUEST_BUFFER,
        ..Header::default()
    }
}

/// The byte of a test's stream at a place.
fn pattern(at: u64) -> u8 {
    (at.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 40) as u8
}

fn write_pattern(stream: &mut UnixStream, len: u64) {
    let mut at = 0;
    while at < len {
        let piece: Vec<u8> = (at..len.min(at + 100_000)).map(pattern).collect();
        stream.write_all(&piece).unwrap();
        at += piece.len() as u64;
    }
    stream.shutdown(Shutdown::Write).unwrap();
}

fn check_pattern(stream: &mut UnixStream, len: u64) {
    let mut at = 0;
    let mut piece = vec![0; 100_000];
    loop {
        let count = stream.read(&mut piece).unwrap();
        if count == 0 {
            break;
        }
        for &byte in &piece[..count] {
            assert_eq!(byte, pattern(at), "at {at}");
            at += 1;
        }
    }
    assert_eq!(at, len);
}

/// `len` bytes each way at once, with credit, ends of stream and closing as a Linux guest has them.
fn stream(habits: Habits, len: u64) {
    let mut machine = Machine::new(habits);
    let (client, mut header) = machine.connected();
    let (mut reader, mut writer) = (client.try_clone().unwrap(), client);
    let writing = thread::spawn(move || write_pattern(&mut writer, len));
    let reading = thread::spawn(move || check_pattern(&mut reader, len));
    let guest = &mut machine.guest;
    let (mut sent, mut received, mut told, mut host_taken) = (0_u64, 0_u64, 0_u64, 0_u32);
    let mut host_ended = false;
    let mut ended = false;

    loop {
        let mut idle = true;
        while let Some((packet, data)) = guest.try_receive() {
            idle = false;
            host_taken = packet.fwd_cnt;
            for &byte in &data {
                assert_eq!(byte, pattern(received));
                received += 1;
            }
            assert!(received - told <= u64::from(GUEST_BUFFER), "more than the credit");
            match Operation::of(&packet).unwrap() {
                Operation::ReadWrite => assert!(!host_ended),
                Operation::Shutdown => {
                    assert_eq!(packet.flags & SHUTDOWN_SEND, SHUTDOWN_SEND);
                    host_ended = true;
                }
                Operation::CreditUpdate | Operation::CreditRequest => {}
                Operation::Reset => {
                    assert!(ended && host_ended);
                    assert_eq!(received, len);
                    writing.join().unwrap();
                    return reading.join().unwrap();
                }
                other => panic!("{other:?}"),
            }
            header.fwd_cnt = received as u32;
            if received - told > u64::from(GUEST_BUFFER / 2) {
                told = received;
                guest.send(with(header, Operation::CreditUpdate), &[]);
            }
        }
        let credit = RECEIVE_BUFFER_SIZE - (sent as u32).wrapping_sub(host_taken);
        let count = u64::from(credit).min(len - sent).min(65_536);
        if count > 0 {
            let data: Vec<u8> = (sent..sent + count).map(pattern).collect();
            if guest.try_send(with(header, Operation::ReadWrite), &data) {
                sent += count;
                told = received;
                idle = false;
            }
        }
        if sent == len && host_ended && !ended {
            ended = true;
            guest.send(Header { flags: SHUTDOWN_BOTH, ..with(header, Operation::Shutdown) }, &[]);
        }
        if idle {
            assert!(guest.wait(Duration::from_secs(10)), "stuck at {sent} sent, {received} received of {len}");
        }
    }
}

#[test]
fn streams_arrive_whole_with_every_habit_of_a_driver() {
    for event_idx in [false, true] {
        for split in [false, true] {
            stream(Habits { event_idx, split }, 8 * 1024 * 1024 + 13);
        }
    }
}

#[test]
#[ignore = "takes seconds in a release build, a minute otherwise: for changes to the data path"]
fn a_gibibyte_arrives_whole() {
    stream(Habits { event_idx: true, split: false }, 1 << 30);
}

#[test]
fn the_agent_talks_to_its_supervisor() {
    let mut machine = Machine::new(Habits::default());
    let request = agent_request();
    machine.guest.send(request, &[]);
    machine.guest.expect(Operation::Response);
    machine.guest.send(with(request, Operation::ReadWrite), b"ready");
    let mut bytes = [0; 16];
    assert_eq!(machine.agent.read(&mut bytes).unwrap(), 5);

    machine.agent.write_all(b"go").unwrap();

    assert_eq!(machine.guest.expect(Operation::ReadWrite).1, b"go");
}

#[test]
fn without_receive_buffers_data_waits_and_nothing_spins() {
    let memory = GuestMemory::from_ranges(&[(GuestAddress(0), 0x10_0000)]).unwrap();
    let queue = |at| {
        let mock = MockSplitQueue::create(&memory, GuestAddress(at), 16);
        ActiveQueue { queue: mock.create_queue().unwrap(), event: EventFd::new(EFD_NONBLOCK).unwrap() }
    };
    let dir = tempfile::tempdir().unwrap();
    let (mut agent, ours) = UnixStream::pair().unwrap();
    let config = VsockConfig {
        guest_cid: GUEST_CID,
        listener: UnixListener::bind(dir.path().join("vsock.sock")).unwrap(),
        agent: Some(ours),
        agent_port: 1024,
    };
    let muxer = Muxer::new(config, Poller::new().unwrap()).unwrap();
    let interrupt = Arc::new(Interrupt::new(EventFd::new(EFD_NONBLOCK).unwrap()));
    let (rx, tx) = (queue(0x1_0000), queue(0x2_0000));
    let mut engine = Engine::new(memory.clone(), rx, tx, interrupt, muxer).unwrap();
    engine.muxer.receive(&FromGuest::Packet(agent_request(), Vec::new()));
    agent.write_all(b"waits").unwrap();
    engine.tx.event.write(1).unwrap();

    let mut events = Vec::new();
    let mut rounds = 0;
    loop {
        engine.poller().wait(&mut events, Some(Duration::from_millis(20))).unwrap();
        if events.is_empty() {
            break;
        }
        assert!(engine.handle(&events).is_continue());
        rounds += 1;
        assert!(rounds < 10, "{events:?}");
    }

    assert!(engine.muxer.has_packet());
}

#[test]
fn waiting_data_arrives_once_there_are_receive_buffers() {
    let mut machine = Machine::new(Habits { event_idx: true, split: false });
    let (mut client, _) = machine.connected();
    let writing = thread::spawn(move || write_pattern(&mut client, 200_000));
    // The ring fills; the device has to wait for the guest.
    thread::sleep(Duration::from_millis(50));

    let mut received = 0;
    while received < 200_000 {
        for byte in machine.guest.expect(Operation::ReadWrite).1 {
            assert_eq!(byte, pattern(received));
            received += 1;
        }
    }
    machine.guest.expect(Operation::Shutdown);
    writing.join().unwrap();
}

#[test]
fn a_broken_ring_closes_everything_and_asks_for_a_reset() {
    let mut machine = Machine::new(Habits::default());
    let (mut client, _) = machine.connected();
    // The transmit queue's available index.
    machine.guest.memory.write_obj(5000_u16, GuestAddress(0x2_1002)).unwrap();
    machine.guest.write(0x50, 1);

    assert_eq!(client.read(&mut [0; 8]).unwrap(), 0);
    while machine.guest.status() == 15 {
        assert!(machine.guest.wait(Duration::from_secs(10)));
    }
    assert_eq!(machine.guest.status(), 15 | DEVICE_NEEDS_RESET);

    machine.guest.start();
    let (mut client, header) = machine.connected();
    machine.guest.send(with(header, Operation::ReadWrite), b"again");
    let mut bytes = [0; 8];
    assert_eq!(client.read(&mut bytes).unwrap(), 5);
}

#[test]
fn a_reset_closes_connections_and_leaves_guest_memory_alone() {
    let mut machine = Machine::new(Habits::default());
    let (mut client, _) = machine.connected();
    client.write_all(&[1; 1000]).unwrap();
    machine.guest.write(0x70, 0);
    // A status of 0 has been written: nothing may change from here on.
    let mut before = vec![0; 0x40_0000];
    machine.guest.memory.read_slice(&mut before, GuestAddress(0)).unwrap();
    let _waiting = machine.client();
    machine.guest.write(0x50, 0);
    thread::sleep(Duration::from_millis(20));
    let mut after = vec![0; before.len()];
    machine.guest.memory.read_slice(&mut after, GuestAddress(0)).unwrap();
    assert!(before == after);
    // The reset closed it, whatever of its bytes was still unread.
    assert!(client.read(&mut [0; 8]).map_or(true, |len| len == 0));

    machine.guest.start();

    machine.guest.expect(Operation::Request);
}

#[test]
fn garbage_in_rings_and_packets_never_stops_other_connections() {
    let mut machine = Machine::new(Habits::default());
    let (mut client, header) = machine.connected();
    let mut state = 99_u64;
    let mut next = move || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 33) as u32
    };
    for _ in 0..5_000 {
        let garbage = Header {
            src_cid: GUEST_CID,
            dst_cid: u64::from(next() % 4),
            src_port: next() % 8,
            dst_port: if next() % 2 == 0 { 1024 } else { 0x4000_0000 + next() % 4 },
            kind: (next() % 3) as u16,
            op: (next() % 10) as u16,
            flags: next(),
            buf_alloc: next(),
            fwd_cnt: next(),
            ..Header::default()
        };
        machine.guest.send(garbage, &vec![0; (next() % 100) as usize]);
        while machine.guest.try_receive().is_some() {}
    }
    machine.guest.send(with(header, Operation::ReadWrite), b"well");

    let mut bytes = [0; 8];
    assert_eq!(client.read(&mut bytes).unwrap(), 4);
    assert_eq!(machine.guest.status(), 15);
}
