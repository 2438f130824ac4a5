// SPDX-License-Identifier: Apache-2.0
//! The page tables and descriptors that the bootstrap vCPU starts with: the first GiB mapped to itself.

use vm_memory::{Bytes, GuestAddress, GuestMemoryError};

use super::layout;
use bulkhead_kvm::GuestMemory;

const PRESENT: u64 = 1;
const WRITABLE: u64 = 1 << 1;
const USER: u64 = 1 << 2;
const LARGE: u64 = 1 << 7;

/// Null, (unused), 64-bit code at 0x10, data at 0x18 (Intel SDM vol. 3A, 3.4.5).
const DESCRIPTORS: [u64; 4] = [0, 0, 0x00af_9b00_0000_ffff, 0x00cf_9300_0000_ffff];

/// Writes the tables. `user` lets code at privilege level 3 use the mapping too, which only a probe guest wants.
///
/// # Errors
///
/// When guest memory does not reach that far.
pub fn write(memory: &GuestMemory, user: bool) -> Result<(), GuestMemoryError> {
    let flags = PRESENT | WRITABLE | if user { USER } else { 0 };
    let (pml4, pdpt, directory) = (layout::PAGE_TABLES, layout::PAGE_TABLES + 0x1000, layout::PAGE_TABLES + 0x2000);
    memory.write_obj((pdpt | flags).to_le(), GuestAddress(pml4))?;
    memory.write_obj((directory | flags).to_le(), GuestAddress(pdpt))?;
    let entries: Vec<u8> = (0..512u64).flat_map(|index| ((index << 21) | flags | LARGE).to_le_bytes()).collect();
    memory.write_slice(&entries, GuestAddress(directory))?;
    let descriptors: Vec<u8> = DESCRIPTORS.iter().flat_map(|descriptor| descriptor.to_le_bytes()).collect();
    memory.write_slice(&descriptors, GuestAddress(layout::GDT))
}
