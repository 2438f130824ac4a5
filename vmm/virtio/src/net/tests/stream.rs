// SPDX-License-Identifier: Apache-2.0
//! The running device on a stream socket.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;

use super::*;

/// Where the guest has frames that it sends, behind the buffers that it gives.
const SENT: u64 = BUFFERS + 0x10_0000;

type StreamMachine<'m> = Machine<'m, UnixStream>;

/// A link whose socket takes little at once, what is told of it, and its other end.
fn link() -> (Arc<Link>, Notice, UnixStream) {
    let (network, device_side) = UnixStream::pair().unwrap();
    network.set_nonblocking(true).unwrap();
    rustix::net::sockopt::set_socket_send_buffer_size(&device_side, 1).unwrap();
    let lost = Notice::new().unwrap();
    (Arc::new(Link::Stream(Stream::new(device_side.into(), lost.clone()))), lost, network)
}

fn machine(memory: &GuestMemory, features: u64) -> (StreamMachine<'_>, Notice) {
    let (link, lost, network) = link();
    (Machine::on(memory, features, &Limits::default(), link, network), lost)
}

/// A frame as it is on the wire: behind its length, and without the guest's header.
fn wire(frame: &[u8]) -> Vec<u8> {
    let content = &frame[HEADER_LEN..];
    [&(content.len() as u32).to_be_bytes(), content].concat()
}

/// What there is to be read by now.
fn read_all(network: &mut UnixStream) -> Vec<u8> {
    let mut bytes = Vec::new();
    // Ends with an error: there is no end of the stream.
    let _ = network.read_to_end(&mut bytes);
    bytes
}

/// What the guest has in a buffer once that has been filled with `frame`.
fn received(frame: &[u8]) -> Vec<u8> {
    let mut bytes = frame.to_vec();
    bytes[10] = 1;
    bytes
}

#[test]
fn frames_reach_the_guest_wherever_the_stream_is_cut() {
    let (one, other) = (frame(HEADER_LEN + 14), frame(HEADER_LEN + 60));
    let stream = [wire(&one), wire(&other)].concat();
    for cut in 0..=stream.len() {
        let memory = memory();
        let (mut machine, _lost) = machine(&memory, 0);
        machine.give(&[2000; 2]);
        for part in [&stream[..cut], &stream[cut..]] {
            machine.network.write_all(part).unwrap();
            machine.run();
        }

        assert_eq!(machine.received(), [one.len() as u32, other.len() as u32], "cut at {cut}");
        assert_eq!(machine.bytes(0, one.len()), received(&one));
        assert_eq!(machine.bytes(1, other.len()), received(&other));
    }
}

#[test]
fn the_longest_frame_fills_several_buffers() {
    let memory = memory();
    let (mut machine, _lost) = machine(&memory, MERGE);
    let longest = frame(HEADER_LEN + 65_535);
    let stream = wire(&longest);
    machine.give(&[9000; 8]);
    let mut sent = 0;
    while sent < stream.len() {
        sent += machine.network.write(&stream[sent..]).unwrap();
        machine.run();
    }

    let mut expected = longest;
    expected[10] = 8;
    let got: Vec<u8> = (0..).zip(machine.received()).flat_map(|(at, len)| machine.bytes(at, len as usize)).collect();
    assert_eq!(got, expected);
}

#[test]
fn frames_that_were_read_wait_for_room() {
    let memory = memory();
    let (mut machine, _lost) = machine(&memory, 0);
    let frames = wire(&frame(100)).repeat(4);
    machine.network.write_all(&frames).unwrap();
    machine.give(&[2000; 2]);
    machine.run();
    assert_eq!(machine.received(), [100; 2]);

    machine.give(&[2000; 2]);
    machine.run();

    assert_eq!(machine.received(), [100; 4]);
}

#[test]
fn a_frame_leaves_the_guest_behind_its_length() {
    let memory = memory();
    let (mut machine, _lost) = machine(&memory, 0);
    machine.send(&frame(1514));

    machine.run();

    assert_eq!(read_all(&mut machine.network), wire(&frame(1514)));
    assert_eq!(machine.tx.used().idx().load(), 1);
}

#[test]
fn a_frame_that_is_none_is_dropped() {
    for len in [HEADER_LEN + 13, HEADER_LEN + 65_536] {
        let memory = memory();
        let (mut machine, _lost) = machine(&memory, 0);
        machine.send(&frame(len));
        machine.run();
        machine.send(&frame(100));
        machine.run();

        assert_eq!(read_all(&mut machine.network), wire(&frame(100)), "{len}");
        assert_eq!(machine.tx.used().idx().load(), 2);
    }
}

/// As many as the mock of a ring holds whole: its used ring lies on the second half of the available one.
const MANY: u16 = SIZE / 2;

/// Has the guest send frames of which no two are alike; what they are on the wire.
fn send_many(machine: &StreamMachine<'_>) -> Vec<u8> {
    const LEN: usize = HEADER_LEN + 65_000;
    let frames: Vec<_> =
        (1..=MANY).map(|number| [&[0; HEADER_LEN][..], &[number as u8; LEN - HEADER_LEN]].concat()).collect();
    let descriptors: Vec<_> = (0..)
        .zip(&frames)
        .map(|(at, frame)| {
            let address = SENT + at * 0x1_1000;
            machine.memory.write_slice(frame, GuestAddress(address)).unwrap();
            RawDescriptor::from(Descriptor::new(address, LEN as u32, 0, 0))
        })
        .collect();
    machine.tx.build_multiple_desc_chains(&descriptors).unwrap();
    machine.tx_event.write(1).unwrap();
    frames.iter().flat_map(|frame| wire(frame)).collect()
}

fn assert_same(got: &[u8], expected: &[u8]) {
    let differs = got.iter().zip(expected).position(|(one, other)| one != other);
    assert_eq!((got.len(), differs), (expected.len(), None));
}

#[test]
fn frames_wait_in_the_ring_while_the_socket_is_full() {
    let memory = memory();
    let (mut machine, _lost) = machine(&memory, 0);
    let expected = send_many(&machine);
    machine.run();
    let taken = machine.tx.used().idx().load();
    assert!(taken < MANY, "{taken}");

    let mut got = Vec::new();
    while got.len() < expected.len() {
        let piece = read_all(&mut machine.network);
        assert!(!piece.is_empty(), "{} of {} bytes have come", got.len(), expected.len());
        got.extend(piece);
        machine.run();
    }

    assert_same(&got, &expected);
    assert_eq!(machine.tx.used().idx().load(), MANY);
}

#[test]
fn a_frame_that_has_begun_is_finished_for_the_next_driver() {
    let memory = memory();
    let (link, _lost, network) = link();
    let mut first = Machine::on(&memory, 0, &Limits::default(), Arc::clone(&link), network);
    let expected = send_many(&first);
    first.network.write_all(&wire(&frame(100)).repeat(2)).unwrap();
    first.give(&[2000]);
    first.run();
    assert_eq!(first.received(), [100]);
    let taken = usize::from(first.tx.used().idx().load()) * (65_000 + 4);

    // Its driver resets the device; what it had not handed over yet is not sent any more.
    let Machine { network, engine, .. } = first;
    drop(engine);
    let mut second = Machine::on(&memory, 0, &Limits::default(), link, network);
    second.give(&[2000]);
    let mut got = Vec::new();
    loop {
        second.run();
        let piece = read_all(&mut second.network);
        if piece.is_empty() {
            break;
        }
        got.extend(piece);
    }

    assert_same(&got, &expected[..taken]);
    assert_eq!(second.received(), [100]);
}

#[test]
fn a_length_that_is_none_ends_the_link_and_not_the_device() {
    for len in [0, 13, 65_536, u32::MAX] {
        let memory = memory();
        let (mut machine, lost) = machine(&memory, 0);
        machine.give(&[2000; 2]);
        machine.network.write_all(&[&wire(&frame(100))[..], &len.to_be_bytes(), &[0; 100]].concat()).unwrap();
        machine.run();

        let reason = lost.take().unwrap();
        assert!(reason.starts_with(&format!("a frame of {len} bytes was announced")), "{reason}");
        assert_eq!(machine.received(), [100]);
        machine.send(&frame(100));
        machine.run();
        assert_eq!(machine.tx.used().idx().load(), 1);
        assert!(read_all(&mut machine.network).is_empty());
        assert!(!machine.interrupt.needs_reset());
    }
}

#[test]
fn a_socket_whose_other_end_is_gone_ends_the_link() {
    let memory = memory();
    let (mut machine, lost) = machine(&memory, 0);
    machine.network = UnixStream::pair().unwrap().0;
    machine.run();

    assert_eq!(lost.take().as_deref(), Some("the other end of its socket was closed"));
    machine.send(&frame(100));
    machine.run();
    assert_eq!(machine.tx.used().idx().load(), 1);
    assert!(!machine.interrupt.needs_reset());
}

#[test]
fn a_device_hangs_on_what_it_is_made_for() {
    let net =
        |link| Net::new(&NetConfig { mac: MacAddress([2, 0, 0, 0, 0, 1]), link, pairs: 4, limits: Limits::default() });
    let stream = || Backend::Stream { socket: UnixStream::pair().unwrap().0.into(), lost: Notice::new().unwrap() };

    let error = net(LinkKind::Tap).on(stream()).unwrap_err();
    assert!(matches!(error, AttachError::Kind(LinkKind::Tap)), "{error}");
    let net = net(LinkKind::Stream).on(stream()).unwrap();

    // A stream has no order among several pairs of queues.
    assert_eq!(net.port().state().max_pairs, 1);
    assert!(net.port().state().link_up);
    net.port().detach();
    assert!(!net.port().state().link_up);
}
