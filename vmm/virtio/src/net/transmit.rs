// SPDX-License-Identifier: Apache-2.0
//! Frames from the guest to the host.

use std::io;
use std::time::{Duration, Instant};

use virtio_queue::{QueueOwnedT, QueueT};
use vm_memory::Permissions;

use super::limit::Pace;
use super::link::Link;
use super::pieces::Pieces;
use super::used::Used;
use super::{FRAME_MAX, HEADER_LEN, QueueError};
use crate::device::{ActiveQueue, GuestMemory, Interrupt};

/// Most frames that are written before others get their turn.
const FRAMES_AT_ONCE: usize = 64;

/// Why writing has stopped.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Transmitted {
    /// The driver will notify when there is more.
    All,
    /// There may be more; it is others' turn.
    Some,
    /// The limits allow no more for so long.
    Limited(Duration),
    /// The link has no room; it becomes writable when it has.
    LinkFull,
}

/// The transmit queue.
#[derive(Debug)]
pub(super) struct Transmitter {
    active: ActiveQueue,
    memory: GuestMemory,
    used: Used,
    /// Of the frame at hand.
    pieces: Pieces,
}

impl Transmitter {
    pub(super) fn new(active: ActiveQueue, memory: GuestMemory) -> Self {
        Self { used: Used::new(&active.queue), active, pieces: Pieces::new(memory.clone()), memory }
    }

    pub(super) fn into_queue(self) -> ActiveQueue {
        self.active
    }

    pub(super) fn queue(&self) -> &ActiveQueue {
        &self.active
    }

    /// Writes frames until there are none, or the link is full, or it is others' turn. Without one they are dropped.
    pub(super) fn transmit(
        &mut self,
        link: Option<&Link>,
        pace: Option<&Pace>,
        interrupt: &Interrupt,
    ) -> Result<Transmitted, QueueError> {
        let mut outcome = Transmitted::Some;
        self.active.queue.disable_notification(&self.memory)?;
        for _ in 0..FRAMES_AT_ONCE {
            if let Some(wait) = pace.and_then(|pace| pace.wait(Instant::now())) {
                outcome = Transmitted::Limited(wait);
                break;
            }
            let Some(chain) = self.active.queue.iter(&self.memory)?.next() else {
                if self.active.queue.enable_notification(&self.memory)? {
                    continue;
                }
                outcome = Transmitted::All;
                break;
            };
            let head = chain.head_index();
            self.pieces.clear();
            let extent = self.pieces.push_chain(chain, Permissions::Read)?;
            if extent.bytes < HEADER_LEN {
                return Err(QueueError::TooShort);
            }
            if let Some(link) = link.filter(|_| extent.bytes <= FRAME_MAX)
                && let Err(error) = link.write(&self.pieces)
                && error.kind() == io::ErrorKind::WouldBlock
            {
                self.active.queue.go_to_previous_position();
                outcome = Transmitted::LinkFull;
                break;
            }
            pace.iter().for_each(|pace| pace.pay(Instant::now(), extent.bytes - HEADER_LEN));
            self.used.put(&self.active.queue, &self.memory, head, 0)?;
            self.used.show(&mut self.active.queue, &self.memory)?;
        }
        if self.used.wants_interrupt(&self.active.queue, &self.memory)? {
            interrupt.signal_used();
        }
        Ok(outcome)
    }
}
