// SPDX-License-Identifier: Apache-2.0
//! The host's block devices that a container has, as its guest has them: by other numbers, which the agent tells.

use bulkhead_protocol::agent::CreateContainerRequest;

use super::agent::{Agent, AgentError};
use crate::spec::{BlockDevice, DeviceRules, GuestDisk};
use crate::storage::block_device::Number;

/// The kind of a block device in a request.
const BLOCK: &str = "b";

/// By which the guest knows the devices that a machine is made with, in their order.
pub(super) fn serial(index: usize) -> String {
    format!("disk-{index}")
}

/// The devices of a container whose machine is made with them.
#[derive(Debug)]
pub(super) struct Disks {
    numbers: Vec<Number>,
    rules: DeviceRules,
}

impl Disks {
    /// Those that a machine is made with.
    pub(super) fn new(devices: &[BlockDevice], rules: DeviceRules) -> Self {
        Self { numbers: devices.iter().map(|device| device.number).collect(), rules }
    }

    /// Whether there are none, so that a request is right as it is.
    pub(super) fn is_empty(&self) -> bool {
        self.numbers.is_empty()
    }

    /// What they are in the guest, which may still boot.
    pub(super) async fn find(&self, agent: &Agent) -> Result<Vec<GuestDisk>, AgentError> {
        let found = agent.find_disks((0..self.numbers.len()).map(serial).collect()).await?;
        Ok(self.numbers.iter().zip(found).map(|(host, guest)| GuestDisk { host: *host, guest }).collect())
    }

    /// The request in the guest's numbers.
    pub(super) fn localized(&self, request: &CreateContainerRequest, found: &[GuestDisk]) -> CreateContainerRequest {
        let mut request = request.clone();
        localize(&mut request, &self.rules, found);
        request
    }
}

/// Puts the guest's numbers of the container's block devices in the place of the host's.
pub(super) fn localize(request: &mut CreateContainerRequest, rules: &DeviceRules, disks: &[GuestDisk]) {
    for device in request.devices.iter_mut().filter(|device| device.kind == BLOCK) {
        let is_it = |number: Number| (i64::from(number.major), i64::from(number.minor)) == (device.major, device.minor);
        if let Some(disk) = disks.iter().find(|disk| is_it(disk.host)) {
            (device.major, device.minor) = (disk.guest.major.into(), disk.guest.minor.into());
        }
    }
    request.device_filter = rules.compile(disks);
}

#[cfg(test)]
mod tests {
    use bulkhead_protocol::agent::Device;

    use super::*;
    use crate::spec;

    #[test]
    fn block_devices_get_the_guests_numbers_and_no_others_do() {
        let device = |kind: &str, minor| Device { kind: kind.to_owned(), major: 8, minor, ..Default::default() };
        let devices = vec![device("b", 16), device("c", 16), device("b", 32), device("b", 16)];
        let mut request = CreateContainerRequest { devices, ..Default::default() };
        let number = |major, minor| Number { major, minor };
        let disks =
            [(16, 16), (32, 0)].map(|(host, guest)| GuestDisk { host: number(8, host), guest: number(254, guest) });
        let rules = spec::no_device_rules();

        localize(&mut request, &rules, &disks);

        let numbers: Vec<_> = request.devices.iter().map(|device| (device.major, device.minor)).collect();
        assert_eq!(numbers, [(254, 16), (8, 16), (254, 0), (254, 16)]);
        assert_eq!(request.device_filter, rules.compile(&disks));
    }
}
