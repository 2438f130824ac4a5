// SPDX-License-Identifier: Apache-2.0
//! The device as the transport sees it.

use std::io;

use virtio_bindings::virtio_net::{VIRTIO_NET_F_CTRL_VQ, VIRTIO_NET_F_MQ};

use super::backend::{AttachError, Backend, LinkKind};
use super::control::ControlQueue;
use super::limit::Limits;
use super::port::Port;
use super::{MAX_PAIRS, MacAddress, features};
use crate::device::{ActivateError, Activation, DeviceKind, Notification, VirtioDevice, read_config_bytes};

/// Sizes of each pair's receive and transmit queue. A receive ring of Linux' buffers of 1.5 KiB holds five frames of 64 KiB.
const PAIR_SIZES: [u16; 2] = [256, 256];
/// Size of the control queue: Linux waits for each answer, and a command has five pieces at most.
const CONTROL_SIZE: u16 = 16;

/// What a network device is made of.
#[derive(Debug)]
pub struct NetConfig {
    /// The guest's address.
    pub mac: MacAddress,
    /// What it is to hang on.
    pub link: LinkKind,
    /// How many pairs of queues there are: 1 to [`MAX_PAIRS`], and 1 on a stream socket.
    pub pairs: u16,
    /// How much may go.
    pub limits: Limits,
}

/// The network device.
#[derive(Debug)]
pub struct Net {
    port: Port,
    features: u64,
    pairs: u16,
    queue_sizes: Vec<u16>,
    control: Option<ControlQueue>,
}

impl Net {
    /// A device that does not run yet, and hangs on nothing.
    #[must_use]
    pub fn new(config: &NetConfig) -> Self {
        let &NetConfig { mac, link, pairs, limits } = config;
        let max_pairs = if link == LinkKind::Stream { 1 } else { MAX_PAIRS };
        let pairs = pairs.clamp(1, max_pairs);
        let mut queue_sizes = PAIR_SIZES.repeat(pairs.into());
        queue_sizes.push(CONTROL_SIZE);
        let port = Port::new(mac, link, pairs, limits);
        Self { port, features: features::offered(link, pairs), pairs, queue_sizes, control: None }
    }

    /// The same on `backend`.
    ///
    /// # Errors
    ///
    /// When it is not what the device is made for.
    pub fn on(self, backend: Backend) -> Result<Self, AttachError> {
        self.port.attach(backend)?;
        Ok(self)
    }

    /// The device's host side.
    #[must_use]
    pub fn port(&self) -> &Port {
        &self.port
    }

    fn start(&mut self, activation: Activation) -> io::Result<()> {
        let Activation { memory, features: accepted, mut queues, interrupt } = activation;
        if features::has(accepted, VIRTIO_NET_F_CTRL_VQ) {
            let control = queues.pop().ok_or(io::ErrorKind::InvalidInput)?;
            self.control = Some(ControlQueue::new(control.queue, memory.clone(), interrupt.clone()));
        }
        let mut pairs = Vec::with_capacity(queues.len() / 2);
        let mut queues = queues.into_iter();
        while let (Some(rx), Some(tx)) = (queues.next(), queues.next()) {
            pairs.push([rx, tx]);
        }
        self.port.activate(memory, accepted, interrupt, pairs)
    }
}

impl VirtioDevice for Net {
    fn kind(&self) -> DeviceKind {
        DeviceKind::Net
    }

    fn features(&self) -> u64 {
        self.features
    }

    fn accepts(&self, features: u64) -> bool {
        features::go_together(features, self.pairs)
    }

    fn queue_max_sizes(&self) -> &[u16] {
        &self.queue_sizes
    }

    /// The control queue comes behind all pairs.
    fn queue_count(&self, features: u64) -> usize {
        let pairs = if features::has(features, VIRTIO_NET_F_MQ) { self.pairs } else { 1 };
        2 * usize::from(pairs) + usize::from(features::has(features, VIRTIO_NET_F_CTRL_VQ))
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        read_config_bytes(&self.port.config_space(), offset, data);
    }

    fn config_generation(&self) -> u32 {
        self.port.generation()
    }

    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError> {
        self.reset();
        self.start(activation).map_err(|source| {
            self.reset();
            ActivateError { doing: "start the queues of the network device".to_owned(), source }
        })
    }

    fn notification(&self, queue: u16) -> Notification {
        if queue == 2 * self.pairs { Notification::Call } else { Notification::Event }
    }

    fn notify(&mut self, _queue: u16) {
        let (Some(control), port) = (&mut self.control, &self.port) else { return };
        if control.serve(|command| port.obey(command)).is_err() {
            control.signal_needs_reset();
            self.control = None;
            port.stop();
        }
    }

    fn always_shows_used(&self) -> bool {
        true
    }

    fn reset(&mut self) {
        self.control = None;
        self.port.reset();
    }
}

impl Drop for Net {
    fn drop(&mut self) {
        self.reset();
    }
}
