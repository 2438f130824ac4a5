// SPDX-License-Identifier: Apache-2.0
//! A driver that writes any register at any time, and any bytes to its rings: the transport with the entropy device, which
//! is served on the driver's own notifications.
//!
//! Input: 4 KiB of guest memory (the rest is zero), then accesses of 8 bytes each: offset, width, value.
#![no_main]

use bulkhead_virtio::device::GuestMemory;
use bulkhead_virtio::mmio::MmioTransport;
use bulkhead_virtio::rng::Rng;
use libfuzzer_sys::fuzz_target;
use vm_memory::{Bytes, GuestAddress};

const MEMORY_LEN: usize = 0x4000;
const FROM_INPUT: usize = 0x1000;
const WIDTHS: [usize; 4] = [1, 2, 4, 8];

fuzz_target!(|bytes: &[u8]| {
    let (content, accesses) = bytes.split_at(bytes.len().min(FROM_INPUT));
    let memory = GuestMemory::from_ranges(&[(GuestAddress(0), MEMORY_LEN)]).unwrap();
    memory.write_slice(content, GuestAddress(0)).unwrap();
    let mut transport = MmioTransport::new(Box::new(Rng::new()), memory).unwrap();
    for access in accesses.chunks_exact(8) {
        let offset = u64::from(u16::from_le_bytes([access[0], access[1]]) & 0xfff);
        let width = WIDTHS[usize::from(access[2] & 3)];
        if access[2] & 4 == 0 {
            let mut value = [0; 8];
            value[..4].copy_from_slice(&access[4..]);
            transport.write(offset, &value[..width]);
        } else {
            transport.read(offset, &mut [0; 8][..width]);
        }
    }
});
