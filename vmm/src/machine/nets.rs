// SPDX-License-Identifier: Apache-2.0
//! The network devices, also those that a machine is given while it runs: their windows and interrupt lines are there from the
//! beginning, and say that they have no device. The guest looks at one again when it is told to.

use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError};

use bulkhead_kvm::{GuestMemory, Vm};
use bulkhead_virtio::mmio::MmioTransport;
use bulkhead_virtio::net::{Backend, Net, NetConfig, Notice, Port};

use super::MachineError;
use super::bus::Bus;

/// What there is of them, and where further ones go.
#[derive(Debug)]
pub(super) struct Nets {
    /// The host's side of each, by its number.
    pub(super) ports: Mutex<Vec<(u32, Port)>>,
    pub(super) vm: Arc<Vm>,
    pub(super) memory: GuestMemory,
    pub(super) bus: Bus,
    pub(super) fallback: Notice,
    /// The windows that are kept for them and have none yet.
    pub(super) empty: Mutex<Range<usize>>,
}

impl Nets {
    /// The host's side of the device with that number.
    pub(super) fn port(&self, id: u32) -> Option<Port> {
        // Nothing panics while the lock is held. A number that has come again is the last one's.
        let ports = self.ports.lock().unwrap_or_else(PoisonError::into_inner);
        ports.iter().rfind(|(number, _)| *number == id).map(|(_, port)| port.clone())
    }

    /// Puts a device on `backend` into the first empty window, and tells which that was.
    pub(super) fn attach(&self, id: u32, config: &NetConfig, backend: Backend) -> Result<u32, MachineError> {
        // Nothing panics while the lock is held.
        let mut empty = self.empty.lock().unwrap_or_else(PoisonError::into_inner);
        if empty.is_empty() {
            return Err(MachineError::NoRoom("network"));
        }
        let device = net(config, backend)?;
        let port = device.port().clone();
        let transport = MmioTransport::new(Box::new(device), self.memory.clone())
            .map_err(|source| MachineError::Device { device: name(config), source: source.into() })?;
        // One that KVM refuses has used its window up.
        let index = empty.next().ok_or(MachineError::NoRoom("network"))?;
        self.bus.fill(&self.vm, index, transport)?;
        self.ports.lock().unwrap_or_else(PoisonError::into_inner).push((id, port));
        Ok(index as u32) // one of some tens
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
