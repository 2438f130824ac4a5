// SPDX-License-Identifier: Apache-2.0
//! `linux.resources.blockIO` to what the sandbox's cgroup on the host says of block devices.

use oci_spec::runtime::{LinuxBlockIo, LinuxResources, LinuxThrottleDevice};

use super::error::FieldError;
use crate::cgroup::block_io::{BlockIo, Device, Rate, Throttle, WEIGHTS};

/// Checks all of it.
pub(crate) fn translate(block_io: Option<&LinuxBlockIo>) -> Result<BlockIo, FieldError> {
    let Some(block_io) = block_io else { return Ok(BlockIo::default()) };
    let no_leaves = |weight: Option<u16>, name: &str| match weight.filter(|weight| *weight != 0) {
        Some(_) => Err(FieldError::unsupported(field(name), "cgroup v2 has no such setting")),
        None => Ok(()),
    };
    no_leaves(block_io.leaf_weight(), "leafWeight")?;
    let mut device_weights = Vec::new();
    for (index, entry) in block_io.weight_device().iter().flatten().enumerate() {
        let name = format!("weightDevice[{index}]");
        no_leaves(entry.leaf_weight(), &format!("{name}.leafWeight"))?;
        if let Some(weight) = checked_weight(&format!("{name}.weight"), entry.weight())? {
            device_weights.push((device(&name, entry.major(), entry.minor())?, weight));
        }
    }
    let mut throttles = Vec::new();
    for (list, name, what) in [
        (block_io.throttle_read_bps_device(), "throttleReadBpsDevice", Rate::ReadBytes),
        (block_io.throttle_write_bps_device(), "throttleWriteBpsDevice", Rate::WriteBytes),
        (block_io.throttle_read_iops_device(), "throttleReadIOPSDevice", Rate::Reads),
        (block_io.throttle_write_iops_device(), "throttleWriteIOPSDevice", Rate::Writes),
    ] {
        for (index, entry) in list.iter().flatten().enumerate() {
            throttles.push(throttle(&format!("{name}[{index}]"), entry, what)?);
        }
    }
    Ok(BlockIo { weight: checked_weight("weight", block_io.weight())?, device_weights, throttles })
}

/// Refuses limits for single devices in a pod: its containers have one cgroup of the host together.
pub(super) fn refuse_devices(resources: Option<&LinuxResources>) -> Result<(), FieldError> {
    let block_io = translate(resources.and_then(|resources| resources.block_io().as_ref()))?;
    if block_io.needs_host() {
        let what = "a block device's limits in a pod, whose containers have one cgroup of the host together";
        return Err(FieldError::unsupported("linux.resources.blockIO", what));
    }
    Ok(())
}

/// A weight in the range that there is for them; 0 says nothing.
pub(super) fn checked_weight(name: &str, weight: Option<u16>) -> Result<Option<u16>, FieldError> {
    match weight.filter(|weight| *weight != 0) {
        Some(weight) if !WEIGHTS.contains(&weight) => {
            Err(FieldError::invalid(field(name), weight, format!("from {} to {}", WEIGHTS.start(), WEIGHTS.end())))
        }
        weight => Ok(weight),
    }
}

fn throttle(name: &str, entry: &LinuxThrottleDevice, what: Rate) -> Result<Throttle, FieldError> {
    Ok(Throttle { device: device(name, entry.major(), entry.minor())?, what, per_second: entry.rate() })
}

fn device(name: &str, major: i64, minor: i64) -> Result<Device, FieldError> {
    let number = |part: &str, number: i64| {
        u32::try_from(number)
            .map_err(|_| FieldError::invalid(field(&format!("{name}.{part}")), number, "the number of a device"))
    };
    Ok(Device { major: number("major", major)?, minor: number("minor", minor)? })
}

fn field(name: &str) -> String {
    format!("linux.resources.blockIO.{name}")
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};

    fn translated(block_io: Value) -> Result<BlockIo, String> {
        translate(Some(&serde_json::from_value(block_io).unwrap())).map_err(|error| error.to_string())
    }

    #[test]
    fn devices_are_named_by_their_numbers() {
        let device = Device { major: 8, minor: 16 };
        let block_io = translated(json!({
            "weight": 500,
            "weightDevice": [{"major": 8, "minor": 16, "weight": 10}, {"major": 8, "minor": 0, "weight": 0}],
            "throttleReadBpsDevice": [{"major": 8, "minor": 16, "rate": 1}],
            "throttleWriteIOPSDevice": [{"major": 8, "minor": 16, "rate": 0}],
        }))
        .unwrap();

        assert_eq!((block_io.weight, block_io.device_weights), (Some(500), vec![(device, 10)]));
        assert_eq!(
            block_io.throttles,
            [
                Throttle { device, what: Rate::ReadBytes, per_second: 1 },
                Throttle { device, what: Rate::Writes, per_second: 0 },
            ]
        );
        assert_eq!(
            translated(json!({"weight": 0, "leafWeight": 0, "throttleReadBpsDevice": []})),
            Ok(BlockIo::default())
        );
    }

    #[test]
    fn a_pods_containers_have_no_limits_for_devices() {
        let refused = |resources: Value| refuse_devices(Some(&serde_json::from_value(resources).unwrap())).is_err();

        assert!(refused(json!({"blockIO": {"throttleReadBpsDevice": [{"major": 8, "minor": 0, "rate": 1}]}})));
        assert!(!refused(json!({"blockIO": {"weight": 10}})));
    }

    #[test]
    fn what_cannot_be_is_refused_by_name() {
        for (block_io, name) in [
            (json!({"weight": 9}), "weight"),
            (json!({"leafWeight": 9}), "leafWeight"),
            (json!({"weightDevice": [{"major": 8, "minor": 0, "weight": 1001}]}), "weightDevice[0].weight"),
            (json!({"weightDevice": [{"major": 8, "minor": 0, "leafWeight": 10}]}), "weightDevice[0].leafWeight"),
            (
                json!({"throttleReadBpsDevice": [{"major": -1, "minor": 0, "rate": 1}]}),
                "throttleReadBpsDevice[0].major",
            ),
        ] {
            let error = translated(block_io).unwrap_err();
            assert!(error.starts_with(&format!("linux.resources.blockIO.{name}: ")), "{error}");
        }
    }
}
