// SPDX-License-Identifier: Apache-2.0
//! What a guest puts into the queue of its block device: a table of descriptors, and the requests that they describe. The disk
//! behind it keeps its length, and one that is read-only its content.
//!
//! Input: a byte of features, then guest memory. The descriptors lie at 0, 16 bytes each; every one begins a chain.
#![no_main]

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use bulkhead_virtio::blk::{Disk, Engine, Serial};
use bulkhead_virtio::device::{ActiveQueue, GuestMemory, Interrupt};
use bulkhead_virtio::worker::EventHandler;
use libfuzzer_sys::fuzz_target;
use virtio_queue::{Queue, QueueT};
use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

const MEMORY_LEN: usize = 0x2_0000;
const QUEUE_SIZE: u16 = 64;
/// Where the input must not reach: the rings.
const RINGS: u32 = 0x1_0000;
const DISK_LEN: usize = 0x4000;
const EVENT_IDX: u64 = 1 << 29;
/// `VIRTIO_BLK_F_FLUSH`.
const FLUSH: u64 = 1 << 9;

fn event() -> EventFd {
    EventFd::new(EFD_NONBLOCK).unwrap()
}

/// A file that has no name any more.
fn disk() -> &'static File {
    static DISK: OnceLock<File> = OnceLock::new();
    DISK.get_or_init(|| {
        let path = std::env::temp_dir().join(format!("bulkhead-fuzz-disk-{}", std::process::id()));
        let file = File::options().read(true).write(true).create_new(true).open(&path).unwrap();
        fs::remove_file(path).unwrap();
        file
    })
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
    let event = event();
    event.write(1).unwrap();
    ActiveQueue { queue, event }
}

fuzz_target!(|bytes: &[u8]| {
    let Some((first, content)) = bytes.split_first() else { return };
    let is_set = |bit: u8, feature| if first & bit != 0 { feature } else { 0 };
    let features = is_set(1, EVENT_IDX) | is_set(2, FLUSH);
    let read_only = first & 4 != 0;
    let before = vec![0xa5; DISK_LEN];
    disk().write_all_at(&before, 0).unwrap();
    let memory = GuestMemory::from_ranges(&[(GuestAddress(0), MEMORY_LEN)]).unwrap();
    memory.write_slice(&content[..content.len().min(RINGS as usize)], GuestAddress(0)).unwrap();
    let queue = queue(&memory, features);
    let host_side = Arc::new(Disk::new(disk().try_clone().unwrap(), read_only).unwrap());
    let (interrupt, serial) = (Arc::new(Interrupt::new(event())), Serial::new("fuzzed").unwrap());
    let mut engine = Engine::new(memory, features, queue, interrupt, host_side, serial).unwrap();
    let mut events = Vec::new();
    loop {
        engine.poller().wait(&mut events, Some(Duration::ZERO)).unwrap();
        if events.is_empty() || engine.handle(&events).is_break() {
            break;
        }
    }
    assert_eq!(disk().metadata().unwrap().len(), DISK_LEN as u64);
    if read_only {
        let mut after = vec![0; DISK_LEN];
        disk().read_exact_at(&mut after, 0).unwrap();
        assert_eq!(after, before);
    }
});
