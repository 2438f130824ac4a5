// SPDX-License-Identifier: Apache-2.0
//! The device, driven through its queue in guest memory.

use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::ops::ControlFlow;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use virtio_bindings::virtio_ring::{VRING_DESC_F_NEXT, VRING_DESC_F_WRITE};
use virtio_queue::desc::split::Descriptor;
use virtio_queue::{Queue, QueueT};
use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::device::Serial;
use super::request::{MAX_RANGE_SECTORS, MAX_RANGES};
use super::wire::{F_DISCARD, F_FLUSH, F_RO, SECTOR, T_DISCARD, T_FLUSH, T_GET_ID, T_IN, T_OUT, T_WRITE_ZEROES};
use super::{Blk, Disk, Engine};
use crate::device::{ActiveQueue, DeviceKind, GuestMemory, Interrupt, VirtioDevice};
use crate::worker::EventHandler;

const QUEUE_SIZE: u16 = 16;
const AVAILABLE: u64 = 0x400;
const USED: u64 = 0x800;
const HEADER: u64 = 0x1000;
const DATA: u64 = 0x2000;
const DATA_LEN: usize = 0x2000;
const STATUS: u64 = 0x5000;
const NEXT: u16 = VRING_DESC_F_NEXT as u16;
const WRITE: u16 = VRING_DESC_F_WRITE as u16;

const OK: u8 = 0;
const IO_ERROR: u8 = 1;
const UNSUPPORTED: u8 = 2;
/// No answer: the device has not touched it.
const UNTOUCHED: u8 = 0xee;

/// Sectors of the disk.
const SECTORS: u64 = 8;

/// A driver that has one request under way at a time, of a device without a thread.
struct Driver {
    memory: GuestMemory,
    interrupt: Arc<Interrupt>,
    engine: Engine,
    file: File,
    asked: u16,
    ended: bool,
}

impl Driver {
    fn new(read_only: bool) -> Self {
        let file = tempfile::tempfile().unwrap();
        for sector in 0..SECTORS {
            file.write_all_at(&[b'a' + sector as u8; SECTOR as usize], sector * SECTOR).unwrap();
        }
        let memory = GuestMemory::from_ranges(&[(GuestAddress(0), 0x1_0000)]).unwrap();
        let mut queue = Queue::new(QUEUE_SIZE).unwrap();
        queue.set_avail_ring_address(Some(AVAILABLE as u32), None);
        queue.set_used_ring_address(Some(USED as u32), None);
        queue.set_ready(true);
        let event = || EventFd::new(EFD_NONBLOCK).unwrap();
        let interrupt = Arc::new(Interrupt::new(event()));
        let disk = Arc::new(Disk::new(file.try_clone().unwrap(), read_only).unwrap());
        let (queue, serial) = (ActiveQueue { queue, event: event() }, Serial::new("disk-0").unwrap());
        let accepted = 1 << F_FLUSH;
        let engine = Engine::new(memory.clone(), accepted, queue, Arc::clone(&interrupt), disk, serial).unwrap();
        Self { memory, interrupt, engine, file, asked: 0, ended: false }
    }

    /// Puts a chain into the queue and lets the device look; the status.
    fn put(&mut self, descriptors: &[Descriptor]) -> u8 {
        self.memory.write_obj(UNTOUCHED, GuestAddress(STATUS)).unwrap();
        for (index, descriptor) in (0..).zip(descriptors) {
            self.memory.write_obj(*descriptor, GuestAddress(16 * index)).unwrap();
        }
        // Every chain begins at descriptor 0, which is what the ring is full of.
        self.asked += 1;
        self.memory.write_obj(self.asked, GuestAddress(AVAILABLE + 2)).unwrap();
        self.ended = self.engine.handle(&[]) == ControlFlow::Break(());
        self.memory.read_obj(GuestAddress(STATUS)).unwrap()
    }

    fn header(&self, kind: u32, sector: u64) -> Descriptor {
        let header = [&kind.to_le_bytes()[..], &[0; 4], &sector.to_le_bytes()].concat();
        self.memory.write_slice(&header, GuestAddress(HEADER)).unwrap();
        Descriptor::new(HEADER, 16, NEXT, 1)
    }

    /// Asks with so many bytes of room; the status, and what is there then.
    fn ask(&mut self, kind: u32, sector: u64, room: usize) -> (u8, Vec<u8>) {
        self.memory.write_slice(&[UNTOUCHED; DATA_LEN], GuestAddress(DATA)).unwrap();
        let header = self.header(kind, sector);
        let status = self.put(&[
            header,
            Descriptor::new(DATA, room as u32, NEXT | WRITE, 2),
            Descriptor::new(STATUS, 1, WRITE, 0),
        ]);
        let mut bytes = vec![0; room];
        self.memory.read_slice(&mut bytes, GuestAddress(DATA)).unwrap();
        (status, bytes)
    }

    /// Gives data with a request; the status.
    fn give(&mut self, kind: u32, sector: u64, data: &[u8]) -> u8 {
        self.memory.write_slice(data, GuestAddress(DATA)).unwrap();
        let header = self.header(kind, sector);
        self.put(&[header, Descriptor::new(DATA, data.len() as u32, NEXT, 2), Descriptor::new(STATUS, 1, WRITE, 0)])
    }

    /// Asks with neither; the status.
    fn order(&mut self, kind: u32) -> u8 {
        let header = self.header(kind, 0);
        self.put(&[header, Descriptor::new(STATUS, 1, WRITE, 0)])
    }

    fn ranges(&mut self, kind: u32, ranges: &[(u64, u32, u32)]) -> u8 {
        let bytes: Vec<u8> = ranges
            .iter()
            .flat_map(|(sector, count, flags)| {
                [&sector.to_le_bytes()[..], &count.to_le_bytes(), &flags.to_le_bytes()].concat()
            })
            .collect();
        self.give(kind, 0, &bytes)
    }

    /// The length that the device says it has written of the last chain.
    fn used(&self) -> (u16, u32) {
        let place = USED + 4 + 8 * u64::from((self.asked - 1) % QUEUE_SIZE);
        let used = self.memory.read_obj(GuestAddress(USED + 2)).unwrap();
        (used, self.memory.read_obj(GuestAddress(place + 4)).unwrap())
    }

    /// The first byte of each sector of the file, which has to have kept its length.
    fn content(&mut self) -> String {
        let mut bytes = Vec::new();
        self.file.seek(SeekFrom::Start(0)).unwrap();
        self.file.read_to_end(&mut bytes).unwrap();
        assert_eq!(bytes.len() as u64, SECTORS * SECTOR);
        bytes.iter().step_by(SECTOR as usize).map(|byte| if *byte == 0 { '0' } else { char::from(*byte) }).collect()
    }
}

#[test]
fn what_is_written_is_on_the_disk_and_read_again() {
    let mut driver = Driver::new(false);

    assert_eq!(driver.give(T_OUT, 2, &[b'X'; 1024]), OK);
    assert_eq!(driver.used(), (1, 1));
    let (status, bytes) = driver.ask(T_IN, 1, 2048);

    assert_eq!((status, driver.used()), (OK, (2, 2049)));
    assert_eq!(bytes, [[b'b'; 512], [b'X'; 512], [b'X'; 512], [b'e'; 512]].concat());
    assert_eq!(driver.content(), "abXXefgh");
    assert_eq!(driver.interrupt.status(), 1);
}

#[test]
fn a_header_may_come_in_pieces_and_with_its_data() {
    let mut driver = Driver::new(false);
    let _ = driver.header(T_OUT, 7);
    driver.memory.write_slice(&[b'Y'; 512], GuestAddress(HEADER + 16)).unwrap();

    let status = driver.put(&[
        Descriptor::new(HEADER, 5, NEXT, 1),
        Descriptor::new(HEADER + 5, 11 + 512, NEXT, 2),
        Descriptor::new(STATUS, 1, WRITE, 0),
    ]);

    assert_eq!((status, driver.content().as_str()), (OK, "abcdefgY"));
}

#[test]
fn nothing_beyond_the_disk_is_read_or_written() {
    let mut driver = Driver::new(false);
    for (sector, length) in [(7, 1024), (8, 512), (u64::MAX, 512), (u64::MAX / 512, 512), (0, 511), (0, 513)] {
        let (status, bytes) = driver.ask(T_IN, sector, length);
        assert_eq!(status, IO_ERROR, "{length} bytes at {sector}");
        assert!(bytes.iter().all(|byte| *byte == UNTOUCHED));
        assert_eq!(driver.used().1, 0);
        assert_eq!(driver.give(T_OUT, sector, &vec![b'Z'; length]), IO_ERROR, "{length} bytes at {sector}");
    }
    assert_eq!(driver.content(), "abcdefgh");
    assert!(!driver.ended && !driver.interrupt.needs_reset());
}

#[test]
fn a_disk_that_is_read_only_is_not_written() {
    let mut driver = Driver::new(true);

    assert_eq!(driver.give(T_OUT, 0, &[b'X'; 512]), IO_ERROR);
    assert_eq!(driver.ranges(T_DISCARD, &[(0, 1, 0)]), IO_ERROR);
    assert_eq!(driver.ranges(T_WRITE_ZEROES, &[(0, 1, 0)]), IO_ERROR);

    assert_eq!(driver.order(T_FLUSH), OK);
    assert_eq!(driver.ask(T_IN, 0, 512), (OK, vec![b'a'; 512]));
    assert_eq!(driver.content(), "abcdefgh");
}

#[test]
fn the_serial_number_is_told() {
    let mut driver = Driver::new(false);
    assert_eq!(driver.ask(T_GET_ID, 0, 20), (OK, b"disk-0\0\0\0\0\0\0\0\0\0\0\0\0\0\0".to_vec()));
    assert_eq!(driver.ask(T_GET_ID, 0, 19).0, IO_ERROR);
    for serial in ["", "with space", "of more than 20 bytes", "ü", "nul\0"] {
        assert!(Serial::new(serial).is_err(), "{serial:?}");
    }
    assert!(Serial::new("of-exactly-20-bytes.").is_ok());
}

#[test]
fn ranges_are_given_up_and_made_zero() {
    let mut driver = Driver::new(false);

    let zeroed = driver.ranges(T_WRITE_ZEROES, &[(0, 2, 0), (7, 1, 1)]);
    // The temporary folder's file system may have neither.
    if zeroed != UNSUPPORTED {
        assert_eq!((zeroed, driver.content().as_str()), (OK, "00cdefg0"));
    }
    let discarded = driver.ranges(T_DISCARD, &[(4, 2, 0)]);
    if discarded != UNSUPPORTED {
        assert_eq!((discarded, &driver.content()[2..4], &driver.content()[4..6]), (OK, "cd", "00"));
    }
}

#[test]
fn ranges_that_are_none_are_refused() {
    let mut driver = Driver::new(false);
    for kind in [T_DISCARD, T_WRITE_ZEROES] {
        for range in [(7, 2, 0), (8, 1, 0), (u64::MAX, 1, 0), (0, 0, 0), (0, MAX_RANGE_SECTORS + 1, 0)] {
            assert_eq!(driver.ranges(kind, &[range]), IO_ERROR, "{range:?}");
            // Also behind one that is good, which is then not touched.
            assert_eq!(driver.ranges(kind, &[(0, 1, 0), range]), IO_ERROR, "{range:?}");
        }
        assert_eq!(driver.ranges(kind, &[(0, 1, 2)]), UNSUPPORTED);
        assert_eq!(driver.ranges(kind, &vec![(0, 1, 0); MAX_RANGES as usize + 1]), IO_ERROR);
        assert_eq!(driver.give(kind, 0, &[0; 15]), IO_ERROR);
        assert_eq!(driver.order(kind), IO_ERROR);
    }
    assert_eq!(driver.ranges(T_DISCARD, &[(0, 1, 1)]), UNSUPPORTED);
    assert_eq!(driver.content(), "abcdefgh");
}

#[test]
fn what_the_device_does_not_know_it_says_so() {
    let mut driver = Driver::new(false);
    for kind in [2, 3, 16, u32::MAX] {
        assert_eq!(driver.order(kind), UNSUPPORTED, "{kind}");
    }
    // Requests in the wrong direction.
    assert_eq!(driver.give(T_IN, 0, &[0; 512]), IO_ERROR);
    assert_eq!(driver.ask(T_OUT, 0, 512).0, IO_ERROR);
    assert_eq!(driver.give(T_FLUSH, 0, &[0; 512]), IO_ERROR);
}

#[test]
fn what_cannot_be_answered_asks_for_a_reset() {
    let unanswerable: [&[Descriptor]; 5] = [
        &[Descriptor::new(HEADER, 16, 0, 0)],
        &[Descriptor::new(HEADER, 15, NEXT, 1), Descriptor::new(STATUS, 1, WRITE, 0)],
        &[Descriptor::new(STATUS, 1, WRITE, 0)],
        &[Descriptor::new(STATUS, 1, NEXT | WRITE, 1), Descriptor::new(HEADER, 16, 0, 0)],
        &[Descriptor::new(0xffff_0000, 16, NEXT, 1), Descriptor::new(STATUS, 1, WRITE, 0)],
    ];
    for chain in unanswerable {
        let mut driver = Driver::new(false);
        let _ = driver.header(T_FLUSH, 0);
        assert_eq!(driver.put(chain), UNTOUCHED, "{chain:?}");
        assert!(driver.ended && driver.interrupt.needs_reset(), "{chain:?}");
    }
    // A ring with more in it than it has room for.
    let mut driver = Driver::new(false);
    driver.asked = QUEUE_SIZE;
    assert_eq!(driver.order(T_FLUSH), UNTOUCHED);
    assert!(driver.ended && driver.interrupt.needs_reset());
}

#[test]
fn the_driver_is_told_what_the_disk_is() {
    let disk = |read_only| {
        let file = tempfile::tempfile().unwrap();
        file.set_len(9 * SECTOR).unwrap();
        Blk::new(Disk::new(file, read_only).unwrap(), "x").unwrap()
    };
    let (writable, read_only) = (disk(false), disk(true));
    let word = |device: &Blk, at| {
        let mut bytes = [0xff; 4];
        device.read_config(at, &mut bytes);
        u32::from_le_bytes(bytes)
    };

    assert_eq!(writable.kind() as u32, DeviceKind::Block as u32);
    assert_eq!([0, 4, 12, 20].map(|at| word(&writable, at)), [9, 0, 126, 512]);
    assert_ne!((word(&writable, 36), word(&writable, 48)), (0, 0));
    assert_eq!((word(&read_only, 36), word(&read_only, 48), word(&read_only, 60)), (0, 0, 0));
    let has = |device: &Blk, feature| device.features() & (1_u64 << feature) != 0;
    assert_eq!([F_RO, F_DISCARD, F_FLUSH].map(|feature| has(&writable, feature)), [false, true, true]);
    assert_eq!([F_RO, F_DISCARD, F_FLUSH].map(|feature| has(&read_only, feature)), [true, false, true]);
}
