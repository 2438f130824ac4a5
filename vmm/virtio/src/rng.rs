// SPDX-License-Identifier: Apache-2.0
//! The entropy device (virtio 1.2, section 5.4): fills the driver's buffers from the host's random number generator.
//!
//! It has no thread: a driver asks rarely and for a few bytes, so it is answered while its vCPU waits.
//!
//! | the driver | fate |
//! | --- | --- |
//! | asks for more than [`MAX_CHAIN_BYTES`] in one chain | gets that many |
//! | posts a chain that is not writable, or not within memory | gets what fitted before it, or 0 bytes |
//! | breaks the ring | the device needs a reset |

use std::io;
use std::sync::Arc;

use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};
use virtio_queue::{DescriptorChain, Queue, QueueOwnedT, QueueT};
use vm_memory::{GuestMemory as _, Permissions, VolatileSlice};

use crate::device::{
    ActivateError, Activation, DeviceKind, GuestMemory, Interrupt, Notification, VirtioDevice, read_config_bytes,
};

/// Most bytes that one descriptor chain receives.
pub const MAX_CHAIN_BYTES: usize = 64 * 1024;

/// A driver asks for one buffer at a time.
const QUEUE_SIZE: u16 = 8;

/// The entropy device.
#[derive(Debug, Default)]
pub struct Rng {
    active: Option<Active>,
}

#[derive(Debug)]
struct Active {
    memory: GuestMemory,
    queue: Queue,
    interrupt: Arc<Interrupt>,
}

impl Rng {
    /// A device that does not run yet.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }
}

impl VirtioDevice for Rng {
    fn kind(&self) -> DeviceKind {
        DeviceKind::Rng
    }

    fn features(&self) -> u64 {
        1 << VIRTIO_RING_F_EVENT_IDX | 1 << VIRTIO_RING_F_INDIRECT_DESC
    }

    fn queue_max_sizes(&self) -> &[u16] {
        &[QUEUE_SIZE]
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        read_config_bytes(&[], offset, data);
    }

    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError> {
        let Activation { memory, mut queues, interrupt, .. } = activation;
        let Some(queue) = queues.pop() else {
            return Err(ActivateError {
                doing: "start the entropy device without a queue".to_owned(),
                source: io::ErrorKind::InvalidInput.into(),
            });
        };
        self.active = Some(Active { memory, queue: queue.queue, interrupt });
        Ok(())
    }

    fn notification(&self, _queue: u16) -> Notification {
        Notification::Call
    }

    fn notify(&mut self, _queue: u16) {
        let Some(active) = &mut self.active else { return };
        if active.serve().is_err() {
            active.interrupt.signal_needs_reset();
            self.active = None;
        }
    }

    fn reset(&mut self) {
        self.active = None;
    }
}

impl Active {
    /// Fills the buffers that the driver has made available, at most a queue of them: one that makes more available
    /// meanwhile notifies again.
    fn serve(&mut self) -> Result<(), virtio_queue::Error> {
        let mut served = 0;
        while served < QUEUE_SIZE {
            let Some(chain) = self.queue.iter(&self.memory)?.next() else {
                if self.queue.enable_notification(&self.memory)? {
                    continue;
                }
                break;
            };
            let head = chain.head_index();
            self.queue.add_used(&self.memory, head, fill(&self.memory, chain))?;
            served += 1;
        }
        if served == QUEUE_SIZE {
            self.queue.enable_notification(&self.memory)?;
        }
        if served > 0 && self.queue.needs_notification(&self.memory)? {
            self.interrupt.signal_used();
        }
        Ok(())
    }
}

/// Fills the writable part of `chain`, as far as it is within memory and the bound, and returns how many bytes it got.
fn fill(memory: &GuestMemory, chain: DescriptorChain<&GuestMemory>) -> u32 {
    let mut filled = 0;
    for descriptor in chain.writable() {
        let wanted = usize::try_from(descriptor.len()).unwrap_or(usize::MAX).min(MAX_CHAIN_BYTES - filled);
        let Ok(slices) = memory.get_slices(descriptor.addr(), wanted, Permissions::Write) else { break };
        for slice in slices {
            let Ok(slice) = slice else { return filled as u32 };
            let got = fill_slice(&slice);
            filled += got;
            if got < slice.len() {
                return filled as u32;
            }
        }
    }
    filled as u32
}

/// Fills `slice` with random bytes; returns fewer than its length only if the host's generator fails.
fn fill_slice(slice: &VolatileSlice<'_>) -> usize {
    let mut filled = 0;
    let mut piece = [0; 256];
    while filled < slice.len() {
        let wanted = piece.len().min(slice.len() - filled);
        let got = match rustix::rand::getrandom(&mut piece[..wanted], rustix::rand::GetRandomFlags::empty()) {
            Ok(got) => got,
            Err(rustix::io::Errno::INTR) => continue,
            Err(_) => break,
        };
        let Ok(target) = slice.subslice(filled, got) else { break };
        target.copy_from(&piece[..got]);
        filled += got;
    }
    filled
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::ActiveQueue;
    use virtio_queue::desc::{RawDescriptor, split::Descriptor};
    use virtio_queue::mock::MockSplitQueue;
    use vm_memory::{Bytes, GuestAddress};
    use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

    const WRITE: u16 = 2;
    const BUFFER: GuestAddress = GuestAddress(0x10_0000);

    fn memory() -> GuestMemory {
        GuestMemory::from_ranges(&[(GuestAddress(0), 0x40_0000)]).unwrap()
    }

    /// Runs a device on one descriptor and returns its queue's used index, the used length and the interrupt.
    fn run(memory: &GuestMemory, descriptor: Descriptor) -> (u16, u32, Arc<Interrupt>) {
        let mock = MockSplitQueue::new(memory, QUEUE_SIZE);
        mock.build_desc_chain(&[RawDescriptor::from(descriptor)]).unwrap();
        let interrupt = Arc::new(Interrupt::new(EventFd::new(EFD_NONBLOCK).unwrap()));
        let mut rng = Rng::new();
        rng.activate(Activation {
            memory: memory.clone(),
            features: 0,
            queues: vec![ActiveQueue {
                queue: mock.create_queue().unwrap(),
                event: EventFd::new(EFD_NONBLOCK).unwrap(),
            }],
            interrupt: Arc::clone(&interrupt),
        })
        .unwrap();
        rng.notify(0);
        let used = mock.used();
        (used.idx().load(), used.ring().ref_at(0).unwrap().load().len(), interrupt)
    }

    #[test]
    fn a_buffer_is_filled_with_bytes_that_differ() {
        let memory = memory();
        let (used, length, interrupt) = run(&memory, Descriptor::new(BUFFER.0, 1000, WRITE, 0));

        let mut bytes = [0; 1000];
        memory.read_slice(&mut bytes, BUFFER).unwrap();
        assert_eq!((used, length), (1, 1000));
        assert_ne!(bytes[..500], bytes[500..]);
        assert!(bytes[750..].iter().any(|&byte| byte != 0));
        assert_eq!(interrupt.status(), 1);
    }

    #[test]
    fn a_huge_buffer_is_filled_up_to_the_bound() {
        let memory = memory();
        let (_, length, _) = run(&memory, Descriptor::new(BUFFER.0, 0x20_0000, WRITE, 0));

        let beyond: u64 = memory.read_obj(GuestAddress(BUFFER.0 + MAX_CHAIN_BYTES as u64)).unwrap();
        assert_eq!(length as usize, MAX_CHAIN_BYTES);
        assert_eq!(beyond, 0);
    }

    #[test]
    fn buffers_that_cannot_be_written_get_nothing() {
        let memory = memory();
        assert_eq!(run(&memory, Descriptor::new(BUFFER.0, 1000, 0, 0)).1, 0);
        assert_eq!(run(&memory, Descriptor::new(u64::MAX - 4, 1000, WRITE, 0)).1, 0);
        assert_eq!(run(&memory, Descriptor::new(0x4000_0000, 1000, WRITE, 0)).1, 0);
    }

    #[test]
    fn a_broken_ring_asks_for_a_reset() {
        let memory = memory();
        let mock = MockSplitQueue::new(&memory, QUEUE_SIZE);
        mock.avail().idx().store(1000);
        let interrupt = Arc::new(Interrupt::new(EventFd::new(EFD_NONBLOCK).unwrap()));
        let mut rng = Rng::new();
        rng.activate(Activation {
            memory: memory.clone(),
            features: 0,
            queues: vec![ActiveQueue {
                queue: mock.create_queue().unwrap(),
                event: EventFd::new(EFD_NONBLOCK).unwrap(),
            }],
            interrupt: Arc::clone(&interrupt),
        })
        .unwrap();

        rng.notify(0);

        assert!(interrupt.needs_reset());
    }
}
