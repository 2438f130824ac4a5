// SPDX-License-Identifier: Apache-2.0
//! The streams of `Exec`, `Attach` and `PortForward`: binary messages of a WebSocket (RFC 6455) whose first byte is a channel.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::time::Duration;

use crate::failure::{Context as _, Result, ensure, fail};

/// Channels of a process; 2 is stderr.
pub(crate) const STDIN: u8 = 0;
pub(crate) const STDOUT: u8 = 1;
/// Its end, as JSON.
pub(crate) const STATUS: u8 = 3;
/// The size of its terminal, as JSON.
pub(crate) const RESIZE: u8 = 4;

/// Channels of a forwarded port. Each begins with the number of the port.
pub(crate) const PORT_DATA: u8 = 0;
/// Why it failed, as text.
pub(crate) const PORT_ERROR: u8 = 1;

/// The version of the protocol of channels.
const PROTOCOL: &str = "v4.channel.k8s.io";

/// Kinds of frames.
const BINARY: u8 = 2;
const CLOSE: u8 = 8;

/// The longest time without a byte.
const LIMIT: Duration = Duration::from_secs(60);

/// Most bytes of a frame that is read.
const MAX_FRAME: u64 = 1 << 20;

/// An open connection.
#[derive(Debug)]
pub(crate) struct WebSocket {
    stream: BufReader<TcpStream>,
    ended: bool,
}

impl WebSocket {
    /// Connects to a URL that CRI gave, with this query.
    pub(crate) fn connect(url: &str, query: &str) -> Result<Self> {
        let Some((host, path)) = url.strip_prefix("http://").and_then(|rest| rest.split_once('/')) else {
            fail!("{url:?} is no URL of a streaming server");
        };
        let stream = TcpStream::connect(host).context(|| format!("connecting to {host}"))?;
        stream.set_read_timeout(Some(LIMIT))?;
        let mut stream = BufReader::new(stream);
        // The key only has to be 16 bytes in base64: the server is no stranger.
        write!(
            stream.get_mut(),
            "GET /{path}{query} HTTP/1.1\r\nHost: {host}\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\
             Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: MDEyMzQ1Njc4OWFiY2RlZg==\r\n\
             Sec-WebSocket-Protocol: {PROTOCOL}\r\nOrigin: http://{host}\r\n\r\n"
        )?;
        let mut head = String::new();
        while !head.ends_with("\r\n\r\n") {
            ensure!(stream.read_line(&mut head)? > 0, "the streaming server answers {head:?}");
        }
        ensure!(head.starts_with("HTTP/1.1 101 "), "the streaming server answers {head:?}");
        Ok(Self { stream, ended: false })
    }

    /// Sends bytes on a channel.
    pub(crate) fn send(&mut self, channel: u8, bytes: &[u8]) -> Result {
        let length = u16::try_from(bytes.len() + 1)?;
        // The last fragment; masked, as a client's has to be, by zeros; a length of 16 bits.
        let mut frame = vec![0x80 | BINARY, 0x80 | 126];
        frame.extend(length.to_be_bytes());
        frame.extend([0; 4]);
        frame.push(channel);
        frame.extend(bytes);
        Ok(self.stream.get_mut().write_all(&frame)?)
    }

    /// The next message with its channel; `None` when the server has ended.
    pub(crate) fn receive(&mut self) -> Result<Option<(u8, Vec<u8>)>> {
        while !self.ended {
            let mut head = [0; 2];
            if self.stream.read_exact(&mut head).is_err() {
                self.ended = true;
                break;
            }
            let mut length = u64::from(head[1] & 0x7f);
            if length >= 126 {
                let size = if length == 126 { 2 } else { 8 };
                let mut bytes = [0; 8];
                self.stream.read_exact(&mut bytes[8 - size..])?;
                length = u64::from_be_bytes(bytes);
            }
            ensure!(length <= MAX_FRAME, "a frame of {length} bytes");
            let mut payload = vec![0; usize::try_from(length)?];
            self.stream.read_exact(&mut payload)?;
            match head[0] & 0x0f {
                BINARY if !payload.is_empty() => return Ok(Some((payload.remove(0), payload))),
                CLOSE => self.ended = true,
                _ => {}
            }
        }
        Ok(None)
    }

    /// Collects a channel until it holds `text`.
    pub(crate) fn wait_for(&mut self, channel: u8, text: &str) -> Result<String> {
        let mut seen = String::new();
        while let Some((from, bytes)) = self.receive()? {
            if from == channel {
                seen += &String::from_utf8_lossy(&bytes);
            }
            if seen.contains(text) {
                return Ok(seen);
            }
        }
        fail!("{text:?} did not come on channel {channel}, but {seen:?}")
    }

    /// All that comes until the end, by channel.
    pub(crate) fn finish(mut self) -> Result<[Vec<u8>; 4]> {
        let mut channels: [Vec<u8>; 4] = Default::default();
        while let Some((from, bytes)) = self.receive()? {
            match channels.get_mut(usize::from(from)) {
                Some(channel) => channel.extend(bytes),
                None => fail!("bytes on the channel {from}"),
            }
        }
        Ok(channels)
    }
}
