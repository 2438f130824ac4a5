// SPDX-License-Identifier: Apache-2.0
//! The running device: carries the queue's requests out one after the other, on a thread of its own.

use std::io;
use std::ops::ControlFlow;
use std::sync::Arc;

use virtio_queue::{QueueOwnedT, QueueT};

use super::device::Serial;
use super::disk::Disk;
use super::request::{Range, Request, Unanswerable, status_at};
use super::wire::{F_FLUSH, HEADER_LEN, Status};
use crate::buffers::{Buffers, GatherError};
use crate::device::{ActiveQueue, GuestMemory, Interrupt};
use crate::worker::{Event, EventHandler, Interest, Poller, eventfd_as_fd};

const QUEUE_TOKEN: u64 = 0;

/// Requests that are served before the thread looks whether it is to stop.
const TURN: usize = 16;

/// Why the queue cannot be served any more. The device then needs a reset.
#[derive(Debug, thiserror::Error)]
enum QueueError {
    #[error("the driver broke the queue's rings")]
    Ring(#[from] virtio_queue::Error),
    #[error(transparent)]
    Buffers(#[from] GatherError),
    #[error(transparent)]
    Unanswerable(#[from] Unanswerable),
}

/// The queue and the disk.
#[derive(Debug)]
pub struct Engine {
    poller: Poller,
    memory: GuestMemory,
    queue: ActiveQueue,
    interrupt: Arc<Interrupt>,
    backend: Backend,
}

/// What requests are carried out on.
#[derive(Debug)]
struct Backend {
    disk: Arc<Disk>,
    serial: Serial,
    /// The driver does not know how to flush.
    flush_writes: bool,
}

impl Engine {
    /// Joins queue and disk; an event that is pending already is found by the poller.
    ///
    /// # Errors
    ///
    /// When the host's kernel has no room for the poller.
    pub fn new(
        memory: GuestMemory,
        accepted: u64,
        queue: ActiveQueue,
        interrupt: Arc<Interrupt>,
        disk: Arc<Disk>,
        serial: Serial,
    ) -> io::Result<Self> {
        let poller = Poller::new()?;
        // Each notification wakes the thread once, and no eventfd has to be read for that.
        poller.add(eventfd_as_fd(&queue.event), QUEUE_TOKEN, Interest::IN | Interest::ET)?;
        let backend = Backend { disk, serial, flush_writes: accepted & 1 << F_FLUSH == 0 };
        Ok(Self { poller, memory, queue, interrupt, backend })
    }

    /// Serves what is in the queue, a turn of it.
    fn serve(&mut self) -> Result<(), QueueError> {
        let Self { memory, queue: ActiveQueue { queue, event }, interrupt, backend, .. } = self;
        let memory = &*memory;
        let mut buffers = Buffers::default();
        for _ in 0..TURN {
            let Some(chain) = queue.iter(memory)?.next() else {
                if queue.enable_notification(memory)? {
                    continue;
                }
                return Ok(());
            };
            let head = chain.head_index();
            buffers.gather(chain, memory)?;
            let written = backend.answer(&buffers)?;
            queue.add_used(memory, head, written)?;
            // At once: whoever waits for this one is not to wait for the next.
            if queue.needs_notification(memory)? {
                interrupt.signal_used();
            }
        }
        // There may be more, which is looked at after other events. Fails only when it will be looked at anyway.
        let _ = event.write(1);
        Ok(())
    }
}

impl Backend {
    /// Carries out what is asked for in the buffers, and says how many bytes were written to them from their beginning on.
    fn answer(&self, buffers: &Buffers<'_>) -> Result<u32, Unanswerable> {
        let status_at = status_at(buffers)?;
        let status = match Request::parse(buffers, &self.disk) {
            Ok(request) => self.carry_out(&request, buffers),
            Err(status) => status,
        };
        buffers.writable.copy_from_at(status_at, &[status as u8]);
        // What lies in front of the status is not filled where a read has failed. A chain has less than 4 GiB.
        Ok(if status == Status::Ok || status_at == 0 { status_at as u32 + 1 } else { 0 })
    }

    fn carry_out(&self, request: &Request, buffers: &Buffers<'_>) -> Status {
        let result = match *request {
            // The offsets are on the disk, whose size the host's kernel tells as an `i64`.
            Request::Read { offset, length } => self.disk.read(&buffers.writable, length, offset.cast_signed()),
            Request::Write { offset, length } => self
                .disk
                .write(&buffers.readable, HEADER_LEN, length, offset.cast_signed())
                .and_then(|()| self.settle()),
            Request::Flush => self.disk.flush(),
            Request::GetId => {
                buffers.writable.copy_from(&self.serial.0);
                Ok(())
            }
            Request::Discard(ref ranges) => each(ranges, |range| self.disk.discard(range.offset, range.length)),
            Request::WriteZeroes(ref ranges) => {
                each(ranges, |range| self.disk.write_zeroes(range.offset, range.length)).and_then(|()| self.settle())
            }
        };
        match result {
            Ok(()) => Status::Ok,
            Err(error) if error.kind() == io::ErrorKind::Unsupported => Status::Unsupported,
            Err(_) => Status::IoError,
        }
    }

    /// After a write of a driver that takes it for durable.
    fn settle(&self) -> io::Result<()> {
        if self.flush_writes { self.disk.flush() } else { Ok(()) }
    }
}

fn each(ranges: &[Range], work: impl FnMut(&Range) -> io::Result<()>) -> io::Result<()> {
    ranges.iter().try_for_each(work)
}

impl EventHandler for Engine {
    fn poller(&self) -> &Poller {
        &self.poller
    }

    fn handle(&mut self, _events: &[Event]) -> ControlFlow<()> {
        match self.serve() {
            Ok(()) => ControlFlow::Continue(()),
            // Whatever the cause, it is the guest's loss alone: there is nobody else to tell.
            Err(_) => {
                self.interrupt.signal_needs_reset();
                ControlFlow::Break(())
            }
        }
    }
}
