// SPDX-License-Identifier: Apache-2.0
//! What a guest puts into the queues of its network device: two tables of descriptors, and the memory that they describe.
//! The network behind it sends a few frames, and takes what it is given.
//!
//! Input: a byte of features, then guest memory. The descriptors of the receive queue lie at 0, those of the transmit queue
//! at 0x400, 16 bytes each; every one begins a chain.
#![no_main]

use std::os::unix::net::UnixDatagram;
use std::sync::Arc;
use std::time::Duration;

use bulkhead_virtio::device::{ActiveQueue, GuestMemory, Interrupt};
use bulkhead_virtio::net::{Engine, Link, Tap};
use bulkhead_virtio::worker::EventHandler;
use libfuzzer_sys::fuzz_target;
use virtio_queue::{Queue, QueueT};
use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

const MEMORY_LEN: usize = 0x2_0000;
const QUEUE_SIZE: u16 = 64;
/// Where the input must not reach: the rings.
const RINGS: usize = 0x1_0000;
/// `VIRTIO_NET_F_MRG_RXBUF` and `VIRTIO_RING_F_EVENT_IDX`.
const FEATURES: [u64; 4] = [0, 1 << 15, 1 << 29, 1 << 15 | 1 << 29];

fn event() -> EventFd {
    EventFd::new(EFD_NONBLOCK).unwrap()
}

fn queue(memory: &GuestMemory, index: u32, features: u64) -> ActiveQueue {
    let rings = RINGS as u32 + index * 0x1000;
    let mut queue = Queue::new(QUEUE_SIZE).unwrap();
    queue.set_size(QUEUE_SIZE);
    queue.set_desc_table_address(Some(index * 0x400), Some(0));
    queue.set_avail_ring_address(Some(rings), Some(0));
    queue.set_used_ring_address(Some(rings + 0x800), Some(0));
    queue.set_event_idx(features & 1 << 29 != 0);
    queue.set_ready(true);
    memory.write_obj(QUEUE_SIZE, GuestAddress(u64::from(rings) + 2)).unwrap();
    for head in 0..QUEUE_SIZE {
        memory.write_obj(head, GuestAddress(u64::from(rings) + 4 + 2 * u64::from(head))).unwrap();
    }
    let event = event();
    event.write(1).unwrap();
    ActiveQueue { queue, event }
}

fuzz_target!(|bytes: &[u8]| {
    let Some((first, content)) = bytes.split_first() else { return };
    let features = FEATURES[usize::from(first & 3)];
    let memory = GuestMemory::from_ranges(&[(GuestAddress(0), MEMORY_LEN)]).unwrap();
    memory.write_slice(&content[..content.len().min(RINGS)], GuestAddress(0)).unwrap();
    let queues = [queue(&memory, 0, features), queue(&memory, 1, features)];
    let (network, device_side) = UnixDatagram::pair().unwrap();
    network.set_nonblocking(true).unwrap();
    device_side.set_nonblocking(true).unwrap();
    for len in [12, 60, 1514, 40_000] {
        network.send(&vec![0xa5; len]).unwrap();
    }
    let link = Arc::new(Link::Tap(Tap::new(device_side.into())));
    let mut engine = Engine::new(&memory, features, queues, Arc::new(Interrupt::new(event())), link).unwrap();
    let mut events = Vec::new();
    let mut received = [0; 256];
    loop {
        engine.poller().wait(&mut events, Some(Duration::ZERO)).unwrap();
        if events.is_empty() || engine.handle(&events).is_break() {
            return;
        }
        while network.recv(&mut received).is_ok() {}
    }
});
