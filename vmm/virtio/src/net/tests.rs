// SPDX-License-Identifier: Apache-2.0
//! The running device between a driver in memory and a socket that stands for the tap.

mod control;
mod stream;

use std::os::fd::OwnedFd;
use std::os::unix::net::UnixDatagram;
use std::sync::Arc;

use virtio_bindings::virtio_net::VIRTIO_NET_F_MRG_RXBUF;
use virtio_bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX;
use virtio_queue::desc::{RawDescriptor, split::Descriptor};
use virtio_queue::mock::MockSplitQueue;
use virtio_queue::{Queue, QueueT};
use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::engine::Engine;
use super::limit::Limiter;
use super::pair::{Context, Pair};
use super::*;
use crate::device::{ActiveQueue, GuestMemory, Interrupt};
use crate::worker::{Event, EventHandler, Poller};

const WRITE: u16 = 2;
const NEXT: u16 = 1;
const SIZE: u16 = 16;
const RX_RING: GuestAddress = GuestAddress(0);
const TX_RING: GuestAddress = GuestAddress(0x1_0000);
const BUFFERS: u64 = 0x10_0000;

/// A device on a socket, not on a thread: [`Self::run`] does what a thread would do by now.
struct Machine<'m, N = UnixDatagram> {
    memory: &'m GuestMemory,
    rx: MockSplitQueue<'m, GuestMemory>,
    tx: MockSplitQueue<'m, GuestMemory>,
    rx_event: EventFd,
    tx_event: EventFd,
    interrupt: Arc<Interrupt>,
    engine: Engine,
    network: N,
}

impl<'m> Machine<'m> {
    fn new(memory: &'m GuestMemory, features: u64) -> Self {
        Self::with(memory, features, &Limits::default())
    }

    fn with(memory: &'m GuestMemory, features: u64, limits: &Limits) -> Self {
        let (network, device_side) = UnixDatagram::pair().unwrap();
        network.set_nonblocking(true).unwrap();
        device_side.set_nonblocking(true).unwrap();
        // The least: a few frames' worth.
        rustix::net::sockopt::set_socket_send_buffer_size(&device_side, 1).unwrap();
        Self::on(memory, features, limits, Arc::new(Link::Tap(Tap::new(device_side.into()))), network)
    }
}

impl<'m, N> Machine<'m, N> {
    fn on(memory: &'m GuestMemory, features: u64, limits: &Limits, link: Arc<Link>, network: N) -> Self {
        let rx = MockSplitQueue::create(memory, RX_RING, SIZE);
        let tx = MockSplitQueue::create(memory, TX_RING, SIZE);
        let event = || EventFd::new(EFD_NONBLOCK).unwrap();
        let (rx_event, tx_event, interrupt) = (event(), event(), Arc::new(Interrupt::new(event())));
        let active = |mock: &MockSplitQueue<'_, GuestMemory>, event: &EventFd| {
            let mut queue: Queue = mock.create_queue().unwrap();
            queue.set_event_idx(features::has(features, VIRTIO_RING_F_EVENT_IDX));
            ActiveQueue { queue, event: event.try_clone().unwrap() }
        };
        let queues = [active(&rx, &rx_event), active(&tx, &tx_event)];
        let limiter = limits.are_set().then(|| Arc::new(Limiter::new(limits)));
        let context = Context {
            memory: memory.clone(),
            accepted: features,
            interrupt: Arc::clone(&interrupt),
            link,
            limiter,
            fallback: None,
        };
        let engine = Engine::start(Poller::new().unwrap(), context, queues).unwrap();
        Self { memory, rx, tx, rx_event, tx_event, interrupt, engine, network }
    }

    /// Handles events until there are none, or the device has failed.
    fn run(&mut self) {
        let mut events: Vec<Event> = Vec::new();
        loop {
            self.engine.poller().wait(&mut events, Some(std::time::Duration::ZERO)).unwrap();
            if events.is_empty() || self.engine.handle(&events).is_break() {
                return;
            }
        }
    }

    /// Gives the device receive buffers of `lens` bytes, each a chain of its own, from [`BUFFERS`] on, 64 KiB apart.
    fn give(&self, lens: &[u32]) {
        let chains: Vec<_> = (0u64..)
            .zip(lens)
            .map(|(at, len)| RawDescriptor::from(Descriptor::new(BUFFERS + at * 0x1_0000, *len, WRITE, 0)))
            .collect();
        self.rx.build_multiple_desc_chains(&chains).unwrap();
        self.rx_event.write(1).unwrap();
    }

    /// Sends a frame out of the guest, in one chain of two pieces.
    fn send(&self, frame: &[u8]) {
        self.memory.write_slice(frame, GuestAddress(BUFFERS)).unwrap();
        let first = HEADER_LEN as u32 + 1;
        self.tx
            .build_desc_chain(&[
                RawDescriptor::from(Descriptor::new(BUFFERS, first, NEXT, 1)),
                RawDescriptor::from(Descriptor::new(BUFFERS + u64::from(first), frame.len() as u32 - first, 0, 0)),
            ])
            .unwrap();
        self.tx_event.write(1).unwrap();
    }

    /// What the driver has got back of the receive queue: for each chain its length.
    fn received(&self) -> Vec<u32> {
        let used = self.rx.used();
        (0..used.idx().load()).map(|at| used.ring().ref_at(at.into()).unwrap().load().len()).collect()
    }

    fn bytes(&self, buffer: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.memory.read_slice(&mut bytes, GuestAddress(BUFFERS + buffer * 0x1_0000)).unwrap();
        bytes
    }
}

fn memory() -> GuestMemory {
    GuestMemory::from_ranges(&[(GuestAddress(0), 0x40_0000)]).unwrap()
}

/// A frame of `len` bytes with an empty header.
fn frame(len: usize) -> Vec<u8> {
    (0..len).map(|at| if at < HEADER_LEN { 0 } else { at as u8 }).collect()
}

const MERGE: u64 = 1 << VIRTIO_NET_F_MRG_RXBUF;

#[test]
fn a_frame_reaches_the_guest_in_one_buffer() {
    let memory = memory();
    let mut machine = Machine::new(&memory, 0);
    machine.give(&[2000]);
    machine.network.send(&frame(100)).unwrap();

    machine.run();

    let mut expected = frame(100);
    expected[10] = 1;
    assert_eq!(machine.received(), [100]);
    assert_eq!(machine.bytes(0, 100), expected);
    assert_eq!(machine.interrupt.status(), 1);
}

#[test]
fn a_long_frame_fills_several_buffers() {
    let memory = memory();
    let mut machine = Machine::new(&memory, MERGE);
    machine.give(&[1000; SIZE as usize]);
    machine.network.send(&frame(2500)).unwrap();
    machine.network.send(&frame(60)).unwrap();

    machine.run();

    let mut expected = frame(2500);
    expected[10] = 3;
    assert_eq!(machine.received(), [1000, 1000, 500, 60]);
    assert_eq!([machine.bytes(0, 1000), machine.bytes(1, 1000), machine.bytes(2, 500)].concat(), expected);
    assert_eq!(machine.bytes(3, 12)[10..], [1, 0]);
}

#[test]
fn frames_wait_in_the_tap_until_there_is_room() {
    let memory = memory();
    let mut machine = Machine::new(&memory, 0);
    machine.network.send(&frame(100)).unwrap();
    machine.run();
    assert!(machine.received().is_empty());

    machine.give(&[2000]);
    machine.run();

    assert_eq!(machine.received(), [100]);
}

#[test]
fn a_frame_that_may_be_longer_than_the_room_waits_for_more() {
    let memory = memory();
    let mut machine = Machine::new(&memory, MERGE);
    machine.give(&[1000; 4]);
    machine.network.send(&frame(2500)).unwrap();
    machine.run();
    assert!(machine.received().is_empty());

    // The driver has given half of its ring: more may not come.
    machine.give(&[1000; 4]);
    machine.run();

    assert_eq!(machine.received().len(), 3);
}

#[test]
fn a_frame_leaves_the_guest() {
    let memory = memory();
    let mut machine = Machine::new(&memory, 0);
    machine.send(&frame(1514));

    machine.run();

    let mut got = [0; 2000];
    assert_eq!(machine.network.recv(&mut got).unwrap(), 1514);
    assert_eq!(got[..1514], frame(1514));
    assert_eq!(machine.tx.used().idx().load(), 1);
}

#[test]
fn frames_wait_in_the_ring_while_the_tap_is_full() {
    let memory = memory();
    let mut machine = Machine::new(&memory, 0);
    // The socket takes fewer.
    let descriptors: Vec<_> = (0..SIZE - 1).map(|_| RawDescriptor::from(Descriptor::new(BUFFERS, 100, 0, 0))).collect();
    machine.tx.build_multiple_desc_chains(&descriptors).unwrap();
    machine.tx_event.write(1).unwrap();
    machine.run();
    let sent = machine.tx.used().idx().load();
    assert!(sent < SIZE - 1, "{sent}");

    let mut received = 0;
    while machine.network.recv(&mut [0; 200]).is_ok() {
        received += 1;
        machine.run();
    }

    assert_eq!((received, machine.tx.used().idx().load()), (SIZE - 1, SIZE - 1));
}

#[test]
fn what_the_guest_sends_is_dropped_once_the_tap_has_gone() {
    let memory = memory();
    let mut machine = Machine::new(&memory, 0);
    machine.network = UnixDatagram::unbound().unwrap();
    machine.run();

    machine.send(&frame(100));
    machine.run();

    assert_eq!(machine.tx.used().idx().load(), 1);
    assert!(!machine.interrupt.needs_reset());
}

#[test]
fn a_frame_too_long_is_dropped() {
    let memory = memory();
    let mut machine = Machine::new(&memory, 0);
    machine.send(&frame(FRAME_MAX + 1));

    machine.run();

    assert_eq!(machine.tx.used().idx().load(), 1);
    assert!(machine.network.recv(&mut [0; 16]).is_err());
    assert!(!machine.interrupt.needs_reset());
}

#[test]
fn a_malformed_chain_needs_a_reset() {
    let bad_rx = [
        Descriptor::new(BUFFERS, 2000, 0, 0),
        Descriptor::new(BUFFERS, HEADER_LEN as u32 - 1, WRITE, 0),
        Descriptor::new(0x3f_ffff, 2000, WRITE, 0),
        Descriptor::new(u64::MAX - 5, 2000, WRITE, 0),
    ];
    for descriptor in bad_rx {
        let memory = memory();
        let mut machine = Machine::new(&memory, 0);
        machine.rx.build_desc_chain(&[RawDescriptor::from(descriptor)]).unwrap();
        machine.network.send(&frame(100)).unwrap();
        machine.run();
        assert!(machine.interrupt.needs_reset(), "{descriptor:?}");
    }
    let bad_tx = [
        Descriptor::new(BUFFERS, 2000, WRITE, 0),
        Descriptor::new(BUFFERS, 0, 0, 0),
        Descriptor::new(0x3f_ffff, 2000, 0, 0),
    ];
    for descriptor in bad_tx {
        let memory = memory();
        let mut machine = Machine::new(&memory, 0);
        machine.tx.build_desc_chain(&[RawDescriptor::from(descriptor)]).unwrap();
        machine.tx_event.write(1).unwrap();
        machine.run();
        assert!(machine.interrupt.needs_reset(), "{descriptor:?}");
    }
}

#[test]
fn a_ring_that_is_none_needs_a_reset() {
    let memory = memory();
    let mut machine = Machine::new(&memory, 0);
    machine.tx.avail().idx().store(SIZE + 1);
    machine.tx_event.write(1).unwrap();

    machine.run();

    assert!(machine.interrupt.needs_reset());
}

#[test]
fn a_queue_is_handed_on_as_it_stands() {
    let memory = memory();
    let mut machine = Machine::new(&memory, MERGE);
    machine.give(&[1000; SIZE as usize]);
    machine.network.send(&frame(1500)).unwrap();
    machine.send(&frame(100));
    machine.run();

    let [rx, tx] = machine.engine.into_queues();

    // More chains have been taken than filled.
    assert_eq!((rx.queue.next_avail(), rx.queue.next_used()), (2, 2));
    assert_eq!((tx.queue.next_avail(), tx.queue.next_used()), (1, 1));
}

#[test]
fn frames_over_the_limit_wait_and_go_later() {
    let memory = memory();
    let one_in_50_ms = Rate { packets_per_second: std::num::NonZeroU64::new(20), ..Rate::default() };
    let mut machine = Machine::with(&memory, 0, &Limits { rx: one_in_50_ms, tx: one_in_50_ms });
    machine.give(&[2000; SIZE as usize]);
    for _ in 0..4 {
        machine.network.send(&frame(100)).unwrap();
    }
    let descriptors = [RawDescriptor::from(Descriptor::new(BUFFERS, 100, 0, 0)); 4];
    machine.tx.build_multiple_desc_chains(&descriptors).unwrap();
    machine.tx_event.write(1).unwrap();

    machine.run();

    // A burst is two frames' worth; more only where this thread has slept meanwhile.
    let counts = |machine: &Machine<'_>| (machine.received().len(), machine.tx.used().idx().load());
    let (received, sent) = counts(&machine);
    assert!((1..4).contains(&received) && (1..4).contains(&sent), "{received}, {sent}");
    // The timer wakes the device until all have gone.
    while counts(&machine) != (4, 4) {
        let mut events = Vec::new();
        machine.engine.poller().wait(&mut events, None).unwrap();
        assert!(machine.engine.handle(&events).is_continue());
    }
}

/// What queues without an engine run with; the other end of their tap, and what they tell of.
fn context(memory: &GuestMemory) -> (Context, UnixDatagram, Notice) {
    let (network, device_side) = UnixDatagram::pair().unwrap();
    device_side.set_nonblocking(true).unwrap();
    let fallback = Notice::new().unwrap();
    let context = Context {
        memory: memory.clone(),
        accepted: 0,
        interrupt: Arc::new(Interrupt::new(EventFd::new(EFD_NONBLOCK).unwrap())),
        link: Arc::new(Link::Tap(Tap::new(OwnedFd::from(device_side)))),
        limiter: None,
        fallback: Some(fallback.clone()),
    };
    (context, network, fallback)
}

/// A queue as it is handed over.
fn handed_over(mock: &MockSplitQueue<'_, GuestMemory>) -> ActiveQueue {
    ActiveQueue { queue: mock.create_queue().unwrap(), event: EventFd::new(EFD_NONBLOCK).unwrap() }
}

#[test]
fn queues_that_vhost_does_not_take_are_served_here_which_is_told() {
    let memory = memory();
    let (context, _network, fallback) = context(&memory);
    let queues = [RX_RING, TX_RING].map(|ring| handed_over(&MockSplitQueue::create(&memory, ring, SIZE)));
    let not_vhost = VhostNet::new(std::fs::File::open("/dev/null").unwrap().into());

    let pair = Pair::start(context, queues, Some(not_vhost)).unwrap();

    assert!(matches!(pair, Pair::Engine(_)));
    assert!(fallback.take().unwrap().starts_with("it does not take the queues: "));
}

#[test]
fn queues_that_vhost_gives_up_are_served_here_which_is_told_unless_the_guest_broke_them() {
    let (rx, tx) = (Descriptor::new(BUFFERS, 2000, WRITE, 0), Descriptor::new(BUFFERS, 100, 0, 0));
    let outside = |flags| Descriptor::new(0x3f_ffff, 2000, flags, 0);
    let cases = [([rx, tx], Some("a reason")), ([outside(WRITE), tx], None), ([rx, outside(0)], None)];
    for (descriptors, told) in cases {
        let memory = memory();
        let rings = [RX_RING, TX_RING].map(|ring| MockSplitQueue::create(&memory, ring, SIZE));
        for (ring, descriptor) in rings.iter().zip(descriptors) {
            ring.build_desc_chain(&[RawDescriptor::from(descriptor)]).unwrap();
        }
        let (context, _network, fallback) = context(&memory);
        let interrupt = Arc::clone(&context.interrupt);

        let pair =
            Pair::go_on(Poller::new().unwrap(), context, rings.each_ref().map(handed_over), &"a reason").unwrap();

        assert_eq!(fallback.take().as_deref(), told, "{descriptors:?}");
        assert_eq!(interrupt.needs_reset(), told.is_none(), "{descriptors:?}");
        assert_eq!(matches!(pair, Pair::Engine(_)), told.is_some(), "{descriptors:?}");
    }
}
