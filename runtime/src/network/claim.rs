// SPDX-License-Identifier: Apache-2.0
//! A network namespace is one machine's. Who has it holds the name of a socket there: such names belong to their namespace,
//! exist once, and end with their holder, however it ends.

use std::io;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixDatagram};

const NAME: &[u8] = b"bulkhead-sandbox";

/// The claim; given up when dropped.
#[derive(Debug)]
pub(super) struct Claim {
    _socket: UnixDatagram,
}

impl Claim {
    /// Claims the calling thread's network namespace; `None` if it is another's.
    pub(super) fn take() -> io::Result<Option<Self>> {
        let address = SocketAddr::from_abstract_name(NAME)?;
        match UnixDatagram::bind_addr(&address) {
            Ok(socket) => Ok(Some(Self { _socket: socket })),
            Err(error) if error.kind() == io::ErrorKind::AddrInUse => Ok(None),
            Err(error) => Err(error),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn there_is_one_at_a_time() {
        let first = Claim::take().unwrap().unwrap();
        assert!(Claim::take().unwrap().is_none());
        drop(first);
        assert!(Claim::take().unwrap().is_some());
    }
}
