// SPDX-License-Identifier: Apache-2.0
//! Frames from the host to the guest.

use std::collections::VecDeque;
use std::io;
use std::time::{Duration, Instant};

use virtio_bindings::virtio_net::VIRTIO_NET_F_MRG_RXBUF;
use virtio_queue::{QueueOwnedT, QueueT};
use vm_memory::Permissions;

use super::limit::Pace;
use super::link::Link;
use super::pieces::{Extent, Pieces};
use super::used::Used;
use super::{FRAME_MAX, HEADER_LEN, MAX_PIECES, QueueError, features};
use crate::device::{ActiveQueue, GuestMemory, Interrupt};

/// Most frames that are read before others get their turn.
const FRAMES_AT_ONCE: usize = 64;
/// Where in the header the number of chains is that a frame has filled.
const CHAIN_COUNT_OFFSET: usize = 10;

/// Why reading has stopped.
#[derive(Debug)]
pub(super) enum Received {
    /// The host has no more; the link becomes readable when it has.
    All,
    /// There may be more; it is others' turn.
    Some,
    /// There is no room for a frame; the driver notifies when it has given more.
    NoRoom,
    /// The limits allow no more for so long.
    Limited(Duration),
    /// The link is of no use any more.
    Gone(io::Error),
}

/// The receive queue, and the chains that have been taken from it and not been filled.
#[derive(Debug)]
pub(super) struct Receiver {
    active: ActiveQueue,
    memory: GuestMemory,
    used: Used,
    /// Whether a frame may fill several chains.
    merges: bool,
    chains: VecDeque<(u16, Extent)>,
    pieces: Pieces,
    /// Bytes of all pieces.
    room: usize,
}

impl Receiver {
    pub(super) fn new(active: ActiveQueue, memory: GuestMemory, accepted: u64) -> Self {
        Self {
            used: Used::new(&active.queue),
            active,
            pieces: Pieces::new(memory.clone()),
            memory,
            merges: features::has(accepted, VIRTIO_NET_F_MRG_RXBUF),
            chains: VecDeque::new(),
            room: 0,
        }
    }

    /// The queue, with the chains that have not been filled yet.
    pub(super) fn into_queue(self) -> ActiveQueue {
        let mut active = self.active;
        let taken = u16::try_from(self.chains.len()).unwrap_or_default();
        let next = active.queue.next_avail().wrapping_sub(taken);
        active.queue.set_next_avail(next);
        active
    }

    /// Takes the chains that the next frame would be read into, though there may be none.
    pub(super) fn look(&mut self) -> Result<(), QueueError> {
        if !self.has_room() {
            self.take_chains()?;
        }
        Ok(())
    }

    pub(super) fn queue(&self) -> &ActiveQueue {
        &self.active
    }

    /// Reads frames until there are none, or no room, or it is others' turn.
    pub(super) fn receive(
        &mut self,
        link: &Link,
        pace: Option<&Pace>,
        interrupt: &Interrupt,
    ) -> Result<Received, QueueError> {
        let mut outcome = Received::Some;
        for _ in 0..FRAMES_AT_ONCE {
            if !self.has_room() && !self.take_chains()? {
                outcome = Received::NoRoom;
                break;
            }
            if let Some(wait) = pace.and_then(|pace| pace.wait(Instant::now())) {
                outcome = Received::Limited(wait);
                break;
            }
            match link.read(&self.pieces, self.pieces_of_a_frame()) {
                // No room for a header, or one that whoever wrote it left out: not a tap, or not for long.
                Ok(len) if len < HEADER_LEN => {}
                Ok(len) => {
                    pace.iter().for_each(|pace| pace.pay(Instant::now(), len - HEADER_LEN));
                    self.deliver(len)?;
                }
                Err(error) => {
                    let is_all = error.kind() == io::ErrorKind::WouldBlock;
                    outcome = if is_all { Received::All } else { Received::Gone(error) };
                    break;
                }
            }
        }
        if self.used.wants_interrupt(&self.active.queue, &self.memory)? {
            interrupt.signal_used();
        }
        Ok(outcome)
    }

    /// Whether the longest of frames would fit. A driver whose ring is too small for these has given enough with half of
    /// it: it may wait for a frame before it gives more.
    fn has_room(&self) -> bool {
        if !self.merges {
            return !self.chains.is_empty();
        }
        self.room >= FRAME_MAX
            || self.pieces.count() >= MAX_PIECES
            || self.chains.len() >= (usize::from(self.active.queue.size()) / 2).max(1)
    }

    /// Takes chains from the ring until there is room; `false` when the driver will have to give more, and will notify.
    fn take_chains(&mut self) -> Result<bool, QueueError> {
        let mut is_awaited = false;
        loop {
            while !self.has_room() {
                let Some(chain) = self.active.queue.iter(&self.memory)?.next() else { break };
                let head = chain.head_index();
                let extent = self.pieces.push_chain(chain, Permissions::Write)?;
                if extent.bytes < HEADER_LEN {
                    return Err(QueueError::TooShort);
                }
                self.room = self.room.saturating_add(extent.bytes);
                self.chains.push_back((head, extent));
                is_awaited = false;
            }
            if self.has_room() {
                return Ok(true);
            }
            // A ring that says there is more, and gives nothing, would be asked forever.
            if is_awaited {
                return Err(virtio_queue::Error::InvalidAvailRingIndex.into());
            }
            is_awaited = self.active.queue.enable_notification(&self.memory)?;
            if !is_awaited {
                return Ok(false);
            }
        }
    }

    fn pieces_of_a_frame(&self) -> usize {
        match self.chains.front() {
            Some((_, extent)) if !self.merges => extent.pieces,
            _ => self.pieces.count(),
        }
    }

    /// Hands the chains that a frame of `len` bytes has filled to the driver.
    fn deliver(&mut self, len: usize) -> Result<(), QueueError> {
        let mut chain_count: u16 = 0;
        let mut pieces = 0;
        let mut left = len;
        while left > 0 {
            // A frame is never longer than what it was read into.
            let Some((head, extent)) = self.chains.pop_front() else { break };
            let filled = left.min(extent.bytes);
            self.used.put(&self.active.queue, &self.memory, head, filled)?;
            left -= filled;
            self.room -= extent.bytes;
            pieces += extent.pieces;
            chain_count += 1;
        }
        // The link knows nothing of chains, and leaves this field as it was.
        self.pieces.write_at(CHAIN_COUNT_OFFSET, &chain_count.to_le_bytes());
        self.pieces.take_off(pieces);
        Ok(self.used.show(&mut self.active.queue, &self.memory)?)
    }
}
