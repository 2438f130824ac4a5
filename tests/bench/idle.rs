// SPDX-License-Identifier: Apache-2.0
//! What a container that does nothing costs the host.

use std::fs;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::Duration;

use crate::bundle::{Bundle, IDLE_READY};
use crate::cases::{Invocation, Kind, Programs};
use crate::error::{BenchError, file};
use crate::memory::{self, GroupMemory, ProcessMemory};
use crate::start::Running;

/// Where control groups are.
const CGROUPS: &str = "/sys/fs/cgroup";

/// The shell that moves itself into a control group before it becomes the measured program.
const SHELL: &str = "/bundles/idle/rootfs/bin/busybox";

/// How long things settle before they are looked at.
const SETTLE: Duration = Duration::from_secs(2);

/// What was seen of one idle container or machine.
#[derive(Clone, Debug)]
pub(crate) struct Idle {
    pub(crate) name: &'static str,
    /// Its processes on the host.
    pub(crate) processes: Vec<ProcessMemory>,
    /// Its control group; `None` where the memory controller is not there.
    pub(crate) group: Option<GroupMemory>,
    /// Inside the guest: MemTotal less MemAvailable, in KiB; `None` where the guest does not tell.
    pub(crate) guest_used_kib: Option<u64>,
}

/// A control group of ours, removed at the end.
#[derive(Debug)]
struct Group {
    folder: PathBuf,
}

impl Group {
    fn new(name: &str) -> Result<Self, BenchError> {
        let folder = Path::new(CGROUPS).join(format!("bulkhead-bench-{name}"));
        fs::create_dir_all(&folder).map_err(file("create the control group", &folder))?;
        Ok(Self { folder })
    }

    /// `invocation`, started inside this group.
    fn inside(&self, invocation: Invocation) -> Invocation {
        let procs = self.folder.join("cgroup.procs");
        let script = format!("echo $$ >{} && exec \"$@\"", procs.display());
        let program = invocation.program.display().to_string();
        let args = ["sh", "-c", &script, "sh", &program].map(str::to_owned);
        Invocation {
            program: SHELL.into(),
            args: args.into_iter().chain(invocation.args).collect(),
            folder: invocation.folder,
        }
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        // Its last process may still be on the way out.
        for _ in 0..100 {
            if fs::remove_dir(&self.folder).is_ok() {
                return;
            }
            thread::sleep(Duration::from_millis(20));
        }
    }
}

/// Runs an idle container with Bulkhead and looks at it.
///
/// # Errors
///
/// It did not start, or cannot be looked at.
pub(crate) fn bulkhead(programs: &Programs) -> Result<Idle, BenchError> {
    let invocation = programs.invocation(Kind::Bulkhead(Bundle::Idle), "bench-idle", &[]);
    observe("bulkhead", invocation, &format!("\n{IDLE_READY}\n"))
}

/// Boots the idle QEMU guest and looks at it.
///
/// # Errors
///
/// It did not start, or cannot be looked at.
pub(crate) fn qemu(programs: &Programs) -> Result<Idle, BenchError> {
    observe("qemu", programs.qemu(true), "bench: user space")
}

fn observe(name: &'static str, invocation: Invocation, ready: &str) -> Result<Idle, BenchError> {
    let group = Group::new(name)?;
    let mut running = Running::start(name, &group.inside(invocation))?;
    running.wait_output(ready)?;
    thread::sleep(SETTLE);

    let processes = memory::family(running.pid()).into_iter().map(memory::of_process).collect();
    let group_memory = memory::of_group(&group.folder).ok();
    let output = running.output();
    running.kill();

    let guest = |field| memory::field_kib(&output, field);
    let guest_used_kib = guest("MemTotal").zip(guest("MemAvailable")).map(|(total, free)| total.saturating_sub(free));
    let processes: Result<Vec<_>, _> = processes;
    Ok(Idle { name, processes: processes?, group: group_memory, guest_used_kib })
}

/// The agent's resident memory in the guest in KiB, as the guest's kernel tells it when its memory is used up.
///
/// # Errors
///
/// The container did not run, or the list of tasks is not among the kernel's messages.
pub(crate) fn agent_rss_kib(programs: &Programs) -> Result<u64, BenchError> {
    let mut running = Running::start("agent", &programs.invocation(Kind::Bulkhead(Bundle::Agent), "bench-agent", &[]))?;
    running.wait_exit()?;
    memory::unlisted_rss_kib(&running.output()).ok_or_else(|| BenchError::Case {
        case: "agent".to_owned(),
        why: "the guest's kernel did not list its tasks when its memory was used up".to_owned(),
    })
}
