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

/// Has the kernel use the first `count` processors; `sys` is a sysfs. Those in use stay so, and containers may use all of them:
/// the kernel adds them to the cgroups, which have no CPUs of their own.
pub(crate) async fn bring_online(sys: &Path, count: u32) -> Result<(), CpuError> {
    // The first one is always in use, and has no such file.
    for number in 1..count {
        let path = sys.join(CPUS).join(format!("cpu{number}/online"));
        // The kernel takes it again of one that is in use.
        fs::write(&path, "1").map_err(|source| CpuError { number, path, source })?;
        // Other calls are not to wait for all of them.
        tokio::task::yield_now().await;
    }
    Ok(())
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

    #[tokio::test]
    async fn the_first_processors_are_used_and_no_others() {
        let sys = sysfs(5);

        bring_online(sys.path(), 3).await.unwrap();
        assert_eq!(states(sys.path(), 5), "1100");
        // Fewer are no order to leave one.
        bring_online(sys.path(), 1).await.unwrap();
        bring_online(sys.path(), 0).await.unwrap();
        assert_eq!(states(sys.path(), 5), "1100");
        bring_online(sys.path(), 5).await.unwrap();
        assert_eq!(states(sys.path(), 5), "1111");
        assert!(!sys.path().join(CPUS).join("cpu0/online").exists());
    }

    #[tokio::test]
    async fn one_that_there_is_not_is_named() {
        let sys = sysfs(2);

        let error = bring_online(sys.path(), 4).await.unwrap_err().to_string();

        assert!(error.starts_with("the guest's kernel cannot use the processor 2 ("), "{error}");
        assert_eq!(states(sys.path(), 2), "1");
    }
}
