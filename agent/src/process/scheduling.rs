// SPDX-License-Identifier: Apache-2.0
//! How the guest's kernel treats a process: CPU scheduling, I/O priority, execution domain.

use bulkhead_protocol::agent as wire;

use rustix::thread::{CpuSet, sched_setaffinity};

use crate::container::{Failure, SpecError, Stage};
use crate::sys::{self, SchedulingAttributes};

/// What is to be set; what is absent stays as the agent has it.
#[derive(Debug, Clone, Default)]
pub(crate) struct Scheduling {
    attributes: Option<SchedulingAttributes>,
    /// The `ioprio` of ioprio_set(2).
    io_priority: Option<u32>,
    /// The argument of personality(2).
    personality: Option<u32>,
    /// The CPUs of an exec'd process before and after it is in the container's cgroup: the list, and what it means.
    initial_cpus: Option<(String, CpuSet)>,
    final_cpus: Option<(String, CpuSet)>,
}

impl Scheduling {
    pub(crate) fn from_wire(process: &wire::Process) -> Result<Self, SpecError> {
        let attributes = process.scheduler.as_ref().map(|wire| SchedulingAttributes {
            policy: wire.policy,
            flags: wire.flags,
            nice: wire.nice,
            priority: wire.priority,
            runtime: wire.runtime_ns,
            deadline: wire.deadline_ns,
            period: wire.period_ns,
            size: 0,
        });
        Ok(Self {
            attributes,
            io_priority: process.io_priority,
            personality: process.personality,
            initial_cpus: cpus(&process.initial_cpus)?,
            final_cpus: cpus(&process.final_cpus)?,
        })
    }

    /// Sets policy and priorities of a process, or, for 0, of the calling one. Most of it needs CAP_SYS_NICE in the
    /// guest's own user namespace.
    pub(crate) fn apply(&self, pid: i32) -> Result<(), Failure> {
        if let Some(attributes) = &self.attributes {
            sys::set_scheduling(pid, attributes).map_err(|error| {
                let subject = format!("policy {} (sched_setattr)", attributes.policy);
                Failure::new(Stage::Scheduling, subject, error)
            })?;
        }
        if let Some(priority) = self.io_priority {
            sys::set_io_priority(pid, priority)
                .map_err(|error| Failure::new(Stage::Scheduling, format!("I/O priority {priority:#x}"), error))?;
        }
        Ok(())
    }

    /// Has the calling process, which is about to make an exec'd one, run on the CPUs of that one's beginning.
    pub(crate) fn apply_initial_cpus(&self) -> Result<(), Failure> {
        apply_cpus(self.initial_cpus.as_ref())
    }

    /// Has the calling process, which is in its container's cgroup, run on its CPUs.
    pub(crate) fn apply_final_cpus(&self) -> Result<(), Failure> {
        apply_cpus(self.final_cpus.as_ref())
    }

    /// Sets the execution domain of the calling process.
    pub(crate) fn apply_personality(&self) -> Result<(), Failure> {
        if let Some(personality) = self.personality {
            sys::set_personality(personality)
                .map_err(|error| Failure::new(Stage::Scheduling, format!("personality {personality:#x}"), error))?;
        }
        Ok(())
    }
}

fn apply_cpus(cpus: Option<&(String, CpuSet)>) -> Result<(), Failure> {
    let Some((list, set)) = cpus else { return Ok(()) };
    let subject = || format!("CPUs {list} (of the guest's)");
    sched_setaffinity(None, set).map_err(|error| Failure::new(Stage::Scheduling, subject(), error))
}

/// A list such as `0-3,7`; `None` for an empty one.
fn cpus(list: &str) -> Result<Option<(String, CpuSet)>, SpecError> {
    if list.is_empty() {
        return Ok(None);
    }
    let wrong = || SpecError::Cpus(list.to_owned());
    let number =
        |text: &str| text.trim().parse::<usize>().ok().filter(|number| *number < CpuSet::MAX_CPU).ok_or_else(wrong);
    let mut set = CpuSet::new();
    for range in list.split(',') {
        let (first, last) = range.split_once('-').unwrap_or((range, range));
        (number(first)?..=number(last)?).for_each(|cpu| set.set(cpu));
    }
    Ok(Some((list.to_owned(), set)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lists_of_cpus_are_taken_apart() {
        let (_, set) = cpus("0-2, 7").unwrap().unwrap();
        assert_eq!((0..9).filter(|cpu| set.is_set(*cpu)).collect::<Vec<_>>(), [0, 1, 2, 7]);
        assert!(cpus("").unwrap().is_none());
        for list in ["x", "1-", "0,", "99999"] {
            assert!(matches!(cpus(list), Err(SpecError::Cpus(_))), "{list}");
        }
    }
}
