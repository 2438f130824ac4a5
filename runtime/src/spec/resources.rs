// SPDX-License-Identifier: Apache-2.0
//! `linux.resources` to the cgroup v2 files of the container's cgroup in the guest.

use bulkhead_protocol::agent::CgroupSetting;
use oci_spec::runtime::{LinuxBlockIo, LinuxCpu, LinuxHugepageLimit, LinuxMemory, LinuxResources};

use super::error::{FieldError, without_nul};
use super::unified;
use crate::cgroup::block_io::scale;

/// Controllers whose files `unified` may name.
const UNIFIED_CONTROLLERS: &[&str] = &["cpu", "cpuset", "hugetlb", "io", "memory", "pids"];

/// Huge pages that an x86-64 kernel can have.
const HUGE_PAGE_SIZES: &[&str] = &["2MB", "1GB"];

/// Microseconds of a CPU period when only a quota is given and there was none before, as in the kernel.
pub(crate) const DEFAULT_CPU_PERIOD_US: u64 = 100_000;

/// Checks the resources and gives the settings in the order in which they are to be written.
///
/// `devices` are [`super::device_filter`]'s, a block device's limits [`super::block_io`]'s, `cpu.cpus` and `cpu.mems` (and what
/// `unified` says of the same) the supervisor's to honour.
pub(crate) fn translate(resources: &LinuxResources) -> Result<Vec<CgroupSetting>, FieldError> {
    refuse_unsupported(resources)?;
    let mut settings = Vec::new();
    if let Some(memory) = resources.memory() {
        translate_memory(memory, &mut settings)?;
    }
    if let Some(cpu) = resources.cpu() {
        translate_cpu(cpu, &mut settings)?;
    }
    if let Some(limit) = resources.pids().map(|pids| pids.limit()).filter(|limit| *limit != 0) {
        settings.push(setting("pids.max", amount(limit)));
    }
    if let Some(block_io) = resources.block_io() {
        translate_block_io(block_io, &mut settings)?;
    }
    for (index, limit) in resources.hugepage_limits().iter().flatten().enumerate() {
        settings.push(huge_page_limit(index, limit)?);
    }
    let mut unified: Vec<_> = resources.unified().iter().flatten().collect();
    unified.sort();
    for (file, value) in unified {
        let field = format!("linux.resources.unified[{file:?}]");
        without_nul(|| field.clone(), value)?;
        let known = file.split_once('.').is_some_and(|(controller, _)| UNIFIED_CONTROLLERS.contains(&controller));
        if !known || !file.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"._-".contains(&byte)) {
            let expected = format!("a cgroup v2 file of one of {}", UNIFIED_CONTROLLERS.join(", "));
            return Err(FieldError::invalid(field, file, expected));
        }
        if !unified::is_for_host_only(file) {
            settings.push(setting(file, value.clone()));
        }
    }
    Ok(settings)
}

fn refuse_unsupported(resources: &LinuxResources) -> Result<(), FieldError> {
    let memory = resources.memory().unwrap_or_default();
    let cpu = resources.cpu().clone().unwrap_or_default();
    let set = |amount: Option<i64>| amount.is_some_and(|amount| amount > 0);
    let network = resources.network().as_ref();
    let network =
        network.is_some_and(|net| net.class_id().is_some() || net.priorities().as_ref().is_some_and(|p| !p.is_empty()));
    let checks = [
        (set(memory.kernel()), "memory.kernel", "cgroup v2 has no such limit"),
        (set(memory.kernel_tcp()), "memory.kernelTCP", "cgroup v2 has no such limit"),
        (memory.swappiness().is_some(), "memory.swappiness", "cgroup v2 has no such setting"),
        (memory.disable_oom_killer() == Some(true), "memory.disableOOMKiller", "cgroup v2 has no such setting"),
        (set(cpu.realtime_runtime()), "cpu.realtimeRuntime", "cgroup v2 has no such setting"),
        (cpu.realtime_period().is_some_and(|period| period > 0), "cpu.realtimePeriod", "cgroup v2 has no such setting"),
        (network, "network", "cgroup v2 has no such settings"),
        (resources.rdma().as_ref().is_some_and(|rdma| !rdma.is_empty()), "rdma", "RDMA devices"),
    ];
    match checks.iter().find(|(used, ..)| *used) {
        Some((_, name, what)) => Err(FieldError::unsupported(format!("linux.resources.{name}"), *what)),
        None => Ok(()),
    }
}

fn translate_memory(memory: &LinuxMemory, settings: &mut Vec<CgroupSetting>) -> Result<(), FieldError> {
    let limit = memory.limit().filter(|limit| *limit != 0);
    if let Some(limit) = limit {
        settings.push(setting("memory.max", amount(limit)));
    }
    if let Some(reservation) = memory.reservation().filter(|reservation| *reservation != 0) {
        settings.push(setting("memory.low", amount(reservation)));
    }
    // A guest has no swap, so every limit on it holds; what no system would take is refused all the same.
    if let Some(swap) = memory.swap().filter(|swap| !matches!(swap, 0 | -1)) {
        let field = "linux.resources.memory.swap";
        let Some(limit) = limit.filter(|limit| *limit > 0) else {
            return Err(FieldError::invalid(field, swap, "possible without linux.resources.memory.limit"));
        };
        if swap < limit {
            return Err(FieldError::invalid(field, swap, format!("at least the memory limit {limit}")));
        }
    }
    Ok(())
}

/// The limits of memory, by their names, that `checkBeforeUpdate` wants to be above what is used.
pub(super) fn above_use(resources: &LinuxResources) -> Vec<(&'static str, i64)> {
    let memory = resources.memory().unwrap_or_default();
    if memory.check_before_update() != Some(true) {
        return Vec::new();
    }
    // What swap adds, a guest does not have.
    let limits = [("memory+swap", memory.swap()), ("memory", memory.limit())];
    limits.into_iter().filter_map(|(name, limit)| Some((name, limit.filter(|limit| *limit > 0)?))).collect()
}

fn translate_cpu(cpu: &LinuxCpu, settings: &mut Vec<CgroupSetting>) -> Result<(), FieldError> {
    if let Some(idle) = cpu.idle() {
        if !(0..=1).contains(&idle) {
            return Err(FieldError::invalid("linux.resources.cpu.idle", idle, "0 or 1"));
        }
        settings.push(setting("cpu.idle", idle.to_string()));
    }
    // An idle cgroup has no weight.
    if let Some(shares) = cpu.shares().filter(|shares| *shares != 0 && cpu.idle() != Some(1)) {
        settings.push(setting("cpu.weight", weight(shares).to_string()));
    }
    let period = cpu.period().filter(|period| *period != 0);
    let quota = cpu.quota().filter(|quota| *quota != 0);
    if cpu.burst().is_some() {
        // No burst may be above the quota: an old one must not be in the way of a new quota.
        settings.push(setting("cpu.max.burst", "0".to_owned()));
    }
    // Of what is not given the cgroup keeps its own: the kernel a period, the agent a quota.
    match (quota.map(amount), period) {
        (Some(quota), Some(period)) => settings.push(setting("cpu.max", format!("{quota} {period}"))),
        (Some(quota), None) => settings.push(setting("cpu.max", quota)),
        (None, Some(period)) => {
            settings.push(CgroupSetting { keep_first_word: true, ..setting("cpu.max", period.to_string()) });
        }
        (None, None) => {}
    }
    if let Some(burst) = cpu.burst() {
        settings.push(setting("cpu.max.burst", burst.to_string()));
    }
    Ok(())
}

/// What concerns single devices is for [`super::block_io`]: the guest's files come from no block device of its own.
fn translate_block_io(block_io: &LinuxBlockIo, settings: &mut Vec<CgroupSetting>) -> Result<(), FieldError> {
    if let Some(weight) = super::block_io::checked_weight("weight", block_io.weight())? {
        settings.push(setting("io.weight", scale(weight).to_string()));
    }
    Ok(())
}

fn huge_page_limit(index: usize, limit: &LinuxHugepageLimit) -> Result<CgroupSetting, FieldError> {
    let size = limit.page_size();
    if !HUGE_PAGE_SIZES.contains(&size.as_str()) {
        let field = format!("linux.resources.hugepageLimits[{index}].pageSize");
        return Err(FieldError::invalid(field, size, format!("one of {}", HUGE_PAGE_SIZES.join(", "))));
    }
    Ok(setting(&format!("hugetlb.{size}.max"), amount(limit.limit())))
}

/// Shares (2 to 262144) to weight (1 to 10000), by the line through both ends, as runc converts them.
pub(crate) fn weight(shares: u64) -> u64 {
    1 + (shares.clamp(2, 262_144) - 2) * 9_999 / 262_142
}

/// A limit as cgroup v2 spells it: negative is none.
fn amount(limit: i64) -> String {
    if limit < 0 { "max".to_owned() } else { limit.to_string() }
}

fn setting(file: &str, value: String) -> CgroupSetting {
    CgroupSetting { file: file.to_owned(), value, ..CgroupSetting::default() }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};

    fn translated(value: Value) -> Result<Vec<(String, String)>, String> {
        let resources: LinuxResources = serde_json::from_value(value).unwrap();
        let settings = translate(&resources).map_err(|error| error.to_string())?;
        Ok(settings.into_iter().map(|setting| (setting.file, setting.value)).collect())
    }

    #[test]
    fn limits_become_settings() {
        let cases = [
            (json!({"memory": {"limit": 1048576}}), vec![("memory.max", "1048576")]),
            (json!({"memory": {"limit": -1, "reservation": 5}}), vec![("memory.max", "max"), ("memory.low", "5")]),
            (json!({"memory": {"limit": 10, "swap": 15}}), vec![("memory.max", "10")]),
            (json!({"memory": {"swap": -1}}), vec![]),
            (json!({"cpu": {"shares": 1024}}), vec![("cpu.weight", "39")]),
            (json!({"cpu": {"shares": 1024, "idle": 1}}), vec![("cpu.idle", "1")]),
            (json!({"cpu": {"quota": 50000}}), vec![("cpu.max", "50000")]),
            (json!({"cpu": {"quota": -1, "period": 20000}}), vec![("cpu.max", "max 20000")]),
            (
                json!({"cpu": {"quota": 5000, "burst": 1000}}),
                vec![("cpu.max.burst", "0"), ("cpu.max", "5000"), ("cpu.max.burst", "1000")],
            ),
            (json!({"pids": {"limit": 10}}), vec![("pids.max", "10")]),
            (json!({"blockIO": {"weight": 10}}), vec![("io.weight", "1")]),
            (json!({"blockIO": {"weight": 1000}}), vec![("io.weight", "10000")]),
            (
                json!({"hugepageLimits": [{"pageSize": "2MB", "limit": 0}, {"pageSize": "1GB", "limit": -1}]}),
                vec![("hugetlb.2MB.max", "0"), ("hugetlb.1GB.max", "max")],
            ),
            (json!({"pids": {"limit": -1}}), vec![("pids.max", "max")]),
            (json!({"pids": {"limit": 0}, "devices": [{"allow": false, "access": "rwm"}]}), vec![]),
            (
                json!({"unified": {"memory.high": "9", "cpu.weight": "5"}}),
                vec![("cpu.weight", "5"), ("memory.high", "9")],
            ),
        ];
        for (resources, expected) in cases {
            let expected: Vec<_> = expected.iter().map(|(a, b)| ((*a).to_owned(), (*b).to_owned())).collect();
            assert_eq!(translated(resources).unwrap(), expected);
        }
    }

    #[test]
    fn limits_are_compared_with_the_use_where_that_is_asked_for() {
        let above = |memory: Value| above_use(&serde_json::from_value(json!({ "memory": memory })).unwrap());

        assert!(above(json!({"limit": 5, "checkBeforeUpdate": false})).is_empty());
        assert!(above(json!({"limit": -1, "swap": 0, "checkBeforeUpdate": true})).is_empty());
        let both = above(json!({"limit": 5, "swap": 7, "checkBeforeUpdate": true}));
        assert_eq!(both, [("memory+swap", 7), ("memory", 5)]);
    }

    #[test]
    fn a_period_alone_leaves_the_quota() {
        let resources = serde_json::from_value(json!({"cpu": {"period": 20000}})).unwrap();

        let settings = translate(&resources).unwrap();

        let told: Vec<_> = settings.iter().map(|one| (&*one.file, &*one.value, one.keep_first_word)).collect();
        assert_eq!(told, [("cpu.max", "20000", true)]);
    }

    #[test]
    fn shares_span_the_whole_of_weight() {
        assert_eq!((weight(2), weight(262_144), weight(1), weight(u64::MAX)), (1, 10_000, 1, 10_000));
    }

    #[test]
    fn what_cannot_be_honoured_is_refused_by_name() {
        let cases = [
            (json!({"memory": {"kernel": 1}}), "memory.kernel"),
            (json!({"memory": {"kernelTCP": 1}}), "memory.kernelTCP"),
            (json!({"memory": {"swappiness": 60}}), "memory.swappiness"),
            (json!({"memory": {"disableOOMKiller": true}}), "memory.disableOOMKiller"),
            (json!({"memory": {"swap": 5}}), "memory.swap"),
            (json!({"memory": {"limit": 6, "swap": 5}}), "memory.swap"),
            (json!({"cpu": {"realtimeRuntime": 1}}), "cpu.realtimeRuntime"),
            (json!({"cpu": {"realtimePeriod": 1}}), "cpu.realtimePeriod"),
            (json!({"cpu": {"idle": 2}}), "cpu.idle"),
            (json!({"blockIO": {"weight": 9}}), "blockIO.weight"),
            (json!({"hugepageLimits": [{"pageSize": "64KB", "limit": 1}]}), "hugepageLimits[0].pageSize"),
            (json!({"network": {"classID": 1}}), "network"),
            (json!({"rdma": {"mlx5_1": {"hcaHandles": 1}}}), "rdma"),
            (json!({"unified": {"cgroup.procs": "1"}}), "unified[\"cgroup.procs\"]"),
            (json!({"unified": {"memory.max/../x": "1"}}), "unified[\"memory.max/../x\"]"),
        ];
        for (resources, field) in cases {
            let error = translated(resources).unwrap_err();
            assert!(error.starts_with(&format!("linux.resources.{field}: ")), "{error}");
        }
        assert!(
            translated(json!({"blockIO": {"weight": 0, "throttleReadBpsDevice": []}, "cpu": {"mems": ""}})).is_ok()
        );
        assert!(translated(json!({"blockIO": {}, "network": {}, "rdma": {}, "memory": {"kernel": -1}})).is_ok());
    }
}
