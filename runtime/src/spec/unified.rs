// SPDX-License-Identifier: Apache-2.0
//! `linux.resources.unified`: what it says of the machine and of its cgroup on the host, in the properties that there are for
//! that. As with runc, it goes before them.

use oci_spec::runtime::LinuxResources;

use super::error::FieldError;

/// Those files that concern the host alone: its CPUs and its memory nodes have other numbers in the guest.
const HOST_ONLY: &[&str] = &["cpuset.cpus", "cpuset.mems"];

/// Whether a file is not for the guest's cgroup.
pub(super) fn is_for_host_only(file: &str) -> bool {
    HOST_ONLY.contains(&file)
}

/// The resources with what `unified` says.
///
/// # Errors
///
/// A value that its file would not take.
pub(super) fn fold(resources: &LinuxResources) -> Result<LinuxResources, FieldError> {
    let mut folded = resources.clone();
    let (mut memory, mut cpu) = (resources.memory().unwrap_or_default(), resources.cpu().clone().unwrap_or_default());
    let mut files: Vec<_> = resources.unified().iter().flatten().collect();
    files.sort();
    for (file, value) in files {
        let value = value.trim();
        let invalid = |expected: &str| {
            FieldError::invalid(format!("linux.resources.unified[{file:?}]"), value, expected.to_owned())
        };
        let number = || value.parse::<u64>().map_err(|_| invalid("a number"));
        match file.as_str() {
            "memory.max" => {
                memory.set_limit(Some(amount(value).ok_or_else(|| invalid("bytes, or max"))?));
            }
            "memory.low" => {
                memory.set_reservation(Some(amount(value).ok_or_else(|| invalid("bytes, or max"))?));
            }
            "cpu.max" => {
                let (quota, period) =
                    cpu_max(value).ok_or_else(|| invalid("QUOTA [PERIOD] in microseconds, or max"))?;
                cpu.set_quota(Some(quota));
                if period.is_some() {
                    cpu.set_period(period);
                }
            }
            "cpu.max.burst" => {
                cpu.set_burst(Some(number()?));
            }
            "cpu.idle" => {
                let idle = value.parse().ok().filter(|idle| (0..=1).contains(idle));
                cpu.set_idle(Some(idle.ok_or_else(|| invalid("0 or 1"))?));
            }
            "cpu.weight" => {
                let weight = Some(number()?).filter(|weight| (1..=10_000).contains(weight));
                cpu.set_shares(Some(shares(weight.ok_or_else(|| invalid("1 to 10000"))?)));
            }
            "cpuset.cpus" => {
                cpu.set_cpus(Some(value.to_owned()));
            }
            "cpuset.mems" => {
                cpu.set_mems(Some(value.to_owned()));
            }
            _ => continue,
        }
        folded.set_memory(Some(memory));
        folded.set_cpu(Some(cpu.clone()));
    }
    Ok(folded)
}

/// Bytes as the kernel reads them, with a suffix or without; -1 for `max`.
fn amount(text: &str) -> Option<i64> {
    if text == "max" {
        return Some(-1);
    }
    let digits = text.trim_end_matches(|last: char| "kKmMgGtT".contains(last));
    let shift = match &text[digits.len()..] {
        "" => 0,
        "k" | "K" => 10,
        "m" | "M" => 20,
        "g" | "G" => 30,
        "t" | "T" => 40,
        _ => return None,
    };
    digits.parse::<i64>().ok().filter(|amount| *amount >= 0)?.checked_mul(1 << shift)
}

/// Quota (-1 for none) and period.
fn cpu_max(text: &str) -> Option<(i64, Option<u64>)> {
    let mut words = text.split_whitespace();
    let quota = match words.next()? {
        "max" => -1,
        quota => quota.parse().ok().filter(|quota| *quota > 0)?,
    };
    let period = words.next().map(str::parse).transpose().ok()?;
    words.next().is_none().then_some((quota, period))
}

/// The fewest shares that are that weight: see [`super::resources::weight`].
fn shares(weight: u64) -> u64 {
    2 + ((weight - 1) * 262_142).div_ceil(9_999)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::spec::resources;
    use serde_json::json;

    fn folded(unified: serde_json::Value) -> Result<LinuxResources, String> {
        let given =
            json!({"memory": {"limit": 5, "reservation": 3}, "cpu": {"period": 7, "cpus": "0"}, "unified": unified});
        fold(&serde_json::from_value(given).unwrap()).map_err(|error| error.to_string())
    }

    #[test]
    fn files_go_before_the_properties_that_say_the_same() {
        let unified = json!({"memory.max": "2G", "cpu.max": "50000", "cpuset.cpus": "1-3", "cpu.idle": "0"});
        let folded = folded(unified).unwrap();

        let (memory, cpu) = (folded.memory().unwrap(), folded.cpu().clone().unwrap());
        assert_eq!((memory.limit(), memory.reservation()), (Some(2 << 30), Some(3)));
        assert_eq!((cpu.quota(), cpu.period(), cpu.idle()), (Some(50_000), Some(7), Some(0)));
        assert_eq!(cpu.cpus().as_deref(), Some("1-3"));
    }

    #[test]
    fn no_limit_is_a_limit_too() {
        let folded = folded(json!({"memory.max": "max", "memory.low": "max", "cpu.max": "max 9000"})).unwrap();

        let (memory, cpu) = (folded.memory().unwrap(), folded.cpu().clone().unwrap());
        assert_eq!((memory.limit(), memory.reservation()), (Some(-1), Some(-1)));
        assert_eq!((cpu.quota(), cpu.period()), (Some(-1), Some(9000)));
    }

    #[test]
    fn a_weight_stays_that_weight() {
        for weight in 1..=10_000 {
            assert_eq!(resources::weight(shares(weight)), weight);
        }
    }

    #[test]
    fn what_the_kernel_would_not_take_is_refused_by_name() {
        for (file, value) in [
            ("memory.max", "lots"),
            ("memory.max", "-1"),
            ("memory.max", "1KK"),
            ("memory.low", "9999999999G"),
            ("cpu.max", ""),
            ("cpu.max", "0"),
            ("cpu.max", "1 2 3"),
            ("cpu.weight", "0"),
            ("cpu.weight", "10001"),
            ("cpu.max.burst", "x"),
            ("cpu.idle", "max"),
            ("cpu.idle", "2"),
            ("cpu.idle", "-1"),
        ] {
            let error = folded(json!({ file: value })).unwrap_err();
            assert!(error.starts_with(&format!("linux.resources.unified[{file:?}]: ")), "{error}");
        }
    }
}
