// SPDX-License-Identifier: Apache-2.0
//! How large a virtual machine a configuration needs.
//!
//! | | from an annotation | else from | else |
//! | --- | --- | --- | --- |
//! | vCPUs | `io.bulkhead.vcpus` | `linux.resources.cpu`: quota by period, rounded up, or the number of `cpus`; at most the host's, or as many as there may be by the next annotation | [`DEFAULT_VCPUS`] |
//! | as many as there may be | `io.bulkhead.max_vcpus` | | those; of a pod that is not told, up to [`POD_VCPUS`] and the host's |
//! | memory | `io.bulkhead.memory_mib` | `linux.resources.memory.limit` and [`MEMORY_OVERHEAD_MIB`]; at most the host's | [`DEFAULT_MEMORY_MIB`] |
//! | more words for the kernel | `io.bulkhead.kernel_args` | | none |
//! | network devices | `io.bulkhead.net.…` | | see `net_device`, `user_network` |
//!
//! Guest memory costs the host nothing until the guest touches it. Where no annotation names its size, it may grow while the
//! machine runs, up to the host's. A vCPU costs each start something, also one that is not used: most machines have none of those.

use std::collections::HashMap;
use std::str::FromStr;
use std::thread;

use bulkhead_vmm::config::{MAX_VCPUS, MIN_MEM_SIZE_MIB};
use nix::sys::sysinfo::sysinfo;
use oci_spec::runtime::LinuxResources;

use super::cpu_limit::{self, CpuLimit};
use super::error::FieldError;
use super::net_device::{self, NetSettings};
use super::user_network::{self, UserNetwork};

/// vCPUs of a machine whose configuration says nothing.
pub(crate) const DEFAULT_VCPUS: u8 = 1;

/// As many vCPUs as a pod's machine may have whose containers' limits are not told when it is made: enough for most of what comes
/// then, and a start takes 3 % longer.
pub(super) const POD_VCPUS: u8 = 4;

/// Memory of a machine whose configuration says nothing: enough for a package manager or a compiler.
pub(crate) const DEFAULT_MEMORY_MIB: u64 = 512;

/// What the guest's kernel and agent need beside the container's memory limit.
pub(crate) const MEMORY_OVERHEAD_MIB: u64 = 96;

/// The kernel's account of its memory is a 64th of that (a `struct page` of 64 bytes for each 4 KiB); that of a small machine is
/// in the overhead already.
const SMALL_MIB: u64 = 512;
const ACCOUNT_SHARE: u64 = 63;

/// Most memory of a machine: 1 TiB.
const MAX_MEMORY_MIB: u64 = 1 << 20;

/// A limit of so many bytes is none.
const NO_LIMIT: u64 = 1 << 60;

/// Most bytes of added words for the kernel's command line.
const MAX_KERNEL_ARGS: usize = 1024;

/// Highest CPU number in `cpus`, as in the kernel's largest configuration.
const MAX_CPU: usize = 8191;

const VCPUS: &str = "io.bulkhead.vcpus";
const MOST_VCPUS: &str = "io.bulkhead.max_vcpus";
const MEMORY_MIB: &str = "io.bulkhead.memory_mib";
const KERNEL_ARGS: &str = "io.bulkhead.kernel_args";
const ANNOTATIONS: [&str; 4] = [VCPUS, MOST_VCPUS, MEMORY_MIB, KERNEL_ARGS];

/// What a machine cannot exceed; each is asked only where it matters.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Host {
    cpu_count: fn() -> usize,
    memory_mib: fn() -> u64,
}

impl Host {
    /// This host.
    pub(crate) const THIS: Self = Self {
        cpu_count: || thread::available_parallelism().map_or(1, usize::from),
        memory_mib: || sysinfo().map_or(MAX_MEMORY_MIB, |info| info.ram_total() >> 20).min(MAX_MEMORY_MIB),
    };
}

/// What a machine is to have besides what the resources say.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Besides {
    /// Of memory, where that is limited, at least so much.
    pub(crate) overhead_mib: u64,
    /// It may come to use so many vCPUs, as far as the host has them, unless an annotation names a number.
    pub(crate) max_vcpus: u8,
}

/// The size of a machine, and where it runs.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Machine {
    /// 1 to [`MAX_VCPUS`].
    pub(crate) vcpus: u8,
    /// How many that may become while the machine runs; no fewer.
    pub(crate) max_vcpus: u8,
    /// [`MIN_MEM_SIZE_MIB`] or more.
    pub(crate) mem_size_mib: u64,
    /// What that may become while the machine runs; no less.
    pub(crate) max_mem_size_mib: u64,
    /// Words added to the kernel's command line.
    pub(crate) kernel_args: Vec<String>,
    /// The CPUs of the host that the sandbox may use; empty for all.
    pub(crate) host_cpus: Vec<usize>,
    /// How readily the host's kernel is to end it when the host's memory runs out.
    pub(crate) oom_score_adj: Option<i32>,
    /// How network devices are served.
    pub(crate) net: NetSettings,
    /// A network that belongs to no namespace.
    pub(crate) user_network: Option<UserNetwork>,
}

impl Machine {
    /// Sizes a machine.
    pub(crate) fn translate(
        annotations: &HashMap<String, String>,
        resources: Option<&LinuxResources>,
        besides: Besides,
        host: Host,
    ) -> Result<Self, FieldError> {
        let known = [&ANNOTATIONS[..], &net_device::ANNOTATIONS, &user_network::ANNOTATIONS].concat();
        let unknown = annotations.keys().find(|key| key.starts_with("io.bulkhead.") && !known.contains(&key.as_str()));
        if let Some(key) = unknown {
            let what = format!("Bulkhead's annotations are {}", known.join(", "));
            return Err(FieldError::unsupported(format!("annotations[{key:?}]"), what));
        }
        let cpu = resources.and_then(|resources| resources.cpu().as_ref());
        let host_cpus = cpu_limit::cpu_list(cpu)?;
        let (vcpus, max_vcpus) = vcpus(annotations, CpuLimit::translate(cpu)?, besides.max_vcpus, host)?;
        let host_memory_mib = (host.memory_mib)();
        let (mem_size_mib, max_mem_size_mib) = match number(annotations, MEMORY_MIB, MIN_MEM_SIZE_MIB, MAX_MEMORY_MIB)?
        {
            Some(size) if size > host_memory_mib => {
                let expected = format!("at most the host's {host_memory_mib} MiB");
                return Err(FieldError::invalid(format!("annotations[{MEMORY_MIB:?}]"), size, expected));
            }
            Some(size) => (size, size),
            None => {
                let with_limit = |limit: u64| {
                    limit.saturating_add(overhead_mib(limit).max(besides.overhead_mib)).min(host_memory_mib)
                };
                let size = memory_limit_mib(resources).map_or(DEFAULT_MEMORY_MIB, with_limit);
                (size, size.max(host_memory_mib))
            }
        };
        let (kernel_args, net) = (kernel_args(annotations)?, NetSettings::translate(annotations)?);
        let user_network = UserNetwork::translate(annotations, &net)?;
        let oom_score_adj = None;
        Ok(Self {
            vcpus,
            max_vcpus,
            mem_size_mib,
            max_mem_size_mib,
            kernel_args,
            host_cpus,
            oom_score_adj,
            net,
            user_network,
        })
    }

    /// One with a vCPU and that much memory, for good.
    #[cfg(test)]
    pub(crate) fn for_test(mem_size_mib: u64) -> Self {
        let (kernel_args, host_cpus, net) = (Vec::new(), Vec::new(), NetSettings::default());
        let (vcpus, max_vcpus, max_mem_size_mib, oom_score_adj, user_network) = (1, 1, mem_size_mib, None, None);
        Self {
            vcpus,
            max_vcpus,
            mem_size_mib,
            max_mem_size_mib,
            kernel_args,
            host_cpus,
            oom_score_adj,
            net,
            user_network,
        }
    }
}

/// How many vCPUs a machine begins with, and how many it may come to use: `besides`, as far as the host has them, if no annotation
/// says.
fn vcpus(
    annotations: &HashMap<String, String>,
    limit: CpuLimit,
    besides: u8,
    host: Host,
) -> Result<(u8, u8), FieldError> {
    let named = number(annotations, VCPUS, 1, MAX_VCPUS)?;
    let most = number(annotations, MOST_VCPUS, named.unwrap_or(1), MAX_VCPUS)?;
    let host_vcpus = || u8::try_from((host.cpu_count)()).map_or(MAX_VCPUS, |count| count.clamp(1, MAX_VCPUS));
    let wanted = |wanted| u8::try_from(wanted).unwrap_or(MAX_VCPUS).min(most.unwrap_or_else(host_vcpus));
    let vcpus = named.unwrap_or_else(|| CpuLimit::processors([limit]).map_or(DEFAULT_VCPUS, wanted));
    let max_vcpus = match (most, named) {
        (Some(most), _) => most,
        (None, None) if besides > vcpus => vcpus.max(besides.min(host_vcpus())),
        (None, _) => vcpus,
    };
    Ok((vcpus, max_vcpus))
}

/// What a guest needs beside a container's limit.
fn overhead_mib(limit_mib: u64) -> u64 {
    MEMORY_OVERHEAD_MIB + limit_mib.saturating_sub(SMALL_MIB).div_ceil(ACCOUNT_SHARE)
}

/// The limit of memory; `None` if there is none.
pub(super) fn memory_limit_mib(resources: Option<&LinuxResources>) -> Option<u64> {
    let limit = resources.and_then(|resources| resources.memory().as_ref()?.limit());
    // Whoever writes as much as no machine has means "no limit"; the cgroup has the exact value.
    let limit = u64::try_from(limit?).ok().filter(|limit| (1..NO_LIMIT).contains(limit))?;
    Some(limit.div_ceil(1 << 20))
}

fn number<T: FromStr + PartialOrd + std::fmt::Display>(
    annotations: &HashMap<String, String>,
    key: &str,
    min: T,
    max: T,
) -> Result<Option<T>, FieldError> {
    let Some(text) = annotations.get(key) else {
        return Ok(None);
    };
    match text.parse::<T>().ok().filter(|value| *value >= min && *value <= max) {
        Some(value) => Ok(Some(value)),
        None => {
            Err(FieldError::invalid(format!("annotations[{key:?}]"), text, format!("a number from {min} to {max}")))
        }
    }
}

fn kernel_args(annotations: &HashMap<String, String>) -> Result<Vec<String>, FieldError> {
    let Some(text) = annotations.get(KERNEL_ARGS) else {
        return Ok(Vec::new());
    };
    if text.len() > MAX_KERNEL_ARGS || !text.bytes().all(|byte| byte == b' ' || byte.is_ascii_graphic()) {
        let expected = format!("printable ASCII of at most {MAX_KERNEL_ARGS} bytes");
        return Err(FieldError::invalid(format!("annotations[{KERNEL_ARGS:?}]"), text, expected));
    }
    Ok(text.split_whitespace().map(str::to_owned).collect())
}

/// A list such as `0-3,7`, sorted, each CPU once.
pub(crate) fn parse_cpu_list(list: &str) -> Option<Vec<usize>> {
    let mut cpus = Vec::new();
    for range in list.trim().split(',') {
        let (first, last) = range.split_once('-').unwrap_or((range, range));
        let (first, last): (usize, usize) = (first.trim().parse().ok()?, last.trim().parse().ok()?);
        if first > last || last > MAX_CPU {
            return None;
        }
        cpus.extend(first..=last);
    }
    cpus.sort_unstable();
    cpus.dedup();
    Some(cpus)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};

    const HOST_MEMORY_MIB: u64 = 4096;
    const HOST: Host = Host { cpu_count: || 8, memory_mib: || HOST_MEMORY_MIB };

    fn sized(annotations: Value, resources: Value) -> Result<Machine, String> {
        let annotations = serde_json::from_value(annotations).unwrap();
        let resources: LinuxResources = serde_json::from_value(resources).unwrap();
        let besides = Besides::default();
        Machine::translate(&annotations, Some(&resources), besides, HOST).map_err(|error| error.to_string())
    }

    #[test]
    fn a_silent_configuration_gets_the_defaults() {
        let besides = Besides { overhead_mib: 200, ..Besides::default() };
        let machine = Machine::translate(&HashMap::new(), None, besides, HOST).unwrap();

        assert_eq!((machine.vcpus, machine.mem_size_mib), (DEFAULT_VCPUS, DEFAULT_MEMORY_MIB));
        assert_eq!(machine.max_vcpus, DEFAULT_VCPUS);
        assert_eq!(machine.max_mem_size_mib, HOST_MEMORY_MIB);
        assert!(machine.kernel_args.is_empty() && machine.host_cpus.is_empty());
    }

    #[test]
    fn limits_size_the_machine() {
        let cases = [
            (json!({"memory": {"limit": 64 << 20}}), 1, 64 + MEMORY_OVERHEAD_MIB),
            (json!({"memory": {"limit": (1 << 20) + 1}}), 1, 2 + MEMORY_OVERHEAD_MIB),
            (json!({"memory": {"limit": 2_i64 << 30}}), 1, 2048 + MEMORY_OVERHEAD_MIB + 25),
            (json!({"memory": {"limit": 64_i64 << 30}}), 1, HOST_MEMORY_MIB),
            (json!({"memory": {"limit": 2_i64 << 40}}), 1, HOST_MEMORY_MIB),
            (json!({"memory": {"limit": i64::MAX}}), 1, DEFAULT_MEMORY_MIB),
            (json!({"memory": {"limit": i64::MAX & !4095}}), 1, DEFAULT_MEMORY_MIB),
            (json!({"memory": {"limit": -1}}), 1, DEFAULT_MEMORY_MIB),
            (json!({"cpu": {"quota": 150_000}}), 2, DEFAULT_MEMORY_MIB),
            (json!({"cpu": {"quota": 10_000, "period": 5_000}}), 2, DEFAULT_MEMORY_MIB),
            (json!({"cpu": {"quota": i64::MAX, "period": 1}}), 8, DEFAULT_MEMORY_MIB),
            (json!({"cpu": {"quota": -1}}), 1, DEFAULT_MEMORY_MIB),
            (json!({"cpu": {"cpus": "1-3,2,6"}}), 4, DEFAULT_MEMORY_MIB),
        ];
        for (resources, vcpus, mem_size_mib) in cases {
            let machine = sized(json!({}), resources.clone()).unwrap();
            assert_eq!((machine.vcpus, machine.mem_size_mib), (vcpus, mem_size_mib), "{resources}");
            assert_eq!(machine.max_vcpus, vcpus, "{resources}");
            assert_eq!(machine.max_mem_size_mib, HOST_MEMORY_MIB, "{resources}");
        }
    }

    #[test]
    fn a_told_overhead_makes_room_but_not_less_than_the_guest_needs() {
        let limit = serde_json::from_value(json!({"memory": {"limit": 64 << 20}})).unwrap();
        let size = |overhead_mib| {
            let besides = Besides { overhead_mib, ..Besides::default() };
            Machine::translate(&HashMap::new(), Some(&limit), besides, HOST).unwrap().mem_size_mib
        };

        assert_eq!((size(10), size(200), size(u64::MAX)), (64 + MEMORY_OVERHEAD_MIB, 264, HOST_MEMORY_MIB));
    }

    #[test]
    fn vcpus_may_be_kept_for_later() {
        let resources = |quota: i64| serde_json::from_value(json!({"cpu": {"quota": quota}})).unwrap();
        let sized = |annotations: &[(&str, &str)], quota, max_vcpus| {
            let annotations = annotations.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect();
            let besides = Besides { max_vcpus, ..Besides::default() };
            let machine = Machine::translate(&annotations, Some(&resources(quota)), besides, HOST).unwrap();
            (machine.vcpus, machine.max_vcpus)
        };
        let (vcpus, most) = ("io.bulkhead.vcpus", "io.bulkhead.max_vcpus");

        assert_eq!(sized(&[(most, "6")], -1, 0), (1, 6));
        assert_eq!(sized(&[(most, "6"), (vcpus, "6")], -1, 0), (6, 6));
        // What is named may be more than the host has, and is a bound for what the limits ask for.
        assert_eq!(sized(&[(most, "12")], 1_000_000, 0), (10, 12));
        assert_eq!(sized(&[(most, "2")], 1_000_000, 0), (2, 2));
        // A pod's.
        assert_eq!(sized(&[], -1, 4), (1, 4));
        assert_eq!(sized(&[], -1, 64), (1, 8));
        assert_eq!(sized(&[], 600_000, 4), (6, 6));
        assert_eq!(sized(&[(most, "2")], -1, 4), (1, 2));
        assert_eq!(sized(&[(vcpus, "3")], -1, 4), (3, 3));
    }

    #[test]
    fn annotations_win() {
        let annotations = json!({
            "io.bulkhead.vcpus": "3", "io.bulkhead.memory_mib": "200", "io.bulkhead.kernel_args": " debug  loglevel=7",
            "org.example.other": "x",
        });

        let machine = sized(annotations, json!({"memory": {"limit": 1 << 30}, "cpu": {"quota": 800_000}})).unwrap();

        assert_eq!((machine.vcpus, machine.mem_size_mib, machine.max_mem_size_mib), (3, 200, 200));
        assert_eq!(machine.kernel_args, ["debug", "loglevel=7"]);
    }

    #[test]
    fn what_is_out_of_range_is_refused() {
        let cases = [
            (
                json!({"io.bulkhead.vcpus": "0"}),
                "annotations[\"io.bulkhead.vcpus\"]: \"0\" is not a number from 1 to 64",
            ),
            (
                json!({"io.bulkhead.max_vcpus": "65"}),
                "annotations[\"io.bulkhead.max_vcpus\"]: \"65\" is not a number from 1 to 64",
            ),
            (
                json!({"io.bulkhead.vcpus": "3", "io.bulkhead.max_vcpus": "2"}),
                "annotations[\"io.bulkhead.max_vcpus\"]: \"2\" is not a number from 3 to 64",
            ),
            (json!({"io.bulkhead.vcpus": "many"}), "annotations[\"io.bulkhead.vcpus\"]: \"many\" is not a number"),
            (
                json!({"io.bulkhead.memory_mib": "63"}),
                "annotations[\"io.bulkhead.memory_mib\"]: \"63\" is not a number",
            ),
            (
                json!({"io.bulkhead.memory_mib": "4097"}),
                "annotations[\"io.bulkhead.memory_mib\"]: \"4097\" is not at most the host's 4096 MiB",
            ),
            (json!({"io.bulkhead.kernel_args": "a\nb"}), "annotations[\"io.bulkhead.kernel_args\"]: "),
            (json!({"io.bulkhead.vcpu": "1"}), "annotations[\"io.bulkhead.vcpu\"]: not supported"),
        ];
        for (annotations, expected) in cases {
            let error = sized(annotations, json!({})).unwrap_err();
            assert!(error.starts_with(expected), "{error}");
        }
        for list in ["x", "3-1", "0-99999999999", "1,,2", "-1"] {
            assert!(sized(json!({}), json!({"cpu": {"cpus": list}})).is_err(), "{list}");
        }
    }
}
