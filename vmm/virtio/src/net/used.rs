// SPDX-License-Identifier: Apache-2.0
//! Handing chains back to the driver, several in one go.
//!
//! A frame that fills several chains has to appear to the driver as a whole (virtio 1.2, section 5.1.6.4), which the
//! queue's own `add_used` cannot do: it shows each chain at once.

use std::sync::atomic::{Ordering, fence};

use virtio_bindings::virtio_ring::{vring_avail, vring_used_elem};
use virtio_queue::{Error, Queue, QueueT};
use vm_memory::{Address, Bytes, GuestAddress};

use crate::device::GuestMemory;

/// Bytes in front of each ring's elements: flags and index.
const RING_HEADER_LEN: u64 = size_of::<vring_avail>() as u64;
/// Offset of the index in a ring.
const RING_INDEX: u64 = 2;

/// Chains that have been put into the used ring and not yet been shown.
#[derive(Debug)]
pub(super) struct Used {
    hidden: u16,
    /// The ring's index when the driver was last thought of for an interrupt.
    told: u16,
}

impl Used {
    pub(super) fn new(queue: &Queue) -> Self {
        Self { hidden: 0, told: queue.next_used() }
    }

    /// Puts a chain of which `len` bytes were written behind those that are there.
    pub(super) fn put(&mut self, queue: &Queue, memory: &GuestMemory, head: u16, len: usize) -> Result<(), Error> {
        let at = u64::from(queue.next_used().wrapping_add(self.hidden) % queue.size());
        // Two little-endian words: the chain's head, and the length.
        let element = u64::from(head) | u64::from(u32::try_from(len).unwrap_or(u32::MAX)) << 32;
        let place = offset(queue.used_ring(), RING_HEADER_LEN + at * size_of::<vring_used_elem>() as u64)?;
        memory.write_obj(element.to_le(), place).map_err(Error::GuestMemory)?;
        self.hidden = self.hidden.wrapping_add(1);
        Ok(())
    }

    /// Shows the driver what has been put.
    pub(super) fn show(&mut self, queue: &mut Queue, memory: &GuestMemory) -> Result<(), Error> {
        queue.set_next_used(queue.next_used().wrapping_add(self.hidden));
        self.hidden = 0;
        let place = offset(queue.used_ring(), RING_INDEX)?;
        memory.store(queue.next_used().to_le(), place, Ordering::Release).map_err(Error::GuestMemory)
    }

    /// Whether the driver wants an interrupt for what it has been shown since this was last asked.
    pub(super) fn wants_interrupt(&mut self, queue: &Queue, memory: &GuestMemory) -> Result<bool, Error> {
        let (before, now) = (self.told, queue.next_used());
        if before == now {
            return Ok(false);
        }
        self.told = now;
        if !queue.event_idx_enabled() {
            return Ok(true);
        }
        // The driver writes what it waits for, then looks at the index; here it is the other way round.
        fence(Ordering::SeqCst);
        let place = offset(queue.avail_ring(), RING_HEADER_LEN + u64::from(queue.size()) * size_of::<u16>() as u64)?;
        let awaited = u16::from_le(memory.load(place, Ordering::Relaxed).map_err(Error::GuestMemory)?);
        Ok(passed(awaited, before, now))
    }
}

/// Whether an index that went from `before` to `now` has left `awaited` behind, all of them going round.
fn passed(awaited: u16, before: u16, now: u16) -> bool {
    now.wrapping_sub(awaited).wrapping_sub(1) < now.wrapping_sub(before)
}

fn offset(ring: u64, by: u64) -> Result<GuestAddress, Error> {
    GuestAddress(ring).checked_add(by).ok_or(Error::AddressOverflow)
}

#[cfg(test)]
mod tests {
    use super::*;
    use virtio_queue::mock::MockSplitQueue;

    #[test]
    fn chains_appear_together() {
        let memory = GuestMemory::from_ranges(&[(GuestAddress(0), 0x1_0000)]).unwrap();
        let driver = MockSplitQueue::new(&memory, 8);
        let mut queue: Queue = driver.create_queue().unwrap();
        let mut used = Used::new(&queue);

        used.put(&queue, &memory, 3, 100).unwrap();
        used.put(&queue, &memory, 5, 200).unwrap();
        assert_eq!(driver.used().idx().load(), 0);
        used.show(&mut queue, &memory).unwrap();

        let element = |at| driver.used().ring().ref_at(at).unwrap().load();
        assert_eq!(driver.used().idx().load(), 2);
        assert_eq!([(element(0).id(), element(0).len()), (element(1).id(), element(1).len())], [(3, 100), (5, 200)]);
        assert!(used.wants_interrupt(&queue, &memory).unwrap());
        assert!(!used.wants_interrupt(&queue, &memory).unwrap());
    }

    #[test]
    fn an_index_is_passed_round_the_corner_too() {
        assert!(passed(5, 5, 6));
        assert!(passed(5, 3, 9));
        assert!(!passed(9, 3, 9));
        assert!(!passed(2, 3, 9));
        assert!(passed(0xffff, 0xfffe, 1));
        assert!(!passed(4, 0xfffe, 1));
    }
}
