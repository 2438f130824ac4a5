// SPDX-License-Identifier: Apache-2.0
//! Connections that the host makes to ports of the guest's own network namespace.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::time::Duration;

use bulkhead_protocol::agent as wire;
use bulkhead_protocol::splice::splice;
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketFlags, SocketType, socket_with, sockopt};
use tokio::sync::{Semaphore, SemaphorePermit, oneshot};
use tokio::time::timeout;

use super::NetworkError;
use crate::process::{FdStream, StreamTable};

/// Connections at once. The host has no more; but a server that keeps its end of one that the host has given up keeps that here.
const MAX_CONNECTIONS: usize = 256;
static ROOM: Semaphore = Semaphore::const_new(MAX_CONNECTIONS);

/// How long a server may take to be connected with: one whose queue is full does not answer.
const CONNECT_LIMIT: Duration = Duration::from_secs(5);

/// How long the host may take to open the stream.
const STREAM_LIMIT: Duration = Duration::from_secs(30);

/// A port, and the stream that its connection is to be joined with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Connect {
    to: SocketAddr,
    stream: u32,
}

/// A request that names no port, or no stream: what it has to have.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("cannot connect to a port: {0} is needed")]
pub(crate) struct ConnectSpecError(&'static str);

impl Connect {
    /// What a request describes, checked.
    pub(crate) fn from_wire(request: &wire::ConnectPortRequest) -> Result<Self, ConnectSpecError> {
        let address = match *request.address.as_slice() {
            [a, b, c, d] => IpAddr::from([a, b, c, d]),
            ref bytes => {
                <[u8; 16]>::try_from(bytes).map_err(|_| ConnectSpecError("an address of 4 or 16 bytes"))?.into()
            }
        };
        let port = u16::try_from(request.port).ok().filter(|port| *port != 0);
        let port = port.ok_or(ConnectSpecError("a number from 1 to 65535"))?;
        if request.stream == 0 {
            return Err(ConnectSpecError("a stream that is not 0"));
        }
        Ok(Self { to: SocketAddr::new(address, port), stream: request.stream })
    }

    /// Connects, and joins the connection with its stream as long as both last.
    pub(crate) async fn run(self, streams: &StreamTable) -> Result<(), NetworkError> {
        let failed = |error: io::Error| NetworkError::new(format!("connect to {}", self.to), error);
        let full = |_| failed(io::Error::other(format!("{MAX_CONNECTIONS} connections are there already")));
        let place = ROOM.try_acquire().map_err(full)?;
        let connection = connect(self.to).await.map_err(failed)?;
        tokio::spawn(join(connection, streams.expect(self.stream), place));
        Ok(())
    }
}

/// Who dials localhost may mean either of its addresses, and goes on to the second where the first refuses: on the host the
/// first has been accepted by then, so it is done here.
async fn connect(to: SocketAddr) -> io::Result<FdStream> {
    let other = match to.ip() {
        IpAddr::V4(Ipv4Addr::LOCALHOST) => Some(IpAddr::V6(Ipv6Addr::LOCALHOST)),
        IpAddr::V6(Ipv6Addr::LOCALHOST) => Some(IpAddr::V4(Ipv4Addr::LOCALHOST)),
        _ => None,
    };
    match (connect_once(to).await, other) {
        (Err(refused), Some(other)) if refused.kind() == io::ErrorKind::ConnectionRefused => {
            // What was asked for has been refused, whatever is wrong with the other.
            connect_once(SocketAddr::new(other, to.port())).await.map_err(|_| refused)
        }
        (result, _) => result,
    }
}

async fn connect_once(to: SocketAddr) -> io::Result<FdStream> {
    let family = if to.is_ipv4() { AddressFamily::INET } else { AddressFamily::INET6 };
    let socket = socket_with(family, SocketType::STREAM, SocketFlags::CLOEXEC | SocketFlags::NONBLOCK, None)?;
    match rustix::net::connect(&socket, &to) {
        Ok(()) | Err(Errno::INPROGRESS) => {}
        Err(error) => return Err(error.into()),
    }
    let connection = FdStream::new(socket)?;
    timeout(CONNECT_LIMIT, connection.writable()).await??;
    // How it has gone.
    sockopt::socket_error(&connection)??;
    // Who sends has had its pieces put together, if it wants that.
    sockopt::set_tcp_nodelay(&connection, true)?;
    Ok(connection)
}

/// Joins one with its stream; it takes its place until both are done.
async fn join(connection: FdStream, stream: oneshot::Receiver<FdStream>, _place: SemaphorePermit<'static>) {
    // A host that gives up opens none.
    if let Ok(Ok(stream)) = timeout(STREAM_LIMIT, stream).await {
        splice(&connection, &stream).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::net::UnixStream;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::net::TcpListener;

    fn request(address: &[u8], port: u32, stream: u32) -> wire::ConnectPortRequest {
        wire::ConnectPortRequest { address: address.to_vec(), port, stream, ..Default::default() }
    }

    #[test]
    fn requests_are_checked() {
        let good = Connect::from_wire(&request(&[127, 0, 0, 1], 80, 7)).unwrap();
        assert_eq!(good, Connect { to: "127.0.0.1:80".parse().unwrap(), stream: 7 });
        let ipv6 = Connect::from_wire(&request(&Ipv6Addr::LOCALHOST.octets(), 65_535, 7)).unwrap();
        assert_eq!(ipv6.to, "[::1]:65535".parse().unwrap());
        for bad in [
            request(&[], 80, 7),
            request(&[127, 0, 0], 80, 7),
            request(&[0; 17], 80, 7),
            request(&[127, 0, 0, 1], 0, 7),
            request(&[127, 0, 0, 1], 65_536, 7),
            request(&[127, 0, 0, 1], 80, 0),
        ] {
            assert!(Connect::from_wire(&bad).is_err(), "{bad:?}");
        }
    }

    #[tokio::test(flavor = "current_thread")]
    async fn a_connection_is_joined_with_its_stream_and_each_end_is_passed_on() {
        let server = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let (table, to) = (StreamTable::default(), server.local_addr().unwrap());
        Connect { to, stream: 7 }.run(&table).await.unwrap();
        let (ours, theirs) = UnixStream::pair().unwrap();
        table.deliver(7, FdStream::new(ours.into()).unwrap()).unwrap();
        let mut host = FdStream::new(theirs.into()).unwrap();
        let (mut accepted, _) = server.accept().await.unwrap();

        host.write_all(b"question").await.unwrap();
        host.shutdown_write().unwrap();
        let mut seen = String::new();
        accepted.read_to_string(&mut seen).await.unwrap();
        assert_eq!(seen, "question");
        // The other direction lives on.
        accepted.write_all(b"answer").await.unwrap();
        accepted.shutdown().await.unwrap();
        let mut seen = String::new();
        host.read_to_string(&mut seen).await.unwrap();
        assert_eq!(seen, "answer");
    }

    #[tokio::test(flavor = "current_thread")]
    async fn localhost_is_either_of_its_addresses() {
        let Ok(server) = TcpListener::bind("[::1]:0").await else { return };
        let port = server.local_addr().unwrap().port();

        assert!(connect(SocketAddr::from((Ipv4Addr::LOCALHOST, port))).await.is_ok());
        assert!(connect(SocketAddr::from((Ipv4Addr::new(127, 0, 0, 2), port))).await.is_err());
    }

    #[tokio::test(flavor = "current_thread")]
    async fn a_port_where_nobody_listens_is_refused() {
        let table = StreamTable::default();
        // Nobody has it, and nobody is given it as long as it is bound.
        let socket = tokio::net::TcpSocket::new_v4().unwrap();
        socket.bind("127.0.0.1:0".parse().unwrap()).unwrap();
        let to = socket.local_addr().unwrap();

        let error = Connect { to, stream: 7 }.run(&table).await.unwrap_err();

        assert_eq!(error.to_string(), format!("cannot connect to {to}"));
    }
}
