// SPDX-License-Identifier: Apache-2.0
//! What a configuration says about the sandbox's cgroup on the host: `linux.cgroupsPath`, and those limits of
//! `linux.resources` that hold for the machine as a whole.

use std::path::Path;

use oci_spec::runtime::LinuxResources;

use super::block_io;
use super::error::{FieldError, without_nul};
use super::machine::Machine;
use super::resources::weight;
use crate::cgroup::{CgroupSpec, Limits, Place};

/// What a sandbox needs of the host beside its guest's memory: the VMM, the supervisor, their page tables, buffers of the
/// files that they serve, and passt's 32 MiB where that is the container's network.
pub(super) const HOST_OVERHEAD_MIB: u64 = 64;

/// From here on, page tables count: those of the VMM and those of its guest are a 512th each of what they map, in small pages.
const LARGE_MIB: u64 = 4096;

/// Checks the place and gathers the limits.
pub(crate) fn translate(
    path: Option<&Path>,
    resources: Option<&LinuxResources>,
    machine: &Machine,
) -> Result<CgroupSpec, FieldError> {
    let place = match path.map(|path| path.to_string_lossy()).filter(|path| !path.is_empty()) {
        None => None,
        Some(path) => {
            let field = || "linux.cgroupsPath".to_owned();
            without_nul(field, &path)?;
            let expected = "a path below the root of the hierarchy, or of the form SLICE:PREFIX:NAME";
            Some(Place::parse(&path).ok_or_else(|| FieldError::invalid(field(), &path, expected))?)
        }
    };
    Ok(CgroupSpec { place, limits: limits(resources, machine.mem_size_mib)? })
}

/// New limits for a machine that runs, but for its memory: see [`host_memory_bytes`].
pub(super) fn new_limits(resources: &LinuxResources) -> Result<Limits, FieldError> {
    Ok(Limits { memory_bytes: None, ..limits(Some(resources), 0)? })
}

/// The limit for a machine with that much memory, as a whole. A lower one would end it: what its guest has had is not given
/// back.
pub(crate) fn host_memory_bytes(memory_mib: u64) -> i64 {
    let page_tables_mib = memory_mib.saturating_sub(LARGE_MIB) / 256;
    ((memory_mib + HOST_OVERHEAD_MIB + page_tables_mib) << 20).cast_signed()
}

/// How much of a sandbox may be swapped out: what the limit of memory and swap together, which is no smaller, has above that of
/// memory. `None` where nothing is said.
fn swap_bytes(memory: Option<i64>, both: Option<i64>) -> Option<i64> {
    match (memory?, both?) {
        (_, 0) => None,
        (_, ..0) | (..0, _) => Some(-1),
        (memory, both) => Some((both - memory).max(0)),
    }
}

/// The limits for a machine with that much memory.
fn limits(resources: Option<&LinuxResources>, memory_mib: u64) -> Result<Limits, FieldError> {
    let memory = resources.and_then(|resources| resources.memory().as_ref()?.limit()).filter(|limit| *limit != 0);
    let cpu = resources.and_then(|resources| resources.cpu().clone()).unwrap_or_default();
    let list =
        |list: &Option<String>| list.as_deref().map(str::trim).filter(|list| !list.is_empty()).map(str::to_owned);
    let swap = resources.and_then(|resources| resources.memory().as_ref()?.swap());
    let reservation = resources.and_then(|resources| resources.memory().as_ref()?.reservation());
    let shares = cpu.shares().filter(|shares| *shares != 0);
    Ok(Limits {
        memory_bytes: memory.map(|limit| if limit < 0 { -1 } else { host_memory_bytes(memory_mib) }),
        memory_swap_bytes: swap_bytes(memory, swap),
        memory_low_bytes: reservation.filter(|reservation| *reservation != 0),
        cpu_shares: shares,
        cpu_weight: shares.map(weight),
        cpu_quota_us: cpu.quota().filter(|quota| *quota != 0),
        cpu_period_us: cpu.period().filter(|period| *period != 0),
        cpu_burst_us: cpu.burst(),
        cpu_idle: cpu.idle().map(|idle| idle != 0),
        cpus: list(cpu.cpus()),
        mems: list(cpu.mems()),
        block_io: block_io::translate(resources.and_then(|resources| resources.block_io().as_ref()))?,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn machine(mem_size_mib: u64) -> Machine {
        Machine::for_test(mem_size_mib)
    }

    #[test]
    fn the_memory_limit_is_that_of_the_whole_machine() {
        let resources = json!({"memory": {"limit": 64 << 20}, "cpu": {"shares": 1024, "quota": -1, "mems": " 0 "}});
        let resources: LinuxResources = serde_json::from_value(resources).unwrap();

        let limits = limits(Some(&resources), 160).unwrap();

        assert_eq!(limits.memory_bytes, Some((160 + 64) << 20));
        assert_eq!((limits.cpu_shares, limits.cpu_weight, limits.cpu_quota_us), (Some(1024), Some(39), Some(-1)));
        assert_eq!((limits.cpus, limits.mems), (None, Some("0".to_owned())));
    }

    #[test]
    fn new_limits_leave_the_memory_to_who_knows_the_machine() {
        let resources = json!({"memory": {"limit": 64 << 20}, "cpu": {"quota": 5000}});

        let limits = new_limits(&serde_json::from_value(resources).unwrap()).unwrap();

        assert_eq!((limits.memory_bytes, limits.cpu_quota_us), (None, Some(5000)));
    }

    #[test]
    fn a_large_machine_has_large_page_tables() {
        assert_eq!(host_memory_bytes(4096), (4096 + 64) << 20);
        assert_eq!(host_memory_bytes(4096 + (64 << 10)), (4096 + (64 << 10) + 64 + 256) << 20);
    }

    #[test]
    fn swap_is_what_both_have_above_memory() {
        let cases = [((5, 5), Some(0)), ((5, 8), Some(3)), ((5, -1), Some(-1)), ((-1, -1), Some(-1)), ((5, 0), None)];
        for ((memory, both), swap) in cases {
            assert_eq!(swap_bytes(Some(memory), Some(both)), swap, "{memory} {both}");
        }
        assert_eq!((swap_bytes(None, Some(-1)), swap_bytes(Some(5), None)), (None, None));
    }

    #[test]
    fn a_silent_configuration_asks_for_nothing() {
        assert_eq!(translate(None, None, &machine(512)).unwrap(), CgroupSpec::default());
        assert_eq!(translate(Some(Path::new("")), None, &machine(512)).unwrap(), CgroupSpec::default());
    }

    #[test]
    fn a_path_out_of_the_hierarchy_is_refused() {
        let error = translate(Some(Path::new("/a/../../b")), None, &machine(512)).unwrap_err().to_string();

        assert!(error.starts_with("linux.cgroupsPath: \"/a/../../b\" is not a path"), "{error}");
    }
}
