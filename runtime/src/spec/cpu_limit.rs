// SPDX-License-Identifier: Apache-2.0
//! What a container may use of processors: how many of them a machine is to have.

use oci_spec::runtime::LinuxCpu;

use super::error::FieldError;
use super::machine::parse_cpu_list;
use super::resources::DEFAULT_CPU_PERIOD_US;

/// In what limits are added up: a part of a processor that is no whole number of them is left out.
const MILLIONTHS: u64 = 1_000_000;

/// A container's limit. What is `None` is not said.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct CpuLimit {
    /// Microseconds of a period; negative for no limit.
    quota_us: Option<i64>,
    period_us: Option<u64>,
    /// To how many CPUs of the host the container is restricted.
    cpu_count: Option<usize>,
}

impl CpuLimit {
    /// What `linux.resources.cpu` says.
    pub(super) fn translate(cpu: Option<&LinuxCpu>) -> Result<Self, FieldError> {
        let count = cpu_list(cpu)?.len();
        Ok(Self {
            quota_us: cpu.and_then(LinuxCpu::quota).filter(|quota| *quota != 0),
            period_us: cpu.and_then(LinuxCpu::period).filter(|period| *period != 0),
            cpu_count: Some(count).filter(|count| *count > 0),
        })
    }

    /// That of a container whose CPUs of the host are the pod's.
    pub(super) fn of_quota(self) -> Self {
        Self { cpu_count: None, ..self }
    }

    /// The limit after a change: what that does not say, stays.
    pub(crate) fn changed_to(self, new: Self) -> Self {
        Self {
            quota_us: new.quota_us.or(self.quota_us),
            period_us: new.period_us.or(self.period_us),
            cpu_count: new.cpu_count.or(self.cpu_count),
        }
    }

    /// Whether nothing is said.
    pub(crate) fn is_empty(self) -> bool {
        self == Self::default()
    }

    /// `None` where there is no limit.
    fn millionths(self) -> Option<u64> {
        match self.quota_us.and_then(|quota| u128::try_from(quota).ok()) {
            Some(quota) => {
                let period = u128::from(self.period_us.unwrap_or(DEFAULT_CPU_PERIOD_US));
                Some(u64::try_from(quota * u128::from(MILLIONTHS) / period).unwrap_or(u64::MAX))
            }
            None => self.cpu_count.map(|count| (count as u64).saturating_mul(MILLIONTHS)),
        }
    }

    /// How many processors containers with these limits can use together; `None` if none of them has one.
    pub(crate) fn processors(limits: impl IntoIterator<Item = Self>) -> Option<u64> {
        let sum = limits.into_iter().filter_map(Self::millionths).reduce(u64::saturating_add)?;
        Some(sum.div_ceil(MILLIONTHS).max(1))
    }
}

/// The CPUs of the host that `linux.resources.cpu` names; none for all.
pub(super) fn cpu_list(cpu: Option<&LinuxCpu>) -> Result<Vec<usize>, FieldError> {
    let list = cpu.and_then(|cpu| cpu.cpus().as_deref()).filter(|list| !list.trim().is_empty());
    let Some(list) = list else { return Ok(Vec::new()) };
    parse_cpu_list(list)
        .ok_or_else(|| FieldError::invalid("linux.resources.cpu.cpus", list, "a list of CPUs such as 0-3,7"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};

    fn limit(cpu: Value) -> CpuLimit {
        CpuLimit::translate(Some(&serde_json::from_value(cpu).unwrap())).unwrap()
    }

    fn processors<const N: usize>(limits: [Value; N]) -> Option<u64> {
        CpuLimit::processors(limits.map(limit))
    }

    #[test]
    fn a_quota_counts_before_the_hosts_cpus() {
        assert_eq!(processors([json!({})]), None);
        assert_eq!(processors([json!({ "quota": -1 })]), None);
        assert_eq!(processors([json!({ "quota": 0, "period": 1000 })]), None);
        assert_eq!(processors([json!({ "quota": 1 })]), Some(1));
        assert_eq!(processors([json!({ "quota": 100_001 })]), Some(2));
        assert_eq!(processors([json!({ "quota": 30_000, "period": 10_000 })]), Some(3));
        assert_eq!(processors([json!({ "quota": -1, "cpus": "0-2,7" })]), Some(4));
        assert_eq!(processors([json!({ "quota": 200_000, "cpus": "0-2,7" })]), Some(2));
    }

    #[test]
    fn limits_are_added_before_they_are_rounded() {
        assert_eq!(processors([json!({ "quota": 50_000 }), json!({}), json!({ "quota": 50_000 })]), Some(1));
        assert_eq!(processors([json!({ "quota": 50_000 }), json!({ "quota": 60_000 })]), Some(2));
        // Three thirds are one.
        assert_eq!(processors([(); 3].map(|()| json!({ "quota": 1000, "period": 3000 }))), Some(1));
        let most = json!({ "quota": i64::MAX, "period": 1 });
        assert!(processors([most.clone(), most]).is_some_and(|count| count > 1 << 40));
    }

    #[test]
    fn a_change_leaves_what_it_does_not_say() {
        let before = limit(json!({ "quota": 100_000, "period": 50_000, "cpus": "0" }));
        let after = |change| CpuLimit::processors([before.changed_to(limit(change))]);

        assert_eq!(after(json!({ "shares": 7 })), Some(2));
        assert_eq!(after(json!({ "quota": 150_000 })), Some(3));
        assert_eq!(after(json!({ "period": 25_000 })), Some(4));
        assert_eq!(after(json!({ "quota": -1 })), Some(1));
        assert_eq!(after(json!({ "quota": -1, "cpus": "0-5" })), Some(6));
        assert_eq!(CpuLimit::processors([before.changed_to(limit(json!({ "quota": -1 }))).of_quota()]), None);
    }

    #[test]
    fn a_list_that_is_none_is_named() {
        let cpu = serde_json::from_value(json!({ "cpus": "3-1" })).unwrap();

        let error = CpuLimit::translate(Some(&cpu)).unwrap_err().to_string();

        assert!(error.starts_with("linux.resources.cpu.cpus: \"3-1\" is not a list of CPUs"), "{error}");
    }
}
