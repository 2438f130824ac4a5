// SPDX-License-Identifier: Apache-2.0
//! The guest's network interfaces: the virtio ones, in the guest's own network namespace, and each namespace's loopback; and
//! connections that the host makes to what listens there.

mod address;
mod configure;
mod connect;
mod group;
mod link;
mod messages;
mod plan;
mod resolver;
mod setting;
mod settings;
mod wanted;

use std::error::Error;
use std::fmt;
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

    /// Whether the interface that it was about is not there.
    fn is_without_device(&self) -> bool {
        self.source.raw_os_error() == Some(libc::ENODEV)
    }
}

/// How many failures are named at once.
const NAMED_FAILURES: usize = 6;

/// What could not be set up of a network; the rest was.
#[derive(Debug, Default)]
pub(crate) struct NetworkFailures(Vec<NetworkError>);

impl NetworkFailures {
    fn add(&mut self, failure: NetworkError) {
        self.0.push(failure);
    }

    fn into_result(self) -> Result<(), Self> {
        if self.0.is_empty() { Ok(()) } else { Err(self) }
    }
}

impl fmt::Display for NetworkFailures {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (number, failure) in self.0.iter().take(NAMED_FAILURES).enumerate() {
            let separator = if number == 0 { "" } else { "; " };
            write!(f, "{separator}{failure}: {}", failure.source)?;
        }
        match self.0.len().saturating_sub(NAMED_FAILURES) {
            0 => Ok(()),
            more => write!(f, "; and {more} more"),
        }
    }
}

impl Error for NetworkFailures {}

/// Turns the loopback interface of the calling process's network namespace on.
pub(crate) fn bring_loopback_up() -> Result<(), Failure> {
    let bring_up = || -> io::Result<()> {
        let socket = socket_with(AddressFamily::INET, SocketType::DGRAM, SocketFlags::CLOEXEC, None)?;
        sys::set_interface_up(socket.as_fd(), c"lo")
    };
    bring_up().map_err(|error| Failure::new(Stage::Network, "lo", error))
}
