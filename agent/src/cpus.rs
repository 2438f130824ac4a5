// SPDX-License-Identifier: Apache-2.0
//! Processors that the machine has and the kernel does not use: it has begun with some of them, and nothing but this tells it that
//! more are wanted.

use std::path::{Path, PathBuf};
use std::{fs, io};

/// The kernel's processors, below a sysfs.
const CPUS: &str = "devices/system/cpu";

/// A processor that is not in use.
#[derive(Debug, thiserror::Error)]
#[error("the guest's kernel cannot use the processor {number} ({})", path.display())]
pub(crate) struct CpuError {
    number: u32,
    path: PathBuf,
    source: io::Error,
}

/// A processor that the kernel can be told to use.
#[derive(Debug)]
pub(crate) struct Cpu {
    number: u32,
    path: PathBuf,
}

impl Cpu {
    /// The first `count` ones; `sys` is a sysfs. The very first is always in use, and has no such file.
    pub(crate) fn first(sys: &Path, count: u32) -> impl Iterator<Item = Self> {
        (1..count).map(move |number| Self { number, path: sys.join(CPUS).join(format!("cpu{number}/online")) })
    }

    /// Has the kernel use it, which takes a while; nothing is done for one that is in use. Containers may use it then: the kernel
    /// adds it to the cgroups, which have no CPUs of their own.
    pub(crate) fn bring_online(&self) -> io::Result<()> {
        fs::write(&self.path, "1")
    }

    /// Why it is not in use.
    pub(crate) fn error(self, source: io::Error) -> CpuError {
        CpuError { number: self.number, path: self.path, source }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A sysfs with so many processors, of which all but the first are off.
    fn sysfs(count: u32) -> tempfile::TempDir {
        let sys = tempfile::tempdir().unwrap();
        for number in 0..count {
            let cpu = sys.path().join(CPUS).join(format!("cpu{number}"));
            fs::create_dir_all(&cpu).unwrap();
            if number > 0 {
                fs::write(cpu.join("online"), "0").unwrap();
            }
        }
        sys
    }

    fn states(sys: &Path, count: u32) -> String {
        let read = |number| fs::read_to_string(sys.join(CPUS).join(format!("cpu{number}/online"))).unwrap();
        (1..count).map(read).collect()
    }

    fn bring_online(sys: &Path, count: u32) -> Result<(), CpuError> {
        Cpu::first(sys, count).try_for_each(|cpu| cpu.bring_online().map_err(|source| cpu.error(source)))
    }

    #[test]
    fn the_first_processors_are_used_and_no_others() {
        let sys = sysfs(5);

        bring_online(sys.path(), 3).unwrap();
        assert_eq!(states(sys.path(), 5), "1100");
        // Fewer are no order to leave one.
        bring_online(sys.path(), 1).unwrap();
        bring_online(sys.path(), 0).unwrap();
        assert_eq!(states(sys.path(), 5), "1100");
        bring_online(sys.path(), 5).unwrap();
        assert_eq!(states(sys.path(), 5), "1111");
        assert!(!sys.path().join(CPUS).join("cpu0/online").exists());
    }

    #[test]
    fn one_that_there_is_not_is_named() {
        let sys = sysfs(2);

        let error = bring_online(sys.path(), 4).unwrap_err().to_string();

        assert!(error.starts_with("the guest's kernel cannot use the processor 2 ("), "{error}");
        assert_eq!(states(sys.path(), 2), "1");
    }
}
