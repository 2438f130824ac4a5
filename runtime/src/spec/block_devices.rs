// SPDX-License-Identifier: Apache-2.0
//! The block devices of the host among `linux.devices`: opened here, so that a machine can be given them.

use bulkhead_vmm::config::MAX_DISKS;
use oci_spec::runtime::{LinuxDevice, LinuxDeviceType};

use super::device_filter::DeviceRules;
use super::error::FieldError;
use crate::storage::block_device::{self, Number, Opened};

/// A block device that the container has nodes of.
#[derive(Debug)]
pub(crate) struct BlockDevice {
    /// The first of these nodes.
    pub(crate) path: String,
    pub(crate) number: Number,
    pub(crate) opened: Opened,
}

/// Opens each block device once; as far as the rules allow any writing, for that too. Their numbers have been checked.
pub(super) fn open(devices: &[LinuxDevice], rules: &DeviceRules) -> Result<Vec<BlockDevice>, FieldError> {
    let mut opened: Vec<BlockDevice> = Vec::new();
    for (index, device) in devices.iter().enumerate().filter(|(_, device)| device.typ() == LinuxDeviceType::B) {
        let field = || format!("linux.devices[{index}]");
        let number = |number: i64| u32::try_from(number).unwrap_or(u32::MAX);
        let number = Number { major: number(device.major()), minor: number(device.minor()) };
        if opened.iter().any(|other| other.number == number) {
            continue;
        }
        if opened.len() == MAX_DISKS {
            let what = format!("more than {MAX_DISKS} block devices of the host");
            return Err(FieldError::unsupported(field(), what));
        }
        let device_file = block_device::open(number, rules.allow_writing(number))
            .map_err(|error| FieldError::path(field(), device.path(), error))?;
        opened.push(BlockDevice { path: device.path().display().to_string(), number, opened: device_file });
    }
    Ok(opened)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::spec::device_filter;

    #[test]
    fn what_the_host_does_not_have_is_refused_by_name() {
        let devices: Vec<LinuxDevice> = serde_json::from_value(json!([
            {"path": "/dev/null", "type": "c", "major": 1, "minor": 3},
            {"path": "/dev/xvda", "type": "b", "major": 4095, "minor": 0},
        ]))
        .unwrap();
        let rules = device_filter::translate(&[], &devices).unwrap();

        let error = open(&devices, &rules).unwrap_err().to_string();

        assert_eq!(error, "linux.devices[1]: cannot use /dev/xvda: this host has no block device 4095:0");
        assert!(open(&devices[..1], &rules).unwrap().is_empty());
    }
}
