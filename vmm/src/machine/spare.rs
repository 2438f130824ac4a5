// SPDX-License-Identifier: Apache-2.0
//! Network devices that a machine is given while it runs: their windows and interrupt lines are there from the beginning,
//! and say that they have no device. The guest looks at them again when it is told to.

use std::sync::Arc;

use bulkhead_kvm::{GuestMemory, Vm};
use bulkhead_virtio::mmio::MmioTransport;
use bulkhead_virtio::net::{Backend, Net, NetConfig};

use super::MachineError;
use super::bus::Bus;
use crate::config::MIN_MTU;

/// Where such devices go.
#[derive(Debug)]
pub(super) struct SpareNets {
    pub(super) vm: Arc<Vm>,
    pub(super) memory: GuestMemory,
    pub(super) bus: Bus,
}

impl SpareNets {
    /// Puts a device on `backend` into the first empty window.
    pub(super) fn attach(&self, config: &NetConfig, backend: Backend) -> Result<(), MachineError> {
        if let Some(mtu) = config.mtu.filter(|mtu| *mtu < MIN_MTU) {
            let allowed = format!("{MIN_MTU} or more");
            return Err(MachineError::Config { what: "a network device's MTU", value: mtu.into(), allowed });
        }
        let index = self.bus.first_empty().ok_or(MachineError::NoRoom)?;
        let device = net(config, backend)?;
        let transport = MmioTransport::new(Box::new(device), self.memory.clone())
            .map_err(|source| MachineError::Device { device: name(config), source: source.into() })?;
        Ok(self.bus.fill(&self.vm, index, transport)?)
    }
}

/// A network device on `backend`.
pub(super) fn net(config: &NetConfig, backend: Backend) -> Result<Net, MachineError> {
    let device = Net::new(config).on(backend);
    device.map_err(|source| MachineError::Device { device: name(config), source: source.into() })
}

fn name(config: &NetConfig) -> String {
    format!("{} network", config.mac)
}
