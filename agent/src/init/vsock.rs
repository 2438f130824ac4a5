// SPDX-License-Identifier: Apache-2.0
//! The agent's vsock sockets: one connection to the host, and one port on which the host opens process streams.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::Arc;
use std::time::Duration;

use bulkhead_protocol::STREAM_ID_LEN;
use nix::sys::socket::{
    AddressFamily, Backlog, SockFlag, SockType, VsockAddr, bind, listen as start_listening, socket,
};
use rustix::net::{SocketFlags, accept_with};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::sync::Semaphore;
use tokio::time::timeout;

use crate::log::{self, Level};
use crate::process::{FdStream, StreamTable};
use crate::sys;

/// How long the host may take to name a stream that it has opened.
const NAME_DEADLINE: Duration = Duration::from_secs(5);

/// Streams that may be open and not named yet.
const MAX_UNNAMED: usize = 64;

/// Connections that the kernel keeps until they are accepted.
const BACKLOG: i32 = 64;

/// Connects to `port` of the machine `cid`.
pub(super) fn connect(cid: u32, port: u32) -> io::Result<OwnedFd> {
    let socket = socket(AddressFamily::Vsock, SockType::Stream, SockFlag::SOCK_CLOEXEC, None)?;
    nix::sys::socket::connect(socket.as_raw_fd(), &VsockAddr::new(cid, port))?;
    Ok(socket)
}

/// Listens on `port`.
pub(super) fn listen(port: u32) -> io::Result<OwnedFd> {
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let socket = socket(AddressFamily::Vsock, SockType::Stream, flags, None)?;
    bind(socket.as_raw_fd(), &VsockAddr::new(libc::VMADDR_CID_ANY, port))?;
    start_listening(&socket, Backlog::new(BACKLOG)?)?;
    Ok(socket)
}

/// Accepts the host's streams and hands each to the process that waits for it.
pub(super) async fn accept_streams(listener: OwnedFd, streams: Arc<StreamTable>) {
    let unnamed = Arc::new(Semaphore::new(MAX_UNNAMED));
    let listener = match sys::watch_descriptor(listener, Interest::READABLE) {
        Ok(listener) => listener,
        Err(error) => return log::write(Level::Error, &format!("cannot wait for streams: {error}")),
    };
    loop {
        // The semaphore is never closed.
        let Ok(permit) = Arc::clone(&unnamed).acquire_owned().await else { return };
        let stream = match accept(&listener).await.and_then(FdStream::new) {
            Ok(stream) => stream,
            Err(error) => {
                log::write(Level::Error, &format!("cannot accept a stream: {error}"));
                // Out of descriptors or memory, most likely: trying again at once would only spin.
                tokio::time::sleep(Duration::from_millis(100)).await;
                continue;
            }
        };
        let streams = Arc::clone(&streams);
        tokio::spawn(async move {
            name_stream(stream, &streams).await;
            drop(permit);
        });
    }
}

async fn accept(listener: &AsyncFd<OwnedFd>) -> io::Result<OwnedFd> {
    loop {
        let mut ready = listener.readable().await?;
        let accepted = ready.try_io(|listener| Ok(accept_with(listener, SocketFlags::CLOEXEC)?));
        if let Ok(result) = accepted {
            return result;
        }
    }
}

/// Reads the stream's id, and nothing beyond it.
async fn name_stream(stream: FdStream, streams: &StreamTable) {
    let mut id = [0; STREAM_ID_LEN];
    let read = async {
        let mut len = 0;
        while len < id.len() {
            match stream.read(&mut id[len..]).await? {
                0 => return Err(io::Error::from(io::ErrorKind::UnexpectedEof)),
                read => len += read,
            }
        }
        Ok(())
    };
    match timeout(NAME_DEADLINE, read).await {
        Ok(Ok(())) => {
            if let Err(error) = streams.deliver(u32::from_le_bytes(id), stream) {
                log::write(Level::Warning, &error.to_string());
            }
        }
        Ok(Err(error)) => log::write(Level::Warning, &format!("a stream ended before it was named: {error}")),
        Err(_) => log::write(Level::Warning, "a stream was not named in time"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;
    use std::os::unix::net::UnixStream;

    #[tokio::test(flavor = "current_thread")]
    async fn stream_is_named_by_its_first_bytes_only() {
        let table = StreamTable::default();
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        theirs.write_all(&[7, 1, 0, 0, b'x']).unwrap();

        name_stream(FdStream::new(ours.into()).unwrap(), &table).await;

        let stream = table.expect(0x107).await.unwrap();
        let mut rest = [0; 8];
        assert_eq!(stream.read(&mut rest).await.unwrap(), 1);
        assert_eq!(rest[0], b'x');
    }

    #[tokio::test(flavor = "current_thread")]
    async fn stream_that_ends_without_a_name_is_dropped() {
        let table = StreamTable::default();
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        theirs.write_all(&[7, 0]).unwrap();
        drop(theirs);

        name_stream(FdStream::new(ours.into()).unwrap(), &table).await;

        assert!(table.expect(7).try_recv().is_err());
    }
}
