// SPDX-License-Identifier: Apache-2.0
//! Devices that the machine is given while it runs. The kernel has looked at their windows when it booted, and found none:
//! it looks at them again when it is told to.

use std::path::Path;
use std::{fs, io};

/// The driver of the windows, and they themselves, below a sysfs.
const DRIVER: &str = "bus/platform/drivers/virtio-mmio";
const WINDOWS: &str = "bus/platform/devices";
const WINDOW_PREFIX: &str = "virtio-mmio.";

/// Has the kernel look again at each window in which it found no device.
pub(super) fn look_again(sys: &Path) -> io::Result<()> {
    for window in fs::read_dir(sys.join(WINDOWS))? {
        let window = window?;
        let name = window.file_name();
        if name.to_string_lossy().starts_with(WINDOW_PREFIX) && !window.path().join("driver").exists() {
            // Fails where there still is none.
            let _ = fs::write(sys.join(DRIVER).join("bind"), name.as_encoded_bytes());
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn windows_without_a_device_are_looked_at() {
        let sys = tempfile::tempdir().unwrap();
        let sys = sys.path();
        for folder in ["virtio-mmio.4/driver", "virtio-mmio.5", "serial8250"] {
            fs::create_dir_all(sys.join(WINDOWS).join(folder)).unwrap();
        }
        fs::create_dir_all(sys.join(DRIVER)).unwrap();

        look_again(sys).unwrap();

        assert_eq!(fs::read_to_string(sys.join(DRIVER).join("bind")).unwrap(), "virtio-mmio.5");
        assert!(look_again(&sys.join("none")).is_err());
    }
}
