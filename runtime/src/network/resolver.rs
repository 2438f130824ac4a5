// SPDX-License-Identifier: Apache-2.0
//! A resolver that an engine has in a container's network namespace on the host: docker's, for containers on networks that users
//! have made. The container's resolv.conf names it by a loopback address, where in the guest nobody is.

use std::fs;
use std::io;
use std::net::{Ipv4Addr, SocketAddr, UdpSocket};
use std::sync::Arc;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpSocket;

use super::namespace::NetworkNamespace;

/// Its address. It is at another port than that of the name service: filters lead questions there.
const ADDRESS: Ipv4Addr = Ipv4Addr::new(127, 0, 0, 11);
const PLACE: SocketAddr = SocketAddr::new(std::net::IpAddr::V4(ADDRESS), 53);

/// Whether there is one in the calling thread's network namespace.
pub(super) fn is_there() -> bool {
    fs::read_to_string("/proc/thread-self/net/udp").is_ok_and(|sockets| is_among(&sockets))
}

/// Whether a socket of that address is listed (proc_net_udp(5)): the second word is its address, in hexadecimal digits.
fn is_among(sockets: &str) -> bool {
    let address = format!("{:08X}:", u32::from_ne_bytes(ADDRESS.octets()));
    let mut locals = sockets.lines().filter_map(|line| line.split_whitespace().nth(1));
    locals.any(|local| local.starts_with(&address))
}

/// Asks questions of the resolver.
#[derive(Debug, Clone)]
pub(crate) struct Resolver {
    namespace: Arc<NetworkNamespace>,
}

impl Resolver {
    pub(crate) fn new(namespace: Arc<NetworkNamespace>) -> Self {
        Self { namespace }
    }

    /// The answer to a question, which was asked over TCP or by a datagram: so is it here.
    ///
    /// # Errors
    ///
    /// There is none.
    pub(crate) async fn ask(&self, question: &[u8], over_tcp: bool) -> io::Result<Vec<u8>> {
        let len = u16::try_from(question.len()).map_err(|_| io::ErrorKind::InvalidInput)?;
        if over_tcp { self.ask_over_tcp(question, len).await } else { self.ask_by_datagram(question).await }
    }

    async fn ask_by_datagram(&self, question: &[u8]) -> io::Result<Vec<u8>> {
        // What it is bound to says which namespace it is in, whoever uses it.
        let socket = self.namespace.inside(|| UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0)))??;
        socket.set_nonblocking(true)?;
        let socket = tokio::net::UdpSocket::from_std(socket)?;
        socket.connect(PLACE).await?;
        socket.send(question).await?;
        let mut answer = vec![0; usize::from(u16::MAX)];
        let len = socket.recv(&mut answer).await?;
        answer.truncate(len);
        Ok(answer)
    }

    async fn ask_over_tcp(&self, question: &[u8], len: u16) -> io::Result<Vec<u8>> {
        let socket = self.namespace.inside(TcpSocket::new_v4)??;
        let mut connection = socket.connect(PLACE).await?;
        connection.write_all(&[&len.to_be_bytes()[..], question].concat()).await?;
        let len = connection.read_u16().await?;
        let mut answer = vec![0; usize::from(len)];
        connection.read_exact(&mut answer).await?;
        Ok(answer)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_socket_at_its_address_is_seen() {
        let list = |local: &str| {
            format!(
                "   sl  local_address rem_address   st tx_queue rx_queue\n  577: {local} 00000000:0000 07 00000000:00000000\n"
            )
        };
        let own = format!("{:08X}:A3F1", u32::from_ne_bytes([127, 0, 0, 11]));

        assert!(is_among(&list(&own)));
        assert!(!is_among(&list(&format!("{:08X}:0035", u32::from_ne_bytes([127, 0, 0, 1])))));
        assert!(!is_among(""));
    }
}
