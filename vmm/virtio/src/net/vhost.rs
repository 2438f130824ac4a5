// SPDX-License-Identifier: Apache-2.0
//! The host's kernel in the place of a queue pair's thread (linux/vhost.h): it moves frames between the rings and the tap,
//! is notified by the ioeventfds, and raises the device's interrupt itself.

use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};

use libc::{c_int, c_ulong};
use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_net::VIRTIO_NET_F_MRG_RXBUF;
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC, vring_used_elem};
use virtio_queue::{Queue, QueueT};
use vm_memory::{GuestAddress, GuestMemoryBackend as _, GuestMemoryRegion as _};
use vmm_sys_util::eventfd::EventFd;

use crate::device::{ActiveQueue, GuestMemory};

/// Of the features that a driver accepts, those that concern the rings. The others are the tap's, or the device's.
const RING_FEATURES: u64 = 1 << VIRTIO_F_VERSION_1
    | 1 << VIRTIO_NET_F_MRG_RXBUF
    | 1 << VIRTIO_RING_F_EVENT_IDX
    | 1 << VIRTIO_RING_F_INDIRECT_DESC;

/// `VHOST_VIRTIO`: the type of all requests.
const TYPE: c_ulong = 0xaf;
const READ: c_ulong = 2;
const WRITE: c_ulong = 1;

/// The number of a request that hands over a `T`, as `_IOC` of asm-generic/ioctl.h makes it.
const fn request<T>(direction: c_ulong, number: c_ulong) -> c_ulong {
    direction << 30 | (size_of::<T>() as c_ulong) << 16 | TYPE << 8 | number
}

const GET_FEATURES: c_ulong = request::<u64>(READ, 0x00);
const SET_FEATURES: c_ulong = request::<u64>(WRITE, 0x00);
const SET_OWNER: c_ulong = request::<()>(0, 0x01);
/// The regions behind the head do not count.
const SET_MEM_TABLE: c_ulong = request::<u64>(WRITE, 0x03);
const SET_VRING_NUM: c_ulong = request::<VringState>(WRITE, 0x10);
const SET_VRING_ADDR: c_ulong = request::<VringAddresses>(WRITE, 0x11);
const SET_VRING_BASE: c_ulong = request::<VringState>(WRITE, 0x12);
const GET_VRING_BASE: c_ulong = request::<VringState>(READ | WRITE, 0x12);
const SET_VRING_KICK: c_ulong = request::<VringFile>(WRITE, 0x20);
const SET_VRING_CALL: c_ulong = request::<VringFile>(WRITE, 0x21);
const SET_VRING_ERR: c_ulong = request::<VringFile>(WRITE, 0x22);
const NET_SET_BACKEND: c_ulong = request::<VringFile>(WRITE, 0x30);

/// `struct vhost_vring_state`.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
struct VringState {
    index: u32,
    number: u32,
}

/// `struct vhost_vring_file`.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
struct VringFile {
    index: u32,
    /// -1 for none.
    fd: c_int,
}

/// `struct vhost_vring_addr`, whose addresses are this process'.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
struct VringAddresses {
    index: u32,
    flags: u32,
    descriptors: u64,
    used: u64,
    available: u64,
    log: u64,
}

/// `/dev/vhost-net`, opened once for each queue pair.
#[derive(Debug)]
pub struct VhostNet {
    device: OwnedFd,
    /// Whether it is this process' yet.
    is_owned: bool,
}

impl VhostNet {
    /// Takes the open device, which nobody has used yet.
    #[must_use]
    pub fn new(device: OwnedFd) -> Self {
        Self { device, is_owned: false }
    }

    /// Whether the host's kernel can do all that a guest may ask for.
    ///
    /// # Errors
    ///
    /// `ENOTTY` when it is not vhost.
    pub fn is_sufficient(device: impl AsFd) -> io::Result<bool> {
        let mut features = 0_u64;
        // SAFETY: the descriptor is open, and the kernel writes a u64 at the address, which outlives the call. What is not
        // vhost does not know the request.
        let result = unsafe { libc::ioctl(device.as_fd().as_raw_fd(), GET_FEATURES, &raw mut features) };
        succeeded(result).map(|()| features & RING_FEATURES == RING_FEATURES)
    }

    /// Serves the receive and the transmit queue from here on. `interrupt` is signalled when the driver is to be
    /// interrupted, `errors` when the kernel cannot go on with a queue.
    pub(super) fn start(
        &mut self,
        memory: &GuestMemory,
        accepted: u64,
        queues: &[ActiveQueue; 2],
        interrupt: &EventFd,
        errors: &EventFd,
        tap: RawFd,
    ) -> io::Result<()> {
        if !self.is_owned {
            self.hand_over(SET_OWNER, &())?;
            self.is_owned = true;
        }
        self.hand_over(SET_FEATURES, &(accepted & RING_FEATURES))?;
        let table = memory_table(memory);
        // SAFETY: the kernel reads the table's head and as many regions as it says there are, all of which `table` holds
        // (`memory_table`). The regions are guest memory, and stay mapped as long as the device uses them: `VhostPair`
        // holds the memory until after `stop`, or until the process ends and the device with it.
        succeeded(unsafe { libc::ioctl(self.device.as_raw_fd(), SET_MEM_TABLE, table.as_ptr()) })?;
        for (index, active) in (0..).zip(queues) {
            let queue = &active.queue;
            self.hand_over(SET_VRING_NUM, &VringState { index, number: queue.size().into() })?;
            self.hand_over(SET_VRING_BASE, &VringState { index, number: queue.next_avail().into() })?;
            self.hand_over(SET_VRING_ADDR, &ring_addresses(memory, index, queue)?)?;
            self.hand_over(SET_VRING_CALL, &VringFile { index, fd: interrupt.as_raw_fd() })?;
            self.hand_over(SET_VRING_ERR, &VringFile { index, fd: errors.as_raw_fd() })?;
            self.hand_over(SET_VRING_KICK, &VringFile { index, fd: active.event.as_raw_fd() })?;
        }
        for index in 0..2 {
            self.hand_over(NET_SET_BACKEND, &VringFile { index, fd: tap })?;
        }
        Ok(())
    }

    /// Leaves the queues alone; returns where in the available ring of each the next chain is. When this has returned,
    /// nothing touches guest memory any more.
    pub(super) fn stop(&self) -> io::Result<[u16; 2]> {
        for index in 0..2 {
            self.hand_over(NET_SET_BACKEND, &VringFile { index, fd: -1 })?;
        }
        let mut next = [0; 2];
        for (index, next) in (0..).zip(&mut next) {
            let mut state = VringState { index, number: 0 };
            // SAFETY: the descriptor is open, and the kernel reads and writes one `vhost_vring_state` at the address,
            // which outlives the call.
            succeeded(unsafe { libc::ioctl(self.device.as_raw_fd(), GET_VRING_BASE, &raw mut state) })?;
            *next = (state.number & u32::from(u16::MAX)) as u16;
            for request in [SET_VRING_KICK, SET_VRING_CALL, SET_VRING_ERR] {
                self.hand_over(request, &VringFile { index, fd: -1 })?;
            }
        }
        Ok(next)
    }

    /// A request for which the kernel reads `argument`.
    fn hand_over<T: Copy>(&self, request: c_ulong, argument: &T) -> io::Result<()> {
        // SAFETY: the descriptor is open. Each request is used with the type that its number was made of (`request`), and
        // the kernel reads that many bytes at the address, which outlives the call. What it keeps are descriptors, which
        // it holds itself, and addresses of rings, which are guest memory: see `start`.
        succeeded(unsafe { libc::ioctl(self.device.as_raw_fd(), request, std::ptr::from_ref(argument)) })
    }
}

/// A `struct vhost_memory`: the number of regions, padding, and each region's guest address, size, address here, and
/// flags.
fn memory_table(memory: &GuestMemory) -> Vec<u64> {
    let mut table = vec![memory.num_regions() as u64];
    for region in memory.iter() {
        table.extend([region.start_addr().0, region.len(), region.as_ptr() as u64, 0]);
    }
    table
}

/// Where a queue's rings are, which have to be whole in one region.
fn ring_addresses(memory: &GuestMemory, index: u32, queue: &Queue) -> io::Result<VringAddresses> {
    let size = usize::from(queue.size());
    let address = |at: u64, len: usize| {
        let slice = memory.get_slice(GuestAddress(at), len).map_err(io::Error::other)?;
        Ok::<_, io::Error>(slice.ptr_guard_mut().as_ptr() as u64)
    };
    // Each ring has flags and an index in front, and an event index behind.
    Ok(VringAddresses {
        index,
        flags: 0,
        descriptors: address(queue.desc_table(), size * 16)?,
        used: address(queue.used_ring(), 6 + size * size_of::<vring_used_elem>())?,
        available: address(queue.avail_ring(), 6 + size * size_of::<u16>())?,
        log: 0,
    })
}

fn succeeded(result: c_int) -> io::Result<()> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests_have_the_numbers_of_the_kernels_headers() {
        assert_eq!([GET_FEATURES, SET_FEATURES, SET_OWNER], [0x8008_af00, 0x4008_af00, 0xaf01]);
        assert_eq!([SET_MEM_TABLE, SET_VRING_NUM, SET_VRING_ADDR], [0x4008_af03, 0x4008_af10, 0x4028_af11]);
        assert_eq!([SET_VRING_BASE, GET_VRING_BASE, SET_VRING_KICK], [0x4008_af12, 0xc008_af12, 0x4008_af20]);
        assert_eq!([SET_VRING_CALL, SET_VRING_ERR, NET_SET_BACKEND], [0x4008_af21, 0x4008_af22, 0x4008_af30]);
    }

    #[test]
    fn the_memory_table_names_each_region() {
        let memory = GuestMemory::from_ranges(&[(GuestAddress(0), 0x1000), (GuestAddress(0x1_0000), 0x2000)]).unwrap();

        let table = memory_table(&memory);

        assert_eq!(table.len(), 1 + 2 * 4);
        assert_eq!((table[0], table[1], table[2], table[4]), (2, 0, 0x1000, 0));
        assert_eq!((table[5], table[6]), (0x1_0000, 0x2000));
    }

    #[test]
    fn what_is_not_vhost_is_refused() {
        let file = std::fs::File::open("/dev/null").unwrap();
        assert!(VhostNet::is_sufficient(&file).is_err());
    }
}
