// SPDX-License-Identifier: Apache-2.0
//! The block devices, also those that a machine is given while it runs: they go into windows that are there from the beginning, as
//! those of network devices, and can be taken out again.

use std::fs::File;
use std::ops::Range;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use bulkhead_kvm::{GuestMemory, KvmError, Vm};
use bulkhead_virtio::blk::{Blk, Disk};
use bulkhead_virtio::mmio::MmioTransport;
use bulkhead_virtio::thread::builder;

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
    windows: Arc<Mutex<Windows>>,
}

/// The windows that are kept for block devices, but those that are being emptied, and those that are of no use any more.
#[derive(Debug, Default)]
struct Windows {
    empty: Vec<usize>,
    /// With the serial numbers of what is in them.
    filled: Vec<(usize, String)>,
}

/// A window that is to be emptied.
#[derive(Debug, Clone, Copy)]
struct Leaving {
    index: usize,
    /// Whether the guest's driver has let go of it: what is still at a device would not find another one in its place.
    is_released: bool,
}

impl Disks {
    /// With those windows, all of them empty.
    pub(super) fn new(vm: Arc<Vm>, memory: GuestMemory, bus: Bus, windows: Range<usize>, fixed: Vec<String>) -> Self {
        let windows = Windows { empty: windows.collect(), filled: Vec::new() };
        Self { vm, memory, bus, fixed, windows: Arc::new(Mutex::new(windows)) }
    }

    /// Puts a device into an empty window, and tells which that was.
    pub(super) fn attach(&self, serial: &str, device: OwnedFd, read_only: bool) -> Result<u32, MachineError> {
        let mut windows = lock(&self.windows);
        if self.fixed.iter().any(|fixed| fixed == serial) || windows.filled.iter().any(|(_, there)| there == serial) {
            return Err(MachineError::DiskThere { serial: serial.to_owned() });
        }
        let index = *windows.empty.first().ok_or(MachineError::NoRoom("block"))?;
        let device = Box::new(disk(serial, device, read_only)?);
        let transport = MmioTransport::new(device, self.memory.clone())
            .map_err(|source| MachineError::Device { device: disk_name(serial), source: source.into() })?;
        // One that KVM refuses has used its window up.
        windows.empty.remove(0);
        self.bus.fill(&self.vm, index, transport)?;
        windows.filled.push((index, serial.to_owned()));
        Ok(index as u32) // one of some tens
    }

    /// Takes a device out of its window, and tells when that is done: what the device has under way is waited for, and a host's
    /// device that does not answer is to hold up nobody else.
    pub(super) fn detach(
        &self,
        serial: &str,
        is_released: bool,
        done: impl FnOnce(Result<(), MachineError>) + Send + 'static,
    ) -> Result<(), MachineError> {
        let mut windows = lock(&self.windows);
        let Some(at) = windows.filled.iter().position(|(_, there)| there == serial) else {
            return Err(MachineError::NoDisk { serial: serial.to_owned() });
        };
        let (index, _) = windows.filled[at];
        let (vm, bus) = (Arc::clone(&self.vm), self.bus.clone());
        let leaving = Leaving { index, is_released };
        empty(&self.windows, leaving, move || bus.vacate(&vm, index), done)?;
        windows.filled.remove(at);
        Ok(())
    }
}

/// Has a window emptied by a thread of its own, which the process does not wait for when it ends.
fn empty(
    windows: &Arc<Mutex<Windows>>,
    Leaving { index, is_released }: Leaving,
    vacate: impl FnOnce() -> Result<(), KvmError> + Send + 'static,
    done: impl FnOnce(Result<(), MachineError>) + Send + 'static,
) -> Result<(), MachineError> {
    let windows = Arc::clone(windows);
    let emptying = builder("disk-detach").spawn(move || {
        let vacated = vacate();
        if vacated.is_ok() && is_released {
            lock(&windows).empty.push(index);
        }
        done(vacated.map_err(Into::into));
    });
    emptying.map(drop).map_err(|source| MachineError::Host { doing: "start a thread", source })
}

fn lock(windows: &Mutex<Windows>) -> MutexGuard<'_, Windows> {
    // Nothing panics while the lock is held.
    windows.lock().unwrap_or_else(PoisonError::into_inner)
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

#[cfg(test)]
mod tests {
    use std::sync::mpsc::channel;

    use super::*;

    /// Has window 7 emptied by `vacate`; whether that succeeded, and which windows are empty then.
    fn emptied(
        is_released: bool,
        vacate: impl FnOnce() -> Result<(), KvmError> + Send + 'static,
    ) -> (bool, Vec<usize>) {
        let windows = Arc::<Mutex<Windows>>::default();
        let (sender, done) = channel();
        let leaving = Leaving { index: 7, is_released };
        empty(&windows, leaving, vacate, move |result| sender.send(result.is_ok()).unwrap()).unwrap();
        (done.recv().unwrap(), std::mem::take(&mut lock(&windows).empty))
    }

    #[test]
    fn a_device_that_does_not_answer_holds_up_no_other() {
        let windows = Arc::new(Mutex::new(Windows { empty: vec![8], filled: Vec::new() }));
        let (answer, answered) = channel();
        let (sender, done) = channel();
        let leaving = Leaving { index: 7, is_released: true };
        let vacate = move || answered.recv().map_err(|_| KvmError::MissingCapability("an answer"));

        empty(&windows, leaving, vacate, move |result| sender.send(result.is_ok()).unwrap()).unwrap();

        // Its window is not used meanwhile; another one is.
        assert_eq!(std::mem::take(&mut lock(&windows).empty), [8]);
        assert!(done.try_recv().is_err());
        answer.send(()).unwrap();
        assert!(done.recv().unwrap());
        assert_eq!(lock(&windows).empty, [7]);
    }

    #[test]
    fn a_window_that_the_guest_has_not_let_go_of_is_not_used_again() {
        assert_eq!(emptied(true, || Ok(())), (true, vec![7]));
        assert_eq!(emptied(false, || Ok(())), (true, vec![]));
        assert_eq!(emptied(true, || Err(KvmError::MissingCapability("it"))), (false, vec![]));
    }
}
