// SPDX-License-Identifier: Apache-2.0
//! Sockets that a program can find by a number.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd, RawFd};

use crate::sys;

const MAP_TYPE_SOCKMAP: u32 = 15;

/// A table of sockets (`BPF_MAP_TYPE_SOCKMAP`). It lives as long as this, or a program that uses it; a socket is in it until it
/// is closed, and the table does not keep it open.
#[derive(Debug)]
pub struct SocketMap {
    descriptor: OwnedFd,
}

impl SocketMap {
    /// A table of so many places, all empty.
    ///
    /// # Errors
    ///
    /// Those of bpf(2).
    pub fn new(name: &str, places: u32) -> io::Result<Self> {
        let number = size_of::<u32>() as u32;
        let descriptor = sys::create_map(&sys::MapArgs {
            map_type: MAP_TYPE_SOCKMAP,
            key_size: number,
            value_size: number,
            max_entries: places,
            name: sys::name(name),
            ..sys::MapArgs::default()
        })?;
        Ok(Self { descriptor })
    }

    /// Puts a socket in a place.
    ///
    /// # Errors
    ///
    /// Those of bpf(2).
    pub fn set(&self, place: u32, socket: BorrowedFd<'_>) -> io::Result<()> {
        sys::update_map(self.descriptor.as_raw_fd(), place, socket.as_raw_fd().cast_unsigned())
    }
}

impl AsRawFd for SocketMap {
    fn as_raw_fd(&self) -> RawFd {
        self.descriptor.as_raw_fd()
    }
}
