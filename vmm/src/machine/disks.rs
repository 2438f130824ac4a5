// SPDX-License-Identifier: Apache-2.0
//! The block devices, also those that a machine is given while it runs: they go into windows that are there from the beginning, as
//! those of network devices, and can be taken out again.

use std::fs::File;
use std::ops::Range;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, PoisonError};

use bulkhead_kvm::{GuestMemory, Vm};
use bulkhead_virtio::blk::{Blk, Disk};
use bulkhead_virtio::mmio::MmioTransport;

use super::MachineError;
use super::bus::Bus;

/// Where block devices go, and come from again.
#[derive(Debug)]
pub(super) struct Disks {
    vm: Arc<Vm>,
    memory: GuestMemory,
    bus: Bus,
    /// The serial numbers of those that are there for good.
    fixed: Vec<String>,
    /// The windows that are kept for them, each with the serial number of the one that is in it.
    windows: Mutex<Vec<(usize, Option<String>)>>,
}

impl Disks {
    /// With those windows, all of them empty.
    pub(super) fn new(vm: Arc<Vm>, memory: GuestMemory, bus: Bus, windows: Range<usize>, fixed: Vec<String>) -> Self {
        Self { vm, memory, bus, fixed, windows: Mutex::new(windows.map(|index| (index, None)).collect()) }
    }

    /// Puts a device into an empty window.
    pub(super) fn attach(&self, serial: &str, device: OwnedFd, read_only: bool) -> Result<(), MachineError> {
        // Nothing panics while the lock is held.
        let mut windows = self.windows.lock().unwrap_or_else(PoisonError::into_inner);
        let is_there = |taken: &Option<String>| taken.as_deref() == Some(serial);
        if self.fixed.iter().any(|fixed| fixed == serial) || windows.iter().any(|(_, taken)| is_there(taken)) {
            return Err(MachineError::DiskThere { serial: serial.to_owned() });
        }
        let at = windows.iter().position(|(_, taken)| taken.is_none()).ok_or(MachineError::NoRoom("block"))?;
        let device = Box::new(disk(serial, device, read_only)?);
        let transport = MmioTransport::new(device, self.memory.clone())
            .map_err(|source| MachineError::Device { device: disk_name(serial), source: source.into() })?;
        let (index, _) = windows[at];
        if let Err(error) = self.bus.fill(&self.vm, index, transport) {
            // One that KVM refuses has used its window up.
            windows.remove(at);
            return Err(error.into());
        }
        windows[at].1 = Some(serial.to_owned());
        Ok(())
    }

    /// Takes a device out of its window.
    pub(super) fn detach(&self, serial: &str) -> Result<(), MachineError> {
        let mut windows = self.windows.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(at) = windows.iter().position(|(_, taken)| taken.as_deref() == Some(serial)) else {
            return Err(MachineError::NoDisk { serial: serial.to_owned() });
        };
        let (index, _) = windows[at];
        if let Err(error) = self.bus.vacate(&self.vm, index) {
            windows.remove(at);
            return Err(error.into());
        }
        windows[at].1 = None;
        Ok(())
    }
}

/// A block device on an open one of the host's.
pub(super) fn disk(serial: &str, device: OwnedFd, read_only: bool) -> Result<Blk, MachineError> {
    let failed = |source| MachineError::Device { device: disk_name(serial), source };
    let disk = Disk::new(File::from(device), read_only).map_err(|source| failed(source.into()))?;
    Blk::new(disk, serial).map_err(|source| failed(source.into()))
}

/// What a block device is called.
pub(super) fn disk_name(serial: &str) -> String {
    format!("{serial} block")
}
