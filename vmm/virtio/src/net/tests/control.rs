// SPDX-License-Identifier: Apache-2.0
//! The control queue of a device that hangs on nothing.

use std::os::unix::net::UnixStream;

use virtio_bindings::virtio_net::{
    VIRTIO_NET_F_CTRL_MAC_ADDR, VIRTIO_NET_F_CTRL_RX, VIRTIO_NET_F_CTRL_VQ, VIRTIO_NET_F_MQ, VIRTIO_NET_F_STATUS,
};

use super::*;
use crate::device::{Activation, INTERRUPT_CONFIG, Notification, VirtioDevice};

const PAIRS: u16 = 2;
const COMMAND: u64 = BUFFERS;
const ANSWER: u64 = BUFFERS + 0x1_0000;
const MAC: MacAddress = MacAddress([2, 0, 0, 0, 0, 1]);
const CONTROL: u64 =
    1 << VIRTIO_NET_F_CTRL_VQ | 1 << VIRTIO_NET_F_CTRL_RX | 1 << VIRTIO_NET_F_CTRL_MAC_ADDR | 1 << VIRTIO_NET_F_MQ;

fn backend(taps: Vec<OwnedFd>, vhosts: Vec<OwnedFd>) -> Backend {
    Backend::Tap { taps, vhosts, fallback: Notice::new().unwrap() }
}

struct Driver<'m> {
    memory: &'m GuestMemory,
    net: Net,
    control: MockSplitQueue<'m, GuestMemory>,
    interrupt: Arc<Interrupt>,
}

impl<'m> Driver<'m> {
    fn new(memory: &'m GuestMemory, features: u64) -> Self {
        let mut net = Net::new(&NetConfig { mac: MAC, link: LinkKind::Tap, pairs: PAIRS, limits: Limits::default() });
        let event = || EventFd::new(EFD_NONBLOCK).unwrap();
        let interrupt = Arc::new(Interrupt::new(event()));
        let ring = |index: u64| MockSplitQueue::create(memory, GuestAddress(index * 0x1_0000), SIZE);
        let active = |index| ActiveQueue { queue: ring(index).create_queue().unwrap(), event: event() };
        let count = net.queue_count(features) as u64;
        let queues: Vec<_> = (0..count).map(active).collect();
        let control = ring(count - 1);
        let activation = Activation { memory: memory.clone(), features, queues, interrupt: Arc::clone(&interrupt) };
        net.activate(activation).unwrap();
        Self { memory, net, control, interrupt }
    }

    /// Posts a chain of what is given, and notifies.
    fn post(&mut self, descriptors: &[Descriptor]) {
        let descriptors: Vec<_> = descriptors.iter().map(|descriptor| RawDescriptor::from(*descriptor)).collect();
        self.control.build_desc_chain(&descriptors).unwrap();
        self.net.notify(2 * PAIRS);
    }

    /// Sends a command in two pieces, and returns the answer.
    fn command(&mut self, bytes: &[u8]) -> u8 {
        self.memory.write_slice(bytes, GuestAddress(COMMAND)).unwrap();
        self.memory.write_obj(0xff_u8, GuestAddress(ANSWER)).unwrap();
        self.post(&[
            Descriptor::new(COMMAND, 2, NEXT, 1),
            Descriptor::new(COMMAND + 2, bytes.len() as u32 - 2, NEXT, 2),
            Descriptor::new(ANSWER, 1, WRITE, 0),
        ]);
        self.memory.read_obj(GuestAddress(ANSWER)).unwrap()
    }
}

#[test]
fn the_control_queue_is_behind_all_pairs_and_is_called() {
    let net = Net::new(&NetConfig { mac: MAC, link: LinkKind::Tap, pairs: PAIRS, limits: Limits::default() });
    assert_eq!(net.queue_max_sizes().len(), 5);
    assert_eq!([net.queue_count(0), net.queue_count(CONTROL)], [2, 5]);
    assert_eq!([net.notification(3), net.notification(4)], [Notification::Event, Notification::Call]);
}

#[test]
fn what_the_guest_asks_for_is_kept_until_a_reset() {
    let memory = memory();
    let mut driver = Driver::new(&memory, CONTROL);

    assert_eq!(driver.command(&[0, 0, 0]), 0);
    assert_eq!(driver.command(&[0, 1, 1]), 0);
    assert_eq!(driver.command(&[1, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0x33, 0x33, 0, 0, 0, 1]), 0);
    assert_eq!(driver.command(&[1, 1, 2, 0, 0, 0, 0, 9]), 0);
    assert_eq!(driver.command(&[4, 0, 2, 0]), 0);

    let state = driver.net.port().state();
    let multicast = vec![MacAddress([0x33, 0x33, 0, 0, 0, 1])];
    assert_eq!(state.filter, Filter { promiscuous: false, all_multicast: true, unicast: vec![], multicast });
    assert_eq!((state.mac, state.pairs), (MacAddress([2, 0, 0, 0, 0, 9]), 2));
    assert_eq!(driver.interrupt.status(), 1);
    assert_eq!(driver.control.used().idx().load(), 5);
    let mut config = [0; 14];
    driver.net.read_config(0, &mut config);
    assert_eq!(config, [2, 0, 0, 0, 0, 9, 0, 0, 2, 0, 0, 0, 0, 0]);

    driver.net.reset();
    let state = driver.net.port().state();
    assert_eq!((state.mac, state.pairs, state.filter), (MAC, 1, Filter::default()));
}

#[test]
fn a_command_that_is_none_fails_and_changes_nothing() {
    let memory = memory();
    let mut driver = Driver::new(&memory, CONTROL);
    let before = driver.net.port().state();
    for bytes in [&[0, 9, 1][..], &[7, 0, 0], &[4, 0, 0, 0], &[4, 0, 3, 0], &[1, 1, 3, 0, 0, 0, 0, 9], &[0, 0, 1, 1]] {
        assert_eq!(driver.command(bytes), 1, "{bytes:?}");
    }
    // Longer than any command, and not even in one piece of memory.
    driver.post(&[
        Descriptor::new(COMMAND, 0x1_0000, NEXT, 1),
        Descriptor::new(COMMAND, 0x1_0000, NEXT, 2),
        Descriptor::new(ANSWER, 1, WRITE, 0),
    ]);
    assert_eq!(driver.memory.read_obj::<u8>(GuestAddress(ANSWER)).unwrap(), 1);

    assert_eq!(driver.net.port().state(), before);
    assert!(!driver.interrupt.needs_reset());
}

#[test]
fn what_was_not_accepted_is_not_done() {
    let memory = memory();
    let mut driver = Driver::new(&memory, 1 << VIRTIO_NET_F_CTRL_VQ | 1 << VIRTIO_NET_F_MQ);

    assert_eq!(driver.command(&[0, 0, 0]), 1);
    assert_eq!(driver.command(&[1, 1, 2, 0, 0, 0, 0, 9]), 1);
    assert_eq!(driver.command(&[4, 0, 2, 0]), 0);
}

#[test]
fn a_malformed_chain_needs_a_reset_and_stops_the_device() {
    for chain in [
        vec![Descriptor::new(COMMAND, 3, 0, 0)],
        vec![Descriptor::new(COMMAND, 3, NEXT, 1), Descriptor::new(u64::MAX - 1, 1, WRITE, 0)],
        vec![Descriptor::new(0x3f_ffff, 3, NEXT, 1), Descriptor::new(ANSWER, 1, WRITE, 0)],
    ] {
        let memory = memory();
        let mut driver = Driver::new(&memory, CONTROL);
        driver.post(&chain);
        assert!(driver.interrupt.needs_reset(), "{chain:?}");
        driver.net.notify(2 * PAIRS);
    }
    let memory = memory();
    let mut driver = Driver::new(&memory, CONTROL);
    driver.control.avail().idx().store(SIZE + 1);
    driver.net.notify(2 * PAIRS);
    assert!(driver.interrupt.needs_reset());
}

#[test]
fn a_backend_has_as_many_queues_as_the_device() {
    let (one, _other) = UnixDatagram::pair().unwrap();
    let net = Net::new(&NetConfig { mac: MAC, link: LinkKind::Tap, pairs: PAIRS, limits: Limits::default() });

    let error = net.on(backend(vec![one.into()], Vec::new())).unwrap_err();

    assert!(matches!(error, AttachError::Count { pairs: 2, taps: 1, vhosts: 0 }), "{error}");
}

#[test]
fn what_is_no_tap_does_not_start() {
    let memory = memory();
    let (one, _other) = UnixDatagram::pair().unwrap();
    let backend = backend(vec![one.into()], Vec::new());
    let mut net = Net::new(&NetConfig { mac: MAC, link: LinkKind::Tap, pairs: 1, limits: Limits::default() })
        .on(backend)
        .unwrap();
    let event = || EventFd::new(EFD_NONBLOCK).unwrap();
    let queues = [RX_RING, TX_RING].map(|at| ActiveQueue {
        queue: MockSplitQueue::create(&memory, at, SIZE).create_queue().unwrap(),
        event: event(),
    });
    let interrupt = Arc::new(Interrupt::new(event()));

    let error =
        net.activate(Activation { memory: memory.clone(), features: 0, queues: queues.into(), interrupt }).unwrap_err();

    assert_eq!(error.to_string(), "cannot start the queues of the network device");
    assert!(net.port().state().link_up);
}

/// Whether the driver sees its link up.
fn shows_link(net: &Net) -> bool {
    let mut status = [0; 2];
    net.read_config(6, &mut status);
    status == [1, 0]
}

#[test]
fn the_link_follows_the_carrier_of_what_the_device_hangs_on() {
    let memory = memory();
    let (socket, _other) = UnixStream::pair().unwrap();
    let net = Net::new(&NetConfig { mac: MAC, link: LinkKind::Stream, pairs: 1, limits: Limits::default() });
    let mut net = net.on(Backend::Stream { socket: socket.into(), lost: Notice::new().unwrap() }).unwrap();
    let event = || EventFd::new(EFD_NONBLOCK).unwrap();
    let queues = [RX_RING, TX_RING].map(|at| ActiveQueue {
        queue: MockSplitQueue::create(&memory, at, SIZE).create_queue().unwrap(),
        event: event(),
    });
    let interrupt = Arc::new(Interrupt::new(event()));
    let features = 1 << VIRTIO_NET_F_STATUS;
    let activation =
        Activation { memory: memory.clone(), features, queues: queues.into(), interrupt: Arc::clone(&interrupt) };
    net.activate(activation).unwrap();

    for (on, is_news) in [(true, false), (false, true), (false, false), (true, true)] {
        let before = net.config_generation();
        interrupt.clear();
        net.port().set_carrier(on);
        assert_eq!(shows_link(&net), on);
        assert_eq!(interrupt.status(), if is_news { INTERRUPT_CONFIG } else { 0 });
        assert_eq!(net.config_generation() - before, u32::from(is_news));
    }
    net.port().detach();
    net.port().set_carrier(true);
    assert!(!shows_link(&net));
}

#[test]
fn what_has_limits_is_not_the_hosts_kernels() {
    let (one, other) = UnixDatagram::pair().unwrap();
    let rx = Rate { bytes_per_second: std::num::NonZeroU64::new(1000), ..Rate::default() };
    let limits = Limits { rx, ..Limits::default() };
    let net = Net::new(&NetConfig { mac: MAC, link: LinkKind::Tap, pairs: 1, limits });

    let error = net.on(backend(vec![one.into()], vec![other.into()])).unwrap_err();

    assert!(matches!(error, AttachError::Limited), "{error}");
}
