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

/// What a sandbox needs of the host beside its guest's memory: the VMM, the supervisor, their page tables, and buffers
/// of the files that they serve.
const HOST_OVERHEAD_MIB: u64 = 64;

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

/// New limits for a machine that runs. Its memory is what it was made with, so that it cannot be given more.
pub(crate) fn new_limits(resources: &LinuxResources, memory_mib: u64) -> Result<Limits, FieldError> {
    let limit = resources.memory().and_then(|memory| memory.limit()).unwrap_or(0);
    if limit > (memory_mib << 20).cast_signed() {
        let expected = format!("at most the {memory_mib} MiB that the machine was made with: its memory does not grow");
        return Err(FieldError::invalid("linux.resources.memory.limit", limit, expected));
    }
    limits(Some(resources), memory_mib)
}

/// The limits for a machine with that much memory.
fn limits(resources: Option<&LinuxResources>, memory_mib: u64) -> Result<Limits, FieldError> {
    let memory = resources.and_then(|resources| resources.memory().as_ref()?.limit()).filter(|limit| *limit != 0);
    let cpu = resources.and_then(|resources| resources.cpu().clone()).unwrap_or_default();
    let list =
        |list: &Option<String>| list.as_deref().map(str::trim).filter(|list| !list.is_empty()).map(str::to_owned);
    // A lower limit than that would end the machine: what its guest has had is not given back.
    let whole = ((memory_mib + HOST_OVERHEAD_MIB) << 20).cast_signed();
    let shares = cpu.shares().filter(|shares| *shares != 0);
    Ok(Limits {
        memory_bytes: memory.map(|limit| if limit < 0 { -1 } else { whole }),
        cpu_shares: shares,
        cpu_weight: shares.map(weight),
        cpu_quota_us: cpu.quota().filter(|quota| *quota != 0),
        cpu_period_us: cpu.period().filter(|period| *period != 0),
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
        Machine { vcpus: 1, mem_size_mib, kernel_args: Vec::new(), host_cpus: Vec::new(), net: Default::default() }
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
    fn a_machine_that_runs_gets_no_more_memory() {
        let new = |limit: i64| {
            new_limits(&serde_json::from_value(json!({ "memory": { "limit": limit } })).unwrap(), 160)
                .map(|limits| limits.memory_bytes)
        };

        assert_eq!(new(64 << 20).unwrap(), Some((160 + 64) << 20));
        assert_eq!(new(160 << 20).unwrap(), Some((160 + 64) << 20));
        assert_eq!((new(-1).unwrap(), new(0).unwrap()), (Some(-1), None));
        let error = new(161 << 20).unwrap_err().to_string();
        assert!(error.contains("linux.resources.memory.limit") && error.contains("160 MiB"), "{error}");
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
