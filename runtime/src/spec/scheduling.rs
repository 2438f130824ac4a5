// SPDX-License-Identifier: Apache-2.0
//! How the guest's kernel is to treat the process: `process.scheduler`, `ioPriority`, `execCPUAffinity`, and
//! `linux.personality`.

use bulkhead_protocol::agent::Scheduler as WireScheduler;
use oci_spec::runtime::{
    ExecCPUAffinity, IOPriorityClass, LinuxIOPriority, LinuxPersonality, LinuxPersonalityDomain, LinuxSchedulerFlag,
    LinuxSchedulerPolicy, Scheduler,
};

use super::error::FieldError;
use super::machine::parse_cpu_list;

/// `struct sched_attr` for sched_setattr(2).
pub(crate) fn scheduler(scheduler: &Scheduler) -> Result<WireScheduler, FieldError> {
    let field = |name: &str| format!("process.scheduler.{name}");
    let policy = scheduler.policy();
    let number = match policy {
        LinuxSchedulerPolicy::SchedOther => libc::SCHED_OTHER,
        LinuxSchedulerPolicy::SchedFifo => libc::SCHED_FIFO,
        LinuxSchedulerPolicy::SchedRr => libc::SCHED_RR,
        LinuxSchedulerPolicy::SchedBatch => libc::SCHED_BATCH,
        LinuxSchedulerPolicy::SchedIdle => libc::SCHED_IDLE,
        LinuxSchedulerPolicy::SchedDeadline => libc::SCHED_DEADLINE,
        LinuxSchedulerPolicy::SchedIso => {
            return Err(FieldError::unsupported(field("policy"), "SCHED_ISO, which Linux does not have"));
        }
    };
    let realtime = matches!(policy, LinuxSchedulerPolicy::SchedFifo | LinuxSchedulerPolicy::SchedRr);
    let deadline = *policy == LinuxSchedulerPolicy::SchedDeadline;
    let nice = scheduler.nice().unwrap_or(0);
    if !(-20..=19).contains(&nice) {
        return Err(FieldError::invalid(field("nice"), nice, "from -20 to 19"));
    }
    let priority = scheduler.priority().unwrap_or(0);
    let range = if realtime { 1..=99 } else { 0..=0 };
    if !range.contains(&priority) {
        let expected = if realtime { "from 1 to 99" } else { "possible: only SCHED_FIFO and SCHED_RR have one" };
        return Err(FieldError::invalid(field("priority"), priority, expected));
    }
    let times = [("runtime", scheduler.runtime()), ("deadline", scheduler.deadline()), ("period", scheduler.period())];
    for (name, time) in times {
        if let Some(time) = time.filter(|time| *time != 0 && !deadline) {
            return Err(FieldError::invalid(field(name), time, "possible: only SCHED_DEADLINE has one"));
        }
    }
    let mut flags = 0;
    for (index, flag) in scheduler.flags().iter().flatten().enumerate() {
        let what = "utilization clamps: the specification has no values for them";
        flags |= flag_bit(*flag).ok_or_else(|| FieldError::unsupported(field(&format!("flags[{index}]")), what))?;
    }
    Ok(WireScheduler {
        policy: number.cast_unsigned(),
        nice,
        priority: priority.cast_unsigned(),
        flags,
        runtime_ns: scheduler.runtime().unwrap_or(0),
        deadline_ns: scheduler.deadline().unwrap_or(0),
        period_ns: scheduler.period().unwrap_or(0),
        ..WireScheduler::default()
    })
}

/// `SCHED_FLAG_*` of <linux/sched.h>, but for those that say something of a value.
fn flag_bit(flag: LinuxSchedulerFlag) -> Option<u64> {
    Some(match flag {
        LinuxSchedulerFlag::SchedResetOnFork => 0x01,
        LinuxSchedulerFlag::SchedFlagReclaim => 0x02,
        LinuxSchedulerFlag::SchedFlagDLOverrun => 0x04,
        LinuxSchedulerFlag::SchedFlagKeepPolicy => 0x08,
        LinuxSchedulerFlag::SchedFlagKeepParams => 0x10,
        LinuxSchedulerFlag::SchedFlagUtilClampMin | LinuxSchedulerFlag::SchedFlagUtilClampMax => return None,
    })
}

/// The `ioprio` of ioprio_set(2).
pub(crate) fn io_priority(priority: &LinuxIOPriority) -> Result<u32, FieldError> {
    let class = match priority.class() {
        IOPriorityClass::IoprioClassRt => 1,
        IOPriorityClass::IoprioClassBe => 2,
        IOPriorityClass::IoprioClassIdle => 3,
    };
    let level = u32::try_from(priority.priority()).ok().filter(|level| *level <= 7);
    let level =
        level.ok_or_else(|| FieldError::invalid("process.ioPriority.priority", priority.priority(), "from 0 to 7"))?;
    Ok(class << 13 | level)
}

/// The CPU lists before and after joining the container's cgroup.
pub(crate) fn exec_cpus(affinity: &ExecCPUAffinity) -> Result<(String, String), FieldError> {
    let list = |name: &str, list: &Option<String>| {
        let list = list.as_deref().map(str::trim).unwrap_or_default();
        if list.is_empty() || parse_cpu_list(list).is_some() {
            return Ok(list.to_owned());
        }
        let field = format!("process.execCPUAffinity.{name}");
        Err(FieldError::invalid(field, list, "a list of CPUs such as 0-3,7"))
    };
    Ok((list("initial", affinity.initial())?, list("final", affinity.cpu_affinity_final())?))
}

/// The argument of personality(2).
pub(crate) fn personality(personality: &LinuxPersonality) -> Result<u32, FieldError> {
    if let Some(flag) = personality.flags().iter().flatten().next() {
        return Err(FieldError::invalid("linux.personality.flags", flag, "known: the specification has none yet"));
    }
    Ok(match personality.domain() {
        LinuxPersonalityDomain::PerLinux => 0,
        LinuxPersonalityDomain::PerLinux32 => 8,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};

    fn translated(value: Value) -> Result<WireScheduler, String> {
        scheduler(&serde_json::from_value(value).unwrap()).map_err(|error| error.to_string())
    }

    #[test]
    fn each_policy_has_its_own_fields() {
        let fifo = json!({"policy": "SCHED_FIFO", "priority": 5, "flags": ["SCHED_FLAG_KEEP_PARAMS"]});
        let fifo = translated(fifo).unwrap();
        let batch = translated(json!({"policy": "SCHED_BATCH", "nice": 19})).unwrap();
        let deadline = json!({"policy": "SCHED_DEADLINE", "runtime": 1, "deadline": 2, "period": 3});
        let deadline = translated(deadline).unwrap();

        assert_eq!((fifo.policy, fifo.priority, fifo.flags), (1, 5, 0x10));
        assert_eq!((batch.policy, batch.nice), (3, 19));
        assert_eq!((deadline.policy, deadline.runtime_ns, deadline.deadline_ns, deadline.period_ns), (6, 1, 2, 3));
    }

    #[test]
    fn values_out_of_range_are_refused_by_name() {
        let cases = [
            (json!({"policy": "SCHED_OTHER", "nice": 20}), "process.scheduler.nice: \"20\" is not from -20 to 19"),
            (json!({"policy": "SCHED_OTHER", "priority": 1}), "process.scheduler.priority: \"1\" is not possible"),
            (json!({"policy": "SCHED_RR"}), "process.scheduler.priority: \"0\" is not from 1 to 99"),
            (json!({"policy": "SCHED_BATCH", "period": 1}), "process.scheduler.period: \"1\" is not possible"),
            (json!({"policy": "SCHED_ISO"}), "process.scheduler.policy: not supported"),
            (
                json!({"policy": "SCHED_OTHER", "flags": ["SCHED_FLAG_KEEP_PARAMS", "SCHED_FLAG_UTIL_CLAMP_MAX"]}),
                "process.scheduler.flags[1]: not supported: utilization clamps",
            ),
        ];
        for (value, expected) in cases {
            let error = translated(value).unwrap_err();
            assert!(error.starts_with(expected), "{error}");
        }
    }

    #[test]
    fn io_priorities_are_class_and_level() {
        let priority = |class: &str, level: i64| {
            io_priority(&serde_json::from_value(json!({"class": class, "priority": level})).unwrap())
        };

        assert_eq!(priority("IOPRIO_CLASS_RT", 0).unwrap(), 1 << 13);
        assert_eq!(priority("IOPRIO_CLASS_BE", 7).unwrap(), 2 << 13 | 7);
        assert_eq!(priority("IOPRIO_CLASS_IDLE", 0).unwrap(), 3 << 13);
        assert!(priority("IOPRIO_CLASS_BE", 8).is_err() && priority("IOPRIO_CLASS_BE", -1).is_err());
    }

    #[test]
    fn execution_domains_have_numbers() {
        let number = |value: Value| personality(&serde_json::from_value(value).unwrap());

        assert_eq!(number(json!({"domain": "LINUX32"})).unwrap(), 8);
        assert_eq!(number(json!({"domain": "LINUX", "flags": []})).unwrap(), 0);
        assert!(number(json!({"domain": "LINUX", "flags": ["x"]})).is_err());
    }
}
