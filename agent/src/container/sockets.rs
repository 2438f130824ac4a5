// SPDX-License-Identifier: Apache-2.0
//! Unix sockets of the host in a container: the agent listens in their place, and tells the host of each connection, which the
//! host joins with one that it makes itself.
//!
//! What is bound into the container is a socket in a directory of the agent's. A connection is accepted when the host asks for
//! one, and not before: those that it has no room for wait in the kernel's queue, as for any server.

use std::fs::{self, Permissions};
use std::future::poll_fn;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::{PermissionsExt, chown};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll};
use std::time::Duration;

use bulkhead_protocol::splice::splice;
use rustix::net::{SocketFlags, accept_with};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::sync::oneshot;
use tokio::task::JoinSet;
use tokio::time::{sleep, timeout};

use super::error::NoSuchContainer;
use super::notify::NotifySocket;
use super::spec::{Mount, MountSource, SocketSpec};
use super::{CreateError, Engine};
use crate::log::{self, Level};
use crate::process::FdStream;
use crate::sys;

/// How long the host may take to open the stream of a connection that it was told of.
const STREAM_DEADLINE: Duration = Duration::from_secs(30);

/// How long nothing is accepted after that has failed: for want of descriptors or memory, most likely.
const RETRY: Duration = Duration::from_millis(100);

/// The sockets that the agent listens at for one container. With it go their files and what is left of the connections.
#[derive(Debug, Default)]
pub(crate) struct HostSockets {
    listeners: Vec<Listener>,
    /// Which of them is asked first, so that none is passed over for ever. Whoever accepts has it.
    turn: tokio::sync::Mutex<usize>,
    connections: Mutex<JoinSet<()>>,
    /// The one at which the container tells that it is ready, if it has one.
    notify: Option<NotifySocket>,
}

#[derive(Debug)]
struct Listener {
    number: u32,
    path: PathBuf,
    socket: AsyncFd<OwnedFd>,
}

impl Drop for Listener {
    fn drop(&mut self) {
        // It is in a directory of the agent's: there is nobody else to take it away.
        let _ = fs::remove_file(&self.path);
    }
}

impl Listener {
    /// Listens at `path`.
    fn new(path: PathBuf, spec: &SocketSpec) -> io::Result<Self> {
        let socket = UnixListener::bind(&path)?;
        socket.set_nonblocking(true)?;
        let socket = sys::watch_descriptor(socket.into(), Interest::READABLE)?;
        let listener = Self { number: spec.number, path, socket };
        chown(&listener.path, Some(spec.uid), Some(spec.gid))?;
        fs::set_permissions(&listener.path, Permissions::from_mode(spec.mode))?;
        Ok(listener)
    }
}

impl HostSockets {
    /// Makes those that the mounts ask for, in `folder`, each by the next of the names.
    pub(super) fn listen(mounts: &[Mount], folder: &Path, names: &AtomicU64) -> Result<Self, CreateError> {
        let (mut listeners, mut notify) = (Vec::new(), None);
        for mount in mounts {
            let next_path = || folder.join(names.fetch_add(1, Ordering::Relaxed).to_string());
            let failed = |source| CreateError::Socket { destination: mount.destination.clone(), source };
            match &mount.source {
                MountSource::Socket(spec) => listeners.push(Listener::new(next_path(), spec).map_err(failed)?),
                MountSource::NotifySocket { .. } if notify.is_none() => {
                    notify = Some(NotifySocket::new(next_path()).map_err(failed)?);
                }
                _ => {}
            }
        }
        Ok(Self { listeners, notify, ..Self::default() })
    }

    /// What is to be bound for the one at which the container tells that it is ready: itself, or the folder that it is in.
    pub(crate) fn notify_path(&self, of_folder: bool) -> Option<&Path> {
        self.notify.as_ref().map(|notify| if of_folder { notify.folder() } else { notify.path() })
    }

    /// The one at which the container tells that it is ready.
    pub(super) fn notify(&self) -> Option<&NotifySocket> {
        self.notify.as_ref()
    }

    /// The file that is to be bound for a socket.
    pub(crate) fn path(&self, number: u32) -> Option<&Path> {
        self.listeners.iter().find(|listener| listener.number == number).map(|listener| listener.path.as_path())
    }

    fn connections(&self) -> MutexGuard<'_, JoinSet<()>> {
        // Nothing panics while the lock is held.
        self.connections.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The next connection, and the number of the socket that it is to. Dropped while it waits, it has taken none.
    async fn accept(&self) -> (u32, OwnedFd) {
        let mut turn = self.turn.lock().await;
        loop {
            match poll_fn(|context| self.poll_accept(*turn, context)).await {
                Ok((at, connection)) => {
                    *turn = at + 1;
                    return (self.listeners[at].number, connection);
                }
                Err(error) => {
                    log::write(Level::Error, &format!("cannot accept a connection to a socket of the host's: {error}"));
                    sleep(RETRY).await;
                }
            }
        }
    }

    fn poll_accept(&self, first: usize, context: &mut Context<'_>) -> Poll<io::Result<(usize, OwnedFd)>> {
        let count = self.listeners.len();
        for at in (0..count).map(|step| (first + step) % count) {
            while let Poll::Ready(ready) = self.listeners[at].socket.poll_read_ready(context) {
                if let Ok(accepted) = ready?.try_io(|socket| accept(socket.get_ref())) {
                    return Poll::Ready(accepted.map(|connection| (at, connection)));
                }
            }
        }
        Poll::Pending
    }

    /// A connection that has been waiting.
    fn accept_waiting(&self) -> Option<(u32, OwnedFd)> {
        self.listeners.iter().find_map(|listener| Some((listener.number, accept(listener.socket.get_ref()).ok()?)))
    }

    /// Joins a connection with the host's stream, once that has come.
    fn join(&self, connection: OwnedFd, stream: oneshot::Receiver<FdStream>) {
        let mut connections = self.connections();
        while connections.try_join_next().is_some() {}
        connections.spawn(async move {
            match (FdStream::new(connection), timeout(STREAM_DEADLINE, stream).await) {
                (Ok(connection), Ok(Ok(stream))) => splice(&connection, &stream).await,
                (Err(error), _) => log::write(Level::Error, &format!("cannot serve a connection to the host: {error}")),
                _ => log::write(Level::Warning, "the host has not opened the stream of a connection in time"),
            }
        });
    }
}

fn accept(socket: &impl AsFd) -> io::Result<OwnedFd> {
    Ok(accept_with(socket, SocketFlags::CLOEXEC | SocketFlags::NONBLOCK)?)
}

impl Engine {
    /// Waits for the next connection to one of a container's sockets, which is joined with that stream of the host's. Returns
    /// the socket's number, or `None` after the container's end, once none is left.
    pub async fn wait_connection(&self, id: &str, stream: u32) -> Result<Option<u32>, NoSuchContainer> {
        let instance = self.find(id)?;
        let sockets = &instance.sockets;
        let accepted = tokio::select! {
            accepted = sockets.accept() => Some(accepted),
            // What the container has sent last is the host's all the same. Nobody is left who could connect.
            () = instance.init.ended() => sockets.accept_waiting(),
        };
        Ok(accepted.map(|(number, connection)| {
            sockets.join(connection, self.streams.expect(stream));
            number
        }))
    }
}
