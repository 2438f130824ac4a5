// SPDX-License-Identifier: Apache-2.0
//! What a program says on its stderr: the beginning of it is kept in memory, whatever the program writes.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::process::Stdio;

use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, memfd_create};

/// Most bytes that are kept.
const SIZE: usize = 4096;

/// The place where it is kept.
#[derive(Debug)]
pub(crate) struct Said(File);

impl Said {
    /// Nothing yet. The name is seen in /proc only.
    ///
    /// # Errors
    ///
    /// When there is no memory or no descriptor left.
    pub(crate) fn new(name: &str) -> io::Result<Self> {
        sealed_memfd(name, SIZE as u64).map(Self)
    }

    /// What the program is given.
    ///
    /// # Errors
    ///
    /// When no descriptor is left.
    pub(crate) fn to_stdio(&self) -> io::Result<Stdio> {
        Ok(self.0.try_clone()?.into())
    }

    /// The same place.
    ///
    /// # Errors
    ///
    /// When no descriptor is left.
    pub(crate) fn try_clone(&self) -> io::Result<Self> {
        self.0.try_clone().map(Self)
    }

    /// What was said so far, as it was said.
    pub(crate) fn text(&self) -> String {
        let mut said = vec![0; SIZE];
        let length = self.0.read_at(&mut said, 0).unwrap_or(0);
        said.truncate(length);
        said.retain(|byte| *byte != 0);
        String::from_utf8_lossy(&said).into_owned()
    }
}

/// A file in memory that cannot grow beyond `size`, whatever is written to it.
fn sealed_memfd(name: &str, size: u64) -> io::Result<File> {
    let file = File::from(memfd_create(name, MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)?);
    file.set_len(size)?;
    fcntl_add_seals(&file, SealFlags::GROW | SealFlags::SHRINK | SealFlags::SEAL)?;
    Ok(file)
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    #[test]
    fn a_file_in_memory_cannot_grow() {
        let mut file = sealed_memfd("test", 8).unwrap();

        assert!(file.write_all(&[1; 8]).is_ok());
        assert!(file.write_all(&[1; 8]).is_err());
        assert_eq!(file.metadata().unwrap().len(), 8);
    }
}
