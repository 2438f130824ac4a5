// SPDX-License-Identifier: Apache-2.0
//! What a client of the host's listening socket says first: `CONNECT <port>\n`, where the port is decimal.

use std::io::ErrorKind;
use std::os::unix::net::UnixStream;

use rustix::net::{RecvFlags, recv};

/// Longest line, with its end: `CONNECT 4294967295\n` is 19 bytes.
pub const MAX_CONNECT_LINE: usize = 32;

/// A port that no socket of the guest has (`VMADDR_PORT_ANY`).
const PORT_ANY: u32 = u32::MAX;

/// A client that has not yet said all of its line.
#[derive(Debug)]
pub(super) struct Handshake {
    line: [u8; MAX_CONNECT_LINE],
    len: usize,
}

/// How far a client is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Progress {
    /// More of the line has to come.
    Waiting,
    /// It wants this port of the guest. Not a byte after the line has been read.
    Port(u32),
    /// It is gone, or speaks something else.
    Failed,
}

impl Handshake {
    /// A client that has said nothing.
    pub(super) fn new() -> Self {
        Self { line: [0; MAX_CONNECT_LINE], len: 0 }
    }

    /// Reads what there is of the line from a non-blocking socket.
    pub(super) fn read(&mut self, stream: &UnixStream) -> Progress {
        loop {
            match self.read_piece(stream) {
                Ok(Some(progress)) => return progress,
                Ok(None) => {}
                Err(error) => match error.kind() {
                    ErrorKind::WouldBlock => return Progress::Waiting,
                    ErrorKind::Interrupted => {}
                    _ => return Progress::Failed,
                },
            }
        }
    }

    /// Takes one piece off the socket: looks first, so as to leave there what follows the line.
    fn read_piece(&mut self, stream: &UnixStream) -> std::io::Result<Option<Progress>> {
        let room = &mut self.line[self.len..];
        let (seen, _) = recv(stream, &mut *room, RecvFlags::PEEK)?;
        let end = room[..seen].iter().position(|&byte| byte == b'\n');
        let take = end.map_or(seen, |end| end + 1);
        if take > 0 {
            let (taken, _) = recv(stream, &mut room[..take], RecvFlags::empty())?;
            self.len += taken;
        }
        Ok(match end {
            Some(_) => Some(parse(&self.line[..self.len - 1]).map_or(Progress::Failed, Progress::Port)),
            None if seen == 0 || self.len == MAX_CONNECT_LINE => Some(Progress::Failed),
            None => None,
        })
    }
}

/// The port of a line without its end: nothing but decimal digits after one blank.
fn parse(line: &[u8]) -> Option<u32> {
    let digits = line.strip_prefix(b"CONNECT ")?;
    if !digits.iter().all(u8::is_ascii_digit) {
        return None;
    }
    std::str::from_utf8(digits).ok()?.parse().ok().filter(|&port| port != PORT_ANY)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read, Write};

    fn pair() -> (UnixStream, UnixStream) {
        let (client, server) = UnixStream::pair().unwrap();
        server.set_nonblocking(true).unwrap();
        (client, server)
    }

    #[test]
    fn a_line_gives_its_port_and_nothing_after_it_is_read() {
        let (mut client, mut server) = pair();
        client.write_all(b"CONNECT 1025\nfirst bytes").unwrap();

        assert_eq!(Handshake::new().read(&server), Progress::Port(1025));

        let mut rest = [0; 64];
        let len = server.read(&mut rest).unwrap();
        assert_eq!(&rest[..len], b"first bytes");
    }

    #[test]
    fn a_line_may_come_byte_by_byte() {
        let (mut client, server) = pair();
        let mut handshake = Handshake::new();
        for byte in b"CONNECT 4294967294" {
            client.write_all(&[*byte]).unwrap();
            assert_eq!(handshake.read(&server), Progress::Waiting);
        }
        client.write_all(b"\n").unwrap();

        assert_eq!(handshake.read(&server), Progress::Port(4_294_967_294));
    }

    #[test]
    fn other_lines_fail() {
        for line in [
            "\n",
            "CONNECT\n",
            "CONNECT \n",
            "connect 1\n",
            "CONNECT 1 \n",
            "CONNECT +1\n",
            "CONNECT -1\n",
            "CONNECT 1\r\n",
            "CONNECT 0x10\n",
            "CONNECT 4294967295\n",
            "CONNECT 4294967296\n",
            "CONNECT  1\n",
            "CONNECT 00000000000000000000000001025\n",
            "GET / HTTP/1.1 and so on, and so on",
        ] {
            let (mut client, server) = pair();
            client.write_all(line.as_bytes()).unwrap();
            assert_eq!(Handshake::new().read(&server), Progress::Failed, "{line:?}");
        }
    }

    #[test]
    fn a_client_that_leaves_fails() {
        let (mut client, server) = pair();
        client.write_all(b"CONNECT 10").unwrap();
        drop(client);

        assert_eq!(Handshake::new().read(&server), Progress::Failed);
    }
}
