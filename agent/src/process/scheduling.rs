// SPDX-License-Identifier: Apache-2.0
//! How the guest's kernel treats a process: CPU scheduling, I/O priority, execution domain.

use bulkhead_protocol::agent as wire;

use crate::container::{Failure, Stage};
use crate::sys::{self, SchedulingAttributes};

/// What is to be set; what is absent stays as the agent has it.
#[derive(Debug, Clone, Default)]
pub(crate) struct Scheduling {
    attributes: Option<SchedulingAttributes>,
    /// The `ioprio` of ioprio_set(2).
    io_priority: Option<u32>,
    /// The argument of personality(2).
    personality: Option<u32>,
}

impl Scheduling {
    pub(crate) fn from_wire(process: &wire::Process) -> Self {
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
        Self { attributes, io_priority: process.io_priority, personality: process.personality }
    }

    /// Sets it for the calling process. Most of it needs CAP_SYS_NICE.
    pub(crate) fn apply(&self) -> Result<(), Failure> {
        if let Some(attributes) = &self.attributes {
            sys::set_scheduling(attributes).map_err(|error| {
                let subject = format!("policy {} (sched_setattr)", attributes.policy);
                Failure::new(Stage::Scheduling, subject, error)
            })?;
        }
        if let Some(priority) = self.io_priority {
            sys::set_io_priority(priority)
                .map_err(|error| Failure::new(Stage::Scheduling, format!("I/O priority {priority:#x}"), error))?;
        }
        if let Some(personality) = self.personality {
            sys::set_personality(personality)
                .map_err(|error| Failure::new(Stage::Scheduling, format!("personality {personality:#x}"), error))?;
        }
        Ok(())
    }
}
