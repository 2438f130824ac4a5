// SPDX-License-Identifier: Apache-2.0

use std::sync::Mutex;

use vm_memory::GuestAddress;

use super::status::{ACKNOWLEDGE, DEVICE_NEEDS_RESET, DRIVER, DRIVER_OK, FAILED, FEATURES_OK};
use super::*;
use crate::device::DeviceKind;

const FEATURE: u64 = 1 << 3;
/// Needs [`FEATURE`]; the second queue is left alone with it.
const OTHER: u64 = 1 << 4;
const EVENT_IDX: u64 = 1 << VIRTIO_RING_F_EVENT_IDX;

type QueueSeen = (u16, u64, bool);

/// What the device under the transport has seen.
#[derive(Debug, Default)]
struct Seen {
    /// The features, and each queue's size, descriptor table and use of event indices.
    activations: Vec<(u64, Vec<QueueSeen>)>,
    interrupt: Option<Arc<Interrupt>>,
    resets: usize,
    notified: Vec<u16>,
}

struct Probe {
    seen: Arc<Mutex<Seen>>,
    notification: Notification,
    refuse: bool,
    always_shows_used: bool,
}

impl VirtioDevice for Probe {
    fn kind(&self) -> DeviceKind {
        DeviceKind::Vsock
    }

    fn features(&self) -> u64 {
        FEATURE | OTHER | EVENT_IDX
    }

    fn queue_max_sizes(&self) -> &[u16] {
        &[256, 128]
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        crate::device::read_config_bytes(&[1, 2, 3, 4, 5, 6, 7, 8], offset, data);
    }

    fn notification(&self, _queue: u16) -> Notification {
        self.notification
    }

    fn always_shows_used(&self) -> bool {
        self.always_shows_used
    }

    fn accepts(&self, features: u64) -> bool {
        features & (FEATURE | OTHER) != OTHER
    }

    fn queue_count(&self, features: u64) -> usize {
        if features & OTHER != 0 { 1 } else { 2 }
    }

    fn config_generation(&self) -> u32 {
        self.seen.lock().unwrap().resets as u32
    }

    fn notify(&mut self, queue: u16) {
        self.seen.lock().unwrap().notified.push(queue);
    }

    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError> {
        let mut seen = self.seen.lock().unwrap();
        if self.refuse {
            return Err(ActivateError { doing: "run".to_owned(), source: io::ErrorKind::Other.into() });
        }
        let queues = activation
            .queues
            .iter()
            .map(|queue| (queue.queue.size(), queue.queue.desc_table(), queue.queue.event_idx_enabled()))
            .collect();
        seen.activations.push((activation.features, queues));
        seen.interrupt = Some(activation.interrupt);
        Ok(())
    }

    fn reset(&mut self) {
        self.seen.lock().unwrap().resets += 1;
    }
}

struct Driver {
    transport: MmioTransport,
    seen: Arc<Mutex<Seen>>,
}

impl Driver {
    fn new() -> Self {
        Self::with(Notification::Event, false)
    }

    fn with(notification: Notification, refuse: bool) -> Self {
        Self::of(notification, refuse, false)
    }

    fn of(notification: Notification, refuse: bool, always_shows_used: bool) -> Self {
        let seen = Arc::new(Mutex::new(Seen::default()));
        let memory = GuestMemory::from_ranges(&[(GuestAddress(0), 0x10_0000)]).unwrap();
        let device = Box::new(Probe { seen: Arc::clone(&seen), notification, refuse, always_shows_used });
        Self { transport: MmioTransport::new(device, memory).unwrap(), seen }
    }

    fn read(&mut self, offset: u64) -> u32 {
        let mut data = [0xff; 4];
        self.transport.read(offset, &mut data);
        u32::from_le_bytes(data)
    }

    fn write(&mut self, offset: u64, value: u32) {
        self.transport.write(offset, &value.to_le_bytes());
    }

    fn event(&self, index: u16) -> &EventFd {
        self.transport.queue_events().find(|(queue, _)| *queue == index).unwrap().1
    }

    fn status(&mut self) -> u32 {
        self.read(registers::STATUS)
    }

    fn accept(&mut self, features: u64) {
        self.write(registers::STATUS, ACKNOWLEDGE);
        self.write(registers::STATUS, ACKNOWLEDGE | DRIVER);
        for (selector, value) in [(0, features as u32), (1, (features >> 32) as u32)] {
            self.write(registers::DRIVER_FEATURES_SEL, selector);
            self.write(registers::DRIVER_FEATURES, value);
        }
        self.write(registers::STATUS, ACKNOWLEDGE | DRIVER | FEATURES_OK);
    }

    fn set_up_queue(&mut self, index: u32, address: u32) {
        self.write(registers::QUEUE_SEL, index);
        self.write(registers::QUEUE_NUM, 64);
        self.write(registers::QUEUE_DESC_LOW, address);
        self.write(registers::QUEUE_DESC_HIGH, 0);
        self.write(registers::QUEUE_DRIVER_LOW, address + 0x1000);
        self.write(registers::QUEUE_DRIVER_HIGH, 0);
        self.write(registers::QUEUE_DEVICE_LOW, address + 0x2000);
        self.write(registers::QUEUE_DEVICE_HIGH, 0);
        self.write(registers::QUEUE_READY, 1);
    }

    fn start(&mut self) {
        self.write(registers::STATUS, ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK);
    }

    /// The whole handshake, done well.
    fn bring_up(&mut self) {
        self.accept(1 << VIRTIO_F_VERSION_1 | EVENT_IDX);
        self.set_up_queue(0, 0x1_0000);
        self.set_up_queue(1, 0x2_0000);
        self.start();
    }
}

#[test]
fn the_window_names_the_device() {
    let mut driver = Driver::new();

    assert_eq!(driver.read(0x000), 0x7472_6976);
    assert_eq!(driver.read(0x004), 2);
    assert_eq!(driver.read(0x008), 19);
    assert_eq!(driver.read(registers::DEVICE_FEATURES), (FEATURE | OTHER | EVENT_IDX) as u32);
    driver.write(registers::DEVICE_FEATURES_SEL, 1);
    assert_eq!(driver.read(registers::DEVICE_FEATURES), 1);
    driver.write(registers::DEVICE_FEATURES_SEL, 2);
    assert_eq!(driver.read(registers::DEVICE_FEATURES), 0);
    for register in [registers::SHM_LEN_LOW, registers::SHM_LEN_HIGH] {
        assert_eq!(driver.read(register), u32::MAX);
    }
}

#[test]
fn a_good_handshake_starts_the_device_on_its_queues() {
    let mut driver = Driver::new();
    driver.bring_up();

    assert_eq!(driver.status(), 15);
    let seen = driver.seen.lock().unwrap();
    let features = 1 << VIRTIO_F_VERSION_1 | EVENT_IDX;
    assert_eq!(seen.activations, [(features, vec![(64, 0x1_0000, true), (64, 0x2_0000, true)])]);
}

#[test]
fn features_that_were_not_offered_are_refused() {
    let mut driver = Driver::new();
    driver.accept(1 << VIRTIO_F_VERSION_1 | 1 << 7);
    assert_eq!(driver.status(), ACKNOWLEDGE | DRIVER);

    driver.write(registers::STATUS, 0);
    driver.accept(FEATURE);
    assert_eq!(driver.status(), ACKNOWLEDGE | DRIVER, "without version 1");
}

#[test]
fn features_are_settled_once_accepted() {
    let mut driver = Driver::new();
    driver.accept(1 << VIRTIO_F_VERSION_1);
    driver.write(registers::DRIVER_FEATURES_SEL, 0);
    driver.write(registers::DRIVER_FEATURES, u32::MAX);
    driver.set_up_queue(0, 0x1_0000);
    driver.set_up_queue(1, 0x2_0000);
    driver.start();

    assert_eq!(driver.seen.lock().unwrap().activations[0].0, 1 << VIRTIO_F_VERSION_1);
}

#[test]
fn queues_are_not_set_up_before_features_or_after_start() {
    let mut driver = Driver::new();
    driver.set_up_queue(0, 0x1_0000);
    assert_eq!(driver.read(registers::QUEUE_READY), 0);

    driver.bring_up();
    driver.write(registers::QUEUE_SEL, 0);
    driver.write(registers::QUEUE_READY, 0);
    driver.write(registers::QUEUE_NUM, 3);
    assert_eq!(driver.read(registers::QUEUE_READY), 1);
    assert_eq!(driver.status(), 15);
}

#[test]
fn a_ready_queue_keeps_its_place() {
    let mut driver = Driver::new();
    driver.accept(1 << VIRTIO_F_VERSION_1);
    driver.set_up_queue(0, 0x1_0000);
    driver.write(registers::QUEUE_DESC_LOW, 0x5_0000);
    driver.set_up_queue(1, 0x2_0000);
    driver.start();

    assert_eq!(driver.seen.lock().unwrap().activations[0].1[0].1, 0x1_0000);
}

#[test]
fn bad_queue_sizes_and_addresses_need_a_reset() {
    for (register, value) in [
        (registers::QUEUE_NUM, 0),
        (registers::QUEUE_NUM, 3),
        (registers::QUEUE_NUM, 512),
        (registers::QUEUE_NUM, 0x1_0040),
        (registers::QUEUE_DESC_LOW, 0x1008),
        (registers::QUEUE_DRIVER_LOW, 0x1001),
        (registers::QUEUE_DEVICE_LOW, 0x1002),
        (registers::QUEUE_READY, 2),
    ] {
        let mut driver = Driver::new();
        driver.accept(1 << VIRTIO_F_VERSION_1);
        driver.write(registers::QUEUE_SEL, 0);
        driver.write(register, value);
        assert_ne!(driver.status() & DEVICE_NEEDS_RESET, 0, "{register:#x} <- {value:#x}");
        driver.start();
        assert!(driver.seen.lock().unwrap().activations.is_empty());
    }
}

#[test]
fn a_device_does_not_start_on_queues_that_it_cannot_use() {
    let mut driver = Driver::new();
    driver.accept(1 << VIRTIO_F_VERSION_1);
    driver.set_up_queue(0, 0x1_0000);
    driver.start();
    assert_eq!(driver.status(), 11 | DEVICE_NEEDS_RESET, "queue 1 is not ready");

    let mut driver = Driver::new();
    driver.accept(1 << VIRTIO_F_VERSION_1);
    driver.set_up_queue(0, 0x1_0000);
    driver.set_up_queue(1, 0xffff_0000);
    driver.start();
    assert_eq!(driver.status(), 11 | DEVICE_NEEDS_RESET, "queue 1 is not in memory");
    assert!(driver.seen.lock().unwrap().activations.is_empty());
}

#[test]
fn a_device_that_fails_to_start_needs_a_reset_and_recovers_by_it() {
    let mut driver = Driver::with(Notification::Event, true);
    driver.bring_up();
    assert_eq!(driver.status(), 11 | DEVICE_NEEDS_RESET);
    assert_eq!(driver.read(registers::INTERRUPT_STATUS), 2);
    assert_eq!(driver.transport.take_activation_error().unwrap().doing, "run");

    driver.write(registers::STATUS, 0);
    assert_eq!(driver.status(), 0);
    assert_eq!(driver.seen.lock().unwrap().resets, 0, "it never ran");
}

#[test]
fn a_reset_stops_the_device_and_forgets_everything() {
    let mut driver = Driver::new();
    driver.bring_up();
    driver.write(registers::QUEUE_NOTIFY, 1);
    driver.seen.lock().unwrap().interrupt.as_ref().unwrap().signal_used();

    driver.write(registers::STATUS, 0);

    assert_eq!(driver.status(), 0);
    assert_eq!(driver.read(registers::INTERRUPT_STATUS), 0);
    assert_eq!(driver.read(registers::QUEUE_READY), 0);
    assert_eq!(driver.seen.lock().unwrap().resets, 1);
    assert!(driver.event(1).read().is_err(), "the notification is forgotten");
    driver.bring_up();
    assert_eq!(driver.seen.lock().unwrap().activations.len(), 2);
}

#[test]
fn a_failing_device_shows_in_the_status() {
    let mut driver = Driver::new();
    driver.bring_up();
    driver.seen.lock().unwrap().interrupt.as_ref().unwrap().signal_needs_reset();

    assert_eq!(driver.status(), 15 | DEVICE_NEEDS_RESET);
    driver.write(registers::QUEUE_NOTIFY, 0);
    assert!(driver.event(0).read().is_err());
    driver.write(registers::STATUS, 0);
    assert_eq!(driver.status(), 0);
}

#[test]
fn notifications_reach_the_queues_event() {
    let mut driver = Driver::new();
    driver.write(registers::QUEUE_NOTIFY, 0);
    assert!(driver.event(0).read().is_err(), "it does not run yet");

    driver.bring_up();
    driver.write(registers::QUEUE_NOTIFY, 1);
    for nonsense in [2, 0xffff, 0x1_0001, u32::MAX] {
        driver.write(registers::QUEUE_NOTIFY, nonsense);
    }
    assert_eq!(driver.event(1).read().unwrap(), 1);
    assert!(driver.event(0).read().is_err());
}

#[test]
fn notifications_call_a_device_that_wants_it() {
    let mut driver = Driver::with(Notification::Call, false);
    driver.write(registers::QUEUE_NOTIFY, 0);
    driver.bring_up();
    driver.write(registers::QUEUE_NOTIFY, 1);
    driver.write(registers::QUEUE_NOTIFY, 2);

    assert!(driver.transport.queue_events().next().is_none());
    assert_eq!(driver.seen.lock().unwrap().notified, [1]);
}

#[test]
fn interrupts_are_acknowledged_bit_by_bit() {
    let mut driver = Driver::new();
    driver.bring_up();
    let interrupt = Arc::clone(driver.seen.lock().unwrap().interrupt.as_ref().unwrap());
    interrupt.signal_used();
    interrupt.signal_needs_reset();

    assert_eq!(driver.read(registers::INTERRUPT_STATUS), 3);
    driver.write(registers::INTERRUPT_ACK, 1);
    assert_eq!(driver.read(registers::INTERRUPT_STATUS), 2);
    assert!(driver.transport.interrupt_event().read().is_ok());
}

#[test]
fn registers_are_four_bytes_wide_and_the_configuration_any() {
    let mut driver = Driver::new();
    let mut byte = [0xff];
    driver.transport.read(registers::MAGIC, &mut byte);
    assert_eq!(byte, [0]);
    let mut long = [0xff; 8];
    driver.transport.read(registers::MAGIC, &mut long);
    assert_eq!(long, [0; 8]);
    driver.transport.write(registers::STATUS, &[1]);
    driver.transport.write(registers::STATUS, &[1, 0, 0, 0, 0, 0, 0, 0]);
    assert_eq!(driver.status(), 0);
    assert_eq!(driver.read(0x002), 0, "unaligned");

    driver.transport.read(registers::CONFIG + 6, &mut long);
    assert_eq!(long, [7, 8, 0, 0, 0, 0, 0, 0]);
    driver.transport.read(registers::CONFIG + 1, &mut byte);
    assert_eq!(byte, [2]);
    driver.transport.read(WINDOW_SIZE - 1, &mut byte);
    driver.transport.read(u64::MAX, &mut byte);
    assert_eq!(byte, [0]);
}

#[test]
fn a_failed_driver_goes_nowhere_but_reset() {
    let mut driver = Driver::new();
    driver.accept(1 << VIRTIO_F_VERSION_1);
    driver.write(registers::STATUS, 11 | FAILED);
    driver.write(registers::STATUS, 15 | FAILED);

    assert_eq!(driver.status(), 11 | FAILED);
}

#[test]
fn no_sequence_of_writes_upsets_the_transport() {
    // A fixed linear congruential sequence: the same hostile driver each time.
    let mut driver = Driver::new();
    let mut state = 0x1234_5678_u64;
    let mut next = move || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 33) as u32
    };
    let statuses = [0, 1, 3, 11, 15, 128, 64, u32::MAX];
    for _ in 0..200_000 {
        let offset = u64::from(next() % 0x110);
        let value = match next() % 4 {
            0 => next(),
            1 => next() % 4,
            2 => 0x1000 * (next() % 0x100),
            _ => statuses[(next() % 8) as usize],
        };
        driver.write(offset & !3, value);
        driver.read(offset);
        assert!(!driver.transport.is_running() || driver.transport.queues.iter().all(QueueT::ready));
    }
}

#[test]
fn a_feature_that_lacks_another_is_not_accepted() {
    let mut driver = Driver::new();
    driver.accept(1 << VIRTIO_F_VERSION_1 | OTHER);
    assert_eq!(driver.status() & FEATURES_OK, 0);
}

#[test]
fn a_queue_that_the_features_leave_out_need_not_be_set_up() {
    let mut driver = Driver::new();
    driver.accept(1 << VIRTIO_F_VERSION_1 | FEATURE | OTHER);
    driver.set_up_queue(0, 0x1_0000);
    driver.start();

    assert_eq!(driver.status(), 15);
    assert_eq!(driver.seen.lock().unwrap().activations[0].1.len(), 1);
}

#[test]
fn used_buffers_may_always_show() {
    let mut driver = Driver::of(Notification::Event, false, true);
    driver.bring_up();
    assert!(driver.transport.acknowledged_event().is_some());
    assert_eq!(driver.read(registers::INTERRUPT_STATUS), 1);

    driver.seen.lock().unwrap().interrupt.as_ref().unwrap().signal_config();
    assert_eq!(driver.read(registers::INTERRUPT_STATUS), 3);
    driver.write(registers::INTERRUPT_ACK, 3);
    assert_eq!(driver.read(registers::INTERRUPT_STATUS), 1);
    assert!(Driver::new().transport.acknowledged_event().is_none());
}

#[test]
fn the_configuration_has_a_generation() {
    let mut driver = Driver::new();
    driver.bring_up();
    assert_eq!(driver.read(registers::CONFIG_GENERATION), 0);
    driver.write(registers::STATUS, 0);
    assert_eq!(driver.read(registers::CONFIG_GENERATION), 1);
}
