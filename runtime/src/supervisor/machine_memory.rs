// SPDX-License-Identifier: Apache-2.0
//! The memory of a machine that runs: what its containers may use of it together, and giving it more.
//!
//! The VMM grants a part of what it keeps in reserve, and the agent is told to have the guest's kernel use that. A machine
//! does not shrink: what a guest has had is not given back.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use bulkhead_vmm::config::ReserveLayout;
use thiserror::Error;

use super::agent::{Agent, AgentError};
use super::claims::Claims;
use super::vmm_control::{ControlError, VmmControl};
use crate::cgroup::{HostCgroup, HostCgroupError};
use crate::logging;
use crate::spec::{self, MEMORY_OVERHEAD_MIB, Machine};

/// A machine that did not get more memory.
#[derive(Debug, Error)]
pub(crate) enum GrowError {
    #[error("linux.resources.memory.limit: {limit} bytes are more than the {max_mib} MiB that the machine can have")]
    TooMuch { limit: i64, max_mib: u64 },
    #[error("cannot give the machine more memory")]
    Host(#[from] HostCgroupError),
    #[error("cannot give the machine more memory")]
    Vmm(#[from] ControlError),
    #[error("cannot have the guest use more memory")]
    Guest(#[source] AgentError),
}

/// A machine's memory.
#[derive(Debug)]
pub(crate) struct MachineMemory {
    control: VmmControl,
    agent: Agent,
    /// The sandbox's, as long as it has one.
    cgroup: Weak<HostCgroup>,
    boot_mib: u64,
    max_mib: u64,
    reserve: Option<ReserveLayout>,
    /// Held while the machine grows.
    growing: tokio::sync::Mutex<()>,
    grown: Mutex<Grown>,
    /// In MiB.
    claims: Claims<u64>,
}

/// How much of the reserve is the guest's.
#[derive(Debug, Default, Clone, Copy)]
struct Grown {
    granted_mib: u64,
    /// Of which the guest has said that its kernel uses it: it is told again of what it has not.
    used_mib: u64,
}

impl MachineMemory {
    /// That of a machine whose guest boots.
    pub(super) fn new(machine: &Machine, control: VmmControl, agent: Agent, cgroup: Weak<HostCgroup>) -> Arc<Self> {
        let (boot_mib, max_mib) = (machine.mem_size_mib, machine.max_mem_size_mib);
        let reserve = ReserveLayout::new(boot_mib, max_mib);
        let (growing, grown, claims) = (tokio::sync::Mutex::default(), Mutex::default(), Claims::new());
        Arc::new(Self { control, agent, cgroup, boot_mib, max_mib, reserve, growing, grown, claims })
    }

    fn grown(&self) -> MutexGuard<'_, Grown> {
        // Nothing panics while the lock is held.
        self.grown.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// How much memory the machine has, in MiB.
    fn size_mib(&self) -> u64 {
        self.boot_mib + self.grown().granted_mib
    }

    /// How much of the reserve the containers' limits together need, as far as there is so much; `None` if the guest uses that.
    fn needed_mib(&self) -> Option<(ReserveLayout, u64)> {
        let sum_mib = self.claims.all().into_iter().fold(MEMORY_OVERHEAD_MIB, u64::saturating_add);
        let more_mib = sum_mib.saturating_sub(self.boot_mib);
        let used_mib = self.grown().used_mib;
        let reserve = self.reserve.filter(|_| more_mib > used_mib)?;
        // The kernel has 64 bytes for each page of 4096, and takes them from what it is given.
        Some((reserve, reserve.whole_blocks_mib(more_mib.saturating_add(more_mib.div_ceil(63)))))
    }

    /// Gives the machine what its containers' limits together need, as far as it can have that. How much it has then, in
    /// MiB.
    async fn make_room(&self) -> Result<u64, GrowError> {
        // Where there is room, nobody waits for a machine that grows for another.
        if self.needed_mib().is_none() {
            return Ok(self.size_mib());
        }
        let _turn = self.growing.lock().await;
        let Some((reserve, needed_mib)) = self.needed_mib() else {
            return Ok(self.size_mib());
        };
        let Grown { granted_mib, used_mib } = *self.grown();
        if needed_mib > granted_mib {
            if let Some(cgroup) = self.cgroup.upgrade() {
                cgroup.raise_memory(spec::host_memory_bytes(self.boot_mib + needed_mib))?;
            }
            self.control.grant_memory(needed_mib).await?;
            self.grown().granted_mib = needed_mib;
        }
        if needed_mib > used_mib {
            let length = (needed_mib - used_mib) << 20;
            self.agent.add_memory(reserve.address(used_mib), length).await.map_err(GrowError::Guest)?;
            self.grown().used_mib = needed_mib;
            logging::debug(format_args!("the machine has {} MiB of memory", self.boot_mib + needed_mib));
        }
        Ok(self.size_mib())
    }
}

/// What one container may use of a machine's memory. It is forgotten with this.
#[derive(Debug)]
pub(crate) struct Claim {
    memory: Arc<MachineMemory>,
    number: u64,
}

impl Claim {
    /// That of a container without a limit.
    pub(super) fn new(memory: Arc<MachineMemory>) -> Self {
        let number = memory.claims.add();
        Self { memory, number }
    }

    /// The container's limit, in MiB.
    pub(super) fn limit_mib(&self) -> Option<u64> {
        self.memory.claims.get(self.number)
    }

    /// Notes a container's limit, in MiB.
    pub(super) fn note(&self, limit_mib: Option<u64>) {
        self.memory.claims.set(self.number, limit_mib);
    }

    /// The machine gets what all containers' limits need, as far as it can have that. A container without one waits for nothing.
    pub(super) async fn make_room(&self) -> Result<(), GrowError> {
        if self.limit_mib().is_none() {
            return Ok(());
        }
        self.memory.make_room().await.map(drop)
    }

    /// Notes a new limit, in bytes and negative for none, and makes room for it. How much memory the machine has then, in
    /// MiB.
    pub(super) async fn change(&self, limit: i64) -> Result<u64, GrowError> {
        let limit_mib = u64::try_from(limit).ok().map(|limit| limit.div_ceil(1 << 20));
        let max_mib = self.memory.max_mib;
        if limit_mib.is_some_and(|limit| limit > max_mib) {
            return Err(GrowError::TooMuch { limit, max_mib });
        }
        let before = self.limit_mib();
        self.note(limit_mib);
        let room = self.memory.make_room().await;
        if room.is_err() {
            self.note(before);
        }
        room
    }

    /// The container uses nothing any more.
    pub(super) fn release(&self) {
        self.note(None);
    }
}

impl Drop for Claim {
    fn drop(&mut self) {
        self.release();
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::OwnedFd;
    use std::os::unix::net::UnixStream;

    use bulkhead_vmm::control::{self, Order, Received};

    use super::*;

    /// A machine of 160 MiB that may have 1000, and the VMM's end of its control socket. Its agent is gone.
    fn memory(max_mem_size_mib: u64) -> (Arc<MachineMemory>, VmmControl, OwnedFd) {
        let (ours, theirs) = control::pair().unwrap();
        let control = VmmControl::new(ours);
        let agent = Agent::new(UnixStream::pair().unwrap().0, "c".to_owned()).unwrap();
        let machine = Machine { max_mem_size_mib, ..Machine::for_test(160) };
        (MachineMemory::new(&machine, control.clone(), agent, Weak::new()), control, theirs)
    }

    /// Takes the next order, and answers it.
    async fn next_order(control: &VmmControl, vmm: &OwnedFd) -> Order {
        loop {
            match control::receive(vmm) {
                Ok(Received::Request(request, _)) => {
                    control.answered(request.sequence, Ok(None));
                    return request.order;
                }
                Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => tokio::task::yield_now().await,
                other => panic!("{other:?}"),
            }
        }
    }

    #[tokio::test]
    async fn limits_that_fit_ask_for_nothing() {
        let (memory, _control, vmm) = memory(1000);
        let (first, second) = (Claim::new(Arc::clone(&memory)), Claim::new(Arc::clone(&memory)));

        assert_eq!(first.change(40 << 20).await.unwrap(), 160);
        assert_eq!(second.change(24 << 20).await.unwrap(), 160);
        first.release();
        assert_eq!(second.change(64 << 20).await.unwrap(), 160);
        assert_eq!(second.change(-1).await.unwrap(), 160);

        assert!(control::receive(&vmm).is_err());
    }

    #[tokio::test]
    async fn limits_that_do_not_fit_have_the_machine_grow_in_blocks() {
        let (memory, control, vmm) = memory(1000);
        let (first, second) = (Claim::new(Arc::clone(&memory)), Claim::new(Arc::clone(&memory)));
        first.note(Some(60));
        second.note(Some(140));

        // 60 + 140 + 96 are 136 more than 160.
        let (room, order) = tokio::join!(second.make_room(), next_order(&control, &vmm));

        assert_eq!(order, Order::GrantMemory { total_mib: 256 });
        assert!(matches!(room, Err(GrowError::Guest(AgentError::Lost))), "{room:?}");
        // What is granted is not asked for again, but what the guest does not use, it is told of again.
        let again = second.make_room().await;
        assert!(matches!(again, Err(GrowError::Guest(AgentError::Lost))), "{again:?}");
        assert!(control::receive(&vmm).is_err());
    }

    #[tokio::test]
    async fn who_needs_nothing_does_not_wait_for_a_machine_that_grows() {
        let (memory, _control, _vmm) = memory(1000);
        let claims = [(); 3].map(|()| Claim::new(Arc::clone(&memory)));
        let [large, small, without] = &claims;
        large.note(Some(200));
        // Nobody answers.
        let growing = large.make_room();
        tokio::pin!(growing);

        let others = async {
            without.make_room().await.unwrap();
            large.note(Some(20));
            assert_eq!(small.change(44 << 20).await.unwrap(), 160);
        };
        tokio::select! {
            biased;
            grown = &mut growing => panic!("{grown:?}"),
            () = others => {}
        }
    }

    #[tokio::test]
    async fn an_order_that_was_not_answered_is_given_again_as_it_was() {
        let (memory, control, vmm) = memory(1000);
        let claim = Claim::new(memory);
        claim.note(Some(200));

        let unanswered = claim.make_room().await;

        assert!(matches!(unanswered, Err(GrowError::Vmm(ControlError::NoAnswer { .. }))), "{unanswered:?}");
        let orders = async { [next_order(&control, &vmm).await, next_order(&control, &vmm).await] };
        let (_, orders) = tokio::join!(claim.make_room(), orders);
        assert_eq!(orders, [(); 2].map(|()| Order::GrantMemory { total_mib: 256 }));
    }

    #[tokio::test]
    async fn more_than_there_can_be_is_refused_before_anything_is_asked_for() {
        let (fixed, _control, vmm) = memory(160);
        let claim = Claim::new(fixed);

        let error = claim.change(161 << 20).await.unwrap_err().to_string();

        assert!(error.starts_with("linux.resources.memory.limit: 168820736 bytes"), "{error}");
        assert!(error.contains("160 MiB"), "{error}");
        assert_eq!(claim.change(160 << 20).await.unwrap(), 160);
        assert!(control::receive(&vmm).is_err());
    }
}
