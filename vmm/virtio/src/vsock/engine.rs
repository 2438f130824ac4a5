// SPDX-License-Identifier: Apache-2.0
//! The running device: moves packets between the queues and the connections, on a thread of its own.

use std::ops::ControlFlow;
use std::sync::Arc;

use virtio_queue::{Error, Queue, QueueOwnedT, QueueT};

use super::muxer::Muxer;
use super::packet::{ReceiveBuffer, parse_transmitted};
use crate::device::{ActiveQueue, GuestMemory, Interrupt};
use crate::worker::{Event, EventHandler, Interest, Poller, eventfd_as_fd};

const RX_TOKEN: u64 = 0;
const TX_TOKEN: u64 = 1;

/// Most chains of a queue that are handled before other events get their turn.
const CHAINS_AT_ONCE: usize = 512;

/// The queues and the connections.
#[derive(Debug)]
pub(super) struct Engine {
    memory: GuestMemory,
    rx: ActiveQueue,
    tx: ActiveQueue,
    interrupt: Arc<Interrupt>,
    muxer: Muxer,
}

/// Why handling a queue has stopped.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Pause {
    /// The driver will notify when there is more to do, or a socket will.
    Idle,
    /// Packets for the guest have to go first.
    Blocked,
    /// It was others' turn.
    Yielded,
}

impl Engine {
    /// Joins queues and connections; an event that is pending already is found by the poller.
    pub(super) fn new(
        memory: GuestMemory,
        rx: ActiveQueue,
        tx: ActiveQueue,
        interrupt: Arc<Interrupt>,
        muxer: Muxer,
    ) -> std::io::Result<Self> {
        muxer.poller().add(eventfd_as_fd(&rx.event), RX_TOKEN, Interest::IN)?;
        muxer.poller().add(eventfd_as_fd(&tx.event), TX_TOKEN, Interest::IN)?;
        Ok(Self { memory, rx, tx, interrupt, muxer })
    }

    /// What the device was made of.
    pub(super) fn into_muxer(self) -> Muxer {
        self.muxer
    }

    /// Moves packets both ways until there is nothing to do or others are to have their turn.
    fn process(&mut self) -> Result<(), Error> {
        loop {
            let transmitted = self.transmit()?;
            let received = self.receive()?;
            if transmitted == Pause::Yielded {
                wake(&self.tx);
            }
            if received == Pause::Yielded {
                wake(&self.rx);
            }
            if transmitted != Pause::Blocked || !self.muxer.can_receive() {
                return Ok(());
            }
        }
    }

    /// Takes packets from the guest.
    fn transmit(&mut self) -> Result<Pause, Error> {
        let queue = &mut self.tx.queue;
        let mut pause = Pause::Yielded;
        let mut used = false;
        for _ in 0..CHAINS_AT_ONCE {
            if !self.muxer.can_receive() {
                pause = Pause::Blocked;
                break;
            }
            let Some(chain) = queue.iter(&self.memory)?.next() else {
                if queue.enable_notification(&self.memory)? {
                    continue;
                }
                pause = Pause::Idle;
                break;
            };
            let head = chain.head_index();
            self.muxer.receive(&parse_transmitted(&self.memory, chain));
            queue.add_used(&self.memory, head, 0)?;
            used = true;
        }
        tell(queue, &self.memory, &self.interrupt, used)?;
        Ok(pause)
    }

    /// Gives packets to the guest, as long as there are some and it has buffers for them.
    fn receive(&mut self) -> Result<Pause, Error> {
        let queue = &mut self.rx.queue;
        let mut pause = Pause::Yielded;
        let mut used = false;
        for _ in 0..CHAINS_AT_ONCE {
            if !self.muxer.has_packet() {
                pause = Pause::Idle;
                break;
            }
            let Some(chain) = queue.iter(&self.memory)?.next() else {
                if queue.enable_notification(&self.memory)? {
                    continue;
                }
                pause = Pause::Idle;
                break;
            };
            let head = chain.head_index();
            let len = match ReceiveBuffer::parse(&self.memory, chain) {
                None => 0,
                Some(buffer) => match self.muxer.next_packet(buffer.data()) {
                    Some(header) => buffer.finish(&header),
                    None => {
                        // The sockets had nothing to say after all; the buffer waits for the next packet.
                        queue.go_to_previous_position();
                        pause = Pause::Idle;
                        break;
                    }
                },
            };
            queue.add_used(&self.memory, head, len)?;
            used = true;
        }
        tell(queue, &self.memory, &self.interrupt, used)?;
        Ok(pause)
    }
}

impl EventHandler for Engine {
    fn poller(&self) -> &Poller {
        self.muxer.poller()
    }

    fn handle(&mut self, events: &[Event]) -> ControlFlow<()> {
        for &event in events {
            match event.token {
                // Reading fails only when there is nothing to read.
                RX_TOKEN => drop(self.rx.event.read()),
                TX_TOKEN => drop(self.tx.event.read()),
                _ => self.muxer.handle(event),
            }
        }
        match self.process() {
            Ok(()) => ControlFlow::Continue(()),
            Err(_) => {
                self.muxer.close();
                self.interrupt.signal_needs_reset();
                ControlFlow::Break(())
            }
        }
    }
}

/// Tells the driver about used buffers, if there are some and it wants to know.
fn tell(queue: &mut Queue, memory: &GuestMemory, interrupt: &Interrupt, used: bool) -> Result<(), Error> {
    if used && queue.needs_notification(memory)? {
        interrupt.signal_used();
    }
    Ok(())
}

/// Has the queue looked at again after other events.
fn wake(queue: &ActiveQueue) {
    // Fails only when the counter would overflow: then the queue will be looked at anyway.
    let _ = queue.event.write(1);
}

#[cfg(test)]
mod guest;
#[cfg(test)]
mod tests;
