// SPDX-License-Identifier: Apache-2.0
//! The virtio side of the device.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::thread::JoinHandle;

use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};
use virtio_queue::QueueT;

use super::server::Server;
use super::trees::AddedTrees;
use super::worker::{self, Stop, Worker};
use crate::device::{ActivateError, Activation, DeviceKind, VirtioDevice};

/// Bytes of a tag in the configuration space.
const TAG_LEN: usize = 36;
/// Bytes of the configuration space: the tag and the number of request queues.
const CONFIG_LEN: usize = TAG_LEN + 4;
/// One for requests that must not wait (FORGET), and one for all others. The guest's largest request is four buffers
/// smaller than the request queue, which therefore is larger than the 256 pages of a request.
const QUEUE_MAX_SIZES: [u16; 2] = [128, 512];

/// How the guest may cache what it sees.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CachePolicy {
    /// Nobody else changes the trees: names and attributes hold for a day, that a name is not there for a second, data is
    /// kept and written back late. Where no tree is read-only or can be added, files are not even opened one by one. A file that the guest
    /// has written to stays open for writing until the guest drops it from its cache, so the host cannot run it sooner.
    Private,
    /// The host may change the trees at any time: names and attributes are asked for at each use, cached data is
    /// dropped when the file's size or time has changed and when it is opened, writes go through at once.
    Shared,
}

/// What a device shares.
#[derive(Debug)]
pub struct FsConfig {
    /// What the guest mounts it by; 1 to 36 bytes, none of them NUL.
    pub tag: String,
    /// The top directory; may be `O_PATH`. Its children are the shared trees. The guest cannot change the top itself.
    pub root: OwnedFd,
    /// The directory `/proc/self/fd`, opened by this process; may be `O_PATH`.
    pub proc_self_fd: OwnedFd,
    /// How the guest may cache.
    pub cache: CachePolicy,
    /// The trees that come and go while the device runs; [`None`] if the trees are those at the top for good.
    pub added: Option<AddedTrees>,
}

/// A tag that does not fit the configuration space.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("a share device's tag has 1 to {TAG_LEN} bytes, none of them NUL; {tag:?} has not")]
pub struct TagError {
    /// The tag.
    pub tag: String,
}

/// The device. It is idle until the driver starts it; then a thread serves it.
///
/// The process has to ignore `SIGXFSZ` if it has a limit on file sizes.
#[derive(Debug)]
pub struct FsDevice {
    tag: String,
    config_space: [u8; CONFIG_LEN],
    root: OwnedFd,
    proc_self_fd: Arc<OwnedFd>,
    cache: CachePolicy,
    added: Option<AddedTrees>,
    running: Option<Running>,
}

#[derive(Debug)]
struct Running {
    thread: JoinHandle<()>,
    stop: Arc<Stop>,
}

impl FsDevice {
    /// An idle device. Touches no file.
    ///
    /// # Errors
    ///
    /// [`TagError`].
    pub fn new(config: FsConfig) -> Result<Self, TagError> {
        let FsConfig { tag, root, proc_self_fd, cache, added } = config;
        let mut config_space = [0; CONFIG_LEN];
        let (tag_space, queue_count) = config_space.split_at_mut(TAG_LEN);
        match tag_space.get_mut(..tag.len()) {
            Some(space) if !tag.is_empty() && !tag.contains('\0') => space.copy_from_slice(tag.as_bytes()),
            _ => return Err(TagError { tag }),
        }
        queue_count.copy_from_slice(&1_u32.to_le_bytes());
        let proc_self_fd = Arc::new(proc_self_fd);
        Ok(Self { tag, config_space, root, proc_self_fd, cache, added, running: None })
    }

    fn start(&mut self, activation: Activation) -> io::Result<Running> {
        let Activation { memory, features, mut queues, interrupt } = activation;
        for active in &mut queues {
            active.queue.set_event_idx(features & 1 << VIRTIO_RING_F_EVENT_IDX != 0);
        }
        let [hiprio, requests] = <[_; 2]>::try_from(queues)
            .map_err(|queues| io::Error::other(format!("the device has 2 queues, not {}", queues.len())))?;
        let stop = Arc::new(Stop::new()?);
        let worker = Worker {
            memory,
            queues: [hiprio, requests],
            interrupt,
            stop: Arc::clone(&stop),
            server: Server::new(&self.root, Arc::clone(&self.proc_self_fd), self.cache, self.added.clone())?,
        };
        Ok(Running { thread: worker::spawn(&format!("fs-{}", self.tag), worker)?, stop })
    }
}

impl VirtioDevice for FsDevice {
    fn kind(&self) -> DeviceKind {
        DeviceKind::Fs
    }

    fn features(&self) -> u64 {
        1 << VIRTIO_RING_F_EVENT_IDX | 1 << VIRTIO_RING_F_INDIRECT_DESC
    }

    fn queue_max_sizes(&self) -> &[u16] {
        &QUEUE_MAX_SIZES
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        let rest = usize::try_from(offset).ok().and_then(|offset| self.config_space.get(offset..));
        for (byte, value) in data.iter_mut().zip(rest.unwrap_or_default()) {
            *byte = *value;
        }
    }

    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError> {
        self.reset();
        let running = self.start(activation).map_err(|source| ActivateError {
            doing: format!("start the file server of share {:?}", self.tag),
            source,
        })?;
        self.running = Some(running);
        Ok(())
    }

    fn reset(&mut self) {
        let Some(Running { thread, stop }) = self.running.take() else { return };
        stop.set();
        // A panic of the worker ends the process, so that there is nothing to learn here.
        let _ = thread.join();
    }
}

impl Drop for FsDevice {
    fn drop(&mut self) {
        self.reset();
    }
}

#[cfg(test)]
mod tests;
