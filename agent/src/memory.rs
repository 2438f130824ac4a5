// SPDX-License-Identifier: Apache-2.0
//! Memory that the machine is given while it runs. Nothing announces it to the kernel, which is told of it block by block,
//! and uses each at once.

use std::path::{Path, PathBuf};
use std::{fs, io};

/// The kernel's blocks of memory, below a sysfs.
const MEMORY: &str = "devices/system/memory";

/// Memory that is not in use, or only in part.
#[derive(Debug, thiserror::Error)]
pub(crate) enum MemoryError {
    #[error("cannot find out the size of a block of memory from {}", path.display())]
    BlockSize { path: PathBuf, source: io::Error },
    #[error("{length:#x} bytes of memory at {address:#x} are not whole blocks of {block:#x} bytes")]
    Unaligned { address: u64, length: u64, block: u64 },
    #[error("the guest's kernel cannot use the block of memory at {address:#x}")]
    Probe { address: u64, source: io::Error },
}

/// Has the kernel use `length` bytes from `address` on; `sys` is a sysfs.
pub(crate) async fn add(sys: &Path, address: u64, length: u64) -> Result<(), MemoryError> {
    let memory = sys.join(MEMORY);
    let block = block_size(&memory.join("block_size_bytes"))?;
    let end = address.checked_add(length).filter(|end| address.is_multiple_of(block) && end.is_multiple_of(block));
    let end = end.ok_or(MemoryError::Unaligned { address, length, block })?;
    let probe = memory.join("probe");
    let mut next = address;
    while next < end {
        match fs::write(&probe, format!("{next:#x}")) {
            // Told before, by a call that failed later.
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
            result => result.map_err(|source| MemoryError::Probe { address: next, source })?,
        }
        next += block;
        // Other calls are not to wait for all of it.
        tokio::task::yield_now().await;
    }
    Ok(())
}

/// The size of a block, which the kernel writes in hexadecimal without a prefix.
fn block_size(path: &Path) -> Result<u64, MemoryError> {
    let read = fs::read_to_string(path).and_then(|text| {
        let size = u64::from_str_radix(text.trim(), 16).map_err(io::Error::other)?;
        if size == 0 { Err(io::Error::other("it is 0")) } else { Ok(size) }
    });
    read.map_err(|source| MemoryError::BlockSize { path: path.to_owned(), source })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sysfs(block: &str) -> tempfile::TempDir {
        let sys = tempfile::tempdir().unwrap();
        fs::create_dir_all(sys.path().join(MEMORY)).unwrap();
        fs::write(sys.path().join(MEMORY).join("block_size_bytes"), block).unwrap();
        sys
    }

    #[tokio::test]
    async fn the_kernel_is_told_of_each_block() {
        let sys = sysfs("8000000\n");

        add(sys.path(), 0x1_0000_0000, 0x1000_0000).await.unwrap();

        // A plain file keeps what was written last.
        assert_eq!(fs::read_to_string(sys.path().join(MEMORY).join("probe")).unwrap(), "0x108000000");
    }

    #[tokio::test]
    async fn parts_of_blocks_are_refused() {
        let sys = sysfs("8000000\n");

        for (address, length) in [(0x1_0000_0000, 0x100_0000), (0x1_0100_0000, 0x800_0000), (u64::MAX - 0xfff, 0x1000)]
        {
            let error = add(sys.path(), address, length).await.unwrap_err();
            assert!(matches!(error, MemoryError::Unaligned { block: 0x800_0000, .. }), "{error}");
        }
        assert!(!sys.path().join(MEMORY).join("probe").exists());
    }

    #[tokio::test]
    async fn a_kernel_without_blocks_is_named() {
        let (none, zero, sys) = (tempfile::tempdir().unwrap(), sysfs("0"), sysfs("8000000"));
        fs::create_dir(sys.path().join(MEMORY).join("probe")).unwrap();

        for sys in [none.path(), zero.path()] {
            assert!(matches!(add(sys, 0, 0x800_0000).await, Err(MemoryError::BlockSize { .. })));
        }
        let error = add(sys.path(), 0x1_0000_0000, 0x800_0000).await.unwrap_err();
        assert_eq!(error.to_string(), "the guest's kernel cannot use the block of memory at 0x100000000");
    }
}
