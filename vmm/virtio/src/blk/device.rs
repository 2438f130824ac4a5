// SPDX-License-Identifier: Apache-2.0
//! The device as the transport sees it.

use std::io;
use std::sync::Arc;

use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};

use super::disk::Disk;
use super::engine::Engine;
use super::request::{MAX_RANGE_SECTORS, MAX_RANGES, MAX_SEGMENT_LEN, MAX_SEGMENTS};
use super::wire::{
    BLK_SIZE_AT, CAPACITY_AT, CONFIG_LEN, DISCARD_SECTOR_ALIGNMENT_AT, F_BLK_SIZE, F_DISCARD, F_FLUSH, F_RO, F_SEG_MAX,
    F_SIZE_MAX, F_WRITE_ZEROES, ID_LEN, MAX_DISCARD_SECTORS_AT, MAX_DISCARD_SEG_AT, MAX_WRITE_ZEROES_SECTORS_AT,
    MAX_WRITE_ZEROES_SEG_AT, SECTOR, SEG_MAX_AT, SIZE_MAX_AT, WRITE_ZEROES_MAY_UNMAP_AT,
};
use crate::device::{ActivateError, Activation, DeviceKind, VirtioDevice, read_config_bytes};
use crate::worker::Worker;

/// Room for a request of the most segments, its header and its status.
const QUEUE_SIZE: u16 = 128;
const _: () = assert!(MAX_SEGMENTS + 2 == QUEUE_SIZE as u32);

/// Most bytes of a serial number.
pub const MAX_SERIAL_LEN: usize = ID_LEN;

/// A serial number that cannot be told to a driver.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("a disk's serial number has 1 to {MAX_SERIAL_LEN} printable bytes of ASCII; {serial:?} has not")]
pub struct SerialError {
    /// The serial number.
    pub serial: String,
}

/// By what the guest knows the disk, padded with NUL.
#[derive(Debug, Clone, Copy)]
pub struct Serial(pub(super) [u8; ID_LEN]);

impl Serial {
    /// That number.
    ///
    /// # Errors
    ///
    /// [`SerialError`].
    pub fn new(serial: &str) -> Result<Self, SerialError> {
        let mut bytes = [0; ID_LEN];
        match bytes.get_mut(..serial.len()) {
            Some(place) if !serial.is_empty() && serial.bytes().all(|byte| byte.is_ascii_graphic()) => {
                place.copy_from_slice(serial.as_bytes());
                Ok(Self(bytes))
            }
            _ => Err(SerialError { serial: serial.to_owned() }),
        }
    }
}

/// The block device.
#[derive(Debug)]
pub struct Blk {
    disk: Arc<Disk>,
    serial: Serial,
    config_space: [u8; CONFIG_LEN],
    running: Option<Worker<Engine>>,
}

impl Blk {
    /// A device that does not run yet.
    ///
    /// # Errors
    ///
    /// [`SerialError`].
    pub fn new(disk: Disk, serial: &str) -> Result<Self, SerialError> {
        let config_space = config_space(&disk);
        Ok(Self { disk: Arc::new(disk), serial: Serial::new(serial)?, config_space, running: None })
    }

    fn start(&self, activation: Activation) -> io::Result<Worker<Engine>> {
        let Activation { memory, features, mut queues, interrupt } = activation;
        let queue = queues.pop().ok_or(io::ErrorKind::InvalidInput)?;
        let engine = Engine::new(memory, features, queue, interrupt, Arc::clone(&self.disk), self.serial)?;
        Worker::spawn("blk", engine)
    }
}

/// What the driver is told of the disk.
fn config_space(disk: &Disk) -> [u8; CONFIG_LEN] {
    let mut space = [0; CONFIG_LEN];
    let mut put = |at: usize, bytes: &[u8]| space[at..at + bytes.len()].copy_from_slice(bytes);
    put(CAPACITY_AT, &disk.sectors().to_le_bytes());
    put(SIZE_MAX_AT, &MAX_SEGMENT_LEN.to_le_bytes());
    put(SEG_MAX_AT, &MAX_SEGMENTS.to_le_bytes());
    put(BLK_SIZE_AT, &disk.block_size().to_le_bytes());
    if !disk.is_read_only() {
        put(MAX_DISCARD_SECTORS_AT, &MAX_RANGE_SECTORS.to_le_bytes());
        put(MAX_DISCARD_SEG_AT, &MAX_RANGES.to_le_bytes());
        put(DISCARD_SECTOR_ALIGNMENT_AT, &(disk.block_size() / SECTOR as u32).to_le_bytes());
        put(MAX_WRITE_ZEROES_SECTORS_AT, &MAX_RANGE_SECTORS.to_le_bytes());
        put(MAX_WRITE_ZEROES_SEG_AT, &MAX_RANGES.to_le_bytes());
        put(WRITE_ZEROES_MAY_UNMAP_AT, &[1]);
    }
    space
}

impl VirtioDevice for Blk {
    fn kind(&self) -> DeviceKind {
        DeviceKind::Block
    }

    fn features(&self) -> u64 {
        let always = 1 << VIRTIO_RING_F_EVENT_IDX
            | 1 << VIRTIO_RING_F_INDIRECT_DESC
            | 1 << F_SIZE_MAX
            | 1 << F_SEG_MAX
            | 1 << F_BLK_SIZE
            | 1 << F_FLUSH;
        always | if self.disk.is_read_only() { 1 << F_RO } else { 1 << F_DISCARD | 1 << F_WRITE_ZEROES }
    }

    fn queue_max_sizes(&self) -> &[u16] {
        &[QUEUE_SIZE]
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        read_config_bytes(&self.config_space, offset, data);
    }

    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError> {
        self.reset();
        let running = self
            .start(activation)
            .map_err(|source| ActivateError { doing: "start the queue of the block device".to_owned(), source })?;
        self.running = Some(running);
        Ok(())
    }

    fn reset(&mut self) {
        if let Some(worker) = self.running.take() {
            // A panic of the worker ends the process, so that there is nothing to learn here.
            let _ = worker.stop();
        }
    }
}

impl Drop for Blk {
    fn drop(&mut self) {
        self.reset();
    }
}
