// SPDX-License-Identifier: Apache-2.0
//! Containers that run for as long as is measured, for the cases that add a process to one.

use crate::bundle::{Bundle, IDLE_READY};
use crate::cases::{Invocation, Kind, Programs, Runtime};
use crate::error::BenchError;
use crate::start::Running;

/// A container that sleeps, run in the foreground. Dropped, it is deleted.
#[derive(Debug)]
pub(crate) struct Target {
    /// The foreground run.
    running: Running,
    delete: Invocation,
}

/// The name of a runtime's container.
pub(crate) fn id(runtime: Runtime) -> &'static str {
    match runtime {
        Runtime::Bulkhead => "bench-exec-bulkhead",
        Runtime::Runc => "bench-exec-runc",
        Runtime::Crun => "bench-exec-crun",
    }
}

impl Target {
    /// Starts the container that a case needs, if it needs one, and waits until it sleeps.
    ///
    /// # Errors
    ///
    /// It did not start.
    pub(crate) fn start(programs: &Programs, kind: Kind) -> Result<Option<Self>, BenchError> {
        let Kind::Exec(runtime) = kind else { return Ok(None) };
        let run = programs.verb(runtime, &["run", id(runtime)], Bundle::Idle.folder());
        let mut running = Running::start("exec", &run)?;
        running.wait_output(&format!("\n{IDLE_READY}\n"))?;
        let delete = programs.verb(runtime, &["delete", "--force", id(runtime)], Bundle::Idle.folder());
        Ok(Some(Self { running, delete }))
    }
}

impl Drop for Target {
    fn drop(&mut self) {
        // Whatever comes of it, the stage goes with the machine.
        if let Ok(mut deleting) = Running::start("exec", &self.delete) {
            let _ = deleting.wait_exit();
        }
        self.running.kill();
    }
}
