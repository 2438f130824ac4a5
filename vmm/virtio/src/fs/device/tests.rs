// SPDX-License-Identifier: Apache-2.0
//! The whole device, driven through its queues in guest memory.

use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

use rustix::fs::{CWD, Mode, OFlags};
use virtio_bindings::virtio_ring::{VRING_DESC_F_NEXT, VRING_DESC_F_WRITE};
use virtio_queue::Queue;
use virtio_queue::desc::split::Descriptor;
use vm_memory::{Address, Bytes, GuestAddress};

use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::*;
use crate::device::{ActiveQueue, GuestMemory, Interrupt};

const QUEUE_SIZE: u16 = 16;
const HIPRIO: GuestAddress = GuestAddress(0);
const REQUESTS: GuestAddress = GuestAddress(0x1000);
/// Where a queue's rings are, behind the descriptors at its start.
const AVAILABLE: u64 = 0x400;
const USED: u64 = 0x800;
const AVAILABLE_INDEX: GuestAddress = GuestAddress(REQUESTS.0 + AVAILABLE + 2);
const REQUEST: GuestAddress = GuestAddress(0x1_0000);
const ANSWER: GuestAddress = GuestAddress(0x2_0000);
const READ: u16 = VRING_DESC_F_NEXT as u16;
const WRITE: u16 = VRING_DESC_F_WRITE as u16;

/// A driver that has one request under way at a time.
struct Driver {
    device: FsDevice,
    memory: GuestMemory,
    interrupt: Arc<Interrupt>,
    events: Vec<EventFd>,
    used: u16,
    _folder: tempfile::TempDir,
}

impl Driver {
    fn start() -> Self {
        let folder = tempfile::tempdir().unwrap();
        fs::create_dir(folder.path().join("tree")).unwrap();
        fs::write(folder.path().join("tree/file"), "content").unwrap();
        let config = FsConfig {
            tag: "private".to_owned(),
            root: open(folder.path()),
            proc_self_fd: open(Path::new("/proc/self/fd")),
            cache: CachePolicy::Private,
            added: None,
        };
        let memory = GuestMemory::from_ranges(&[(GuestAddress(0), 0x10_0000)]).unwrap();
        let interrupt = Arc::new(Interrupt::new(EventFd::new(EFD_NONBLOCK).unwrap()));
        let device = FsDevice::new(config).unwrap();
        let mut driver = Self { device, memory, interrupt, events: Vec::new(), used: 0, _folder: folder };
        driver.activate();
        driver
    }

    fn activate(&mut self) {
        let mut active = |start| {
            self.memory.write_slice(&[0; 0x1000], start).unwrap();
            let low = |offset| Some(u32::try_from(start.0 + offset).unwrap());
            let mut queue = Queue::new(QUEUE_SIZE).unwrap();
            queue.set_desc_table_address(low(0), None);
            queue.set_avail_ring_address(low(AVAILABLE), None);
            queue.set_used_ring_address(low(USED), None);
            queue.set_ready(true);
            assert!(queue.is_valid(&self.memory));
            let event = EventFd::new(EFD_NONBLOCK).unwrap();
            self.events.push(event.try_clone().unwrap());
            ActiveQueue { queue, event }
        };
        let queues = vec![active(HIPRIO), active(REQUESTS)];
        let interrupt = Arc::clone(&self.interrupt);
        self.device.activate(Activation { memory: self.memory.clone(), features: 0, queues, interrupt }).unwrap();
        self.used = 0;
    }

    fn reset(&mut self) {
        self.device.reset();
        self.interrupt.clear();
        self.events.clear();
    }

    /// Puts a chain into the request queue.
    fn put(&mut self, descriptors: &[Descriptor]) {
        for (index, descriptor) in (0..).zip(descriptors) {
            self.memory.write_obj(*descriptor, REQUESTS.unchecked_add(16 * index)).unwrap();
        }
        // Every chain begins at descriptor 0, which is what the ring is full of.
        let available: u16 = self.memory.read_obj(AVAILABLE_INDEX).unwrap();
        self.memory.write_obj(available.wrapping_add(1), AVAILABLE_INDEX).unwrap();
        self.events.get(1).unwrap().write(1).unwrap();
    }

    /// The answer's error number and its body.
    fn ask(&mut self, opcode: u32, node: u64, body: &[u8]) -> (i32, Vec<u8>) {
        let length = u32::try_from(40 + body.len()).unwrap();
        let header = [&length.to_le_bytes()[..], &opcode.to_le_bytes(), &1_u64.to_le_bytes(), &node.to_le_bytes()];
        let request = [header.concat(), vec![0; 16], body.to_vec()].concat();
        self.memory.write_slice(&request, REQUEST).unwrap();
        // The header apart from the rest, and the answer in two parts, as a driver has them.
        self.put(&[
            Descriptor::new(REQUEST.0, 40, READ, 1),
            Descriptor::new(REQUEST.0 + 40, length - 40, READ, 2),
            Descriptor::new(ANSWER.0, 16, READ | WRITE, 3),
            Descriptor::new(ANSWER.0 + 16, 4096, WRITE, 0),
        ]);
        self.used += 1;
        let used = self.used;
        self.wait(|driver| driver.used_index() == used);
        let length: u32 = self.memory.read_obj(ANSWER).unwrap();
        let error: i32 = self.memory.read_obj(GuestAddress(ANSWER.0 + 4)).unwrap();
        let mut answer = vec![0; length as usize - 16];
        self.memory.read_slice(&mut answer, GuestAddress(ANSWER.0 + 16)).unwrap();
        (-error, answer)
    }

    fn used_index(&self) -> u16 {
        self.memory.read_obj(REQUESTS.unchecked_add(USED + 2)).unwrap()
    }

    fn wait(&self, is_done: impl Fn(&Self) -> bool) {
        let deadline = Instant::now() + Duration::from_secs(10);
        while !is_done(self) {
            assert!(Instant::now() < deadline, "the device does not answer");
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    fn init(&mut self) {
        let body: Vec<u8> = [7_u32, 41, 4096, u32::MAX, u32::MAX].iter().flat_map(|word| word.to_le_bytes()).collect();
        assert_eq!(self.ask(26, 0, &body).0, 0);
    }
}

fn open(path: &Path) -> OwnedFd {
    rustix::fs::openat(CWD, path, OFlags::PATH | OFlags::DIRECTORY, Mode::empty()).unwrap()
}

fn node(entry: &[u8]) -> u64 {
    u64::from_le_bytes(*entry.first_chunk().unwrap())
}

#[test]
fn a_file_is_read_through_the_queue() {
    let mut driver = Driver::start();

    driver.init();
    let tree = driver.ask(1, 1, b"tree\0");
    let file = driver.ask(1, node(&tree.1), b"file\0");
    let arguments = [vec![0; 16], 100_u32.to_le_bytes().to_vec(), vec![0; 20]].concat();
    let read = driver.ask(15, node(&file.1), &arguments);

    assert_eq!((tree.0, file.0), (0, 0));
    assert_eq!(read, (0, b"content".to_vec()));
    assert_eq!(driver.interrupt.status(), crate::device::INTERRUPT_USED_RING);
}

#[test]
fn a_broken_chain_needs_a_reset_and_a_reset_mends_it() {
    let broken: [&[Descriptor]; 4] = [
        // A readable buffer behind a writable one.
        &[Descriptor::new(ANSWER.0, 16, READ | WRITE, 1), Descriptor::new(REQUEST.0, 40, 0, 0)],
        // Memory that the guest has not.
        &[Descriptor::new(0xffff_0000, 40, 0, 0)],
        // No whole header.
        &[Descriptor::new(REQUEST.0, 39, READ, 1), Descriptor::new(ANSWER.0, 16, WRITE, 0)],
        // No room for an answer to INIT.
        &[Descriptor::new(REQUEST.0, 40, READ, 1), Descriptor::new(ANSWER.0, 15, WRITE, 0)],
    ];
    let mut driver = Driver::start();

    for chain in broken {
        driver.memory.write_slice(&[&40_u32.to_le_bytes()[..], &26_u32.to_le_bytes()].concat(), REQUEST).unwrap();
        driver.put(chain);
        driver.wait(|driver| driver.interrupt.needs_reset());

        driver.reset();
        driver.activate();
        driver.init();
    }
}

#[test]
fn a_ring_that_offers_more_than_it_has_needs_a_reset() {
    let driver = Driver::start();

    driver.memory.write_obj(QUEUE_SIZE + 1, AVAILABLE_INDEX).unwrap();
    driver.events.get(1).unwrap().write(1).unwrap();

    driver.wait(|driver| driver.interrupt.needs_reset());
}

#[test]
fn the_configuration_space_has_the_tag_and_one_request_queue() {
    let driver = Driver::start();
    let mut whole = [0xff; 44];
    let mut beyond = [0xff; 4];

    driver.device.read_config(0, &mut whole);
    driver.device.read_config(u64::MAX, &mut beyond);

    assert_eq!(&whole[..8], b"private\0");
    assert_eq!(&whole[36..], [1, 0, 0, 0, 0, 0, 0, 0]);
    assert_eq!(beyond, [0; 4]);
}

#[test]
fn tags_have_bounds() {
    let make = |tag: &str| {
        let (root, proc_self_fd) = (open(Path::new("/")), open(Path::new("/proc/self/fd")));
        let (tag, cache) = (tag.to_owned(), CachePolicy::Shared);
        FsDevice::new(FsConfig { tag, root, proc_self_fd, cache, added: None }).is_ok()
    };

    assert!(make(&"t".repeat(36)));
    assert!(!make(&"t".repeat(37)));
    assert!(!make(""));
    assert!(!make("a\0"));
}
