// SPDX-License-Identifier: Apache-2.0
//! Memory that a machine may be given while it runs.
//!
//! Its addresses are set apart when the machine is made, above all of its RAM, so that devices and the host's kernel know
//! them and need not be told later. Until a part is granted nobody can touch it: KVM has no slot for it, and the mapping
//! here allows no access. A guest that names such an address to a device is cut off where a system call would use it, and
//! ends the VMM where its own code would.

use std::io;
use std::ops::Range;
use std::sync::Arc;

use vm_memory::mmap::MmapRegionBuilder;
use vm_memory::{GuestAddress, GuestRegionMmap};

use crate::memory::{GuestMemory, MMIO_GAP_END, ram_end};
use crate::vm::KvmError;

const MIB: u64 = 1 << 20;

/// Linux adds memory in blocks: of 128 MiB, but with 64 GiB and more of the largest size up to 2 GiB by which the end of its
/// RAM is a multiple (`probe_memory_block_size` in arch/x86/mm/init_64.c).
const MIN_BLOCK_LEN: u64 = 128 * MIB;
const MAX_BLOCK_LEN: u64 = 2048 * MIB;
const LARGE_RAM: u64 = 64 << 30;

/// Where a machine's memory grows: the same for who asks for it and who grants it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ReserveLayout {
    start: u64,
    len: u64,
    block_len: u64,
}

impl ReserveLayout {
    /// For a machine with `mem_size_mib` that may have `max_mem_size_mib` in the end; `None` if that is no more.
    #[must_use]
    pub fn new(mem_size_mib: u64, max_mem_size_mib: u64) -> Option<Self> {
        let more_mib = max_mem_size_mib.checked_sub(mem_size_mib).filter(|more| *more > 0)?;
        let ram_end = ram_end(mem_size_mib)?;
        let block_len = block_len(ram_end);
        let len = more_mib.checked_mul(MIB)?.checked_next_multiple_of(block_len)?;
        // A multiple of every block's length.
        let start = ram_end.max(MMIO_GAP_END).checked_next_multiple_of(MAX_BLOCK_LEN)?;
        start.checked_add(len)?;
        Some(Self { start, len, block_len })
    }

    /// What `size_mib` come to in whole blocks; at most all of it.
    #[must_use]
    pub fn whole_blocks_mib(&self, size_mib: u64) -> u64 {
        size_mib.checked_next_multiple_of(self.block_len / MIB).unwrap_or(u64::MAX).min(self.size_mib())
    }

    /// How much it is.
    #[must_use]
    pub fn size_mib(&self) -> u64 {
        self.len / MIB
    }

    /// The guest's address of what lies so far behind the beginning.
    #[must_use]
    pub fn address(&self, offset_mib: u64) -> u64 {
        self.start + offset_mib.min(self.size_mib()) * MIB
    }
}

fn block_len(ram_end: u64) -> u64 {
    if ram_end < LARGE_RAM {
        MIN_BLOCK_LEN
    } else {
        (1 << ram_end.trailing_zeros()).clamp(MIN_BLOCK_LEN, MAX_BLOCK_LEN)
    }
}

/// Memory that was not granted.
#[derive(Debug, thiserror::Error)]
pub enum GrantError {
    /// The machine was made without a reserve, or the host had no address space for one.
    #[error("no memory can be added to this machine")]
    NoReserve,
    /// It is not to be had in this size.
    #[error("cannot add {total_mib} MiB of memory: it has to be a multiple of {block_mib} MiB, and at most {max_mib}")]
    Size {
        /// What was asked for.
        total_mib: u64,
        /// What the guest can be given at a time.
        block_mib: u64,
        /// What there is.
        max_mib: u64,
    },
    /// The host refused the memory.
    #[error("cannot make {total_mib} MiB of added memory accessible")]
    Protect {
        /// What was asked for.
        total_mib: u64,
        /// The cause.
        #[source]
        source: io::Error,
    },
    /// KVM refused the memory.
    #[error(transparent)]
    Kvm(#[from] KvmError),
}

/// The mapping, and how much of it has been granted.
#[derive(Debug)]
pub struct Reserve {
    layout: ReserveLayout,
    region: Arc<GuestRegionMmap<()>>,
    granted: u64,
}

impl Reserve {
    /// Sets the addresses apart; `None` where the host has none left for this process.
    #[must_use]
    pub fn map(layout: ReserveLayout) -> Option<Self> {
        let len = usize::try_from(layout.len).ok()?;
        let mapping = MmapRegionBuilder::new(len)
            .with_mmap_prot(libc::PROT_NONE)
            .with_mmap_flags(libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE)
            .build()
            .ok()?;
        let region = Arc::new(GuestRegionMmap::new(mapping, GuestAddress(layout.start))?);
        Some(Self { layout, region, granted: 0 })
    }

    /// RAM and reserve together, as devices know them; `None` if they overlap.
    pub(crate) fn joined_with(&self, ram: &GuestMemory) -> Option<GuestMemory> {
        ram.insert_region(Arc::clone(&self.region)).ok()
    }

    /// The part that is missing for `total_mib` in all, by its offsets; `None` if so much is granted already.
    pub(crate) fn missing(&self, total_mib: u64) -> Result<Option<Range<u64>>, GrantError> {
        let (block_mib, max_mib) = (self.layout.block_len / MIB, self.layout.size_mib());
        if !total_mib.is_multiple_of(block_mib) || total_mib > max_mib {
            return Err(GrantError::Size { total_mib, block_mib, max_mib });
        }
        let part = self.granted..total_mib * MIB;
        Ok((!part.is_empty()).then_some(part))
    }

    /// Where a part is, for the guest and in this process.
    pub(crate) fn addresses(&self, part: &Range<u64>) -> (u64, *mut u8) {
        // It was checked to lie within the mapping.
        (self.layout.start + part.start, self.region.as_ptr().wrapping_add(part.start as usize))
    }

    /// Allows access to a part, or forbids it.
    pub(crate) fn allow(&self, part: &Range<u64>, allowed: bool) -> io::Result<()> {
        let (_, address) = self.addresses(part);
        let len = (part.end - part.start) as usize; // within a mapping
        let protection = if allowed { libc::PROT_READ | libc::PROT_WRITE } else { libc::PROT_NONE };
        // SAFETY: the part lies within the mapping (`missing`), which `self.region` holds and which nothing but guest memory's
        // users refers to: they reach it by volatile accesses alone, and only what has been granted.
        if unsafe { libc::mprotect(address.cast(), len, protection) } != 0 {
            return Err(io::Error::last_os_error());
        }
        if allowed {
            // SAFETY: as above. MADV_HUGEPAGE only changes how it is backed, MADV_DONTDUMP only keeps it out of core dumps;
            // where the host knows neither, nothing is lost, so errors are ignored.
            unsafe {
                libc::madvise(address.cast(), len, libc::MADV_HUGEPAGE);
                libc::madvise(address.cast(), len, libc::MADV_DONTDUMP);
            }
        }
        Ok(())
    }

    /// A part is granted from here on.
    pub(crate) fn grant(&mut self, part: &Range<u64>) {
        self.granted = part.end;
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixStream;

    use vm_memory::{Bytes as _, GuestMemoryBackend as _, WriteVolatile as _};

    use super::*;
    use crate::allocate;

    fn layout(mem_size_mib: u64, max_mem_size_mib: u64) -> (u64, u64, u64) {
        let layout = ReserveLayout::new(mem_size_mib, max_mem_size_mib).unwrap();
        (layout.start >> 20, layout.len >> 20, layout.block_len >> 20)
    }

    #[test]
    fn the_reserve_lies_above_all_else_in_whole_blocks() {
        assert_eq!(layout(160, 161), (4096, 128, 128));
        assert_eq!(layout(160, 160 + 1000), (4096, 1024, 128));
        // Behind the gap, 1 GiB more.
        assert_eq!(layout(5000, 5128), (6144, 128, 128));
        assert_eq!(layout(63 << 10, 64 << 10), (64 << 10, 2048, 2048));
        assert_eq!(layout((63 << 10) + 1, 64 << 10), (66 << 10, 1024, 128));
    }

    #[test]
    fn a_machine_that_has_all_it_may_have_has_no_reserve() {
        assert_eq!(ReserveLayout::new(512, 512), None);
        assert_eq!(ReserveLayout::new(512, 64), None);
        assert_eq!(ReserveLayout::new(512, u64::MAX), None);
    }

    #[test]
    fn sizes_come_in_blocks_and_end_with_the_reserve() {
        let layout = ReserveLayout::new(160, 160 + 256).unwrap();

        let blocks = [1, 128, 129, 257, u64::MAX].map(|size| layout.whole_blocks_mib(size));
        assert_eq!(blocks, [128, 128, 256, 256, 256]);
        assert_eq!((layout.address(0), layout.address(128)), (4 << 30, (4 << 30) + (128 << 20)));
    }

    #[test]
    fn nothing_can_be_touched_before_it_is_granted() {
        let mut reserve = Reserve::map(ReserveLayout::new(64, 64 + 256).unwrap()).unwrap();
        let memory = reserve.joined_with(&allocate(64).unwrap()).unwrap();
        let (first, second) = (GuestAddress(4 << 30), GuestAddress((4 << 30) + (128 << 20)));
        // A system call fails where an access of this process' own would end it.
        let (mut socket, _other) = UnixStream::pair().unwrap();
        let mut readable = |at| socket.write_volatile(&memory.get_slice(at, 8).unwrap()).is_ok();

        assert!(!readable(first) && !readable(second));
        let part = reserve.missing(128).unwrap().unwrap();
        reserve.allow(&part, true).unwrap();
        reserve.grant(&part);

        memory.write_obj(7_u64, first).unwrap();
        assert!(readable(first) && !readable(second));
        assert_eq!(memory.read_obj::<u64>(first).unwrap(), 7);
        assert_eq!(reserve.missing(256).unwrap(), Some((128 << 20)..(256 << 20)));
        assert_eq!((reserve.missing(128).unwrap(), reserve.missing(0).unwrap()), (None, None));
        assert!(matches!(reserve.missing(384), Err(GrantError::Size { max_mib: 256, .. })));
        assert!(matches!(reserve.missing(100), Err(GrantError::Size { block_mib: 128, .. })));
    }
}
