// SPDX-License-Identifier: Apache-2.0
//! The block devices of the host that a pod's machine has been given.
//!
//! Containers that have the same device have the same disk, so that both see what the other has written, as they would on a
//! host. Whether one of them may write to it is for its rules to say, in the guest; what none may write to is read-only for all.

use std::time::Duration;

use thiserror::Error;
use tokio::sync::Mutex;
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
    /// Held while they change.
    inner: Mutex<Inner>,
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
    read_only: bool,
    disk: GuestDisk,
    users: usize,
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
        Self { control, agent, inner: Mutex::default() }
    }

    /// Gives the machine the devices that a container has and it does not have yet.
    ///
    /// # Errors
    ///
    /// The container has none of them then.
    pub(super) async fn give(&self, devices: &[BlockDevice]) -> Result<TakenDisks, DiskError> {
        let mut taken = TakenDisks::default();
        for device in devices {
            if let Err(error) = self.take(device, &mut taken).await {
                self.take_back(taken).await;
                return Err(error);
            }
        }
        Ok(taken)
    }

    async fn take(&self, device: &BlockDevice, taken: &mut TakenDisks) -> Result<(), DiskError> {
        // Held over the requests, so that no two containers add one device twice.
        let mut inner = self.inner.lock().await;
        let serves =
            |known: &PodDisk| known.disk.host == device.number && (device.opened.read_only || !known.read_only);
        let at = match inner.disks.iter().position(serves) {
            Some(at) => at,
            None => {
                inner.add(device, &self.control, &self.agent).await?;
                inner.disks.len() - 1
            }
        };
        if let Some(known) = inner.disks.get_mut(at) {
            known.users += 1;
            taken.serials.push(known.serial.clone());
            taken.disks.push(known.disk);
        }
        Ok(())
    }

    /// Takes away what a container had, unless another one has it too.
    pub(super) async fn take_back(&self, taken: TakenDisks) {
        if taken.serials.is_empty() {
            return;
        }
        let mut inner = self.inner.lock().await;
        for known in inner.disks.iter_mut().filter(|known| taken.serials.contains(&known.serial)) {
            known.users -= 1;
        }
        let (unused, used) = std::mem::take(&mut inner.disks).into_iter().partition(|known| known.users == 0);
        inner.disks = used;
        let unused: Vec<PodDisk> = unused;
        for disk in unused {
            remove(&self.control, &self.agent, disk.serial).await;
        }
    }
}

impl Inner {
    /// Adds a disk that nobody has yet.
    async fn add(&mut self, device: &BlockDevice, control: &VmmControl, agent: &Agent) -> Result<(), DiskError> {
        if self.disks.len() >= MAX_POD_DISKS {
            return Err(DiskError::NoRoom { path: device.path.clone() });
        }
        self.last += 1;
        let serial = format!("pod-disk-{}", self.last);
        control.attach_disk(&serial, device).await?;
        let finding = timeout(GUEST_TIMEOUT, agent.find_disks(vec![serial.clone()]));
        match finding.await.unwrap_or(Err(AgentError::Timeout)) {
            Ok(found) => {
                let disks = found.into_iter().map(|guest| GuestDisk { host: device.number, guest });
                let read_only = device.opened.read_only;
                self.disks.extend(disks.map(|disk| PodDisk { serial: serial.clone(), read_only, disk, users: 0 }));
                Ok(())
            }
            Err(source) => {
                remove(control, agent, serial).await;
                Err(DiskError::Guest { path: device.path.clone(), number: device.number, source })
            }
        }
    }
}

/// Has the guest let go of a disk, and takes it away, also where the guest does not.
async fn remove(control: &VmmControl, agent: &Agent, serial: String) {
    let releasing = timeout(GUEST_TIMEOUT, agent.release_disks(vec![serial.clone()]));
    match releasing.await.unwrap_or(Err(AgentError::Timeout)) {
        Ok(()) | Err(AgentError::Lost) => {}
        Err(error) => logging::warn(format_args!("{}", text::chain(&error))),
    }
    match control.detach_disk(&serial).await {
        // With the machine, all of its disks are gone.
        Ok(()) | Err(ControlError::Gone { .. } | ControlError::Send { .. }) => {}
        Err(error) => logging::warn(format_args!("{}", text::chain(&error))),
    }
}

#[cfg(test)]
mod tests {
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
    async fn orders(control: &VmmControl, vmm: &std::os::fd::OwnedFd, count: usize) -> Vec<Order> {
        let mut orders = Vec::new();
        while orders.len() < count {
            match control::receive(vmm) {
                Ok(Received::Request(request, _)) => {
                    control.answered(request.sequence, None);
                    orders.push(request.order);
                }
                Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => tokio::task::yield_now().await,
                other => panic!("{other:?}"),
            }
        }
        orders
    }

    #[tokio::test]
    async fn a_disk_that_the_guest_does_not_find_is_taken_back() {
        let (ours, vmm) = control::pair().unwrap();
        let control = VmmControl::new(ours);
        // Its agent is gone.
        let agent = Agent::new(UnixStream::pair().unwrap().0, "c".to_owned()).unwrap();
        let disks = PodDisks::new(control.clone(), agent);

        let wanted = [device(16, true)];
        let (given, orders) = tokio::join!(disks.give(&wanted), orders(&control, &vmm, 2));

        assert!(matches!(given, Err(DiskError::Guest { number: Number { major: 8, minor: 16 }, .. })), "{given:?}");
        let serial = "pod-disk-1".to_owned();
        let attached = Order::AttachDisk { serial: serial.clone(), read_only: true };
        assert_eq!(orders, [attached, Order::DetachDisk { serial }]);
        assert!(disks.inner.lock().await.disks.is_empty());
    }

    #[tokio::test]
    async fn containers_have_one_disk_together_unless_only_one_may_write() {
        let (ours, vmm) = control::pair().unwrap();
        let control = VmmControl::new(ours);
        let agent = Agent::new(UnixStream::pair().unwrap().0, "c".to_owned()).unwrap();
        let disks = PodDisks::new(control.clone(), agent);
        let there = |minor, read_only| PodDisk {
            serial: format!("disk-of-{minor}"),
            read_only,
            disk: GuestDisk { host: Number { major: 8, minor }, guest: Number { major: 254, minor } },
            users: 1,
        };
        disks.inner.lock().await.disks = vec![there(0, false), there(16, true)];

        let taken = disks.give(&[device(0, true), device(0, false), device(16, true)]).await.unwrap();
        assert_eq!(taken.serials, ["disk-of-0", "disk-of-0", "disk-of-16"]);
        let wanted = [device(16, false)];
        let (given, _) = tokio::join!(disks.give(&wanted), orders(&control, &vmm, 2));
        assert!(given.is_err(), "one that is read-only is no disk to write to");

        // Those of others stay.
        disks.take_back(TakenDisks { serials: vec!["disk-of-16".to_owned()], disks: Vec::new() }).await;
        assert_eq!(disks.inner.lock().await.disks.len(), 2);
        disks.inner.lock().await.disks = (0..MAX_POD_DISKS as u32).map(|minor| there(minor, false)).collect();
        let refused = disks.give(&[device(99, false)]).await.unwrap_err().to_string();
        assert_eq!(refused, "/dev/xvd99: the pod has 4 block devices of the host already, and has room for no more");
    }
}
