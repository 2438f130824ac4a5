// SPDX-License-Identifier: Apache-2.0
//! Small files of the kernel's, in /proc and in the cgroup file system: bounded reads, and waiting for changes.

use std::fs::File;
use std::io::{self, Read};
use std::os::fd::OwnedFd;
use std::path::Path;

use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

use crate::sys;

/// Bytes of a file that are looked at. The kernel's are smaller, but for those that list what a container has made.
const MAX_LEN: u64 = 64 << 10;

/// The content of `path`, of which only the first 64 KiB; `None` if it cannot be read.
pub(super) fn read_bounded(path: &Path) -> Option<String> {
    let mut bytes = Vec::new();
    File::open(path).ok()?.take(MAX_LEN).read_to_end(&mut bytes).ok()?;
    Some(String::from_utf8_lossy(&bytes).into_owned())
}

/// The number behind `key` in a file of lines `key number`.
pub(super) fn value_of(text: &str, key: &str) -> Option<u64> {
    key_values(text).find(|(name, _)| *name == key).map(|(_, value)| value)
}

/// The lines `key number` of a file.
pub(super) fn key_values(text: &str) -> impl Iterator<Item = (&str, u64)> {
    text.lines().filter_map(|line| {
        let (key, value) = line.split_once(' ')?;
        Some((key, value.trim().parse().ok()?))
    })
}

/// A file of the cgroup file system that tells when it has changed, as cgroup.events and memory.events do.
#[derive(Debug)]
pub(super) struct EventFile {
    file: AsyncFd<OwnedFd>,
}

impl EventFile {
    /// Opens the file. What has happened by then counts as a change.
    pub(super) fn open(path: &Path) -> io::Result<Self> {
        Ok(Self { file: sys::watch_descriptor(File::open(path)?.into(), Interest::PRIORITY)? })
    }

    /// The content now.
    pub(super) fn read(&self) -> io::Result<String> {
        let mut bytes = [0; 4096];
        let len = rustix::io::pread(self.file.get_ref(), &mut bytes, 0)?;
        Ok(String::from_utf8_lossy(&bytes[..len]).into_owned())
    }

    /// Waits until it may have changed since it was last read.
    pub(super) async fn changed(&self) -> io::Result<()> {
        self.file.ready(Interest::PRIORITY).await?.clear_ready();
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_are_found_by_their_whole_key() {
        let text = "oom 2\noom_kill 3\nnonsense\nbad x\n";
        assert_eq!(value_of(text, "oom_kill"), Some(3));
        assert_eq!(value_of(text, "kill"), None);
        assert_eq!(key_values(text).count(), 2);
    }

    #[test]
    fn long_files_are_cut() {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), vec![b'a'; 100 << 10]).unwrap();
        assert_eq!(read_bounded(file.path()).unwrap().len() as u64, MAX_LEN);
        assert_eq!(read_bounded("/nonexistent".as_ref()), None);
    }
}
