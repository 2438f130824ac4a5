// SPDX-License-Identifier: Apache-2.0
//! Devices that the machine is given while it runs. The kernel has looked at their windows when it booted, and found none:
//! it looks at one again when it is told to. Never at all of them: a look waits for the disk that it comes upon.

use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::{fs, io};

/// The driver of the windows, and they themselves, below a sysfs.
const DRIVER: &str = "bus/platform/drivers/virtio-mmio";
const WINDOWS: &str = "bus/platform/devices";
const WINDOW_PREFIX: &str = "virtio-mmio.";

/// What the devices in them are called.
const DEVICE_PREFIX: &str = "virtio";

/// Has the kernel look again at a window in which it found no device when it booted. Where it has one by now, or is letting go of one,
/// nothing is done.
pub(crate) fn look_at(sys: &Path, window: u32) -> io::Result<()> {
    let name = window_name(window);
    let folder = sys.join(WINDOWS).join(&name);
    if folder.join("driver").exists() || is_in_use(&folder) {
        return Ok(());
    }
    fs::write(sys.join(DRIVER).join("bind"), name)
}

/// The folder of the device in a window, below a sysfs.
pub(crate) fn device_in(sys: &Path, window: u32) -> io::Result<PathBuf> {
    let folder = sys.join(WINDOWS).join(window_name(window));
    for entry in fs::read_dir(&folder)? {
        let entry = entry?;
        if is_device(&entry.file_name()) {
            return Ok(entry.path());
        }
    }
    Err(io::Error::new(io::ErrorKind::NotFound, format!("there is no device in {}", folder.display())))
}

fn window_name(window: u32) -> String {
    format!("{WINDOW_PREFIX}{window}")
}

/// Whether there is a device in a window, which the kernel may be letting go of: to have it look there would wait for that.
fn is_in_use(window: &Path) -> bool {
    fs::read_dir(window).is_ok_and(|entries| entries.flatten().any(|entry| is_device(&entry.file_name())))
}

fn is_device(name: &OsStr) -> bool {
    name.to_string_lossy().starts_with(DEVICE_PREFIX)
}

/// Has the kernel let go of the window that a device is in, so that it can be looked at again. `device` is the device's folder, or one
/// below, with all links resolved.
pub(crate) fn let_go(sys: &Path, device: &Path) -> io::Result<()> {
    let is_window = |name: &&OsStr| name.to_string_lossy().starts_with(WINDOW_PREFIX);
    let window = device.iter().find(is_window).ok_or_else(|| io::Error::other("it is in no window of the machine"))?;
    fs::write(sys.join(DRIVER).join("unbind"), window.as_encoded_bytes())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_device_is_let_go_of_by_its_window() {
        let sys = tempfile::tempdir().unwrap();
        let sys = sys.path();
        fs::create_dir_all(sys.join(DRIVER)).unwrap();

        let_go(sys, Path::new("/sys/devices/platform/virtio-mmio.7/virtio5/block/vda")).unwrap();

        assert_eq!(fs::read_to_string(sys.join(DRIVER).join("unbind")).unwrap(), "virtio-mmio.7");
        assert!(let_go(sys, Path::new("/sys/devices/virtual/block/loop0")).is_err());
    }

    #[test]
    fn a_window_without_a_device_is_looked_at_alone() {
        let sys = tempfile::tempdir().unwrap();
        let sys = sys.path();
        for folder in ["virtio-mmio.4/driver", "virtio-mmio.5/power", "virtio-mmio.6/virtio3", "virtio-mmio.7"] {
            fs::create_dir_all(sys.join(WINDOWS).join(folder)).unwrap();
        }
        fs::create_dir_all(sys.join(DRIVER)).unwrap();
        let bind = sys.join(DRIVER).join("bind");

        look_at(sys, 4).unwrap();
        look_at(sys, 6).unwrap();
        assert!(!bind.exists());

        look_at(sys, 5).unwrap();
        assert_eq!(fs::read_to_string(bind).unwrap(), "virtio-mmio.5");
        assert_eq!(device_in(sys, 6).unwrap(), sys.join(WINDOWS).join("virtio-mmio.6/virtio3"));
        assert!(device_in(sys, 5).unwrap_err().to_string().starts_with("there is no device in "));
        assert!(look_at(&sys.join("none"), 5).is_err());
    }
}
