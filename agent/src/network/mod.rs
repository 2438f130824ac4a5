// SPDX-License-Identifier: Apache-2.0
//! The guest's network interfaces: the virtio ones, in the guest's own network namespace, and each namespace's loopback; and
//! connections that the host makes to what listens there.

mod configure;
mod connect;
mod link;
mod resolver;
mod settings;

use std::io;
use std::os::fd::AsFd;

use rustix::net::{AddressFamily, SocketFlags, SocketType, socket_with};

use crate::container::{Failure, Stage};
use crate::sys;

pub(crate) use configure::Network;
pub(crate) use connect::{Connect, ConnectSpecError};
pub(crate) use resolver::Question;

/// A network that could not be set up: what was being done, and why it failed.
#[derive(Debug, thiserror::Error)]
#[error("cannot {doing}")]
pub(crate) struct NetworkError {
    /// Completes "cannot …".
    doing: String,
    #[source]
    source: io::Error,
}

impl NetworkError {
    fn new(doing: impl Into<String>, source: impl Into<io::Error>) -> Self {
        Self { doing: doing.into(), source: source.into() }
    }
}

/// Turns the loopback interface of the calling process's network namespace on.
pub(crate) fn bring_loopback_up() -> Result<(), Failure> {
    let bring_up = || -> io::Result<()> {
        let socket = socket_with(AddressFamily::INET, SocketType::DGRAM, SocketFlags::CLOEXEC, None)?;
        sys::set_interface_up(socket.as_fd(), c"lo")
    };
    bring_up().map_err(|error| Failure::new(Stage::Network, "lo", error))
}
