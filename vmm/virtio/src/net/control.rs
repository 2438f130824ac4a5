// SPDX-License-Identifier: Apache-2.0
//! The control queue (virtio 1.2, section 5.1.6.5). It is served while the driver's vCPU waits: a driver asks rarely, and
//! does nothing else until it has its answer.

use std::sync::Arc;

use virtio_bindings::virtio_net::{VIRTIO_NET_ERR, VIRTIO_NET_OK};
use virtio_queue::{DescriptorChain, Queue, QueueOwnedT, QueueT};

use super::QueueError;
use super::command::{COMMAND_MAX, Command};
use crate::device::{GuestMemory, Interrupt};

/// A running control queue.
#[derive(Debug)]
pub(super) struct ControlQueue {
    queue: Queue,
    memory: GuestMemory,
    interrupt: Arc<Interrupt>,
}

impl ControlQueue {
    pub(super) fn new(queue: Queue, memory: GuestMemory, interrupt: Arc<Interrupt>) -> Self {
        Self { queue, memory, interrupt }
    }

    /// Answers the commands that there are, at most a queue of them: a driver that makes more available meanwhile notifies
    /// again. `obey` tells whether a command could be followed.
    pub(super) fn serve(&mut self, mut obey: impl FnMut(Command) -> bool) -> Result<(), QueueError> {
        let mut served = 0;
        while served < self.queue.size() {
            let Some(chain) = self.queue.iter(&self.memory)?.next() else {
                if self.queue.enable_notification(&self.memory)? {
                    served += 1;
                    continue;
                }
                break;
            };
            let head = chain.head_index();
            let written = self.answer(chain, &mut obey)?;
            self.queue.add_used(&self.memory, head, written)?;
            served += 1;
        }
        if served == self.queue.size() {
            self.queue.enable_notification(&self.memory)?;
        }
        if served > 0 && self.queue.needs_notification(&self.memory)? {
            self.interrupt.signal_used();
        }
        Ok(())
    }

    /// The driver has broken the queue.
    pub(super) fn signal_needs_reset(&self) {
        self.interrupt.signal_needs_reset();
    }

    /// Does what a chain asks for, and writes the answer; returns its length.
    fn answer(
        &self,
        chain: DescriptorChain<&GuestMemory>,
        obey: &mut impl FnMut(Command) -> bool,
    ) -> Result<u32, QueueError> {
        let mut reader = chain.clone().reader(&self.memory)?;
        let mut writer = chain.writer(&self.memory)?;
        if writer.available_bytes() == 0 {
            return Err(QueueError::TooShort);
        }
        let len = reader.available_bytes();
        let command = if len > COMMAND_MAX {
            None
        } else {
            let mut bytes = vec![0; len];
            std::io::Read::read_exact(&mut reader, &mut bytes)?;
            Command::parse(&bytes)
        };
        let status = if command.is_some_and(obey) { VIRTIO_NET_OK } else { VIRTIO_NET_ERR };
        writer.write_obj(status as u8)?;
        Ok(1)
    }
}
