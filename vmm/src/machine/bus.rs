// SPDX-License-Identifier: Apache-2.0
//! The machine's devices, where the guest's accesses find them.
//!
//! An access that no device answers reads as all ones and is dropped when written, as on a real machine. A window that is
//! kept for a device to come says that there is none in it yet (virtio 1.2, section 4.2.2: a `DeviceID` of 0).

use std::sync::{Arc, Mutex, PoisonError};

use bulkhead_kvm::{ExitIo, KvmError, Stop, Vm};
use bulkhead_virtio::device::INTERRUPT_USED_RING;
use bulkhead_virtio::mmio::{INTERRUPT_ACK_OFFSET, MmioTransport, QUEUE_NOTIFY_OFFSET};

use super::console::{Console, SERIAL_PORT, SERIAL_PORT_LEN};
use super::run::describe;
use crate::arch::x86_64::layout::{FIRST_IRQ, LAST_IRQ, VIRTIO_WINDOW_LEN, VIRTIO_WINDOWS};

/// The keyboard controller's command port, by which a guest resets the machine.
const RESET_PORT: u16 = 0x64;
/// Its command: pulse the reset line.
const RESET_COMMAND: u8 = 0xfe;

/// What the first registers of an empty window say: `MagicValue`, and `Version`; all others, `DeviceID` among them, are 0.
const EMPTY_WINDOW: [(u64, u32); 2] = [(0, u32::from_le_bytes(*b"virt")), (4, 2)];

/// Every device of the machine. Clones share them.
#[derive(Debug, Clone)]
pub struct Bus {
    console: Arc<Mutex<Console>>,
    virtio: Vec<Arc<Mutex<Window>>>,
}

/// A device's registers, in the order of their addresses.
#[derive(Debug)]
enum Window {
    Device(Box<MmioTransport>),
    /// For a device to come.
    Empty,
    /// For one that KVM refused, or is being taken out.
    Unusable,
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
        let index = self.reserve()?;
        self.fill(vm, index, transport)
    }

    /// Keeps the next window and interrupt line for a device to come.
    ///
    /// # Errors
    ///
    /// The lines are used up.
    pub fn reserve(&mut self) -> Result<usize, KvmError> {
        let index = self.virtio.len();
        if Self::window(index).1 > LAST_IRQ {
            return Err(KvmError::MissingCapability("an interrupt line for one more device"));
        }
        self.virtio.push(Arc::new(Mutex::new(Window::Empty)));
        Ok(index)
    }

    /// Puts a device into an empty window, also while the machine runs, and tells KVM of its notifications and interrupt.
    ///
    /// # Errors
    ///
    /// When KVM refuses: the window is of no use then.
    pub fn fill(&self, vm: &Vm, index: usize, transport: MmioTransport) -> Result<(), KvmError> {
        let Some(window) = self.virtio.get(index) else {
            return Err(KvmError::MissingCapability("a window for one more device"));
        };
        let registered = Self::register(vm, index, &transport);
        *lock(window) = if registered.is_ok() { Window::Device(Box::new(transport)) } else { Window::Unusable };
        registered
    }

    /// Takes the device out of a window, which is empty then; also while the machine runs. Returns when nothing of the device
    /// is left, which waits for what it has under way, for ever if need be.
    ///
    /// # Errors
    ///
    /// When KVM refuses: the window is of no use then.
    pub fn vacate(&self, vm: &Vm, index: usize) -> Result<(), KvmError> {
        let Some(window) = self.virtio.get(index) else { return Ok(()) };
        // Not under the lock, for which vCPUs wait.
        let Window::Device(transport) = std::mem::replace(&mut *lock(window), Window::Unusable) else { return Ok(()) };
        Self::unregister(vm, index, &transport)?;
        drop(transport);
        *lock(window) = Window::Empty;
        Ok(())
    }

    fn register(vm: &Vm, index: usize, transport: &MmioTransport) -> Result<(), KvmError> {
        let (address, irq) = Self::window(index);
        for (queue, event) in transport.queue_events() {
            vm.register_ioevent(event, address + QUEUE_NOTIFY_OFFSET, queue.into())?;
        }
        if let Some(event) = transport.acknowledged_event() {
            vm.register_ioevent(event, address + INTERRUPT_ACK_OFFSET, INTERRUPT_USED_RING)?;
        }
        vm.register_irqfd(transport.interrupt_event(), irq)
    }

    fn unregister(vm: &Vm, index: usize, transport: &MmioTransport) -> Result<(), KvmError> {
        let (address, irq) = Self::window(index);
        for (queue, event) in transport.queue_events() {
            vm.unregister_ioevent(event, address + QUEUE_NOTIFY_OFFSET, queue.into())?;
        }
        if let Some(event) = transport.acknowledged_event() {
            vm.unregister_ioevent(event, address + INTERRUPT_ACK_OFFSET, INTERRUPT_USED_RING)?;
        }
        vm.unregister_irqfd(transport.interrupt_event(), irq)
    }

    fn virtio_at(&self, address: u64) -> Option<(&Mutex<Window>, u64)> {
        let offset = address.checked_sub(VIRTIO_WINDOWS)?;
        let device = self.virtio.get(usize::try_from(offset / VIRTIO_WINDOW_LEN).ok()?)?;
        Some((device, offset % VIRTIO_WINDOW_LEN))
    }

    fn serial_register(port: u16) -> Option<u16> {
        port.checked_sub(SERIAL_PORT).filter(|offset| *offset < SERIAL_PORT_LEN)
    }
}

impl Window {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        match self {
            Self::Device(transport) => transport.read(offset, data),
            Self::Empty | Self::Unusable => {
                let register = EMPTY_WINDOW.iter().find(|(at, _)| *at == offset).map_or(0, |(_, value)| *value);
                data.fill(0);
                data.iter_mut().zip(register.to_le_bytes()).for_each(|(to, from)| *to = from);
            }
        }
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
            Some((window, offset)) => lock(window).read(offset, data),
            None => data.fill(0xff),
        }
    }

    fn mmio_write(&mut self, address: u64, data: &[u8]) {
        if let Some((window, offset)) = self.virtio_at(address)
            && let Window::Device(transport) = &mut *lock(window)
        {
            transport.write(offset, data);
            if let Some(error) = transport.take_activation_error() {
                lock(&self.console).note(&describe(&error));
            }
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
    fn an_empty_window_says_that_there_is_no_device() {
        let mut bus = bus();
        assert_eq!(bus.reserve().unwrap(), 0);
        let mut register = |offset| {
            let mut data = [0xff; 4];
            bus.mmio_read(VIRTIO_WINDOWS + offset, &mut data);
            u32::from_le_bytes(data)
        };

        assert_eq!([register(0), register(4), register(8)], [0x7472_6976, 2, 0]);
        bus.mmio_write(VIRTIO_WINDOWS + 0x70, &[1, 0, 0, 0]);
        let mut long = [0xff; 8];
        bus.mmio_read(VIRTIO_WINDOWS, &mut long);
        assert_eq!(long, *b"virt\0\0\0\0");
    }

    #[test]
    fn windows_end_with_the_interrupt_lines() {
        let mut bus = bus();
        for _ in FIRST_IRQ..=LAST_IRQ {
            bus.reserve().unwrap();
        }
        assert!(bus.reserve().is_err());
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
