// SPDX-License-Identifier: Apache-2.0
//! Linux' 64-bit boot protocol (Documentation/arch/x86/boot.rst): kernel, initramfs, command line and `boot_params` in
//! memory, and the registers to start with.

use std::fs::File;
use std::io::Read;

use bulkhead_kvm::{GuestMemory, MMIO_GAP_END, MMIO_GAP_START, StartState};
use linux_loader::loader::bootparam::{boot_e820_entry, boot_params};
use linux_loader::loader::{Elf, KernelLoader};
use vm_memory::{
    Address, Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryError, ReadVolatile, VolatileMemoryError,
};

use super::{layout, mptable, paging};

const PAGE_LEN: u64 = 0x1000;
const E820_RAM: u32 = 1;
const E820_RESERVED: u32 = 2;

/// A guest that could not be put into memory.
#[derive(Debug, thiserror::Error)]
pub enum BootError {
    /// The kernel is not a whole x86-64 ELF executable, or does not fit.
    #[error(
        "cannot load the guest kernel: it is damaged, not an uncompressed x86-64 ELF, or too large for guest memory ({})",
        innermost(.0)
    )]
    Kernel(linux_loader::loader::Error),
    /// The image could not be looked at.
    #[error("cannot read the guest image")]
    ReadInitramfs(#[source] std::io::Error),
    /// The image ended early or could not be read.
    #[error("cannot copy the guest image into guest memory")]
    CopyInitramfs(#[source] VolatileMemoryError),
    /// The image is not an initramfs.
    #[error("the guest image is damaged: it does not begin as an initramfs (a newc cpio archive) does")]
    NotInitramfs,
    /// Kernel and image do not fit.
    #[error("{mem_size_mib} MiB of guest memory are too little for the guest kernel and image; give it more")]
    TooLittleMemory {
        /// The guest's memory.
        mem_size_mib: u64,
    },
    /// The command line is over the kernel's bound.
    #[error("the kernel's command line is {len} bytes long, over {} bytes", layout::CMDLINE_MAX - 1)]
    CommandLine {
        /// Its length.
        len: usize,
    },
    /// A table lies outside guest memory.
    #[error("cannot write the boot tables into guest memory")]
    Tables(#[from] GuestMemoryError),
}

/// What went wrong, without the layers that repeat it.
fn innermost(error: &dyn std::error::Error) -> String {
    error.source().map_or_else(|| error.to_string(), innermost)
}

/// Puts everything into memory that the kernel needs, and says where to begin.
///
/// # Errors
///
/// When a part is damaged or does not fit.
pub fn load(
    memory: &GuestMemory,
    vcpus: u8,
    kernel: &mut File,
    initramfs: &mut File,
    cmdline: &str,
) -> Result<StartState, BootError> {
    if cmdline.len() >= layout::CMDLINE_MAX {
        return Err(BootError::CommandLine { len: cmdline.len() });
    }
    let loaded = Elf::load(memory, None, kernel, Some(GuestAddress(layout::HIGH_MEMORY))).map_err(BootError::Kernel)?;
    let image = load_initramfs(memory, initramfs, loaded.kernel_end)?;
    memory.write_slice(&[cmdline.as_bytes(), b"\0"].concat(), GuestAddress(layout::CMDLINE))?;
    memory.write_obj(boot_parameters(memory, cmdline.len(), image), GuestAddress(layout::BOOT_PARAMS))?;
    mptable::write(memory, vcpus)?;
    paging::write(memory, false)?;
    Ok(StartState {
        rip: loaded.kernel_load.raw_value(),
        rsp: layout::STACK_TOP,
        rsi: layout::BOOT_PARAMS,
        cr3: layout::PAGE_TABLES,
        gdt: layout::GDT,
    })
}

/// Copies the image to the page behind the kernel, so that the two share a huge page of the host's rather than touch one
/// more. Answers its address and length.
fn load_initramfs(memory: &GuestMemory, initramfs: &mut File, kernel_end: u64) -> Result<(u64, u64), BootError> {
    let low_end = memory.last_addr().raw_value().saturating_add(1).min(MMIO_GAP_START);
    let too_little = BootError::TooLittleMemory { mem_size_mib: low_end >> 20 };
    let len = initramfs.metadata().map_err(BootError::ReadInitramfs)?.len();
    let address = kernel_end.next_multiple_of(PAGE_LEN);
    if address.checked_add(len).is_none_or(|end| end > low_end) {
        return Err(too_little);
    }
    let mut magic = [0; 6];
    initramfs.read_exact(&mut magic).map_err(BootError::ReadInitramfs)?;
    if &magic != b"070701" {
        return Err(BootError::NotInitramfs);
    }
    memory.write_slice(&magic, GuestAddress(address))?;
    let rest = memory.get_slice(GuestAddress(address + 6), (len - 6) as usize)?;
    initramfs.read_exact_volatile(&mut { rest }).map_err(BootError::CopyInitramfs)?;
    Ok((address, len))
}

/// The kernel's map of memory: low RAM, the reserved rest of it, and all RAM above 1 MiB.
fn memory_map(ram_end: u64) -> Vec<boot_e820_entry> {
    let entry = |from: u64, to: u64, kind: u32| boot_e820_entry { addr: from, size: to - from, r#type: kind };
    let mut map = vec![
        entry(0, layout::MP_TABLE, E820_RAM),
        entry(layout::MP_TABLE, layout::LOW_MEMORY_END, E820_RESERVED),
        entry(layout::HIGH_MEMORY, ram_end.min(MMIO_GAP_START), E820_RAM),
    ];
    if ram_end > MMIO_GAP_END {
        map.push(entry(MMIO_GAP_END, ram_end, E820_RAM));
    }
    map
}

fn boot_parameters(memory: &GuestMemory, cmdline_len: usize, (image, image_len): (u64, u64)) -> boot_params {
    const BOOT_FLAG: u16 = 0xaa55;
    const MAGIC: u32 = 0x5372_6448; // "HdrS"
    const LOADER_UNDEFINED: u8 = 0xff;
    let mut params = boot_params::default();
    params.hdr.boot_flag = BOOT_FLAG;
    params.hdr.header = MAGIC;
    params.hdr.type_of_loader = LOADER_UNDEFINED;
    params.hdr.kernel_alignment = 0x0100_0000;
    // All of it lies below 4 GiB, as `layout` has it.
    params.hdr.cmd_line_ptr = layout::CMDLINE as u32;
    params.hdr.cmdline_size = cmdline_len as u32;
    params.hdr.ramdisk_image = image as u32;
    params.hdr.ramdisk_size = image_len as u32;
    let map = memory_map(memory.last_addr().raw_value() + 1);
    params.e820_entries = map.len() as u8;
    params.e820_table[..map.len()].copy_from_slice(&map);
    params
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Seek, Write};

    fn file(content: &[u8]) -> File {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(content).unwrap();
        file.rewind().unwrap();
        file
    }

    #[test]
    fn a_damaged_kernel_is_refused() {
        let memory = bulkhead_kvm::allocate(64).unwrap();
        let result = load(&memory, 1, &mut file(b"\x7fELF nonsense"), &mut file(b"070701"), "quiet");
        assert!(matches!(result, Err(BootError::Kernel(_))));
    }

    #[test]
    fn an_image_that_is_no_archive_is_refused() {
        let memory = bulkhead_kvm::allocate(64).unwrap();
        let result = load_initramfs(&memory, &mut file(b"not a cpio archive"), 0x20_0000);
        assert!(matches!(result, Err(BootError::NotInitramfs)));
    }

    #[test]
    fn an_image_behind_the_kernel_does_not_fit_small_memory() {
        let memory = bulkhead_kvm::allocate(64).unwrap();
        let result = load_initramfs(&memory, &mut file(b"070701"), 64 << 20);
        assert!(matches!(result, Err(BootError::TooLittleMemory { mem_size_mib: 64 })));
    }

    #[test]
    fn the_image_lies_behind_the_kernel() {
        let memory = bulkhead_kvm::allocate(64).unwrap();
        let (address, len) = load_initramfs(&memory, &mut file(b"070701rest"), 0x20_0001).unwrap();
        assert_eq!((address, len), (0x20_1000, 10));
        assert_eq!(memory.read_obj::<[u8; 10]>(GuestAddress(address)).unwrap(), *b"070701rest");
    }

    #[test]
    fn the_memory_map_leaves_the_gap_out() {
        let map = memory_map(MMIO_GAP_END + (1 << 30));
        let (addr, size) = (map[3].addr, map[3].size);
        assert_eq!((map.len(), addr, size), (4, MMIO_GAP_END, 1 << 30));
        let end = map[2].addr + map[2].size;
        assert_eq!(end, MMIO_GAP_START);
    }

    #[test]
    fn a_long_command_line_is_refused() {
        let memory = bulkhead_kvm::allocate(64).unwrap();
        let cmdline = "x".repeat(layout::CMDLINE_MAX);
        let result = load(&memory, 1, &mut file(b""), &mut file(b""), &cmdline);
        assert!(matches!(result, Err(BootError::CommandLine { len: layout::CMDLINE_MAX })));
    }
}
