// SPDX-License-Identifier: Apache-2.0
//! The container's network interfaces.

use std::io;
use std::os::fd::AsFd;

use rustix::net::{AddressFamily, SocketFlags, SocketType, socket_with};

use crate::container::{Failure, Stage};
use crate::sys;

/// Turns the loopback interface of the calling process's network namespace on.
pub(crate) fn bring_loopback_up() -> Result<(), Failure> {
    let bring_up = || -> io::Result<()> {
        let socket = socket_with(AddressFamily::INET, SocketType::DGRAM, SocketFlags::CLOEXEC, None)?;
        sys::set_interface_up(socket.as_fd(), c"lo")
    };
    bring_up().map_err(|error| Failure::new(Stage::Network, "lo", error))
}
