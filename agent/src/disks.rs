// SPDX-License-Identifier: Apache-2.0
//! Block devices of the host that the machine has: found by the serial number that the host has given them, since the kernel
//! names them as it comes upon them.

use std::collections::{HashMap, HashSet};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::{fs, io};

use crate::late;

/// The kernel's block devices, below a sysfs, and what those of virtio are called.
const BLOCK: &str = "block";
const PREFIX: &str = "vd";

/// A block device that cannot be had, or let go of.
#[derive(Debug, thiserror::Error)]
pub(crate) enum DiskError {
    #[error("cannot list the guest's block devices in {}", path.display())]
    List { path: PathBuf, source: io::Error },
    #[error("the guest's kernel has found no block device {serial:?}")]
    Absent { serial: String },
    #[error("cannot find the block device {serial:?} in window {window} of the machine")]
    Add { serial: String, window: u32, source: io::Error },
    #[error("cannot tell the number of the block device {serial:?}")]
    Number { serial: String, source: io::Error },
    #[error("cannot let go of the block device {serial:?}")]
    Release { serial: String, source: io::Error },
}

/// A device's number in the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Number {
    pub(crate) major: u32,
    pub(crate) minor: u32,
}

/// The devices that have been asked for.
#[derive(Debug, Default)]
pub(crate) struct Disks {
    /// The kernel's names of those that were found, by their serial numbers. A device is asked for its own but once: one that does
    /// not answer any more is not to hold up the search for others.
    names: Mutex<HashMap<String, String>>,
    /// The kernel's names of those that are being asked.
    asked: Mutex<HashSet<String>>,
}

/// A device that is asked for its serial number. That is a request to the disk like any other: who waits for it is not to hold up
/// anybody, nor does another call wait for the same one.
#[derive(Debug)]
pub(crate) struct Asked<'a> {
    disks: &'a Disks,
    name: String,
}

impl Asked<'_> {
    /// The file that has the number, or stays empty.
    pub(crate) fn file(&self, sys: &Path) -> PathBuf {
        sys.join(BLOCK).join(&self.name).join("serial")
    }

    /// It has answered.
    pub(crate) fn answered(self, serial: &str) {
        self.disks.names().insert(serial.trim_end().to_owned(), self.name.clone());
    }

    /// The kernel's name of it.
    pub(crate) fn name(&self) -> &str {
        &self.name
    }
}

impl Drop for Asked<'_> {
    fn drop(&mut self) {
        self.disks.asked().remove(&self.name);
    }
}

impl Disks {
    /// The next device that has not been asked for its serial number, but those that are `passed` over.
    pub(crate) fn ask_next(&self, sys: &Path, passed: &[String]) -> Result<Option<Asked<'_>>, DiskError> {
        let path = sys.join(BLOCK);
        let failed = |source| DiskError::List { path: path.clone(), source };
        let (names, mut asked) = (self.names(), self.asked());
        for entry in fs::read_dir(&path).map_err(failed)? {
            let name = entry.map_err(failed)?.file_name().to_string_lossy().into_owned();
            let is_known = names.values().any(|known| *known == name) || passed.contains(&name);
            if name.starts_with(PREFIX) && !is_known && asked.insert(name.clone()) {
                return Ok(Some(Asked { disks: self, name }));
            }
        }
        Ok(None)
    }

    /// The device in a window that the kernel has looked at again, known by that serial number from now on; its number. It is not
    /// asked for it.
    pub(crate) fn add(&self, sys: &Path, serial: &str, window: u32) -> io::Result<Number> {
        let block = late::device_in(sys, window)?.join(BLOCK);
        let name = fs::read_dir(&block)?.next().ok_or(io::ErrorKind::NotFound)??.file_name();
        let number = number(&block.join(&name).join("dev"))?;
        self.names().insert(serial.to_owned(), name.to_string_lossy().into_owned());
        Ok(number)
    }

    /// The numbers of these devices, in their order; `sys` is a sysfs.
    pub(crate) fn find(&self, sys: &Path, serials: &[String]) -> Result<Vec<Number>, DiskError> {
        let names = self.names();
        let find = |serial: &String| {
            let name = names.get(serial).ok_or_else(|| DiskError::Absent { serial: serial.clone() })?;
            number(&sys.join(BLOCK).join(name).join("dev"))
                .map_err(|source| DiskError::Number { serial: serial.clone(), source })
        };
        serials.iter().map(find).collect()
    }

    /// Has the kernel let go of a device. One whose disk does not answer may hold the caller up for ever, and this is to be called
    /// where that holds up nobody else; [`Self::forget`] comes after it. One that has not told its serial number may be the kernel's all
    /// the same, or come to be: that cannot be let go of.
    pub(crate) fn release(&self, sys: &Path, serial: &str) -> io::Result<()> {
        let name = self.names().get(serial).cloned();
        let name = name.ok_or_else(|| io::Error::other("no device has told this serial number"))?;
        let device = fs::canonicalize(sys.join(BLOCK).join(name))?;
        late::let_go(sys, &device)
    }

    /// A device that the kernel has let go of: its name may be another's from now on.
    pub(crate) fn forget(&self, serial: &str) {
        self.names().remove(serial);
    }

    fn asked(&self) -> MutexGuard<'_, HashSet<String>> {
        // As below.
        self.asked.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn names(&self) -> MutexGuard<'_, HashMap<String, String>> {
        // Nothing panics while the lock is held.
        self.names.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The number in a file, as in `254:16`.
fn number(path: &Path) -> io::Result<Number> {
    let text = fs::read_to_string(path)?;
    let parse = |number: &str| number.parse().map_err(io::Error::other);
    let (major, minor) = text.trim_end().split_once(':').ok_or_else(|| io::Error::other(format!("it is {text:?}")))?;
    Ok(Number { major: parse(major)?, minor: parse(minor)? })
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    /// A sysfs with these block devices: name, serial number, number.
    fn sysfs(devices: &[(&str, &str, &str)]) -> tempfile::TempDir {
        let sys = tempfile::tempdir().unwrap();
        for folder in [BLOCK, "bus/platform/devices", "bus/platform/drivers/virtio-mmio"] {
            fs::create_dir_all(sys.path().join(folder)).unwrap();
        }
        for device in devices {
            add(sys.path(), *device);
        }
        sys
    }

    fn add(sys: &Path, (name, serial, number): (&str, &str, &str)) {
        let device = sys.join(format!("devices/platform/virtio-mmio.{name}/virtio0/block/{name}"));
        fs::create_dir_all(&device).unwrap();
        fs::write(device.join("serial"), serial).unwrap();
        fs::write(device.join("dev"), number).unwrap();
        symlink(&device, sys.join(BLOCK).join(name)).unwrap();
    }

    /// Asks all devices that have not been asked.
    fn learn(disks: &Disks, sys: &Path) {
        let mut passed = Vec::new();
        while let Some(asked) = disks.ask_next(sys, &passed).unwrap() {
            match fs::read_to_string(asked.file(sys)) {
                Ok(serial) => asked.answered(&serial),
                Err(_) => passed.push(asked.name().to_owned()),
            }
        }
    }

    fn serials(serials: &[&str]) -> Vec<String> {
        serials.iter().map(|serial| (*serial).to_owned()).collect()
    }

    #[test]
    fn devices_are_found_by_their_serial_numbers() {
        let sys = sysfs(&[("vda", "disk-1\n", "254:0\n"), ("vdb", "disk-0\n", "254:16\n"), ("loop0", "disk-2", "7:0")]);
        let disks = Disks::default();
        learn(&disks, sys.path());

        let found = disks.find(sys.path(), &serials(&["disk-0", "disk-1"])).unwrap();

        assert_eq!(found, [Number { major: 254, minor: 16 }, Number { major: 254, minor: 0 }]);
        let error = disks.find(sys.path(), &serials(&["disk-0", "disk-2"])).unwrap_err().to_string();
        assert_eq!(error, "the guest's kernel has found no block device \"disk-2\"");
    }

    #[test]
    fn a_device_is_asked_for_its_serial_number_once() {
        let sys = sysfs(&[("vda", "disk-0\n", "254:0\n")]);
        let disks = Disks::default();
        learn(&disks, sys.path());
        disks.find(sys.path(), &serials(&["disk-0"])).unwrap();

        fs::write(sys.path().join(BLOCK).join("vda/serial"), "other\n").unwrap();
        add(sys.path(), ("vdb", "disk-1\n", "254:16\n"));
        learn(&disks, sys.path());

        assert_eq!(disks.find(sys.path(), &serials(&["disk-0", "disk-1"])).unwrap().len(), 2);
    }

    #[test]
    fn what_is_let_go_of_may_come_back_under_its_name() {
        let sys = sysfs(&[("vda", "disk-0\n", "254:0\n")]);
        let disks = Disks::default();
        learn(&disks, sys.path());
        disks.find(sys.path(), &serials(&["disk-0"])).unwrap();

        disks.release(sys.path(), "disk-0").unwrap();
        disks.forget("disk-0");

        let unbind = sys.path().join("bus/platform/drivers/virtio-mmio/unbind");
        assert_eq!(fs::read_to_string(unbind).unwrap(), "virtio-mmio.vda");
        fs::write(sys.path().join(BLOCK).join("vda/serial"), "disk-1\n").unwrap();
        learn(&disks, sys.path());
        assert!(disks.find(sys.path(), &serials(&["disk-1"])).is_ok());
        assert!(matches!(disks.find(sys.path(), &serials(&["disk-0"])), Err(DiskError::Absent { .. })));
    }

    #[test]
    fn what_has_not_told_its_serial_number_is_not_let_go_of() {
        let sys = sysfs(&[("vda", "disk-0\n", "254:0\n")]);
        let disks = Disks::default();

        let error = disks.release(sys.path(), "disk-0").unwrap_err().to_string();

        assert_eq!(error, "no device has told this serial number");
        assert!(!sys.path().join("bus/platform/drivers/virtio-mmio/unbind").exists());
    }

    #[test]
    fn a_guest_without_block_devices_has_none() {
        let sys = tempfile::tempdir().unwrap();
        assert!(matches!(Disks::default().ask_next(sys.path(), &[]), Err(DiskError::List { .. })));
    }

    #[test]
    fn a_device_that_is_being_asked_is_not_asked_twice() {
        let sys = sysfs(&[("vda", "disk-0\n", "254:0\n"), ("vdb", "disk-1\n", "254:16\n")]);
        let disks = Disks::default();

        let first = disks.ask_next(sys.path(), &[]).unwrap().unwrap();
        let second = disks.ask_next(sys.path(), &[]).unwrap().unwrap();
        assert_ne!(first.name(), second.name());
        assert!(disks.ask_next(sys.path(), &[]).unwrap().is_none());
        drop(first);
        assert!(disks.ask_next(sys.path(), &[]).unwrap().is_some());
        second.answered("disk-1\n");

        assert!(disks.find(sys.path(), &serials(&["disk-1"])).is_ok());
        assert!(disks.find(sys.path(), &serials(&["disk-0"])).is_err());
    }

    #[test]
    fn a_device_that_has_come_is_found_by_its_window_and_not_asked() {
        let sys = sysfs(&[]);
        let disks = Disks::default();
        let window = sys.path().join("bus/platform/devices/virtio-mmio.9");
        fs::create_dir_all(&window).unwrap();
        assert_eq!(disks.add(sys.path(), "pod-disk-1", 9).unwrap_err().kind(), io::ErrorKind::NotFound);

        // As the kernel has it once it has looked there.
        let device = window.join("virtio5/block/vdb");
        fs::create_dir_all(&device).unwrap();
        fs::write(device.join("dev"), "254:16\n").unwrap();
        symlink(&device, sys.path().join(BLOCK).join("vdb")).unwrap();

        let number = disks.add(sys.path(), "pod-disk-1", 9).unwrap();
        assert_eq!(number, Number { major: 254, minor: 16 });
        assert!(disks.ask_next(sys.path(), &[]).unwrap().is_none());
        disks.release(sys.path(), "pod-disk-1").unwrap();
        let unbind = sys.path().join("bus/platform/drivers/virtio-mmio/unbind");
        assert_eq!(fs::read_to_string(unbind).unwrap(), "virtio-mmio.9");
    }
}
