// SPDX-License-Identifier: Apache-2.0
//! Devices that the machine is given while it runs. The kernel has looked at their windows when it booted, and found none:
//! it looks at them again when it is told to.

use std::ffi::{OsStr, OsString};
use std::path::Path;
use std::{fs, io};

/// The driver of the windows, and they themselves, below a sysfs.
const DRIVER: &str = "bus/platform/drivers/virtio-mmio";
const WINDOWS: &str = "bus/platform/devices";
const WINDOW_PREFIX: &str = "virtio-mmio.";

/// What the devices in them are called.
const DEVICE_PREFIX: &str = "virtio";

/// Has the kernel look again at each window in which it found no device.
pub(crate) fn look_again(sys: &Path) -> io::Result<()> {
    for window in fs::read_dir(sys.join(WINDOWS))? {
        let window = window?;
        let name = window.file_name();
        let is_window = name.to_string_lossy().starts_with(WINDOW_PREFIX);
        if is_window && !window.path().join("driver").exists() && !is_in_use(&window.path()) {
            // Fails where there still is none.
            let _ = fs::write(sys.join(DRIVER).join("bind"), name.as_encoded_bytes());
        }
    }
    Ok(())
}

/// Whether there is a device in a window, which the kernel may be letting go of: to have it look there would wait for that.
fn is_in_use(window: &Path) -> bool {
    let is_device = |name: OsString| name.to_string_lossy().starts_with(DEVICE_PREFIX);
    fs::read_dir(window).is_ok_and(|entries| entries.flatten().any(|entry| is_device(entry.file_name())))
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
    fn windows_without_a_device_are_looked_at() {
        let sys = tempfile::tempdir().unwrap();
        let sys = sys.path();
        for folder in ["virtio-mmio.4/driver", "virtio-mmio.5/power", "virtio-mmio.6/virtio3", "serial8250"] {
            fs::create_dir_all(sys.join(WINDOWS).join(folder)).unwrap();
        }
        fs::create_dir_all(sys.join(DRIVER)).unwrap();

        look_again(sys).unwrap();

        assert_eq!(fs::read_to_string(sys.join(DRIVER).join("bind")).unwrap(), "virtio-mmio.5");
        assert!(look_again(&sys.join("none")).is_err());
    }
}
