// SPDX-License-Identifier: Apache-2.0
//! What a device offers to the transport, and what the transport gives it when the driver is ready.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use virtio_queue::Queue;
use vm_memory::GuestMemoryMmap;
use vmm_sys_util::eventfd::EventFd;

/// The guest's memory. Clones share the mapping.
pub type GuestMemory = GuestMemoryMmap<()>;

/// The virtio device ids that Bulkhead has (virtio 1.2, section 5).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
pub enum DeviceKind {
    /// Section 5.1.
    Net = 1,
    /// Section 5.2.
    Block = 2,
    /// Section 5.4.
    Rng = 4,
    /// Section 5.10.
    Vsock = 19,
    /// Section 5.11.
    Fs = 26,
}

/// A device, seen by the MMIO transport.
pub trait VirtioDevice: Send {
    /// The device id that the driver sees.
    fn kind(&self) -> DeviceKind;

    /// The device's feature bits; the transport adds `VIRTIO_F_VERSION_1`.
    fn features(&self) -> u64;

    /// Whether the device runs with `features`, a subset of its own that the driver has accepted: some need others.
    fn accepts(&self, features: u64) -> bool {
        let _ = features;
        true
    }

    /// The largest size of each queue, in order; each a power of two.
    fn queue_max_sizes(&self) -> &[u16];

    /// How many queues, from the first on, a driver sets up that has accepted `features`; the others may be left alone.
    fn queue_count(&self, features: u64) -> usize {
        let _ = features;
        self.queue_max_sizes().len()
    }

    /// Reads the device's configuration space. Bytes beyond its end read as 0.
    fn read_config(&self, offset: u64, data: &mut [u8]);

    /// Changes with each change of the configuration space that the device itself makes.
    fn config_generation(&self) -> u32 {
        0
    }

    /// Starts the device on its queues: the driver has set `DRIVER_OK`. All of its queues are enabled and valid.
    ///
    /// # Errors
    ///
    /// The transport answers an error by setting `DEVICE_NEEDS_RESET`.
    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError>;

    /// How the driver's notifications of queue `queue` reach the device.
    fn notification(&self, queue: u16) -> Notification {
        let _ = queue;
        Notification::Event
    }

    /// The driver has notified queue `queue`, which is one of the device's; only called on an active device, for a queue
    /// whose [`Self::notification`] is [`Notification::Call`], on the vCPU's own thread. To be short and never to wait for
    /// the guest.
    fn notify(&mut self, queue: u16) {
        let _ = queue;
    }

    /// Whether the driver always reads that buffers have been used when it asks what an interrupt was for. It looks at
    /// its rings then, and finds out. Who raises the interrupt need not say so before, which the host's kernel cannot, and
    /// the driver's acknowledgement need not reach the device.
    fn always_shows_used(&self) -> bool {
        false
    }

    /// Stops the device and forgets its queues: the driver has written 0 to the status register, or a worker failed.
    /// Returns only when nothing of the device touches guest memory any more.
    fn reset(&mut self);
}

/// How a driver's notification of a queue reaches the device.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Notification {
    /// Through the queue's [`ActiveQueue::event`], on which a thread of the device waits. The VMM registers it as
    /// ioeventfd, so that the vCPU goes on at once.
    Event,
    /// Through [`VirtioDevice::notify`], while the vCPU waits: for devices that are asked rarely, and need no thread.
    Call,
}

/// What a device gets to run.
#[derive(Debug)]
pub struct Activation {
    /// The guest's memory.
    pub memory: GuestMemory,
    /// The features that the driver accepted, a subset of those offered.
    pub features: u64,
    /// The queues, as many as [`VirtioDevice::queue_count`] says.
    pub queues: Vec<ActiveQueue>,
    /// How the device tells the driver.
    pub interrupt: Arc<Interrupt>,
}

/// A queue and the driver's notification of it.
#[derive(Debug)]
pub struct ActiveQueue {
    /// The ring.
    pub queue: Queue,
    /// Readable when the driver has notified the queue.
    pub event: EventFd,
}

/// A device that could not be started: what was being done, and why it failed.
#[derive(Debug, thiserror::Error)]
#[error("cannot {doing}")]
pub struct ActivateError {
    /// Completes "cannot …".
    pub doing: String,
    /// The cause.
    #[source]
    pub source: std::io::Error,
}

/// Reads `data.len()` bytes at `offset` of a configuration space whose whole content is `config`; bytes beyond it are 0.
pub fn read_config_bytes(config: &[u8], offset: u64, data: &mut [u8]) {
    let start = usize::try_from(offset).unwrap_or(usize::MAX).min(config.len());
    let count = data.len().min(config.len() - start);
    data[..count].copy_from_slice(&config[start..start + count]);
    data[count..].fill(0);
}

/// `InterruptStatus` bit 0: the device has used buffers (virtio 1.2, section 4.2.2).
pub const INTERRUPT_USED_RING: u32 = 1;
/// `InterruptStatus` bit 1: the device's configuration has changed.
pub const INTERRUPT_CONFIG: u32 = 2;

/// A device's one interrupt line: the status bits that the driver reads and acknowledges, and the eventfd that KVM turns
/// into an interrupt.
pub struct Interrupt {
    status: AtomicU32,
    needs_reset: AtomicU32,
    event: EventFd,
}

impl Interrupt {
    /// An idle line that raises its interrupts through `event`.
    #[must_use]
    pub fn new(event: EventFd) -> Self {
        Self { status: AtomicU32::new(0), needs_reset: AtomicU32::new(0), event }
    }

    /// The eventfd behind the line, to be registered as irqfd.
    #[must_use]
    pub fn event(&self) -> &EventFd {
        &self.event
    }

    /// Tells the driver that buffers have been used.
    pub fn signal_used(&self) {
        self.raise(INTERRUPT_USED_RING);
    }

    /// Tells the driver that the configuration space has changed.
    pub fn signal_config(&self) {
        self.raise(INTERRUPT_CONFIG);
    }

    /// Tells the driver that the device has met something in its queues that it cannot go on from: the transport shows
    /// `DEVICE_NEEDS_RESET` until the driver resets the device.
    pub fn signal_needs_reset(&self) {
        self.needs_reset.store(1, Ordering::Release);
        self.raise(INTERRUPT_CONFIG);
    }

    /// Whether [`Self::signal_needs_reset`] was called since the last [`Self::clear`].
    #[must_use]
    pub fn needs_reset(&self) -> bool {
        self.needs_reset.load(Ordering::Acquire) != 0
    }

    /// The pending bits.
    #[must_use]
    pub fn status(&self) -> u32 {
        self.status.load(Ordering::Acquire)
    }

    /// Acknowledges the bits that are set in `bits`.
    pub fn acknowledge(&self, bits: u32) {
        self.status.fetch_and(!bits, Ordering::AcqRel);
    }

    /// Back to idle, on a device reset.
    pub fn clear(&self) {
        self.status.store(0, Ordering::Release);
        self.needs_reset.store(0, Ordering::Release);
    }

    fn raise(&self, bit: u32) {
        self.status.fetch_or(bit, Ordering::AcqRel);
        // An eventfd's write fails only when its counter would overflow, and then the interrupt is pending already.
        let _ = self.event.write(1);
    }
}

impl fmt::Debug for Interrupt {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.debug_struct("Interrupt").field("status", &self.status).finish_non_exhaustive()
    }
}
