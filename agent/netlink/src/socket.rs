// SPDX-License-Identifier: Apache-2.0
//! The connection to the kernel's side of the network namespace in which it was opened.

use std::io;
use std::os::fd::OwnedFd;

use rustix::net::{
    AddressFamily, Protocol, RecvFlags, SendFlags, SocketFlags, SocketType, netlink, recv, send, socket_with,
};

use crate::headers::Header;
use crate::message::{HEADER_LEN, Message};

/// Longest datagram that the kernel sends: it fills at most 32 KiB.
pub(crate) const BUFFER_LEN: usize = 64 * 1024;

/// A connection. It stays with the namespace in which it was opened, wherever its thread goes.
#[derive(Debug)]
pub struct Socket {
    socket: OwnedFd,
    sequence: u32,
    buffer: Vec<u8>,
}

/// A piece of an answer.
pub(crate) enum Piece<'a> {
    /// The end: 0, or an error number.
    End(i32),
    /// What was asked for.
    Data { kind: u16, payload: &'a [u8] },
}

impl Socket {
    /// Connects to the calling thread's network namespace.
    ///
    /// # Errors
    ///
    /// Those of socket(2).
    pub fn open() -> io::Result<Self> {
        // Of netlink's protocols, NETLINK_ROUTE is number 0, which is the default.
        Self::open_for(None)
    }

    /// Connects to what filters packets in the calling thread's network namespace.
    ///
    /// # Errors
    ///
    /// Those of socket(2).
    pub fn open_netfilter() -> io::Result<Self> {
        Self::open_for(Some(netlink::NETFILTER))
    }

    fn open_for(protocol: Option<Protocol>) -> io::Result<Self> {
        let socket = socket_with(AddressFamily::NETLINK, SocketType::RAW, SocketFlags::CLOEXEC, protocol)?;
        Ok(Self { socket, sequence: 0, buffer: vec![0; BUFFER_LEN] })
    }

    /// Sends a request and waits until it has been carried out.
    ///
    /// # Errors
    ///
    /// What the kernel answers.
    pub fn request(&mut self, message: Message) -> io::Result<()> {
        self.exchange(message, libc::NLM_F_ACK, &mut |_, _| {})
    }

    /// Asks for everything of a kind, and hands each answer of the kind `kind` to `each`: its header, and its attributes.
    ///
    /// # Errors
    ///
    /// What the kernel answers.
    pub fn dump<H: Header>(
        &mut self,
        message: Message,
        kind: u16,
        mut each: impl FnMut(H, crate::Attributes<'_>),
    ) -> io::Result<()> {
        self.exchange(message, libc::NLM_F_DUMP, &mut |got, payload| {
            if got == kind
                && let Some((header, rest)) = H::read(payload)
            {
                each(header, crate::Attributes::new(rest));
            }
        })
    }

    fn exchange(&mut self, message: Message, flags: i32, each: &mut dyn FnMut(u16, &[u8])) -> io::Result<()> {
        self.sequence = self.sequence.wrapping_add(1);
        let bytes = message.finish(self.sequence, flags);
        rustix::io::retry_on_intr(|| send(&self.socket, &bytes, SendFlags::empty()))?;
        loop {
            let (len, _) =
                rustix::io::retry_on_intr(|| recv(&self.socket, self.buffer.as_mut_slice(), RecvFlags::empty()))?;
            let mut rest = self.buffer.get(..len).unwrap_or_default();
            while let Some((sequence, piece, after)) = next_piece(rest) {
                rest = after;
                if sequence != self.sequence {
                    continue;
                }
                match piece {
                    Piece::End(0) => return Ok(()),
                    Piece::End(error) => return Err(io::Error::from_raw_os_error(error)),
                    Piece::Data { kind, payload } => each(kind, payload),
                }
            }
        }
    }
}

/// The first message of `bytes`, with its number, and what follows; `None` at the end.
pub(crate) fn next_piece(bytes: &[u8]) -> Option<(u32, Piece<'_>, &[u8])> {
    let (header, _) = bytes.split_first_chunk::<HEADER_LEN>()?;
    let [l0, l1, l2, l3, k0, k1, _, _, s0, s1, s2, s3, ..] = *header;
    let len = usize::try_from(u32::from_ne_bytes([l0, l1, l2, l3])).ok()?;
    let payload = bytes.get(HEADER_LEN..len)?;
    let rest = bytes.get(len.next_multiple_of(4)..).unwrap_or_default();
    let kind = u16::from_ne_bytes([k0, k1]);
    let piece = match i32::from(kind) {
        // The error number is negative; 0 acknowledges. The end of a list may have one too.
        libc::NLMSG_ERROR | libc::NLMSG_DONE => {
            Piece::End(payload.first_chunk().map_or(0, |number| i32::from_ne_bytes(*number).wrapping_neg()))
        }
        _ => Piece::Data { kind, payload },
    };
    Some((u32::from_ne_bytes([s0, s1, s2, s3]), piece, rest))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::LinkHeader;

    #[test]
    fn the_loopback_interface_is_found() {
        let mut socket = Socket::open().unwrap();
        let mut names = Vec::new();

        let request = Message::new(libc::RTM_GETLINK, 0, &LinkHeader::default());
        socket
            .dump(request, libc::RTM_NEWLINK, |header: LinkHeader, attributes| {
                let name = attributes.find_kind(libc::IFLA_IFNAME).and_then(|name| name.text().map(str::to_owned));
                names.push((header.hardware, name));
            })
            .unwrap();

        assert!(names.contains(&(libc::ARPHRD_LOOPBACK, Some("lo".to_owned()))), "{names:?}");
    }

    #[test]
    fn an_error_is_the_kernels() {
        let mut socket = Socket::open().unwrap();
        let nobody = LinkHeader { index: i32::MAX, ..Default::default() };

        let error = socket.request(Message::new(libc::RTM_GETLINK, 0, &nobody)).unwrap_err();

        assert_eq!(error.raw_os_error(), Some(libc::ENODEV));
    }
}
