// SPDX-License-Identifier: Apache-2.0
//! On which of the host's CPUs a pod's machine runs.
//!
//! The kubelet's static CPU manager gives each container CPUs of the host: some to itself, the others what is left for all. In
//! the guest those numbers mean nothing. The machine is kept to what its containers have together, so that it does not run
//! where other pods are to be alone. As long as one of them may run anywhere, it may.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use crate::cgroup::{HostCgroup, HostCgroupError, Limits};
use crate::logging;
use crate::spec::parse_cpu_list;
use crate::text;

/// The CPUs of a pod's machine.
#[derive(Debug)]
pub(super) struct PodCpus {
    cgroup: Weak<HostCgroup>,
    /// Those of the sandbox's configuration.
    own: Option<String>,
    of_containers: Mutex<Containers>,
}

/// The containers that there are, and which CPUs they have; [`None`] for all.
#[derive(Debug, Default)]
struct Containers {
    last: u64,
    /// Whether the machine has been kept to some.
    is_kept: bool,
    cpus: BTreeMap<u64, Option<String>>,
}

impl PodCpus {
    pub(super) fn new(cgroup: Weak<HostCgroup>, own: Option<String>) -> Arc<Self> {
        Arc::new(Self { cgroup, own, of_containers: Mutex::default() })
    }

    fn of_containers(&self) -> MutexGuard<'_, Containers> {
        // Nothing panics while the lock is held.
        self.of_containers.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A container has come that is to have these, until what is returned is dropped.
    pub(super) fn claim(self: &Arc<Self>, cpus: Option<String>) -> CpusClaim {
        let mut containers = self.of_containers();
        containers.last += 1;
        let number = containers.last;
        containers.cpus.insert(number, cpus);
        self.write_or_warn(&mut containers);
        CpusClaim { pod: Arc::clone(self), number }
    }

    fn write_or_warn(&self, containers: &mut Containers) {
        if let Err(error) = self.write(containers) {
            logging::warn(format_args!("linux.resources.cpu.cpus: the pod's machine: {}", text::chain(&error)));
        }
    }

    fn write(&self, containers: &mut Containers) -> Result<(), HostCgroupError> {
        let Some(cgroup) = self.cgroup.upgrade().filter(|cgroup| cgroup.has_cpus()) else { return Ok(()) };
        let together = together(containers.cpus.values().map(Option::as_deref));
        // What has been set is not unset as long as there are processes.
        let all = || containers.is_kept.then(|| cgroup.cpus_of_parent()).flatten();
        let Some(cpus) = together.or_else(|| self.own.clone()).or_else(all) else { return Ok(()) };
        cgroup.update(&Limits { cpus: Some(cpus), ..Limits::default() })?;
        containers.is_kept = true;
        Ok(())
    }
}

/// What all of them have; `None` if there are none, or one has all.
fn together<'a>(lists: impl Iterator<Item = Option<&'a str>>) -> Option<String> {
    let mut cpus = BTreeSet::new();
    for list in lists {
        cpus.extend(parse_cpu_list(list?)?);
    }
    let names = cpus.iter().map(ToString::to_string).collect::<Vec<_>>();
    Some(names.join(",")).filter(|names| !names.is_empty())
}

/// A container's share of it.
#[derive(Debug)]
pub(super) struct CpusClaim {
    pod: Arc<PodCpus>,
    number: u64,
}

impl CpusClaim {
    /// Whether the machine can be kept to some.
    pub(super) fn can_be_changed(&self) -> bool {
        self.pod.cgroup.upgrade().is_some_and(|cgroup| cgroup.has_cpus())
    }

    /// The container gets others; what it had.
    pub(super) fn change(&self, cpus: Option<String>) -> Result<Option<String>, HostCgroupError> {
        let mut containers = self.pod.of_containers();
        let before = containers.cpus.insert(self.number, cpus).flatten();
        if let Err(error) = self.pod.write(&mut containers) {
            containers.cpus.insert(self.number, before);
            return Err(error);
        }
        Ok(before)
    }
}

impl CpusClaim {
    /// The container has ended.
    pub(super) fn release(&self) {
        let mut containers = self.pod.of_containers();
        if containers.cpus.remove(&self.number).is_some() {
            self.pod.write_or_warn(&mut containers);
        }
    }
}

impl Drop for CpusClaim {
    fn drop(&mut self) {
        self.release();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_machine_has_what_its_containers_have_together() {
        let all = |lists: &[Option<&str>]| together(lists.iter().copied());

        assert_eq!(all(&[Some("2-3"), Some("0,3")]).as_deref(), Some("0,2,3"));
        assert_eq!(all(&[Some("2-3"), None]), None);
        assert_eq!(all(&[]), None);
    }

    #[test]
    fn without_a_cgroup_nothing_is_done() {
        let pod = PodCpus::new(Weak::new(), None);
        let claim = pod.claim(Some("1".to_owned()));

        assert!(!claim.can_be_changed());
        assert_eq!(claim.change(None).unwrap().as_deref(), Some("1"));
        drop(claim);
        assert!(pod.of_containers().cpus.is_empty());
    }
}
