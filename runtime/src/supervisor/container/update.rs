// SPDX-License-Identifier: Apache-2.0
//! New limits for a container that runs: on the host and in the guest, all of them or none.

use super::{CallError, Claim, Container, CpuClaim};
use crate::spec::{self, NewLimits};

impl Container {
    /// Changes the limits, on the host and in the guest: all of them, or none. The machine grows first, if it has less memory or
    /// uses fewer processors than they need, and stays as large.
    pub(crate) async fn update(&self, mut limits: NewLimits) -> Result<(), CallError> {
        self.require_alive()?;
        self.require_process()?;
        if self.init_has_ended() {
            return Err(CallError::NotRunning);
        }
        if limits.host.needs_host() && self.cgroup.upgrade().is_none() {
            let what = "a limit for a block device or for memory nodes, without a cgroup of its own on the host";
            return Err(CallError::NotSupported(what));
        }
        if limits.host.cpus.is_some() && !self.has_host_cpus() {
            return Err(CallError::NotSupported("other CPUs, without a cgroup of its own on the host"));
        }
        let _change = self.change.lock().await;
        self.check_use(&limits).await?;
        let claimed_mib = self.memory.as_ref().map(Claim::limit_mib);
        let claimed_cpus = self.cpus.as_ref().map(CpuClaim::limit);
        if let (Some(limit), Some(memory)) = (limits.memory, &self.memory) {
            let size_mib = memory.change(limit).await?;
            limits.host.memory_bytes = Some(if limit < 0 { -1 } else { spec::host_memory_bytes(size_mib) });
        }
        let changed = self.change_on_both_sides(limits).await;
        if let (Err(_), Some(memory), Some(limit_mib)) = (&changed, &self.memory, claimed_mib) {
            memory.note(limit_mib);
        }
        if let (Err(_), Some(cpus), Some(limit)) = (&changed, &self.cpus, claimed_cpus) {
            cpus.note(limit);
        }
        changed
    }

    /// The host goes first: the guest is not changed where it refuses, and where the guest does it has what it had.
    async fn change_on_both_sides(&self, limits: NewLimits) -> Result<(), CallError> {
        let former = self.cgroup.upgrade().map(|cgroup| cgroup.update(&limits.host)).transpose()?;
        let cpus = self.host_cpus.as_ref().zip(limits.host.cpus.clone());
        let former_cpus =
            cpus.map(|(claim, cpus)| Ok::<_, CallError>((claim, claim.change(Some(cpus))?))).transpose()?;
        let changed = self.change_in_guest(limits).await;
        if let (Err(_), Some((claim, cpus))) = (&changed, former_cpus) {
            // What was set before can be set again.
            let _ = claim.change(cpus);
        }
        if let (Err(_), Some(former)) = (&changed, former) {
            former.restore();
        }
        changed
    }

    /// Processors that a quota is for are in use before it holds.
    async fn change_in_guest(&self, limits: NewLimits) -> Result<(), CallError> {
        if let Some(cpus) = &self.cpus {
            cpus.change(limits.cpu).await?;
        }
        let disks = self.disks.get().map_or(&[][..], Vec::as_slice);
        let filter = limits.device_rules.map(|rules| rules.compile(disks)).unwrap_or_default();
        self.heard(self.agent.update(limits.cgroup_settings, filter).await)
    }

    /// Whether the host keeps the machine to some CPUs where it is asked to.
    fn has_host_cpus(&self) -> bool {
        match &self.host_cpus {
            Some(cpus) => cpus.can_be_changed(),
            None => self.cgroup.upgrade().is_some_and(|cgroup| cgroup.takes_cpus()),
        }
    }

    /// Fails where a limit of memory is to be above what is used, and is not.
    async fn check_use(&self, limits: &NewLimits) -> Result<(), CallError> {
        if limits.above_use.is_empty() {
            return Ok(());
        }
        let usage = self.heard(self.agent.stats().await)?.memory_current.unwrap_or(0);
        let below = limits.above_use.iter().find(|(_, limit)| limit.cast_unsigned() <= usage);
        below.map_or(Ok(()), |(name, limit)| Err(CallError::BelowUse { name, limit: *limit, usage }))
    }
}
