// SPDX-License-Identifier: Apache-2.0
//! The device as the transport sees it.

use std::fmt;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use super::engine::Engine;
use super::features;
use super::tap::Tap;
use crate::device::{ActivateError, Activation, ActiveQueue, DeviceKind, VirtioDevice, read_config_bytes};
use crate::worker::Worker;

/// Sizes of the receive and the transmit queue. A receive ring of Linux' buffers of 1.5 KiB holds five frames of 64 KiB.
const QUEUE_SIZES: [u16; 2] = [256, 256];

/// An interface's hardware address.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct MacAddress(pub [u8; 6]);

impl fmt::Display for MacAddress {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, f] = self.0;
        write!(formatter, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{f:02x}")
    }
}

/// What a network device is made of.
#[derive(Debug)]
pub struct NetConfig {
    /// An open tap, with `IFF_TAP | IFF_NO_PI | IFF_VNET_HDR`.
    pub tap: OwnedFd,
    /// The guest's address.
    pub mac: MacAddress,
    /// The longest packet that goes through, without its Ethernet header.
    pub mtu: u16,
}

/// The network device.
#[derive(Debug)]
pub struct Net {
    tap: Arc<Tap>,
    config_space: [u8; 12],
    worker: Option<Worker<Engine>>,
}

impl Net {
    /// A device that does not run yet. The tap is not touched.
    #[must_use]
    pub fn new(config: NetConfig) -> Self {
        let NetConfig { tap, mac, mtu } = config;
        let mut config_space = [0; 12];
        // Status and number of queue pairs, between the two, belong to features that are not offered.
        config_space[..6].copy_from_slice(&mac.0);
        config_space[10..].copy_from_slice(&mtu.to_le_bytes());
        Self { tap: Arc::new(Tap::new(tap)), config_space, worker: None }
    }

    fn start(&self, activation: Activation) -> Result<Worker<Engine>, ActivateError> {
        let failed = |doing: &str| {
            let doing = format!("{doing} of the network device");
            move |source: io::Error| ActivateError { doing, source }
        };
        let Activation { memory, features: accepted, queues, interrupt } = activation;
        let Ok(queues) = <[ActiveQueue; QUEUE_SIZES.len()]>::try_from(queues) else {
            return Err(failed("find the two queues")(io::ErrorKind::InvalidInput.into()));
        };
        self.tap.configure(features::tap_offloads(accepted)).map_err(failed("configure the tap"))?;
        let engine = Engine::new(&memory, accepted, queues, interrupt, Arc::clone(&self.tap))
            .map_err(failed("watch queues and tap"))?;
        Worker::spawn("net", engine).map_err(failed("start the thread"))
    }
}

impl VirtioDevice for Net {
    fn kind(&self) -> DeviceKind {
        DeviceKind::Net
    }

    fn features(&self) -> u64 {
        features::offered()
    }

    fn queue_max_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        read_config_bytes(&self.config_space, offset, data);
    }

    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError> {
        self.reset();
        self.worker = Some(self.start(activation)?);
        Ok(())
    }

    fn reset(&mut self) {
        if let Some(worker) = self.worker.take() {
            // A panic of the worker ends the process, so that there is nothing to learn here.
            let _ = worker.stop();
        }
    }
}

impl Drop for Net {
    fn drop(&mut self) {
        self.reset();
    }
}
