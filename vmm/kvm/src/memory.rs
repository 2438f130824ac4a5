// SPDX-License-Identifier: Apache-2.0
//! The guest's memory: anonymous and private, taken from the host as the guest touches it.
//!
//! | guest-physical | what |
//! | --- | --- |
//! | 0 up to [`MMIO_GAP_START`] | RAM |
//! | [`MMIO_GAP_START`] to [`MMIO_GAP_END`] | devices: virtio windows, IO-APIC, local APIC |
//! | [`MMIO_GAP_END`] up | the rest of the RAM, and behind it what may be added: see `reserve` |

use vm_memory::mmap::MmapRegionBuilder;
use vm_memory::{GuestAddress, GuestMemoryMmap, GuestRegionMmap};

/// The guest's memory. Clones share the mapping.
pub type GuestMemory = GuestMemoryMmap<()>;

/// First address that is never RAM: 3 GiB.
pub const MMIO_GAP_START: u64 = 3 << 30;
/// First address above the gap: 4 GiB.
pub const MMIO_GAP_END: u64 = 4 << 30;

/// Memory that could not be had.
#[derive(Debug, thiserror::Error)]
pub enum MemoryError {
    /// The host refused the mapping.
    #[error("cannot map {size_mib} MiB of guest memory")]
    Map {
        /// Size of the region that was refused.
        size_mib: u64,
        /// The cause.
        #[source]
        source: vm_memory::mmap::MmapRegionError,
    },
    /// The size leaves the address space.
    #[error("{size_mib} MiB of guest memory do not fit the address space")]
    Layout {
        /// The size asked for.
        size_mib: u64,
    },
}

/// Maps `size_mib` MiB of guest memory around the device gap.
///
/// # Errors
///
/// When the host refuses the mapping.
pub fn allocate(size_mib: u64) -> Result<GuestMemory, MemoryError> {
    let layout = || MemoryError::Layout { size_mib };
    let regions = ranges(size_mib)
        .ok_or_else(layout)?
        .into_iter()
        .map(|(base, len)| {
            let len_usize = usize::try_from(len).map_err(|_| layout())?;
            let mapping = MmapRegionBuilder::new(len_usize)
                .with_mmap_prot(libc::PROT_READ | libc::PROT_WRITE)
                .with_mmap_flags(libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE)
                .build()
                .map_err(|source| MemoryError::Map { size_mib: len >> 20, source })?;
            // SAFETY: the range is the mapping just made. MADV_HUGEPAGE only changes how it is backed, MADV_DONTDUMP
            // only keeps it out of core dumps; where the host knows neither, nothing is lost, so errors are ignored.
            unsafe {
                libc::madvise(mapping.as_ptr().cast(), len_usize, libc::MADV_HUGEPAGE);
                libc::madvise(mapping.as_ptr().cast(), len_usize, libc::MADV_DONTDUMP);
            }
            GuestRegionMmap::new(mapping, base).ok_or_else(layout)
        })
        .collect::<Result<Vec<_>, _>>()?;
    GuestMemoryMmap::from_regions(regions).map_err(|_| layout())
}

/// The first address behind `size_mib` MiB of RAM.
pub(crate) fn ram_end(size_mib: u64) -> Option<u64> {
    let (base, len) = ranges(size_mib)?.pop()?;
    base.0.checked_add(len)
}

/// The regions that `size_mib` MiB of RAM are made of.
fn ranges(size_mib: u64) -> Option<Vec<(GuestAddress, u64)>> {
    let size = size_mib.checked_mul(1 << 20).filter(|size| *size > 0)?;
    let low = size.min(MMIO_GAP_START);
    let mut ranges = vec![(GuestAddress(0), low)];
    if size > low {
        MMIO_GAP_END.checked_add(size - low)?;
        ranges.push((GuestAddress(MMIO_GAP_END), size - low));
    }
    Some(ranges)
}

#[cfg(test)]
mod tests {
    use super::*;
    use vm_memory::GuestMemoryBackend as _;

    #[test]
    fn small_memory_is_one_region() {
        assert_eq!(ranges(128), Some(vec![(GuestAddress(0), 128 << 20)]));
    }

    #[test]
    fn large_memory_goes_around_the_gap() {
        let regions = ranges(4096).unwrap();
        assert_eq!(regions, vec![(GuestAddress(0), 3 << 30), (GuestAddress(4 << 30), 1 << 30)]);
    }

    #[test]
    fn impossible_sizes_are_refused() {
        assert_eq!(ranges(0), None);
        assert_eq!(ranges(u64::MAX), None);
        assert!(matches!(allocate(u64::MAX >> 20), Err(MemoryError::Map { .. } | MemoryError::Layout { .. })));
    }

    #[test]
    fn allocated_memory_has_its_size() {
        let memory = allocate(64).unwrap();
        assert_eq!(memory.num_regions(), 1);
        assert_eq!(memory.last_addr(), GuestAddress((64 << 20) - 1));
    }
}
