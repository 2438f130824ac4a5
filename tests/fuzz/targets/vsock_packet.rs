// SPDX-License-Identifier: Apache-2.0
//! What a guest puts into its transmit queue: a table of descriptors, and the packets that they describe, through the
//! parser and the connections behind it. The agent's socket is read by nobody, so that its buffers fill.
//!
//! Input: guest memory. Descriptors lie at 0, 16 bytes each; every one of the first 64 begins a chain.
#![no_main]

use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::atomic::{AtomicU32, Ordering};

use bulkhead_virtio::device::GuestMemory;
use bulkhead_virtio::vsock::packet::{ReceiveBuffer, parse_transmitted};
use bulkhead_virtio::vsock::{Muxer, VsockConfig};
use bulkhead_virtio::worker::Poller;
use libfuzzer_sys::fuzz_target;
use virtio_queue::desc::split::Descriptor;
use virtio_queue::{Queue, QueueT};
use vm_memory::{Bytes, GuestAddress};

const MEMORY_LEN: usize = 0x2_0000;
const QUEUE_SIZE: u16 = 64;
const AVAILABLE_RING: u64 = 0x1_0000;
const USED_RING: u64 = 0x1_1000;
/// Where the input must not reach.
const RINGS: usize = 0x1_0000;
/// The packets that the guest takes meanwhile go here.
const RECEIVED: u64 = 0x1_8000;

fn listener() -> UnixListener {
    use std::os::linux::net::SocketAddrExt;
    use std::os::unix::net::SocketAddr;
    static NEXT: AtomicU32 = AtomicU32::new(0);
    let name = format!("bulkhead-fuzz-{}-{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
    UnixListener::bind_addr(&SocketAddr::from_abstract_name(name).unwrap()).unwrap()
}

fn queue(memory: &GuestMemory) -> Queue {
    let mut queue = Queue::new(QUEUE_SIZE).unwrap();
    queue.set_size(QUEUE_SIZE);
    queue.set_desc_table_address(Some(0), Some(0));
    queue.set_avail_ring_address(Some(AVAILABLE_RING as u32), Some(0));
    queue.set_used_ring_address(Some(USED_RING as u32), Some(0));
    queue.set_ready(true);
    memory.write_obj(QUEUE_SIZE, GuestAddress(AVAILABLE_RING + 2)).unwrap();
    for head in 0..QUEUE_SIZE {
        memory.write_obj(head, GuestAddress(AVAILABLE_RING + 4 + 2 * u64::from(head))).unwrap();
    }
    queue
}

/// A chain of one writable descriptor, far from the input.
fn room(memory: &GuestMemory) -> Option<virtio_queue::DescriptorChain<&GuestMemory>> {
    let descriptor = Descriptor::new(RECEIVED, 0x1000, 2, 0);
    memory.write_obj(descriptor, GuestAddress(RECEIVED - 0x1000)).ok()?;
    let mut queue = Queue::new(1).ok()?;
    queue.set_size(1);
    queue.set_desc_table_address(Some((RECEIVED - 0x1000) as u32), Some(0));
    queue.set_avail_ring_address(Some((RECEIVED - 0x800) as u32), Some(0));
    queue.set_used_ring_address(Some((RECEIVED - 0x400) as u32), Some(0));
    queue.set_ready(true);
    memory.write_obj(1_u16, GuestAddress(RECEIVED - 0x800 + 2)).ok()?;
    queue.pop_descriptor_chain(memory)
}

fuzz_target!(|bytes: &[u8]| {
    let memory = GuestMemory::from_ranges(&[(GuestAddress(0), MEMORY_LEN)]).unwrap();
    memory.write_slice(&bytes[..bytes.len().min(RINGS)], GuestAddress(0)).unwrap();
    let mut queue = queue(&memory);
    let (agent, _unread) = UnixStream::pair().unwrap();
    let config = VsockConfig { guest_cid: 3, listener: listener(), agent: Some(agent), agent_port: 1024 };
    let mut muxer = Muxer::new(config, Poller::new().unwrap()).unwrap();
    while let Some(chain) = queue.pop_descriptor_chain(&memory) {
        muxer.receive(&parse_transmitted(&memory, chain));
        let Some(buffer) = room(&memory).and_then(|chain| ReceiveBuffer::parse(&memory, chain)) else { continue };
        if let Some(header) = muxer.next_packet(buffer.data()) {
            let _ = buffer.finish(&header);
        }
    }
});
