// SPDX-License-Identifier: Apache-2.0
//! What a guest puts into the control queue of its network device: a table of descriptors, and the commands that they
//! describe.
//!
//! Input: a byte of features, then guest memory. The queue's descriptors lie at 0, 16 bytes each; every one begins a chain.
#![no_main]

use std::sync::Arc;

use bulkhead_virtio::device::{Activation, ActiveQueue, GuestMemory, Interrupt, VirtioDevice};
use bulkhead_virtio::net::{Limits, LinkKind, MacAddress, Net, NetConfig, TABLE_MAX};
use libfuzzer_sys::fuzz_target;
use virtio_queue::{Queue, QueueT};
use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

const MEMORY_LEN: usize = 0x2_0000;
const QUEUE_SIZE: u16 = 64;
/// Where the input must not reach: the rings.
const RINGS: u32 = 0x1_0000;
const PAIRS: u16 = 2;
const EVENT_IDX: u64 = 1 << 29;
/// `VIRTIO_NET_F_CTRL_VQ`, `_MQ`, and those of filters and addresses.
const FEATURES: [u64; 2] = [1 << 17 | 1 << 22, 1 << 17 | 1 << 22 | 1 << 18 | 1 << 23];

fn event() -> EventFd {
    EventFd::new(EFD_NONBLOCK).unwrap()
}

fn queue(memory: &GuestMemory, features: u64) -> ActiveQueue {
    let mut queue = Queue::new(QUEUE_SIZE).unwrap();
    queue.set_size(QUEUE_SIZE);
    queue.set_desc_table_address(Some(0), Some(0));
    queue.set_avail_ring_address(Some(RINGS), Some(0));
    queue.set_used_ring_address(Some(RINGS + 0x800), Some(0));
    queue.set_event_idx(features & EVENT_IDX != 0);
    queue.set_ready(true);
    memory.write_obj(QUEUE_SIZE, GuestAddress(u64::from(RINGS) + 2)).unwrap();
    for head in 0..QUEUE_SIZE {
        memory.write_obj(head, GuestAddress(u64::from(RINGS) + 4 + 2 * u64::from(head))).unwrap();
    }
    ActiveQueue { queue, event: event() }
}

fuzz_target!(|bytes: &[u8]| {
    let Some((first, content)) = bytes.split_first() else { return };
    let features = FEATURES[usize::from(first & 1)] | if first & 2 != 0 { EVENT_IDX } else { 0 };
    let memory = GuestMemory::from_ranges(&[(GuestAddress(0), MEMORY_LEN)]).unwrap();
    memory.write_slice(&content[..content.len().min(RINGS as usize)], GuestAddress(0)).unwrap();
    let mut net = Net::new(&NetConfig {
        mac: MacAddress([2, 0, 0, 0, 0, 1]),
        link: LinkKind::Tap,
        pairs: PAIRS,
        limits: Limits::default(),
    });
    let queues = (0..=2 * PAIRS).map(|_| queue(&memory, features)).collect();
    let interrupt = Arc::new(Interrupt::new(event()));
    net.activate(Activation { memory, features, queues, interrupt }).unwrap();
    net.notify(2 * PAIRS);
    let state = net.port().state();
    assert!((1..=PAIRS).contains(&state.pairs) && state.mac.0[0] & 1 == 0);
    assert!(state.filter.unicast.len() <= TABLE_MAX && state.filter.multicast.len() <= TABLE_MAX);
});
