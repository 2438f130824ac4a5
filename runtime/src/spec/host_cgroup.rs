// SPDX-License-Identifier: Apache-2.0
//! What a configuration says about the sandbox's cgroup on the host: `linux.cgroupsPath`, and those limits of
//! `linux.resources` that hold for the machine as a whole.

use std::path::Path;

use oci_spec::runtime::LinuxResources;

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
    Ok(CgroupSpec { place, limits: limits(resources, Some(machine)) })
}

/// The limits for a machine; those of its memory are its size, and absent without it.
pub(crate) fn limits(resources: Option<&LinuxResources>, machine: Option<&Machine>) -> Limits {
    let memory = resources.and_then(|resources| resources.memory().as_ref()?.limit()).filter(|limit| *limit != 0);
    let cpu = resources.and_then(|resources| resources.cpu().clone()).unwrap_or_default();
    let list =
        |list: &Option<String>| list.as_deref().map(str::trim).filter(|list| !list.is_empty()).map(str::to_owned);
    let whole = machine.map(|machine| ((machine.mem_size_mib + HOST_OVERHEAD_MIB) << 20).cast_signed());
    let shares = cpu.shares().filter(|shares| *shares != 0);
    Limits {
        memory_bytes: whole.and_then(|whole| memory.map(|limit| if limit < 0 { -1 } else { whole })),
        cpu_shares: shares,
        cpu_weight: shares.map(weight),
        cpu_quota_us: cpu.quota().filter(|quota| *quota != 0),
        cpu_period_us: cpu.period().filter(|period| *period != 0),
        cpus: list(cpu.cpus()),
        mems: list(cpu.mems()),
    }
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

        let limits = limits(Some(&resources), Some(&machine(160)));

        assert_eq!(limits.memory_bytes, Some((160 + 64) << 20));
        assert_eq!((limits.cpu_shares, limits.cpu_weight, limits.cpu_quota_us), (Some(1024), Some(39), Some(-1)));
        assert_eq!((limits.cpus, limits.mems), (None, Some("0".to_owned())));
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
