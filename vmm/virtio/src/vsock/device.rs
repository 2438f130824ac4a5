// SPDX-License-Identifier: Apache-2.0
//! The device as the transport sees it.

use std::io;
use std::os::unix::net::{UnixListener, UnixStream};

use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};

use super::engine::Engine;
use super::muxer::Muxer;
use crate::device::{ActivateError, Activation, ActiveQueue, DeviceKind, VirtioDevice, read_config_bytes};
use crate::worker::{Poller, Worker};

/// Sizes of the receive, the transmit and the event queue.
const QUEUE_SIZES: [u16; 3] = [128, 128, 8];

/// What a vsock device is made of.
#[derive(Debug)]
pub struct VsockConfig {
    /// The guest's context id, 3 or more.
    pub guest_cid: u64,
    /// A listening socket whose clients say `CONNECT <port>\n` and are connected to that port of the guest.
    pub listener: UnixListener,
    /// What the guest gets when it connects to `agent_port`, once; `None` when it has got it.
    pub agent: Option<UnixStream>,
    /// The host's port that the agent connects to; not 0.
    pub agent_port: u32,
}

/// The vsock device.
#[derive(Debug)]
pub struct Vsock {
    guest_cid: u64,
    state: State,
}

#[derive(Debug)]
enum State {
    Idle(VsockConfig),
    Running(Worker<Engine>),
    /// The device could not be started, or its thread panicked: the sockets are gone.
    Lost,
}

impl Vsock {
    /// A device that does not run yet.
    #[must_use]
    pub fn new(config: VsockConfig) -> Self {
        Self { guest_cid: config.guest_cid, state: State::Idle(config) }
    }

    fn start(&mut self, activation: Activation) -> Result<Worker<Engine>, ActivateError> {
        let failed = |doing: &str| {
            let doing = format!("{doing} of the vsock device");
            move |source: io::Error| ActivateError { doing, source }
        };
        let State::Idle(config) = std::mem::replace(&mut self.state, State::Lost) else {
            return Err(failed("use the sockets again")(io::ErrorKind::NotConnected.into()));
        };
        let Activation { memory, queues, interrupt, .. } = activation;
        // Nothing is put into the event queue: its one event tells a driver that its guest has been moved.
        let Ok([rx, tx, _events]) = <[ActiveQueue; QUEUE_SIZES.len()]>::try_from(queues) else {
            return Err(failed("find the three queues")(io::ErrorKind::InvalidInput.into()));
        };
        let poller = Poller::new().map_err(failed("make an epoll"))?;
        let muxer = Muxer::new(config, poller).map_err(failed("watch the listener"))?;
        let engine = Engine::new(memory, rx, tx, interrupt, muxer).map_err(failed("watch the queues"))?;
        Worker::spawn("vsock", engine).map_err(failed("start the thread"))
    }
}

impl VirtioDevice for Vsock {
    fn kind(&self) -> DeviceKind {
        DeviceKind::Vsock
    }

    fn features(&self) -> u64 {
        1 << VIRTIO_RING_F_EVENT_IDX | 1 << VIRTIO_RING_F_INDIRECT_DESC
    }

    fn queue_max_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        read_config_bytes(&self.guest_cid.to_le_bytes(), offset, data);
    }

    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError> {
        self.state = State::Running(self.start(activation)?);
        Ok(())
    }

    fn reset(&mut self) {
        self.state = match std::mem::replace(&mut self.state, State::Lost) {
            State::Running(worker) => match worker.stop() {
                Some(engine) => State::Idle(engine.into_muxer().into_config()),
                None => State::Lost,
            },
            state => state,
        };
    }
}

impl Drop for Vsock {
    fn drop(&mut self) {
        self.reset();
    }
}
