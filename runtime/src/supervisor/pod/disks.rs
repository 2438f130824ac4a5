// SPDX-License-Identifier: Apache-2.0
//! The block devices of the host that a pod's machine has been given.
//!
//! Containers that have the same device have the same disk, so that both see what the other has written, as they would on a
//! host. Whether one of them may write to it is for its rules to say, in the guest; what none may write to is read-only for all.

use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use thiserror::Error;
use tokio::sync::Notify;
use tokio::time::timeout;

use crate::logging;
use crate::spec::{BlockDevice, GuestDisk};
use crate::storage::block_device::Number;
use crate::supervisor::agent::{Agent, AgentError};
use crate::supervisor::vmm_control::{ControlError, VmmControl};
use crate::text;

/// How many a pod's machine has room for at once. Each costs its boot three accesses to a window that has no device.
pub(crate) const MAX_POD_DISKS: usize = 4;

/// How long a guest may take to find a device, or to let go of one.
const GUEST_TIMEOUT: Duration = Duration::from_secs(30);

/// A device that a machine has not been given.
#[derive(Debug, Error)]
pub(crate) enum DiskError {
    #[error("{path}: the pod has {MAX_POD_DISKS} block devices of the host already, and has room for no more")]
    NoRoom { path: String },
    #[error(transparent)]
    Vmm(#[from] ControlError),
    #[error("{path}: cannot have the guest find the block device {number} of the host")]
    Guest { path: String, number: Number, source: AgentError },
}

/// The disks of a pod.
#[derive(Debug)]
pub(super) struct PodDisks {
    control: VmmControl,
    agent: Agent,
    inner: Mutex<Inner>,
    /// A disk has come, or is gone.
    changed: Notify,
}

#[derive(Debug, Default)]
struct Inner {
    /// The number in the last serial number: none is used twice.
    last: u32,
    disks: Vec<PodDisk>,
}

/// A disk, and how many containers have it.
#[derive(Debug)]
struct PodDisk {
    serial: String,
    host: Number,
    read_only: bool,
    phase: Phase,
    users: usize,
}

#[derive(Debug, PartialEq, Eq)]
enum Phase {
    /// The machine is being given it, for its first user.
    Coming,
    /// The guest has it.
    There(GuestDisk),
    /// Nobody has it, and the machine is losing it.
    Leaving,
}

/// What a container that wants a device is to do.
#[derive(Debug)]
enum Turn {
    /// It has a disk that is there.
    Takes(String, GuestDisk),
    /// It gives the machine one, by that serial number.
    Adds(String),
    /// One is coming, or leaving.
    Waits,
}

/// What one container has of them; given back by [`PodDisks::take_back`].
#[derive(Debug, Default)]
pub(super) struct TakenDisks {
    serials: Vec<String>,
    /// What they are in the guest.
    pub(super) disks: Vec<GuestDisk>,
}

impl PodDisks {
    pub(super) fn new(control: VmmControl, agent: Agent) -> Self {
        Self { control, agent, inner: Mutex::default(), changed: Notify::new() }
    }

    /// Gives the machine the devices that a container has and it does not have yet.
    ///
    /// # Errors
    ///
    /// The container has none of them then.
    pub(super) async fn give(&self, devices: &[BlockDevice]) -> Result<TakenDisks, DiskError> {
        let mut taken = TakenDisks::default();
        for device in devices {
            match self.take(device).await {
                Ok((serial, disk)) => {
                    taken.serials.push(serial);
                    taken.disks.push(disk);
                }
                Err(error) => {
                    self.take_back(taken).await;
                    return Err(error);
                }
            }
        }
        Ok(taken)
    }

    /// One disk, for one more user. Nobody waits but for one of the same device.
    async fn take(&self, device: &BlockDevice) -> Result<(String, GuestDisk), DiskError> {
        loop {
            // First, so that no change is missed.
            let changed = self.changed.notified();
            let turn = self.inner().turn(device)?;
            match turn {
                Turn::Takes(serial, disk) => return Ok((serial, disk)),
                Turn::Adds(serial) => return self.add(serial, device).await,
                Turn::Waits => changed.await,
            }
        }
    }

    /// Gives the machine a disk that is coming.
    async fn add(&self, serial: String, device: &BlockDevice) -> Result<(String, GuestDisk), DiskError> {
        let window = match self.control.attach_disk(&serial, device).await {
            Ok(window) => window,
            Err(error) => {
                self.is_gone(&serial);
                return Err(error.into());
            }
        };
        // The guest looks there alone: another one may be slow, or on its way out.
        let adding = timeout(GUEST_TIMEOUT, self.agent.add_disk(&serial, window));
        match adding.await.unwrap_or(Err(AgentError::Timeout)) {
            Ok(guest) => {
                let disk = GuestDisk { host: device.number, guest };
                self.inner().enter(&serial, Phase::There(disk));
                self.changed.notify_waiters();
                Ok((serial, disk))
            }
            Err(source) => {
                self.inner().enter(&serial, Phase::Leaving);
                self.remove(&serial).await;
                Err(DiskError::Guest { path: device.path.clone(), number: device.number, source })
            }
        }
    }

    /// Takes away what a container had, unless another one has it too.
    pub(super) async fn take_back(&self, taken: TakenDisks) {
        let unused = self.inner().leave(&taken.serials);
        for serial in unused {
            self.remove(&serial).await;
        }
    }

    /// Has the guest let go of a disk, and takes it away, also where the guest does not: its place is lost to the machine then.
    async fn remove(&self, serial: &str) {
        let releasing = timeout(GUEST_TIMEOUT, self.agent.release_disks(vec![serial.to_owned()]));
        let released = releasing.await.unwrap_or(Err(AgentError::Timeout));
        match &released {
            Ok(()) | Err(AgentError::Lost) => {}
            Err(error) => {
                let why = text::chain(error);
                logging::warn(format_args!("the pod has room for one block device less from here on: {why}"));
            }
        }
        match self.control.detach_disk(serial, released.is_ok()).await {
            // With the machine, all of its disks are gone.
            Ok(()) | Err(ControlError::Gone { .. } | ControlError::Send { .. }) => {}
            Err(error) => logging::warn(format_args!("{}", text::chain(&error))),
        }
        self.is_gone(serial);
    }

    fn is_gone(&self, serial: &str) {
        self.inner().disks.retain(|known| known.serial != serial);
        self.changed.notify_waiters();
    }

    fn inner(&self) -> MutexGuard<'_, Inner> {
        // Nothing panics while the lock is held.
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Inner {
    /// What a container is to do that wants this device.
    fn turn(&mut self, device: &BlockDevice) -> Result<Turn, DiskError> {
        let read_only = device.opened.read_only;
        // What is leaving may have something to write yet.
        let serves = |known: &&mut PodDisk| {
            known.host == device.number && (read_only || !known.read_only || known.phase == Phase::Leaving)
        };
        if let Some(known) = self.disks.iter_mut().find(serves) {
            let Phase::There(disk) = known.phase else { return Ok(Turn::Waits) };
            known.users += 1;
            return Ok(Turn::Takes(known.serial.clone(), disk));
        }
        if self.disks.len() >= MAX_POD_DISKS {
            return Err(DiskError::NoRoom { path: device.path.clone() });
        }
        self.last += 1;
        let serial = format!("pod-disk-{}", self.last);
        let (host, phase) = (device.number, Phase::Coming);
        self.disks.push(PodDisk { serial: serial.clone(), host, read_only, phase, users: 1 });
        Ok(Turn::Adds(serial))
    }

    fn enter(&mut self, serial: &str, phase: Phase) {
        if let Some(known) = self.disks.iter_mut().find(|known| known.serial == serial) {
            known.phase = phase;
        }
    }

    /// One user less for each of these; the disks that have none are to be removed.
    fn leave(&mut self, serials: &[String]) -> Vec<String> {
        let mut unused = Vec::new();
        for serial in serials {
            if let Some(known) = self.disks.iter_mut().find(|known| known.serial == *serial) {
                known.users -= 1;
                if known.users == 0 {
                    known.phase = Phase::Leaving;
                    unused.push(serial.clone());
                }
            }
        }
        unused
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::OwnedFd;
    use std::os::unix::net::UnixStream;

    use bulkhead_vmm::control::{self, Order, Received};

    use super::*;
    use crate::storage::block_device::Opened;

    /// A device of the host, which is a file here.
    fn device(minor: u32, read_only: bool) -> BlockDevice {
        let opened = Opened { file: tempfile::tempfile().unwrap().into(), read_only };
        BlockDevice { path: format!("/dev/xvd{minor}"), number: Number { major: 8, minor }, opened }
    }

    /// Carries out what is asked for, until there have been so many orders.
    async fn orders(control: &VmmControl, vmm: &OwnedFd, count: usize) -> Vec<Order> {
        let mut orders = Vec::new();
        while orders.len() < count {
            match control::receive(vmm) {
                Ok(Received::Request(request, _)) => {
                    let window = matches!(request.order, Order::AttachDisk { .. }).then_some(7);
                    control.answered(request.sequence, Ok(window));
                    orders.push(request.order);
                }
                Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => tokio::task::yield_now().await,
                other => panic!("{other:?}"),
            }
        }
        orders
    }

    /// One that the guest has, for one container.
    fn there(minor: u32, read_only: bool) -> PodDisk {
        let host = Number { major: 8, minor };
        let phase = Phase::There(GuestDisk { host, guest: Number { major: 254, minor } });
        PodDisk { serial: format!("disk-of-{minor}"), host, read_only, phase, users: 1 }
    }

    /// Those of a pod whose agent is gone, and its VMM.
    fn disks(there: Vec<PodDisk>) -> (PodDisks, VmmControl, OwnedFd) {
        disks_with(there, UnixStream::pair().unwrap().0)
    }

    /// Those of a pod with a connection to its agent.
    fn disks_with(there: Vec<PodDisk>, agent: UnixStream) -> (PodDisks, VmmControl, OwnedFd) {
        let (ours, vmm) = control::pair().unwrap();
        let control = VmmControl::new(ours);
        let agent = Agent::new(agent, "c".to_owned()).unwrap();
        let disks = PodDisks::new(control.clone(), agent);
        disks.inner().disks = there;
        (disks, control, vmm)
    }

    #[tokio::test]
    async fn a_disk_that_the_guest_does_not_find_is_taken_back() {
        let (disks, control, vmm) = disks(Vec::new());

        let wanted = [device(16, true)];
        let (given, orders) = tokio::join!(disks.give(&wanted), orders(&control, &vmm, 2));

        assert!(matches!(given, Err(DiskError::Guest { number: Number { major: 8, minor: 16 }, .. })), "{given:?}");
        let serial = "pod-disk-1".to_owned();
        let attached = Order::AttachDisk { serial: serial.clone(), read_only: true };
        // Its place is not used again: the guest may be at it yet, or come to be.
        assert_eq!(orders, [attached, Order::DetachDisk { serial, is_released: false }]);
        assert!(disks.inner().disks.is_empty());
    }

    #[tokio::test]
    async fn who_wants_another_disk_does_not_wait_for_one_that_comes_slowly() {
        let (disks, control, vmm) = disks(vec![there(0, false), there(32, false)]);
        let (slow, quick) = ([device(16, false)], [device(0, false)]);
        let coming = disks.give(&slow);
        tokio::pin!(coming);
        let others = async {
            let taken = disks.give(&quick).await.unwrap();
            disks.take_back(taken).await;
        };

        // Nobody has answered for the first one when it is the turn of the others.
        tokio::select! {
            biased;
            given = &mut coming => panic!("{given:?}"),
            () = others => {}
        }

        // Who wants the same waits, and then adds it again, since it has not come.
        let (first, second, orders) = tokio::join!(coming, disks.give(&slow), orders(&control, &vmm, 4));
        assert!(first.is_err() && second.is_err());
        let numbers = orders.iter().map(|order| match order {
            Order::AttachDisk { serial, .. } => (true, serial.as_str()),
            Order::DetachDisk { serial, .. } => (false, serial.as_str()),
            other => panic!("{other:?}"),
        });
        let expected = [(true, "pod-disk-1"), (false, "pod-disk-1"), (true, "pod-disk-2"), (false, "pod-disk-2")];
        assert_eq!(numbers.collect::<Vec<_>>(), expected);
    }

    #[tokio::test]
    async fn nobody_waits_for_the_guest_to_find_another_disk_or_to_let_go_of_it() {
        // An agent that does not answer.
        let (ours, _agent) = UnixStream::pair().unwrap();
        let (disks, control, vmm) = disks_with(vec![there(0, false)], ours);
        let (first, second) = ([device(16, false)], [device(32, false)]);
        let taken = TakenDisks { serials: vec!["disk-of-0".to_owned()], disks: Vec::new() };

        let orders = tokio::select! {
            biased;
            () = disks.take_back(taken) => panic!("the guest has not let go of it"),
            given = disks.give(&first) => panic!("{given:?}"),
            given = disks.give(&second) => panic!("{given:?}"),
            orders = orders(&control, &vmm, 2) => orders,
        };

        let attached = |number| Order::AttachDisk { serial: format!("pod-disk-{number}"), read_only: false };
        assert_eq!(orders, [attached(1), attached(2)]);
    }

    #[tokio::test]
    async fn what_is_leaving_counts_and_is_waited_for_by_who_wants_it_again() {
        let (disks, control, vmm) = disks((0..MAX_POD_DISKS as u32).map(|minor| there(minor, false)).collect());
        let taken = TakenDisks { serials: vec!["disk-of-0".to_owned()], disks: Vec::new() };
        let (same, another) = ([device(0, true)], [device(99, true)]);
        let leaving = disks.take_back(taken);
        tokio::pin!(leaving);

        tokio::select! {
            biased;
            () = &mut leaving => panic!("nobody has answered"),
            given = disks.give(&another) => assert!(matches!(given, Err(DiskError::NoRoom { .. })), "{given:?}"),
        }
        let (_, (), orders) = tokio::join!(disks.give(&same), leaving, orders(&control, &vmm, 3));

        assert_eq!(orders[0], Order::DetachDisk { serial: "disk-of-0".to_owned(), is_released: false });
        assert_eq!(orders[1], Order::AttachDisk { serial: "pod-disk-1".to_owned(), read_only: true });
    }

    #[tokio::test]
    async fn containers_have_one_disk_together_unless_only_one_may_write() {
        let (disks, control, vmm) = disks(vec![there(0, false), there(16, true)]);

        let taken = disks.give(&[device(0, true), device(0, false), device(16, true)]).await.unwrap();
        assert_eq!(taken.serials, ["disk-of-0", "disk-of-0", "disk-of-16"]);
        let wanted = [device(16, false)];
        let (given, _) = tokio::join!(disks.give(&wanted), orders(&control, &vmm, 2));
        assert!(given.is_err(), "one that is read-only is no disk to write to");

        // Those of others stay.
        disks.take_back(TakenDisks { serials: vec!["disk-of-16".to_owned()], disks: Vec::new() }).await;
        assert_eq!(disks.inner().disks.len(), 2);
        disks.inner().disks = (0..MAX_POD_DISKS as u32).map(|minor| there(minor, false)).collect();
        let refused = disks.give(&[device(99, false)]).await.unwrap_err().to_string();
        assert_eq!(refused, "/dev/xvd99: the pod has 4 block devices of the host already, and has room for no more");
    }
}
