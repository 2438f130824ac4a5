// SPDX-License-Identifier: Apache-2.0
//! What a sandbox may use of the host, and how each version of cgroups spells it.

use super::block_io::BlockIo;

/// Limits; what is `None` stays as it is.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Limits {
    /// Negative for none.
    pub(crate) memory_bytes: Option<i64>,
    /// What of it may be swapped out; negative for all.
    pub(crate) memory_swap_bytes: Option<i64>,
    /// What is not reclaimed as long as there is other memory; negative for all.
    pub(crate) memory_low_bytes: Option<i64>,
    /// 2 to 262144.
    pub(crate) cpu_shares: Option<u64>,
    /// The same on version 2's scale.
    pub(crate) cpu_weight: Option<u64>,
    /// Microseconds of a period; negative for no limit.
    pub(crate) cpu_quota_us: Option<i64>,
    pub(crate) cpu_period_us: Option<u64>,
    /// What may be used beyond the quota, of what was left of it before; version 2 only, as is the next.
    pub(crate) cpu_burst_us: Option<u64>,
    /// Whether others go first.
    pub(crate) cpu_idle: Option<bool>,
    /// Lists of CPUs and NUMA nodes.
    pub(crate) cpus: Option<String>,
    pub(crate) mems: Option<String>,
    pub(crate) block_io: BlockIo,
}

impl Limits {
    pub(crate) fn is_empty(&self) -> bool {
        *self == Self::default()
    }

    /// Whether something is asked for that only a cgroup can do.
    pub(crate) fn needs_host(&self) -> bool {
        self.mems.is_some() || self.block_io.needs_host()
    }

    /// File and value, for version 2, but for block devices. A period without a quota is written behind the `old_quota`; the
    /// other way round the kernel keeps the period.
    pub(crate) fn version_2(&self, old_quota: &str) -> Vec<(&'static str, String)> {
        let amount = |limit: i64| if limit < 0 { "max".to_owned() } else { limit.to_string() };
        let quota = match (self.cpu_quota_us.map(amount), self.cpu_period_us) {
            (quota, None) => quota,
            (None, Some(period)) => Some(format!("{old_quota} {period}")),
            (Some(quota), Some(period)) => Some(format!("{quota} {period}")),
        };
        let idle = |wanted: bool| self.cpu_idle.filter(|idle| *idle == wanted).map(|idle| u8::from(idle).to_string());
        // What is idle has no weight, and takes none.
        let weight = self.cpu_weight.filter(|_| self.cpu_idle != Some(true));
        let settings = [
            ("memory.max", self.memory_bytes.map(amount)),
            ("memory.swap.max", self.memory_swap_bytes.map(amount)),
            ("memory.low", self.memory_low_bytes.map(amount)),
            ("cpu.idle", idle(false)),
            ("cpu.weight", weight.map(|weight| weight.to_string())),
            ("cpu.idle", idle(true)),
            // No burst may be above the quota: an old one must not be in the way of a new quota.
            ("cpu.max.burst", self.cpu_burst_us.map(|_| "0".to_owned())),
            ("cpu.max", quota),
            ("cpu.max.burst", self.cpu_burst_us.map(|burst| burst.to_string())),
            ("cpuset.cpus", self.cpus.clone()),
            ("cpuset.mems", self.mems.clone()),
        ];
        settings.into_iter().filter_map(|(file, value)| Some((file, value?))).collect()
    }

    /// The same for version 1. CPUs and nodes are left out there: each cgroup of that controller has to be given both
    /// before it can have a process. The VMM's CPU affinity holds all the same.
    pub(crate) fn version_1(&self) -> Vec<(&'static str, String)> {
        // Version 1 counts both together.
        let both = |(memory, swap): (i64, i64)| if memory < 0 || swap < 0 { -1 } else { memory.saturating_add(swap) };
        let memory_and_swap = self.memory_bytes.zip(self.memory_swap_bytes).map(both);
        let settings = [
            ("memory.limit_in_bytes", self.memory_bytes.map(|limit| limit.max(-1).to_string())),
            ("memory.memsw.limit_in_bytes", memory_and_swap.map(|limit| limit.to_string())),
            ("memory.soft_limit_in_bytes", self.memory_low_bytes.map(|limit| limit.max(-1).to_string())),
            ("cpu.shares", self.cpu_shares.map(|shares| shares.to_string())),
            // The period first: a quota is checked against it.
            ("cpu.cfs_period_us", self.cpu_period_us.map(|period| period.to_string())),
            ("cpu.cfs_quota_us", self.cpu_quota_us.map(|quota| quota.max(-1).to_string())),
        ];
        settings.into_iter().filter_map(|(file, value)| Some((file, value?))).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_version_has_its_spelling() {
        let limits = Limits {
            memory_bytes: Some(-5),
            memory_swap_bytes: Some(8192),
            memory_low_bytes: Some(4096),
            cpu_shares: Some(1024),
            cpu_weight: Some(39),
            cpu_quota_us: Some(5000),
            cpu_period_us: Some(10000),
            cpu_burst_us: Some(2000),
            cpu_idle: Some(false),
            cpus: Some("0-1".to_owned()),
            mems: None,
            block_io: BlockIo::default(),
        };

        let text = |settings: Vec<(&str, String)>| {
            settings.iter().map(|(file, value)| format!("{file}={value}")).collect::<Vec<_>>().join(" ")
        };
        assert_eq!(
            text(limits.version_2("max")),
            "memory.max=max memory.swap.max=8192 memory.low=4096 cpu.idle=0 cpu.weight=39 cpu.max.burst=0 cpu.max=5000 10000 cpu.max.burst=2000 cpuset.cpus=0-1"
        );
        let idle = Limits { cpu_idle: Some(true), cpu_weight: Some(39), ..Limits::default() };
        assert_eq!(text(idle.version_2("max")), "cpu.idle=1");
        assert_eq!(
            text(limits.version_1()),
            "memory.limit_in_bytes=-1 memory.memsw.limit_in_bytes=-1 memory.soft_limit_in_bytes=4096 cpu.shares=1024 cpu.cfs_period_us=10000 cpu.cfs_quota_us=5000"
        );
        assert!(Limits::default().is_empty() && !limits.is_empty());
    }

    #[test]
    fn a_quota_leaves_the_period_and_a_period_the_quota() {
        let quota = Limits { cpu_quota_us: Some(5000), ..Limits::default() };
        let period = Limits { cpu_period_us: Some(5000), ..Limits::default() };

        assert_eq!(quota.version_2("7000"), [("cpu.max", "5000".to_owned())]);
        assert_eq!(period.version_2("7000"), [("cpu.max", "7000 5000".to_owned())]);
    }
}
