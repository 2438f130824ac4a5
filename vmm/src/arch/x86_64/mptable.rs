// SPDX-License-Identifier: Apache-2.0
//! The MP configuration table (Intel MultiProcessor Specification 1.4, chapter 4): how a kernel without ACPI learns of
//! its processors and interrupt lines.

use vm_memory::{Bytes, GuestAddress, GuestMemoryError};

use super::layout;
use bulkhead_kvm::GuestMemory;

const SPEC_REVISION: u8 = 4;
const LOCAL_APIC_VERSION: u8 = 0x14;
const IO_APIC_VERSION: u8 = 0x11;
const CPU_ENABLED: u8 = 1;
const CPU_BOOTSTRAP: u8 = 2;
const ISA_BUS: u8 = 0;
const INTERRUPT_INT: u8 = 0;
const INTERRUPT_NMI: u8 = 1;
const INTERRUPT_EXTINT: u8 = 3;
const ALL_LOCAL_APICS: u8 = 0xff;

/// Writes the table of a machine with `vcpus` processors.
///
/// # Errors
///
/// When guest memory does not reach that far.
pub fn write(memory: &GuestMemory, vcpus: u8) -> Result<(), GuestMemoryError> {
    memory.write_slice(&table(vcpus), GuestAddress(layout::MP_TABLE))?;
    memory.write_slice(&floating_pointer(), GuestAddress(layout::MP_POINTER))
}

/// The byte that makes `bytes` add up to 0.
fn checksum(bytes: &[u8]) -> u8 {
    bytes.iter().fold(0u8, |sum, byte| sum.wrapping_add(*byte)).wrapping_neg()
}

fn floating_pointer() -> Vec<u8> {
    let mut pointer = b"_MP_".to_vec();
    pointer.extend((layout::MP_TABLE as u32).to_le_bytes());
    pointer.extend([1, SPEC_REVISION, 0, 0, 0, 0, 0, 0]);
    pointer[10] = checksum(&pointer);
    pointer
}

fn table(vcpus: u8) -> Vec<u8> {
    let io_apic_id = vcpus;
    let mut entries = Vec::new();
    for id in 0..vcpus {
        let flags = CPU_ENABLED | if id == 0 { CPU_BOOTSTRAP } else { 0 };
        entries.extend([0, id, LOCAL_APIC_VERSION, flags]);
        entries.extend([0; 16]); // signature and features: the kernel asks CPUID
    }
    entries.extend([1, ISA_BUS]);
    entries.extend(b"ISA   ");
    entries.extend([2, io_apic_id, IO_APIC_VERSION, 1]);
    entries.extend(layout::IO_APIC.to_le_bytes());
    for irq in 0..=layout::LAST_IRQ as u8 {
        entries.extend([3, INTERRUPT_INT, 0, 0, ISA_BUS, irq, io_apic_id, irq]);
    }
    entries.extend([4, INTERRUPT_EXTINT, 0, 0, ISA_BUS, 0, 0, 0]);
    entries.extend([4, INTERRUPT_NMI, 0, 0, ISA_BUS, 0, ALL_LOCAL_APICS, 1]);

    const HEADER_LEN: usize = 44;
    let count = u16::from(vcpus) + 2 + layout::LAST_IRQ as u16 + 1 + 2;
    let mut table = b"PCMP".to_vec();
    table.extend(((HEADER_LEN + entries.len()) as u16).to_le_bytes());
    table.extend([SPEC_REVISION, 0]);
    table.extend(b"BULKHEADMICROVM     ");
    table.extend([0; 6]); // no OEM table
    table.extend(count.to_le_bytes());
    table.extend(layout::LOCAL_APIC.to_le_bytes());
    table.extend([0; 4]);
    table.extend(entries);
    table[7] = checksum(&table);
    table
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sum(bytes: &[u8]) -> u8 {
        bytes.iter().fold(0, |sum, byte| sum.wrapping_add(*byte))
    }

    #[test]
    fn checksums_add_up() {
        for vcpus in [1, 2, 64] {
            let table = table(vcpus);
            assert_eq!(sum(&table), 0);
            assert_eq!(usize::from(u16::from_le_bytes([table[4], table[5]])), table.len());
        }
        assert_eq!(sum(&floating_pointer()), 0);
    }

    #[test]
    fn the_largest_table_ends_before_its_pointer() {
        assert!(layout::MP_TABLE + (table(64).len() as u64) <= layout::MP_POINTER);
    }

    #[test]
    fn one_processor_starts_the_machine() {
        let table = table(4);
        let flags: Vec<u8> = (0..4).map(|cpu| table[44 + cpu * 20 + 3]).collect();
        assert_eq!(flags, [3, 1, 1, 1]);
    }
}
