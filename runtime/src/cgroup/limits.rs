// SPDX-License-Identifier: Apache-2.0
//! What a sandbox may use of the host, and how each version of cgroups spells it.

use std::fs;
use std::path::Path;

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
    /// What may be used beyond the quota, of what was left of it before.
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

    /// The same for version 1, where the cgroup has had the limits `before`.
    pub(crate) fn version_1(&self, before: MemoryLimits) -> Vec<(&'static str, String)> {
        let idle = |wanted: bool| self.cpu_idle.filter(|idle| *idle == wanted).map(|idle| u8::from(idle).to_string());
        let shares = self.cpu_shares.filter(|_| self.cpu_idle != Some(true));
        let others = [
            ("memory.soft_limit_in_bytes", self.memory_low_bytes.map(|limit| limit.max(-1).to_string())),
            ("cpu.idle", idle(false)),
            ("cpu.shares", shares.map(|shares| shares.to_string())),
            ("cpu.idle", idle(true)),
            ("cpu.cfs_burst_us", self.cpu_burst_us.map(|_| "0".to_owned())),
            // The period first: a quota is checked against it.
            ("cpu.cfs_period_us", self.cpu_period_us.map(|period| period.to_string())),
            ("cpu.cfs_quota_us", self.cpu_quota_us.map(|quota| quota.max(-1).to_string())),
            ("cpu.cfs_burst_us", self.cpu_burst_us.map(|burst| burst.to_string())),
            ("cpuset.cpus", self.cpus.clone()),
            ("cpuset.mems", self.mems.clone()),
        ];
        let mut settings = self.memory_version_1(before);
        settings.extend(others.into_iter().filter_map(|(file, value)| Some((file, value?))));
        settings
    }

    /// Version 1 limits memory, and memory and swap together, which may at no moment be less: what grows goes first. A limit
    /// of memory alone leaves what may be swapped out.
    fn memory_version_1(&self, before: MemoryLimits) -> Vec<(&'static str, String)> {
        let memory = self.memory_bytes.map_or(before.memory, limited);
        let swap = self.memory_swap_bytes.map_or(before.swap(), limited);
        let both = memory.zip(swap).map(|(memory, swap)| memory.saturating_add(swap));
        let text = |limit: Option<i64>| limit.unwrap_or(-1).to_string();
        let mut settings = Vec::new();
        if self.memory_bytes.is_some() {
            settings.push(("memory.limit_in_bytes", text(memory)));
        }
        if both != before.both {
            settings.push(("memory.memsw.limit_in_bytes", text(both)));
        }
        if before.both.is_some_and(|before| both.is_none_or(|both| both > before)) {
            settings.reverse();
        }
        settings
    }
}

/// The limits that a cgroup of version 1 has; `None` for no limit.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct MemoryLimits {
    memory: Option<i64>,
    /// Of memory and swap together.
    both: Option<i64>,
}

impl MemoryLimits {
    /// Reads them; a cgroup of another controller has none, and a kernel that does not account for swap no second one.
    pub(super) fn of(cgroup: &Path) -> Self {
        let read = |file: &str| {
            let limit = fs::read_to_string(cgroup.join(file)).ok()?.trim().parse().ok()?;
            // What the kernel shows for none: the greatest number of pages.
            limited(limit).filter(|limit| *limit < i64::MAX & !0xfff)
        };
        Self { memory: read("memory.limit_in_bytes"), both: read("memory.memsw.limit_in_bytes") }
    }

    fn swap(self) -> Option<i64> {
        Some((self.both? - self.memory?).max(0))
    }
}

/// A limit of a configuration, where one that is negative is none.
fn limited(limit: i64) -> Option<i64> {
    (limit >= 0).then_some(limit)
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
            text(limits.version_1(MemoryLimits::default())),
            "memory.limit_in_bytes=-1 memory.soft_limit_in_bytes=4096 cpu.idle=0 cpu.shares=1024 cpu.cfs_burst_us=0 cpu.cfs_period_us=10000 cpu.cfs_quota_us=5000 cpu.cfs_burst_us=2000 cpuset.cpus=0-1"
        );
        assert_eq!(text(idle.version_1(MemoryLimits::default())), "cpu.idle=1");
        assert!(Limits::default().is_empty() && !limits.is_empty());
    }

    #[test]
    fn memory_and_swap_of_version_1_are_never_less_than_memory() {
        let limits = |memory, swap| Limits { memory_bytes: memory, memory_swap_bytes: swap, ..Limits::default() };
        let had = MemoryLimits { memory: Some(100), both: Some(130) };
        let (memory, both) = ("memory.limit_in_bytes", "memory.memsw.limit_in_bytes");

        for (new, before, expected) in [
            (limits(Some(100), Some(30)), MemoryLimits::default(), vec![(memory, "100"), (both, "130")]),
            (limits(Some(100), None), MemoryLimits::default(), vec![(memory, "100")]),
            (limits(Some(200), None), had, vec![(both, "230"), (memory, "200")]),
            (limits(Some(50), None), had, vec![(memory, "50"), (both, "80")]),
            (limits(Some(50), Some(80)), had, vec![(memory, "50")]),
            (limits(Some(-1), None), had, vec![(both, "-1"), (memory, "-1")]),
            (limits(Some(100), Some(-1)), had, vec![(both, "-1"), (memory, "100")]),
            (limits(None, None), had, vec![]),
        ] {
            let expected: Vec<_> = expected.into_iter().map(|(file, value)| (file, value.to_owned())).collect();
            assert_eq!(new.version_1(before), expected, "{new:?} after {before:?}");
        }
    }

    #[test]
    fn limits_of_version_1_are_read_and_its_greatest_number_is_none() {
        let folder = tempfile::tempdir().unwrap();
        fs::write(folder.path().join("memory.limit_in_bytes"), "4096\n").unwrap();
        fs::write(folder.path().join("memory.memsw.limit_in_bytes"), "9223372036854771712\n").unwrap();

        assert_eq!(MemoryLimits::of(folder.path()), MemoryLimits { memory: Some(4096), both: None });
        assert_eq!(MemoryLimits::of(Path::new("/no/such")), MemoryLimits::default());
    }

    #[test]
    fn a_quota_leaves_the_period_and_a_period_the_quota() {
        let quota = Limits { cpu_quota_us: Some(5000), ..Limits::default() };
        let period = Limits { cpu_period_us: Some(5000), ..Limits::default() };

        assert_eq!(quota.version_2("7000"), [("cpu.max", "5000".to_owned())]);
        assert_eq!(period.version_2("7000"), [("cpu.max", "7000 5000".to_owned())]);
    }
}
