// SPDX-License-Identifier: Apache-2.0
//! What changes in a network namespace, as the kernel tells it.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};

use rustix::net::netlink::SocketAddrNetlink;
use rustix::net::{AddressFamily, RecvFlags, SocketFlags, SocketType, bind, recv, socket_with};

use crate::socket::{BUFFER_LEN, Piece, next_piece};

/// A subscription to the changes of the network namespace in which it was opened. Its descriptor is readable when there are
/// some.
#[derive(Debug)]
pub struct Events {
    socket: OwnedFd,
    buffer: Vec<u8>,
}

impl Events {
    /// Subscribes to groups: the bits `RTMGRP_*` of rtnetlink(7).
    ///
    /// # Errors
    ///
    /// Those of socket(2) and bind(2).
    pub fn subscribe(groups: u32) -> io::Result<Self> {
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let socket = socket_with(AddressFamily::NETLINK, SocketType::RAW, flags, None)?;
        bind(&socket, &SocketAddrNetlink::new(0, groups))?;
        Ok(Self { socket, buffer: vec![0; BUFFER_LEN] })
    }

    /// Takes what has come, without waiting; whether there was a message, of a kind (`RTM_*`) and with a content, that
    /// counts, or messages were lost.
    ///
    /// # Errors
    ///
    /// Those of recv(2).
    pub fn drain(&mut self, mut counts: impl FnMut(u16, &[u8]) -> bool) -> io::Result<bool> {
        let mut changed = false;
        loop {
            match recv(&self.socket, self.buffer.as_mut_slice(), RecvFlags::empty()) {
                Ok((len, _)) => {
                    let mut rest = self.buffer.get(..len).unwrap_or_default();
                    while let Some((_, piece, after)) = next_piece(rest) {
                        rest = after;
                        changed |= matches!(piece, Piece::Data { kind, payload } if counts(kind, payload));
                    }
                }
                Err(rustix::io::Errno::AGAIN) => return Ok(changed),
                Err(rustix::io::Errno::INTR) => {}
                Err(rustix::io::Errno::NOBUFS) => changed = true,
                Err(error) => return Err(error.into()),
            }
        }
    }
}

impl AsFd for Events {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

impl AsRawFd for Events {
    fn as_raw_fd(&self) -> RawFd {
        self.socket.as_raw_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn where_nothing_changes_there_is_nothing_to_take() {
        let mut events = Events::subscribe(libc::RTMGRP_NEIGH.cast_unsigned()).unwrap();
        assert!(!events.drain(|_, _| false).unwrap());
    }
}
