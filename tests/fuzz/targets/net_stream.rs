// SPDX-License-Identifier: Apache-2.0
//! What comes on the stream socket of a network device, in two parts: the guest behind it gets the frames that are there, and
//! nothing that is not.
//!
//! Input: where the stream is cut (2 bytes), then the stream.
#![no_main]

use std::io::Write;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::Duration;

use bulkhead_virtio::device::{ActiveQueue, GuestMemory, Interrupt};
use bulkhead_virtio::net::{Engine, HEADER_LEN, Link, Notice, Stream};
use bulkhead_virtio::worker::EventHandler;
use libfuzzer_sys::fuzz_target;
use virtio_queue::{Queue, QueueT};
use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

const MEMORY_LEN: usize = 0x90_0000;
const QUEUE_SIZE: u16 = 64;
/// Where the receive queue's buffers lie, and how far apart.
const BUFFERS: u64 = 0x10_0000;
const BUFFER_LEN: u32 = 0x2_0000;
const USED: u64 = 0x1000;
const FRAME_LEN: std::ops::RangeInclusive<usize> = 14..=65_535;
/// Most bytes of a stream: as many as the socket takes at once.
const STREAM_MAX: usize = 60_000;

fn event() -> EventFd {
    EventFd::new(EFD_NONBLOCK).unwrap()
}

/// A queue at `rings` with so many buffers of the guest's for the device to write to.
fn queue(memory: &GuestMemory, rings: u32, buffers: u16) -> ActiveQueue {
    let (avail, used) = (rings + 0x800, rings + USED as u32);
    let mut queue = Queue::new(QUEUE_SIZE).unwrap();
    queue.set_size(QUEUE_SIZE);
    queue.set_desc_table_address(Some(rings), Some(0));
    queue.set_avail_ring_address(Some(avail), Some(0));
    queue.set_used_ring_address(Some(used), Some(0));
    queue.set_ready(true);
    memory.write_obj(buffers, GuestAddress(u64::from(avail) + 2)).unwrap();
    for head in 0..buffers {
        memory.write_obj(head, GuestAddress(u64::from(avail) + 4 + 2 * u64::from(head))).unwrap();
        let descriptor = GuestAddress(u64::from(rings) + 16 * u64::from(head));
        memory.write_obj(BUFFERS + u64::from(head) * u64::from(BUFFER_LEN), descriptor).unwrap();
        memory.write_obj(BUFFER_LEN, GuestAddress(descriptor.0 + 8)).unwrap();
        memory.write_obj(2_u16, GuestAddress(descriptor.0 + 12)).unwrap();
    }
    let event = event();
    event.write(1).unwrap();
    ActiveQueue { queue, event }
}

/// The frames in front of what is none, and whether something is none.
fn frames(mut stream: &[u8]) -> (Vec<&[u8]>, bool) {
    let mut frames = Vec::new();
    while let Some((len, rest)) = stream.split_first_chunk() {
        let len = u32::from_be_bytes(*len) as usize;
        if !FRAME_LEN.contains(&len) {
            return (frames, true);
        }
        let Some((frame, rest)) = rest.split_at_checked(len) else { break };
        frames.push(frame);
        stream = rest;
    }
    (frames, false)
}

fuzz_target!(|bytes: &[u8]| {
    let Some((cut, stream)) = bytes.split_first_chunk() else { return };
    let stream = &stream[..stream.len().min(STREAM_MAX)];
    let (first, second) = stream.split_at(usize::from(u16::from_le_bytes(*cut)).min(stream.len()));
    let memory = GuestMemory::from_ranges(&[(GuestAddress(0), MEMORY_LEN)]).unwrap();
    let queues = [queue(&memory, 0, QUEUE_SIZE), queue(&memory, 0x4000, 0)];
    let (mut network, socket) = UnixStream::pair().unwrap();
    let lost = Notice::new().unwrap();
    let link = Arc::new(Link::Stream(Stream::new(socket.into(), lost.clone())));
    let mut engine = Engine::new(&memory, 0, queues, Arc::new(Interrupt::new(event())), link).unwrap();
    let mut events = Vec::new();
    for part in [first, second] {
        // Where the link has ended already, nobody reads.
        let _ = network.write_all(part);
        loop {
            engine.poller().wait(&mut events, Some(Duration::ZERO)).unwrap();
            if events.is_empty() || engine.handle(&events).is_break() {
                break;
            }
        }
    }
    let (frames, is_malformed) = frames(stream);
    let count: u16 = memory.read_obj(GuestAddress(USED + 2)).unwrap();
    assert_eq!(usize::from(count), frames.len().min(QUEUE_SIZE.into()));
    for (at, frame) in (0..u64::from(count)).zip(&frames) {
        let len: u32 = memory.read_obj(GuestAddress(USED + 4 + 8 * at + 4)).unwrap();
        let mut got = vec![0; frame.len()];
        let buffer = BUFFERS + at * u64::from(BUFFER_LEN) + HEADER_LEN as u64;
        memory.read_slice(&mut got, GuestAddress(buffer)).unwrap();
        assert_eq!((len as usize, &got[..]), (HEADER_LEN + frame.len(), *frame));
    }
    // What is behind more frames than the guest has room for has not been looked at.
    assert!(lost.take().is_some() == is_malformed || frames.len() >= usize::from(QUEUE_SIZE));
});
