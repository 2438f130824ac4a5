// SPDX-License-Identifier: Apache-2.0
//! What can be done with a container while it runs: pausing it, seeing what it uses. Its limits are changed in `update.rs`.

use std::time::Duration;

use bulkhead_protocol::agent as wire;
use tokio::time::timeout;

use super::cgroup::{Cgroup, CgroupError, MEMORY_EVENTS};
use super::error::{ControlError, NoSuchContainer};
use super::instance::Instance;
use super::{Engine, files, listing, proc_files, stats};
use crate::process::apart;

/// How long a container may take to be frozen: a process that the kernel cannot stop, as it waits for a file system,
/// would keep the host waiting for ever.
const FREEZE_DEADLINE: Duration = Duration::from_secs(10);

/// Has the kernel forget files that nobody has open (`3`: their pages, and what it knows of them).
const DROP_CACHES: &str = "/proc/sys/vm/drop_caches";

/// The file that tells whether a cgroup is frozen.
const CGROUP_EVENTS: &str = "cgroup.events";

/// How often the OOM killer struck in a container.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct OomKills {
    /// So far.
    pub count: u64,
    /// The container's init has ended: there will be no more.
    pub ended: bool,
}

impl Engine {
    /// Freezes every process of a container. Returns when they are frozen, and the host has what they have written; if
    /// freezing takes too long, they go on.
    pub async fn pause(&self, id: &str) -> Result<(), ControlError> {
        let instance = self.find(id)?;
        refuse_stopped(&instance, "pause")?;
        let freezing = Freezing::begin(instance.needs_cgroup()?)?;
        match timeout(FREEZE_DEADLINE, freezing.end()).await {
            Ok(result) => result?,
            Err(_) => {
                return Err(ControlError::NotFrozen { id: instance.id.clone(), seconds: FREEZE_DEADLINE.as_secs() });
            }
        }
        if let Err(error) = self.write_back(&instance).await {
            crate::log::write(crate::log::Level::Warning, &format!("container {id}: {error}"));
        }
        Ok(())
    }

    /// Lets the processes of a container go on, which then see what the host has changed meanwhile, but for files that one
    /// of them has open.
    pub async fn resume(&self, id: &str) -> Result<(), ControlError> {
        let instance = self.find(id)?;
        refuse_stopped(&instance, "resume")?;
        // What stays cached was not told apart from what the host has changed; a kernel that does not do it is no reason to stop.
        let _ = apart(&self.reaper, || std::fs::write(DROP_CACHES, "3")).await;
        Ok(instance.needs_cgroup()?.freeze(false)?)
    }

    /// What a container has used.
    pub fn stats(&self, id: &str) -> Result<wire::GetStatsResponse, ControlError> {
        let instance = self.find(id)?;
        Ok(stats::collect(instance.needs_cgroup()?))
    }

    /// The processes of a container, in the order of their pids.
    pub async fn processes(&self, id: &str) -> Result<Vec<wire::ProcessInfo>, ControlError> {
        let instance = self.find(id)?;
        let pids = pids(&instance)?;
        let running = |process: &super::process::Process| (!process.has_ended()).then(|| process.pid());
        let exec_ids = {
            let execs = instance.execs();
            let known = execs.iter().filter_map(|(id, process)| Some((running(process.as_ref()?)?, id.clone())));
            known.collect()
        };
        Ok(listing::describe(&pids, &exec_ids).await)
    }

    /// The same processes by their files in /proc, as the container's pid namespace has them.
    pub async fn process_files(&self, id: &str) -> Result<wire::ReadProcessesResponse, ControlError> {
        let instance = self.find(id)?;
        Ok(proc_files::read(&pids(&instance)?).await)
    }

    /// Waits until the OOM killer has struck more often in a container than `seen`, or the container has ended.
    pub async fn wait_oom(&self, id: &str, seen: u64) -> Result<OomKills, NoSuchContainer> {
        let instance = self.find(id)?;
        tokio::select! {
            biased;
            count = more_oom_kills(&instance, seen) => Ok(OomKills { count, ended: instance.init.has_ended() }),
            () = instance.init.ended() => {
                let count = instance.cgroup.as_ref().and_then(|cgroup| cgroup.oom_kills());
                // The cgroup may be gone already: then this is the last that was heard of it.
                Ok(OomKills { count: count.unwrap_or(seen), ended: true })
            }
        }
    }
}

pub(super) fn refuse_stopped(instance: &Instance, action: &'static str) -> Result<(), ControlError> {
    if instance.init.has_ended() {
        return Err(ControlError::Stopped { action, id: instance.id.clone() });
    }
    Ok(())
}

/// A cgroup that is being frozen. If it is not frozen in the end, or nobody waits for that any longer, it is let go.
#[derive(Debug)]
struct Freezing<'a> {
    cgroup: &'a Cgroup,
    frozen: bool,
}

impl<'a> Freezing<'a> {
    fn begin(cgroup: &'a Cgroup) -> Result<Self, CgroupError> {
        cgroup.freeze(true)?;
        Ok(Self { cgroup, frozen: false })
    }

    /// Waits until every process of the cgroup is frozen.
    async fn end(mut self) -> Result<(), CgroupError> {
        let failed = |source| CgroupError::Read { file: CGROUP_EVENTS, source };
        let events = self.cgroup.watch(CGROUP_EVENTS)?;
        while !self.frozen {
            events.changed().await.map_err(failed)?;
            let text = events.read().map_err(failed)?;
            self.frozen = files::value_of(&text, "frozen") == Some(1);
        }
        Ok(())
    }
}

impl Drop for Freezing<'_> {
    fn drop(&mut self) {
        if !self.frozen {
            // That it could not be frozen is the error to tell of.
            let _ = self.cgroup.freeze(false);
        }
    }
}

/// The processes of a container, in order.
fn pids(instance: &Instance) -> Result<Vec<i32>, ControlError> {
    let mut pids = instance.needs_cgroup()?.processes()?;
    pids.sort_unstable();
    pids.dedup();
    Ok(pids)
}

/// Waits until there have been more OOM kills than `seen`; for ever where they are not counted, or no longer.
async fn more_oom_kills(instance: &Instance, seen: u64) -> u64 {
    if let Some(Ok(events)) = instance.cgroup.as_ref().map(|cgroup| cgroup.watch(MEMORY_EVENTS)) {
        while events.changed().await.is_ok()
            && let Ok(text) = events.read()
        {
            match files::value_of(&text, "oom_kill") {
                Some(count) if count > seen => return count,
                _ => {}
            }
        }
    }
    std::future::pending().await
}
