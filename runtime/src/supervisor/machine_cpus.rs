// SPDX-License-Identifier: Apache-2.0
//! The processors of a machine that runs: what its containers may use of them together, and having the guest use more.
//!
//! All vCPUs that there may ever be are made with the machine, and the guest's kernel begins with some of them. The agent has it
//! use more. One that is in use stays so: what a container has bound to it would be bound to nothing.

use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};

use thiserror::Error;

use super::agent::{Agent, AgentError};
use super::claims::Claims;
use crate::logging;
use crate::spec::{CpuLimit, Machine};

/// A machine whose guest does not use what it has.
#[derive(Debug, Error)]
#[error("cannot have the guest use {count} processors")]
pub(crate) struct OnlineError {
    count: u8,
    #[source]
    source: AgentError,
}

/// A machine's processors.
#[derive(Debug)]
pub(crate) struct MachineCpus {
    agent: Agent,
    max: u8,
    /// How many the guest has said to use.
    online: AtomicU8,
    /// Held while that changes.
    growing: tokio::sync::Mutex<()>,
    claims: Claims<CpuLimit>,
}

impl MachineCpus {
    /// Those of a machine whose guest boots.
    pub(super) fn new(machine: &Machine, agent: Agent) -> Arc<Self> {
        let (online, growing, claims) = (AtomicU8::new(machine.vcpus), tokio::sync::Mutex::default(), Claims::new());
        Arc::new(Self { agent, max: machine.max_vcpus, online, growing, claims })
    }

    /// How many the containers' limits together ask for, as far as there are so many; `None` if the guest uses these.
    fn wanted(&self) -> Option<u8> {
        let processors = CpuLimit::processors(self.claims.all())?;
        let wanted = u8::try_from(processors).unwrap_or(u8::MAX).min(self.max);
        Some(wanted).filter(|wanted| *wanted > self.online.load(Ordering::Relaxed))
    }

    /// Has the guest use what its containers' limits together ask for, as far as there is so much.
    async fn make_room(&self) -> Result<(), OnlineError> {
        if self.wanted().is_none() {
            return Ok(());
        }
        let _turn = self.growing.lock().await;
        let Some(count) = self.wanted() else { return Ok(()) };
        self.agent.online_cpus(count.into()).await.map_err(|source| OnlineError { count, source })?;
        self.online.store(count, Ordering::Relaxed);
        logging::debug(format_args!("the guest uses {count} processors"));
        Ok(())
    }
}

/// What one container may use of a machine's processors. It is forgotten with this.
#[derive(Debug)]
pub(crate) struct CpuClaim {
    cpus: Arc<MachineCpus>,
    number: u64,
}

impl CpuClaim {
    /// That of a container with that limit.
    pub(super) fn new(cpus: Arc<MachineCpus>, limit: CpuLimit) -> Self {
        let number = cpus.claims.add();
        cpus.claims.set(number, Some(limit));
        Self { cpus, number }
    }

    /// The guest uses what all containers' limits ask for, as far as there is so much.
    pub(super) async fn make_room(&self) -> Result<(), OnlineError> {
        self.cpus.make_room().await
    }

    /// Changes the limit, and makes room for it; where that fails, the limit is what it was.
    pub(super) async fn change(&self, new: CpuLimit) -> Result<(), OnlineError> {
        if new.is_empty() {
            return Ok(());
        }
        let before = self.limit();
        self.note(Some(before.unwrap_or_default().changed_to(new)));
        let room = self.make_room().await;
        if room.is_err() {
            self.note(before);
        }
        room
    }

    /// The container's limit; `None` when it uses nothing any more.
    pub(super) fn limit(&self) -> Option<CpuLimit> {
        self.cpus.claims.get(self.number)
    }

    pub(super) fn note(&self, limit: Option<CpuLimit>) {
        self.cpus.claims.set(self.number, limit);
    }

    /// The container uses nothing any more.
    pub(super) fn release(&self) {
        self.note(None);
    }
}

impl Drop for CpuClaim {
    fn drop(&mut self) {
        self.release();
    }
}

#[cfg(test)]
mod tests {
    use std::io::Read;
    use std::os::unix::net::UnixStream;

    use super::*;
    use crate::spec;

    /// A limit of so many thousandths of a processor.
    fn quota(thousandths: u32) -> CpuLimit {
        let json = serde_json::json!({ "cpu": { "quota": thousandths, "period": 1000 } }).to_string();
        spec::new_limits_from_json(json.as_bytes()).unwrap().cpu
    }

    /// A machine that has begun with two processors and may have four, and the agent's end of the connection.
    fn machine() -> (Arc<MachineCpus>, UnixStream) {
        let (ours, theirs) = UnixStream::pair().unwrap();
        theirs.set_nonblocking(true).unwrap();
        let agent = Agent::new(ours, "c".to_owned()).unwrap();
        let machine = Machine { vcpus: 2, max_vcpus: 4, ..Machine::for_test(160) };
        (MachineCpus::new(&machine, agent), theirs)
    }

    fn asked(mut agent: &UnixStream) -> bool {
        agent.read(&mut [0]).is_ok_and(|length| length > 0)
    }

    #[tokio::test]
    async fn limits_that_fit_ask_for_nothing() {
        let (cpus, agent) = machine();
        let (first, second) =
            (CpuClaim::new(Arc::clone(&cpus), quota(500)), CpuClaim::new(Arc::clone(&cpus), quota(1500)));

        first.make_room().await.unwrap();
        second.change(quota(1250)).await.unwrap();
        first.release();
        second.change(quota(2000)).await.unwrap();
        drop(second);
        CpuClaim::new(cpus, quota(2000)).make_room().await.unwrap();

        assert!(!asked(&agent));
    }

    #[tokio::test]
    async fn limits_together_ask_for_as_many_as_there_are() {
        let (cpus, agent) = machine();
        let first = CpuClaim::new(Arc::clone(&cpus), quota(1500));
        let second = CpuClaim::new(Arc::clone(&cpus), quota(750));
        assert_eq!(cpus.wanted(), Some(3));
        second.note(Some(quota(90000)));
        assert_eq!(cpus.wanted(), Some(4));

        // What the guest has said to use, stays used.
        cpus.online.store(4, Ordering::Relaxed);
        first.make_room().await.unwrap();
        drop(second);
        assert_eq!(cpus.wanted(), None);
        assert!(!asked(&agent));
    }

    #[tokio::test]
    async fn a_limit_whose_processors_cannot_be_had_stays_as_it_was() {
        let (cpus, agent) = machine();
        let claim = CpuClaim::new(Arc::clone(&cpus), quota(1000));
        drop(agent);

        let error = claim.change(quota(3000)).await.unwrap_err();

        assert_eq!(error.to_string(), "cannot have the guest use 3 processors");
        assert_eq!((claim.limit(), cpus.wanted()), (Some(quota(1000)), None));
        claim.change(CpuLimit::default()).await.unwrap();
    }
}
