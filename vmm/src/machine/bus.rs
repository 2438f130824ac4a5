// SPDX-License-Identifier: Apache-2.0
//! The machine's devices, where the guest's accesses find them.
//!
//! An access that no device answers reads as all ones and is dropped when written, as on a real machine.

use std::sync::{Arc, Mutex, PoisonError};

use bulkhead_kvm::{ExitIo, KvmError, Stop, Vm};
use bulkhead_virtio::device::INTERRUPT_USED_RING;
use bulkhead_virtio::mmio::{INTERRUPT_ACK_OFFSET, MmioTransport, QUEUE_NOTIFY_OFFSET};

use super::console::{Console, SERIAL_PORT, SERIAL_PORT_LEN};
use crate::arch::x86_64::layout::{FIRST_IRQ, LAST_IRQ, VIRTIO_WINDOW_LEN, VIRTIO_WINDOWS};

/// The keyboard controller's command port, by which a guest resets the machine.
const RESET_PORT: u16 = 0x64;
/// Its command: pulse the reset line.
const RESET_COMMAND: u8 = 0xfe;

/// Every device of the machine. Clones share them.
#[derive(Debug, Clone)]
pub struct Bus {
    console: Arc<Mutex<Console>>,
    virtio: Vec<Arc<Mutex<MmioTransport>>>,
}

impl Bus {
    /// A machine with a console and nothing else.
    #[must_use]
    pub fn new(console: Arc<Mutex<Console>>) -> Self {
        Self { console, virtio: Vec::new() }
    }

    /// The word of the command line that tells the kernel of the device in window `index`
    /// (Documentation/admin-guide/kernel-parameters.txt, `virtio_mmio.device`).
    #[must_use]
    pub fn kernel_word(index: usize) -> String {
        let (address, irq) = Self::window(index);
        format!("virtio_mmio.device=4K@{address:#x}:{irq}")
    }

    fn window(index: usize) -> (u64, u32) {
        (VIRTIO_WINDOWS + index as u64 * VIRTIO_WINDOW_LEN, FIRST_IRQ + index as u32)
    }

    /// Gives a device the next window and interrupt line, and tells KVM of its notifications and interrupt.
    ///
    /// # Errors
    ///
    /// When KVM refuses, or the lines are used up.
    pub fn attach(&mut self, vm: &Vm, transport: MmioTransport) -> Result<(), KvmError> {
        let (address, irq) = Self::window(self.virtio.len());
        if irq > LAST_IRQ {
            return Err(KvmError::MissingCapability("an interrupt line for one more device"));
        }
        for (queue, event) in transport.queue_events() {
            vm.register_ioevent(event, address + QUEUE_NOTIFY_OFFSET, queue.into())?;
        }
        if let Some(event) = transport.acknowledged_event() {
            vm.register_ioevent(event, address + INTERRUPT_ACK_OFFSET, INTERRUPT_USED_RING)?;
        }
        vm.register_irqfd(transport.interrupt_event(), irq)?;
        self.virtio.push(Arc::new(Mutex::new(transport)));
        Ok(())
    }

    fn virtio_at(&self, address: u64) -> Option<(&Mutex<MmioTransport>, u64)> {
        let offset = address.checked_sub(VIRTIO_WINDOWS)?;
        let device = self.virtio.get(usize::try_from(offset / VIRTIO_WINDOW_LEN).ok()?)?;
        Some((device, offset % VIRTIO_WINDOW_LEN))
    }

    fn serial_register(port: u16) -> Option<u16> {
        port.checked_sub(SERIAL_PORT).filter(|offset| *offset < SERIAL_PORT_LEN)
    }
}

/// A poisoned lock means that another thread panicked, which ends the process; until then its state will do.
fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl ExitIo for Bus {
    fn port_in(&mut self, port: u16, data: &mut [u8]) {
        data.fill(0xff);
        if let ([byte], Some(register)) = (&mut *data, Self::serial_register(port)) {
            *byte = lock(&self.console).read(register);
        } else if port == RESET_PORT {
            data.fill(0); // nothing pending: ready for a command
        }
    }

    fn port_out(&mut self, port: u16, data: &[u8]) -> Option<Stop> {
        match (data, Self::serial_register(port)) {
            ([byte], Some(register)) => lock(&self.console).write(register, *byte),
            ([RESET_COMMAND], None) if port == RESET_PORT => return Some(Stop::Reset),
            _ => {}
        }
        None
    }

    fn mmio_read(&mut self, address: u64, data: &mut [u8]) {
        match self.virtio_at(address) {
            Some((device, offset)) => lock(device).read(offset, data),
            None => data.fill(0xff),
        }
    }

    fn mmio_write(&mut self, address: u64, data: &[u8]) {
        if let Some((device, offset)) = self.virtio_at(address) {
            lock(device).write(offset, data);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bus() -> Bus {
        Bus::new(Arc::new(Mutex::new(Console::new(tempfile::tempfile().unwrap()))))
    }

    #[test]
    fn nobody_answers_with_ones() {
        let mut data = [0u8; 4];
        bus().port_in(0xcf8, &mut data);
        assert_eq!(data, [0xff; 4]);
        let mut data = [0u8; 8];
        bus().mmio_read(0xd000_0000, &mut data);
        assert_eq!(data, [0xff; 8]);
    }

    #[test]
    fn a_keyboard_reset_stops_the_machine() {
        assert_eq!(bus().port_out(RESET_PORT, &[RESET_COMMAND]), Some(Stop::Reset));
        assert_eq!(bus().port_out(RESET_PORT, &[0xd1]), None);
        let mut status = [0xffu8];
        bus().port_in(RESET_PORT, &mut status);
        assert_eq!(status, [0]);
    }
}
