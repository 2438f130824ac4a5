// SPDX-License-Identifier: Apache-2.0
//! A guest's driver for tests: rings in guest memory, registers written through the transport.

use std::time::{Duration, Instant};

use vm_memory::{Bytes, GuestAddress};

use crate::device::GuestMemory;
use crate::mmio::MmioTransport;
use crate::vsock::packet::{HEADER_SIZE, HOST_CID, Header, Operation, TYPE_STREAM};
use crate::vsock::{Vsock, VsockConfig};
use crate::worker::{Interest, Poller, eventfd_as_fd};

pub(super) const GUEST_CID: u64 = 3;

const RX: u32 = 0;
const TX: u32 = 1;
const RING_SIZE: u16 = 64;
const BUFFER_SIZE: u32 = 4096 - 44;
const TX_BUFFER_SIZE: u32 = 65_536 + 44;

/// What the guest does not do in the usual way.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Habits {
    /// Uses event indices.
    pub(super) event_idx: bool,
    /// Puts headers into descriptors of their own.
    pub(super) split: bool,
}

/// A split ring that the guest fills. Descriptors `2 * n` and `2 * n + 1` belong to buffer `n`.
struct Ring {
    memory: GuestMemory,
    descriptors: u64,
    available: u64,
    used: u64,
    available_index: u16,
    used_index: u16,
    event_idx: bool,
}

impl Ring {
    fn new(memory: &GuestMemory, at: u64, event_idx: bool) -> Self {
        Self {
            memory: memory.clone(),
            descriptors: at,
            available: at + 0x1000,
            used: at + 0x2000,
            available_index: 0,
            used_index: 0,
            event_idx,
        }
    }

    fn describe(&self, index: u16, address: u64, len: u32, flags: u16) {
        let at = self.descriptors + 16 * u64::from(index);
        self.memory.write_obj(address, GuestAddress(at)).unwrap();
        self.memory.write_obj(len, GuestAddress(at + 8)).unwrap();
        self.memory.write_obj(flags, GuestAddress(at + 12)).unwrap();
        self.memory.write_obj(index + 1, GuestAddress(at + 14)).unwrap();
    }

    /// Makes a buffer available, and says whether the device wants to know.
    fn offer(&mut self, head: u16) -> bool {
        let slot = self.available + 4 + 2 * u64::from(self.available_index % RING_SIZE);
        self.memory.write_obj(head, GuestAddress(slot)).unwrap();
        let before = self.available_index;
        self.available_index = before.wrapping_add(1);
        let order = std::sync::atomic::Ordering::SeqCst;
        self.memory.store(self.available_index, GuestAddress(self.available + 2), order).unwrap();
        std::sync::atomic::fence(order);
        if self.event_idx {
            let event: u16 = self.memory.load(GuestAddress(self.used + 4 + 8 * u64::from(RING_SIZE)), order).unwrap();
            event == before
        } else {
            let flags: u16 = self.memory.load(GuestAddress(self.used), order).unwrap();
            flags & 1 == 0
        }
    }

    /// A buffer that the device has used, and how many bytes of it.
    fn take(&mut self) -> Option<(u16, u32)> {
        let order = std::sync::atomic::Ordering::SeqCst;
        // Asks for an interrupt for the next one before looking whether it is there.
        let event = GuestAddress(self.available + 4 + 2 * u64::from(RING_SIZE));
        self.memory.store(self.used_index, event, order).unwrap();
        std::sync::atomic::fence(order);
        let index: u16 = self.memory.load(GuestAddress(self.used + 2), order).unwrap();
        if index == self.used_index {
            return None;
        }
        let at = self.used + 4 + 8 * u64::from(self.used_index % RING_SIZE);
        self.used_index = self.used_index.wrapping_add(1);
        let head: u32 = self.memory.read_obj(GuestAddress(at)).unwrap();
        let len: u32 = self.memory.read_obj(GuestAddress(at + 4)).unwrap();
        Some((head as u16, len))
    }
}

/// The guest.
pub(super) struct Guest {
    pub(super) transport: MmioTransport,
    pub(super) memory: GuestMemory,
    habits: Habits,
    rx: Ring,
    tx: Ring,
    tx_free: Vec<u16>,
    poller: Poller,
}

impl Guest {
    pub(super) fn new(config: VsockConfig, habits: Habits) -> Self {
        let memory = GuestMemory::from_ranges(&[(GuestAddress(0), 0x100_0000)]).unwrap();
        let transport = MmioTransport::new(Box::new(Vsock::new(config)), memory.clone()).unwrap();
        let poller = Poller::new().unwrap();
        poller.add(eventfd_as_fd(transport.interrupt_event()), 0, Interest::IN).unwrap();
        let rx = Ring::new(&memory, 0x1_0000, habits.event_idx);
        let tx = Ring::new(&memory, 0x2_0000, habits.event_idx);
        let mut guest = Self { transport, memory, habits, rx, tx, tx_free: Vec::new(), poller };
        guest.start();
        guest
    }

    pub(super) fn write(&mut self, offset: u64, value: u32) {
        self.transport.write(offset, &value.to_le_bytes());
    }

    pub(super) fn status(&mut self) -> u32 {
        let mut status = [0; 4];
        self.transport.read(0x70, &mut status);
        u32::from_le_bytes(status)
    }

    /// Resets the device and brings it up with fresh rings.
    pub(super) fn start(&mut self) {
        for status in [0, 1, 3] {
            self.write(0x70, status);
        }
        for (selector, features) in [(0, u32::from(self.habits.event_idx) << 29), (1, 1)] {
            self.write(0x24, selector);
            self.write(0x20, features);
        }
        self.write(0x70, 11);
        self.memory.write_slice(&[0; 0x3_0000], GuestAddress(0x1_0000)).unwrap();
        for (index, at) in [(RX, 0x1_0000), (TX, 0x2_0000), (2, 0x3_0000)] {
            self.write(0x30, index);
            self.write(0x38, if index == 2 { 8 } else { u32::from(RING_SIZE) });
            for (register, address) in [(0x80, at), (0x90, at + 0x1000), (0xa0, at + 0x2000)] {
                self.write(register, address);
                self.write(register + 4, 0);
            }
            self.write(0x44, 1);
        }
        self.rx = Ring::new(&self.memory, 0x1_0000, self.habits.event_idx);
        self.tx = Ring::new(&self.memory, 0x2_0000, self.habits.event_idx);
        self.write(0x70, 15);
        assert_eq!(self.status(), 15);
        self.tx_free = (0..RING_SIZE / 2).collect();
        for buffer in 0..RING_SIZE / 2 {
            self.post(buffer);
        }
    }

    fn rx_address(buffer: u16) -> u64 {
        0x10_0000 + 0x1000 * u64::from(buffer)
    }

    fn tx_address(buffer: u16) -> u64 {
        0x20_0000 + 0x2_0000 * u64::from(buffer)
    }

    /// Gives the device a buffer to receive into.
    fn post(&mut self, buffer: u16) {
        let address = Self::rx_address(buffer);
        if self.habits.split {
            self.rx.describe(2 * buffer, address, HEADER_SIZE as u32, 3);
            self.rx.describe(2 * buffer + 1, address + HEADER_SIZE as u64, BUFFER_SIZE - HEADER_SIZE as u32, 2);
        } else {
            self.rx.describe(2 * buffer, address, BUFFER_SIZE, 2);
        }
        if self.rx.offer(2 * buffer) {
            self.write(0x50, RX);
        }
    }

    /// Sends a packet, if there is a free buffer for it.
    pub(super) fn try_send(&mut self, header: Header, data: &[u8]) -> bool {
        while let Some((head, _)) = self.tx.take() {
            self.tx_free.push(head / 2);
        }
        let Some(buffer) = self.tx_free.pop() else { return false };
        let address = Self::tx_address(buffer);
        let header = Header { len: data.len() as u32, ..header };
        self.memory.write_slice(&header.to_bytes(), GuestAddress(address)).unwrap();
        self.memory.write_slice(data, GuestAddress(address + HEADER_SIZE as u64)).unwrap();
        assert!(HEADER_SIZE + data.len() <= TX_BUFFER_SIZE as usize);
        if self.habits.split && !data.is_empty() {
            self.tx.describe(2 * buffer, address, HEADER_SIZE as u32, 1);
            self.tx.describe(2 * buffer + 1, address + HEADER_SIZE as u64, data.len() as u32, 0);
        } else {
            self.tx.describe(2 * buffer, address, (HEADER_SIZE + data.len()) as u32, 0);
        }
        if self.tx.offer(2 * buffer) {
            self.write(0x50, TX);
        }
        true
    }

    pub(super) fn send(&mut self, header: Header, data: &[u8]) {
        let deadline = Instant::now() + Duration::from_secs(10);
        while !self.try_send(header, data) {
            assert!(Instant::now() < deadline, "the device takes no packets");
            self.wait(Duration::from_millis(100));
        }
    }

    /// A packet that the device has sent.
    pub(super) fn try_receive(&mut self) -> Option<(Header, Vec<u8>)> {
        let (head, len) = self.rx.take()?;
        let address = GuestAddress(Self::rx_address(head / 2));
        let mut bytes = [0; HEADER_SIZE];
        self.memory.read_slice(&mut bytes, address).unwrap();
        let header = Header::from_bytes(&bytes);
        assert_eq!(len, HEADER_SIZE as u32 + header.len);
        let mut data = vec![0; header.len as usize];
        self.memory.read_slice(&mut data, GuestAddress(address.0 + HEADER_SIZE as u64)).unwrap();
        self.post(head / 2);
        Some((header, data))
    }

    pub(super) fn receive(&mut self) -> (Header, Vec<u8>) {
        let deadline = Instant::now() + Duration::from_secs(10);
        loop {
            if let Some(packet) = self.try_receive() {
                return packet;
            }
            assert!(Instant::now() < deadline, "no packet from the device");
            self.wait(Duration::from_secs(1));
        }
    }

    pub(super) fn expect(&mut self, operation: Operation) -> (Header, Vec<u8>) {
        let (header, data) = self.receive();
        assert_eq!(Operation::of(&header), Some(operation), "{header:?}");
        (header, data)
    }

    /// Waits for an interrupt and acknowledges it. Returns whether there was one.
    pub(super) fn wait(&mut self, timeout: Duration) -> bool {
        let mut events = Vec::new();
        self.poller.wait(&mut events, Some(timeout)).unwrap();
        let _ = self.transport.interrupt_event().read();
        self.write(0x64, 3);
        !events.is_empty()
    }

    /// Waits for a request and grants it; returns the header of the guest's packets on the connection.
    pub(super) fn accept(&mut self, buffer_size: u32) -> Header {
        let (request, _) = self.expect(Operation::Request);
        let header = Header {
            src_cid: GUEST_CID,
            dst_cid: HOST_CID,
            src_port: request.dst_port,
            dst_port: request.src_port,
            kind: TYPE_STREAM,
            buf_alloc: buffer_size,
            ..Header::default()
        };
        self.send(Header { op: Operation::Response as u16, ..header }, &[]);
        header
    }
}
