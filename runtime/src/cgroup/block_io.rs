// SPDX-License-Identifier: Apache-2.0
//! Limits for block devices. They hold on the host alone: the files that a guest reads and writes are read and written by
//! its VMM, on the host's devices.
//!
//! Sources: the kernel's `Documentation/admin-guide/cgroup-v2.rst`, "IO Interface Files", `block/bfq-iosched.rst`, and
//! `admin-guide/cgroup-v1/blkio-controller.rst`.

use std::path::Path;

/// The least and the greatest weight of a configuration, which are those of version 1.
pub(crate) const WEIGHTS: std::ops::RangeInclusive<u16> = 10..=1000;

/// What a sandbox may do with the host's block devices.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct BlockIo {
    /// Within [`WEIGHTS`].
    pub(crate) weight: Option<u16>,
    pub(crate) device_weights: Vec<(Device, u16)>,
    pub(crate) throttles: Vec<Throttle>,
}

/// A block device of the host.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Device {
    pub(crate) major: u32,
    pub(crate) minor: u32,
}

impl std::fmt::Display for Device {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(formatter, "{}:{}", self.major, self.minor)
    }
}

/// What is counted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Rate {
    ReadBytes,
    WriteBytes,
    Reads,
    Writes,
}

/// The most that there may be of something in a second.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Throttle {
    pub(crate) device: Device,
    pub(crate) what: Rate,
    /// 0 takes the limit away.
    pub(crate) per_second: u64,
}

impl BlockIo {
    /// Whether something is asked for that only a cgroup of the host can do.
    pub(crate) fn needs_host(&self) -> bool {
        !self.device_weights.is_empty() || !self.throttles.is_empty()
    }

    /// The files without which what is asked for cannot be done: one of each list.
    pub(super) fn needed_files(&self) -> impl Iterator<Item = &'static [&'static str]> {
        let weights: &[_] = &["io.bfq.weight", "io.weight", "blkio.bfq.weight_device", "blkio.weight_device"];
        let throttles: &[_] = &["io.max", "blkio.throttle.read_bps_device"];
        let needed = [(weights, !self.device_weights.is_empty()), (throttles, !self.throttles.is_empty())];
        needed.into_iter().filter_map(|(files, asked)| asked.then_some(files))
    }

    /// File and value of each setting, for the cgroup in `folder`. Which files there are depends on the host's
    /// schedulers; a weight for all devices is left out where there is none, since there is nothing to weigh then.
    pub(crate) fn settings(&self, folder: &Path, version_2: bool) -> Vec<(&'static str, String)> {
        let has = |file: &&'static str| folder.join(file).exists();
        let (bfq, other, bfq_device, other_device) = if version_2 {
            ("io.bfq.weight", "io.weight", "io.bfq.weight", "io.weight")
        } else {
            ("blkio.bfq.weight", "blkio.weight", "blkio.bfq.weight_device", "blkio.weight_device")
        };
        // Version 2's own weights have another scale than those of version 1 and of the BFQ scheduler.
        let scaled = |file: &str, weight: u16| if file == "io.weight" { scale(weight) } else { u64::from(weight) };
        let mut settings = Vec::new();
        if let (Some(weight), Some(file)) = (self.weight, [bfq, other].into_iter().find(has)) {
            settings.push((file, scaled(file, weight).to_string()));
        }
        let file = [bfq_device, other_device].into_iter().find(has).unwrap_or(other_device);
        for (device, weight) in &self.device_weights {
            settings.push((file, format!("{device} {}", scaled(file, *weight))));
        }
        for throttle in &self.throttles {
            settings.push(if version_2 { throttle.version_2() } else { throttle.version_1() });
        }
        settings
    }
}

/// What a file of these has to be written, beside what it had `before`, to lose a `value` again: nothing, where it had one for the
/// same device, or has none for devices.
pub(super) fn undoing(file: &str, value: &str, before: &str) -> Option<String> {
    let (device, _) = value.split_once(' ').filter(|(device, _)| device.contains(':'))?;
    if before.lines().any(|line| line.split(' ').next() == Some(device)) {
        return None;
    }
    let nothing = match file {
        "io.max" => "rbps=max wbps=max riops=max wiops=max",
        throttle if throttle.starts_with("blkio.throttle.") => "0",
        _ => "default",
    };
    Some(format!("{device} {nothing}\n"))
}

impl Throttle {
    fn version_2(&self) -> (&'static str, String) {
        let key = match self.what {
            Rate::ReadBytes => "rbps",
            Rate::WriteBytes => "wbps",
            Rate::Reads => "riops",
            Rate::Writes => "wiops",
        };
        let value = if self.per_second == 0 { "max".to_owned() } else { self.per_second.to_string() };
        ("io.max", format!("{} {key}={value}", self.device))
    }

    fn version_1(&self) -> (&'static str, String) {
        let file = match self.what {
            Rate::ReadBytes => "blkio.throttle.read_bps_device",
            Rate::WriteBytes => "blkio.throttle.write_bps_device",
            Rate::Reads => "blkio.throttle.read_iops_device",
            Rate::Writes => "blkio.throttle.write_iops_device",
        };
        (file, format!("{} {}", self.device, self.per_second))
    }
}

/// A weight on the scale of `io.weight`, 1 to 10,000: by the line through both ends, as runc converts them.
pub(crate) fn scale(weight: u16) -> u64 {
    1 + (u64::from(weight).saturating_sub(10)) * 9_999 / 990
}

#[cfg(test)]
mod tests {
    use super::*;

    fn all() -> BlockIo {
        let device = Device { major: 8, minor: 16 };
        let throttle = |what, per_second| Throttle { device, what, per_second };
        BlockIo {
            weight: Some(1000),
            device_weights: vec![(device, 10)],
            throttles: vec![
                throttle(Rate::ReadBytes, 5),
                throttle(Rate::WriteBytes, 0),
                throttle(Rate::Reads, 7),
                throttle(Rate::Writes, u64::MAX),
            ],
        }
    }

    fn told(folder: &Path, version_2: bool) -> Vec<String> {
        all().settings(folder, version_2).iter().map(|(file, value)| format!("{file}={value}")).collect()
    }

    #[test]
    fn what_a_file_did_not_have_is_taken_away_again() {
        let before = "8:0 rbps=5 wbps=max riops=max wiops=max\n";

        assert_eq!(undoing("io.max", "8:0 wbps=7", before), None);
        let undone = undoing("io.max", "8:16 wbps=7", before);
        assert_eq!(undone.as_deref(), Some("8:16 rbps=max wbps=max riops=max wiops=max\n"));
        assert_eq!(undoing("io.weight", "8:16 50", "default 100\n").as_deref(), Some("8:16 default\n"));
        assert_eq!(undoing("blkio.throttle.read_bps_device", "8:16 5", "").as_deref(), Some("8:16 0\n"));
        assert_eq!(undoing("io.weight", "50", "default 100\n"), None);
        assert_eq!(undoing("cpu.max", "1000 100000", "max 100000\n"), None);
    }

    #[test]
    fn version_2_has_one_file_for_all_throttles() {
        let folder = tempfile::tempdir().unwrap();

        let without = told(folder.path(), true);
        std::fs::write(folder.path().join("io.weight"), "").unwrap();
        let with = told(folder.path(), true);

        let throttles = [
            "io.weight=8:16 1",
            "io.max=8:16 rbps=5",
            "io.max=8:16 wbps=max",
            "io.max=8:16 riops=7",
            "io.max=8:16 wiops=18446744073709551615",
        ];
        assert_eq!(without, throttles);
        assert_eq!(with[0], "io.weight=10000");
        assert_eq!(with[1..], throttles);
    }

    #[test]
    fn version_1_and_bfq_keep_the_weights_as_they_are() {
        let folder = tempfile::tempdir().unwrap();
        for file in ["io.weight", "io.bfq.weight", "blkio.weight"] {
            std::fs::write(folder.path().join(file), "").unwrap();
        }

        assert_eq!(told(folder.path(), true)[..2], ["io.bfq.weight=1000", "io.bfq.weight=8:16 10"]);
        assert_eq!(
            told(folder.path(), false),
            [
                "blkio.weight=1000",
                "blkio.weight_device=8:16 10",
                "blkio.throttle.read_bps_device=8:16 5",
                "blkio.throttle.write_bps_device=8:16 0",
                "blkio.throttle.read_iops_device=8:16 7",
                "blkio.throttle.write_iops_device=8:16 18446744073709551615",
            ]
        );
    }

    #[test]
    fn a_plain_weight_needs_no_host() {
        assert!(all().needs_host());
        assert!(!BlockIo { weight: Some(10), ..BlockIo::default() }.needs_host());
    }
}
