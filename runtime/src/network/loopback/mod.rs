// SPDX-License-Identifier: Apache-2.0
//! Connections that are made on the host to the loopback addresses of a network namespace, which are meant for what listens
//! in the guest: such are those that containerd makes for `kubectl port-forward`.
//!
//! One listener takes them all, whatever their port: a program, which the kernel asks as long as the link to the namespace is
//! there, leads them to it. Both go with this process, however it ends.

mod program;

use std::io;
use std::net::{SocketAddr, TcpListener};
use std::os::fd::{AsFd, AsRawFd};
use std::sync::Arc;
use std::time::Duration;

use bulkhead_bpf::{Kind, Link, Program, SocketMap};
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketFlags, SocketType, listen, socket_with, sockopt};
use tokio::net::TcpStream;
use tokio::time::sleep;

use super::namespace::NetworkNamespace;
use crate::logging;

/// How many connections the kernel keeps until they are accepted.
const BACKLOG: i32 = 128;

/// How long to wait when the kernel has nothing to accept a connection with.
const PAUSE: Duration = Duration::from_millis(100);

/// The loopback addresses of a namespace.
#[derive(Debug)]
pub(crate) struct Loopback {
    namespace: Arc<NetworkNamespace>,
}

impl Loopback {
    pub(super) fn new(namespace: Arc<NetworkNamespace>) -> Self {
        Self { namespace }
    }

    /// Takes what is connected to them from now on; within an event loop. `None`, with a word in the log, where the kernel cannot
    /// do that (before Linux 5.9), or this process may not.
    pub(crate) fn listen(&self) -> Option<Listening> {
        let listening = self.try_listen().inspect_err(|error| {
            let path = self.namespace.path().display();
            logging::debug(format_args!(
                "connections to the loopback interface of {path} do not reach the guest: {error}"
            ));
        });
        listening.ok()
    }

    fn try_listen(&self) -> io::Result<Listening> {
        let listener = self.namespace.inside(listener)??;
        let map = SocketMap::new("loopback", program::PLACE + 1)?;
        map.set(program::PLACE, listener.as_fd())?;
        let program = Program::load(Kind::SocketLookup, "loopback", &program::assemble(map.as_raw_fd()))?;
        let link = program.link_to_namespace(self.namespace.as_fd())?;
        Ok(Listening { _link: link, listener: tokio::net::TcpListener::from_std(listener)? })
    }
}

/// A listener for both families, as far as the host has them. It is at no port that anybody would know.
fn listener() -> io::Result<TcpListener> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = match socket_with(AddressFamily::INET6, SocketType::STREAM, flags, None) {
        Err(Errno::AFNOSUPPORT) => socket_with(AddressFamily::INET, SocketType::STREAM, flags, None)?,
        socket => {
            let socket = socket?;
            sockopt::set_ipv6_v6only(&socket, false)?;
            socket
        }
    };
    listen(&socket, BACKLOG)?;
    Ok(socket.into())
}

/// What takes the connections.
#[derive(Debug)]
pub(crate) struct Listening {
    /// Goes first: nothing is led to a listener that is not there.
    _link: Link,
    listener: tokio::net::TcpListener,
}

impl Listening {
    /// The next connection, and what it was made to. It may be cancelled.
    pub(crate) async fn accept(&self) -> (TcpStream, SocketAddr) {
        loop {
            let accepted = self.listener.accept().await.and_then(|(connection, _)| {
                let dialled = connection.local_addr()?;
                Ok((connection, SocketAddr::new(dialled.ip().to_canonical(), dialled.port())))
            });
            match accepted {
                // The listener's own port is open at the namespace's other addresses too: nobody is meant there.
                Ok((_, dialled)) if !dialled.ip().is_loopback() => {}
                Ok(accepted) => return accepted,
                // One that has gone again, or no descriptor for it; trying again at once might only spin.
                Err(_) => sleep(PAUSE).await,
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::net::{Ipv4Addr, Ipv6Addr, Shutdown};

    use super::*;
    use bulkhead_netlink::Socket;

    /// A namespace with a loopback interface that is on; `None` without the right to make one.
    fn namespace() -> Option<Arc<NetworkNamespace>> {
        let made = std::thread::spawn(|| {
            nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNET).ok()?;
            super::super::own::turn_loopback_on(&mut Socket::open().unwrap()).unwrap();
            NetworkNamespace::open(std::path::Path::new("/proc/thread-self/ns/net")).ok()
        });
        made.join().unwrap().map(Arc::new)
    }

    #[tokio::test(flavor = "current_thread")]
    async fn a_connection_to_any_port_comes_with_what_was_dialled() {
        let Some(namespace) = namespace() else { return };
        let listening = Loopback::new(Arc::clone(&namespace)).try_listen().unwrap();
        let dialled = [
            SocketAddr::from((Ipv4Addr::LOCALHOST, 80)),
            SocketAddr::from((Ipv4Addr::LOCALHOST, 65_535)),
            SocketAddr::from((Ipv6Addr::LOCALHOST, 1)),
        ];
        for address in dialled {
            let mut client = namespace.inside(|| std::net::TcpStream::connect(address)).unwrap().unwrap();
            let (connection, seen) = listening.accept().await;
            assert_eq!(seen, address);
            client.write_all(b"through").unwrap();
            client.shutdown(Shutdown::Write).unwrap();
            let mut connection = connection.into_std().unwrap();
            connection.set_nonblocking(false).unwrap();
            let mut text = String::new();
            connection.read_to_string(&mut text).unwrap();
            assert_eq!(text, "through");
        }
    }

    #[tokio::test(flavor = "current_thread")]
    async fn nobody_is_there_any_more_when_it_is_dropped() {
        let Some(namespace) = namespace() else { return };
        drop(Loopback::new(Arc::clone(&namespace)).try_listen().unwrap());

        let address = SocketAddr::from((Ipv4Addr::LOCALHOST, 80));
        let refused = namespace.inside(|| std::net::TcpStream::connect(address)).unwrap().unwrap_err();
        assert_eq!(refused.kind(), io::ErrorKind::ConnectionRefused);
    }
}
