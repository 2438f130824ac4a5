// SPDX-License-Identifier: Apache-2.0
//! The MMIO transport, version 2 (virtio 1.2, section 4.2): one device's register window.
//!
//! What a misbehaving driver meets:
//!
//! | the driver | fate |
//! | --- | --- |
//! | reads or writes a register with a width other than 4, or unaligned | reads 0, the write is ignored |
//! | touches a register that does not exist, or writes a read-only one | reads 0, the write is ignored |
//! | accepts a feature that was not offered, or not `VIRTIO_F_VERSION_1`, or not what a feature needs | `FEATURES_OK` stays clear |
//! | skips a step of the handshake, or takes a status bit back | the write is ignored |
//! | sets up queues before `FEATURES_OK`, after `DRIVER_OK`, or while they are ready | the write is ignored |
//! | gives a queue a size that is none, or a misaligned address | `DEVICE_NEEDS_RESET` |
//! | starts the device with a queue that is not ready or not within memory | `DEVICE_NEEDS_RESET` |
//! | notifies a queue that does not exist, or a device that does not run | ignored |
//!
//! A device that needs a reset takes no step but that one.

mod registers;
pub mod status;

use std::fmt;
use std::io;
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX;
use virtio_queue::{Queue, QueueT};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use crate::device::{
    ActivateError, Activation, ActiveQueue, GuestMemory, INTERRUPT_USED_RING, Interrupt, Notification, VirtioDevice,
};
use status::Step;

/// Length of a device's register window in bytes.
pub const WINDOW_SIZE: u64 = 0x1000;

/// Where in the window a driver writes the index of the queue that it notifies, 4 bytes wide: the place of the ioeventfds.
pub const QUEUE_NOTIFY_OFFSET: u64 = registers::QUEUE_NOTIFY;

/// Where in the window a driver acknowledges interrupts, 4 bytes wide.
pub const INTERRUPT_ACK_OFFSET: u64 = registers::INTERRUPT_ACK;

/// A device that could not be put behind a register window.
#[derive(Debug, thiserror::Error)]
pub enum NewTransportError {
    /// An eventfd could not be made.
    #[error("cannot make an eventfd for a virtio device")]
    EventFd(#[source] io::Error),
    /// The device names a queue size that is not a power of two of at most 32768.
    #[error("a virtio device names {size} as a queue's largest size: {reason}")]
    QueueSize {
        /// The size.
        size: u16,
        /// Why it cannot be.
        reason: virtio_queue::Error,
    },
}

/// What the driver has written into the registers, apart from the queues'.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
struct Registers {
    status: u32,
    device_features_sel: u32,
    driver_features_sel: u32,
    driver_features: u64,
    queue_sel: u32,
}

/// One device behind its register window.
pub struct MmioTransport {
    device: Box<dyn VirtioDevice>,
    memory: GuestMemory,
    interrupt: Arc<Interrupt>,
    queue_events: Vec<EventFd>,
    acknowledged: Option<EventFd>,
    queues: Vec<Queue>,
    registers: Registers,
    activation_error: Option<ActivateError>,
}

impl MmioTransport {
    /// Puts `device` behind a window. The device gets `memory` when the driver starts it.
    ///
    /// # Errors
    ///
    /// When no eventfd can be had, or the device names an impossible queue size.
    pub fn new(device: Box<dyn VirtioDevice>, memory: GuestMemory) -> Result<Self, NewTransportError> {
        let new_event = || EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC).map_err(NewTransportError::EventFd);
        let sizes = device.queue_max_sizes();
        let mut queue_events = Vec::with_capacity(sizes.len());
        let mut queues = Vec::with_capacity(sizes.len());
        for &size in sizes {
            queues.push(Queue::new(size).map_err(|reason| NewTransportError::QueueSize { size, reason })?);
            queue_events.push(new_event()?);
        }
        let interrupt = Arc::new(Interrupt::new(new_event()?));
        let acknowledged = device.always_shows_used().then(new_event).transpose()?;
        Ok(Self {
            device,
            memory,
            interrupt,
            queue_events,
            acknowledged,
            queues,
            registers: Registers::default(),
            activation_error: None,
        })
    }

    /// The eventfd that stands for the device's interrupt line, to be registered as irqfd (edge-triggered).
    #[must_use]
    pub fn interrupt_event(&self) -> &EventFd {
        self.interrupt.event()
    }

    /// The eventfds to be registered as ioeventfds at [`QUEUE_NOTIFY_OFFSET`], 4 bytes wide, each with the index that it
    /// matches: of the queues that are not notified by calls. Without ioeventfds the device works as well, only slower.
    pub fn queue_events(&self) -> impl Iterator<Item = (u16, &EventFd)> {
        let events = (0u16..).zip(&self.queue_events);
        events.filter(|(index, _)| self.device.notification(*index) == Notification::Event)
    }

    /// The eventfd to be registered as ioeventfd at [`INTERRUPT_ACK_OFFSET`], 4 bytes wide, matching [`INTERRUPT_USED_RING`]
    /// alone: nobody reads it, since nothing hangs on that acknowledgement. `None` for a device where something does.
    #[must_use]
    pub fn acknowledged_event(&self) -> Option<&EventFd> {
        self.acknowledged.as_ref()
    }

    /// Why the device could not be started, if that has happened since the last call: the driver sees only that the
    /// device needs a reset.
    pub fn take_activation_error(&mut self) -> Option<ActivateError> {
        self.activation_error.take()
    }

    /// The driver reads `data.len()` bytes at `offset` of the window.
    pub fn read(&mut self, offset: u64, data: &mut [u8]) {
        if (registers::CONFIG..WINDOW_SIZE).contains(&offset) {
            self.device.read_config(offset - registers::CONFIG, data);
        } else if let Ok(register) = <&mut [u8; 4]>::try_from(&mut *data) {
            *register = self.read_register(offset).to_le_bytes();
        } else {
            data.fill(0);
        }
    }

    /// The driver writes `data` at `offset` of the window.
    pub fn write(&mut self, offset: u64, data: &[u8]) {
        if let Ok(&register) = <&[u8; 4]>::try_from(data) {
            self.write_register(offset, u32::from_le_bytes(register));
        }
    }

    fn read_register(&self, offset: u64) -> u32 {
        match offset {
            registers::MAGIC => registers::MAGIC_VALUE,
            registers::VERSION => registers::VERSION_VALUE,
            registers::DEVICE_ID => self.device.kind() as u32,
            registers::VENDOR_ID => registers::VENDOR_VALUE,
            registers::DEVICE_FEATURES => half(self.offered_features(), self.registers.device_features_sel),
            registers::QUEUE_NUM_MAX => self.selected_queue().map_or(0, |queue| u32::from(queue.max_size())),
            registers::QUEUE_READY => self.selected_queue().map_or(0, |queue| u32::from(queue.ready())),
            registers::INTERRUPT_STATUS if self.device.always_shows_used() => {
                self.interrupt.status() | INTERRUPT_USED_RING
            }
            registers::INTERRUPT_STATUS => self.interrupt.status(),
            registers::STATUS => self.status(),
            registers::SHM_LEN_LOW | registers::SHM_LEN_HIGH | registers::SHM_BASE_LOW | registers::SHM_BASE_HIGH => {
                u32::MAX
            }
            registers::CONFIG_GENERATION => self.device.config_generation(),
            _ => 0,
        }
    }

    fn write_register(&mut self, offset: u64, value: u32) {
        match offset {
            registers::DEVICE_FEATURES_SEL => self.registers.device_features_sel = value,
            registers::DRIVER_FEATURES_SEL => self.registers.driver_features_sel = value,
            registers::DRIVER_FEATURES => self.accept_features(value),
            registers::QUEUE_SEL => self.registers.queue_sel = value,
            registers::QUEUE_NOTIFY => self.notify(value),
            registers::INTERRUPT_ACK => self.interrupt.acknowledge(value),
            registers::STATUS if value == 0 => self.reset(),
            registers::STATUS => self.set_status(value),
            _ => self.write_queue_register(offset, value),
        }
    }

    /// The status as the driver sees it.
    fn status(&self) -> u32 {
        let needs_reset = if self.interrupt.needs_reset() { status::DEVICE_NEEDS_RESET } else { 0 };
        self.registers.status | needs_reset
    }

    fn has_status(&self, bits: u32) -> bool {
        self.registers.status & bits == bits
    }

    fn is_running(&self) -> bool {
        self.has_status(status::DRIVER_OK) && !self.interrupt.needs_reset()
    }

    fn offered_features(&self) -> u64 {
        self.device.features() | 1 << VIRTIO_F_VERSION_1
    }

    fn selected_queue(&self) -> Option<&Queue> {
        self.queues.get(usize::try_from(self.registers.queue_sel).ok()?)
    }

    fn accept_features(&mut self, value: u32) {
        if !self.has_status(status::DRIVER) || self.has_status(status::FEATURES_OK) {
            return;
        }
        let shift = match self.registers.driver_features_sel {
            0 => 0,
            1 => 32,
            _ => return,
        };
        let others = self.registers.driver_features & !(u64::from(u32::MAX) << shift);
        self.registers.driver_features = others | u64::from(value) << shift;
    }

    fn set_status(&mut self, wanted: u32) {
        if self.interrupt.needs_reset() {
            return;
        }
        for step in status::steps(self.registers.status, wanted) {
            match step {
                Step::Note(bit) => self.registers.status |= bit,
                Step::AcceptFeatures => {
                    let accepted = self.registers.driver_features;
                    let is_offered = accepted & !self.offered_features() == 0;
                    if !is_offered || accepted & 1 << VIRTIO_F_VERSION_1 == 0 || !self.device.accepts(accepted) {
                        return;
                    }
                    self.registers.status |= status::FEATURES_OK;
                }
                Step::Start => match self.activate() {
                    Ok(()) => self.registers.status |= status::DRIVER_OK,
                    Err(error) => {
                        self.activation_error = Some(error);
                        return self.interrupt.signal_needs_reset();
                    }
                },
            }
        }
    }

    fn activate(&mut self) -> Result<(), ActivateError> {
        let failed = |doing: String, source: io::Error| ActivateError { doing, source };
        let count = self.device.queue_count(self.registers.driver_features);
        let mut queues = Vec::with_capacity(count);
        for (index, (configured, event)) in self.queues.iter().zip(&self.queue_events).take(count).enumerate() {
            let event = event.try_clone().map_err(|error| failed(format!("share queue {index}'s eventfd"), error))?;
            if !configured.is_valid(&self.memory) {
                return Err(failed(
                    format!("use queue {index} as the driver set it up"),
                    io::ErrorKind::InvalidInput.into(),
                ));
            }
            let mut queue = Queue::try_from(configured.state())
                .map_err(|error| failed(format!("use queue {index}: {error}"), io::ErrorKind::InvalidInput.into()))?;
            queue.set_event_idx(self.registers.driver_features & 1 << VIRTIO_RING_F_EVENT_IDX != 0);
            queues.push(ActiveQueue { queue, event });
        }
        self.device.activate(Activation {
            memory: self.memory.clone(),
            features: self.registers.driver_features,
            queues,
            interrupt: Arc::clone(&self.interrupt),
        })
    }

    fn reset(&mut self) {
        if self.has_status(status::DRIVER_OK) {
            self.device.reset();
        }
        self.registers = Registers::default();
        for (queue, event) in self.queues.iter_mut().zip(&self.queue_events) {
            queue.reset();
            // Fails only when there is no notification to forget.
            let _ = event.read();
        }
        self.interrupt.clear();
    }

    fn notify(&mut self, index: u32) {
        let Ok(index) = u16::try_from(index) else { return };
        let Some(event) = self.queue_events.get(usize::from(index)) else { return };
        if !self.is_running() {
            return;
        }
        match self.device.notification(index) {
            // Fails only when the counter would overflow: then the device has been notified already.
            Notification::Event => drop(event.write(1)),
            Notification::Call => self.device.notify(index),
        }
    }

    fn write_queue_register(&mut self, offset: u64, value: u32) {
        let writable = self.has_status(status::FEATURES_OK)
            && !self.has_status(status::DRIVER_OK)
            && !self.interrupt.needs_reset();
        let index = usize::try_from(self.registers.queue_sel).unwrap_or(usize::MAX);
        let Some(queue) =
            self.queues.get_mut(index).filter(|queue| writable && (!queue.ready() || offset == registers::QUEUE_READY))
        else {
            return;
        };
        let taken = match offset {
            registers::QUEUE_NUM => u16::try_from(value).is_ok_and(|size| queue.try_set_size(size).is_ok()),
            registers::QUEUE_READY => {
                queue.set_ready(value == 1);
                value <= 1
            }
            registers::QUEUE_DESC_LOW => {
                queue.set_desc_table_address(Some(value), None);
                value.is_multiple_of(16)
            }
            registers::QUEUE_DESC_HIGH => {
                queue.set_desc_table_address(None, Some(value));
                true
            }
            registers::QUEUE_DRIVER_LOW => {
                queue.set_avail_ring_address(Some(value), None);
                value.is_multiple_of(2)
            }
            registers::QUEUE_DRIVER_HIGH => {
                queue.set_avail_ring_address(None, Some(value));
                true
            }
            registers::QUEUE_DEVICE_LOW => {
                queue.set_used_ring_address(Some(value), None);
                value.is_multiple_of(4)
            }
            registers::QUEUE_DEVICE_HIGH => {
                queue.set_used_ring_address(None, Some(value));
                true
            }
            _ => true,
        };
        if !taken {
            self.interrupt.signal_needs_reset();
        }
    }
}

impl fmt::Debug for MmioTransport {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter
            .debug_struct("MmioTransport")
            .field("device", &self.device.kind())
            .field("registers", &self.registers)
            .field("queues", &self.queues)
            .finish_non_exhaustive()
    }
}

/// 32 bits of `features`: the lower ones for 0, the upper ones for 1, nothing for all else.
fn half(features: u64, selector: u32) -> u32 {
    match selector {
        0 => (features & u64::from(u32::MAX)) as u32,
        1 => (features >> 32) as u32,
        _ => 0,
    }
}

#[cfg(test)]
mod tests;
