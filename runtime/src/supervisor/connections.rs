// SPDX-License-Identifier: Apache-2.0
//! The connections of a container to sockets of the host: the agent tells of each, and here it is made to the host's socket, and
//! the two are joined.
//!
//! The agent is asked for the next one only while there is room for it: the others wait in the guest's kernel.

use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use bulkhead_protocol::splice::splice;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::task::JoinSet;
use tokio::time::timeout;

use super::agent::AgentError;
use super::container::Container;
use super::streams;
use crate::logging;
use crate::storage::HostSocket;
use crate::text;

/// How many there can be at once: of a container, and of all that are in a machine, whose supervisor has two descriptors for each.
const MAX_OF_CONTAINER: usize = 128;
const MAX_OF_MACHINE: usize = 256;

/// How long, after the container's end, the host may take for what it was sent.
const FAREWELL: Duration = Duration::from_secs(5);

/// Room for the connections of all containers of a machine.
#[derive(Debug, Clone)]
pub(super) struct Room(Arc<Semaphore>);

impl Default for Room {
    fn default() -> Self {
        Self(Arc::new(Semaphore::new(MAX_OF_MACHINE)))
    }
}

/// A container's part of it: what one container has does not keep the others from having some.
struct Share {
    own: Arc<Semaphore>,
    machine: Arc<Semaphore>,
}

impl Share {
    fn of(room: Room, most: usize) -> Self {
        Self { own: Arc::new(Semaphore::new(most)), machine: room.0 }
    }

    /// Waits until there is a place, which is free again when this is dropped. Neither semaphore is ever closed.
    async fn place(&self) -> Option<[OwnedSemaphorePermit; 2]> {
        let own = Arc::clone(&self.own).acquire_owned().await.ok()?;
        Some([own, Arc::clone(&self.machine).acquire_owned().await.ok()?])
    }
}

/// A container's connections. Dropped, they are closed.
#[derive(Debug, Default)]
pub(super) struct Connections {
    /// The one that makes them, if the container has sockets of the host; it ends after the container, with the last of them.
    task: JoinSet<()>,
}

impl Connections {
    /// Makes those that a container asks for, from its creation on.
    pub(super) fn serve(container: Arc<Container>, sockets: Vec<HostSocket>, room: Room) -> Self {
        let mut task = JoinSet::new();
        if !sockets.is_empty() {
            task.spawn(serve(container, sockets, Share::of(room, MAX_OF_CONTAINER)));
        }
        Self { task }
    }

    /// After the container's end: returns when the host has taken what it was sent, or has had the time to.
    pub(super) async fn finish(&mut self) {
        let _ = timeout(FAREWELL, self.task.join_next()).await;
    }
}

async fn serve(container: Arc<Container>, sockets: Vec<HostSocket>, share: Share) {
    let sockets: Vec<_> = sockets.into_iter().map(Arc::new).collect();
    let mut connections = JoinSet::new();
    while let Some(place) = share.place().await {
        while connections.try_join_next().is_some() {}
        let stream = container.execs.stream_number();
        let socket = match container.agent.next_connection(stream).await {
            Ok(Some(number)) => usize::try_from(number).ok().and_then(|number| sockets.get(number)),
            Ok(None) => break,
            // The machine's end is told of elsewhere.
            Err(AgentError::Lost) => return,
            Err(error) => {
                let (id, why) = (container.id(), text::chain(&error));
                return logging::warn(format_args!("{id}: no more connections to the host's sockets: {why}"));
            }
        };
        let Some(socket) = socket else {
            let id = container.id();
            return logging::warn(format_args!(
                "{id}: the guest's agent names a socket that the container does not have"
            ));
        };
        let (socket, vsock) = (Arc::clone(socket), container.vsock_path());
        connections.spawn(async move {
            join(&socket, vsock, stream).await;
            drop(place);
        });
    }
    while connections.join_next().await.is_some() {}
}

/// Makes one connection, and serves it to its end. If the host refuses it, the guest finds its stream closed; for a guest that
/// refuses its own, the host is not asked any longer.
async fn join(socket: &HostSocket, vsock: PathBuf, stream: u32) {
    let guest = async {
        let opened = streams::open_one(vsock, stream).await;
        opened.and_then(|stream| stream.ok_or_else(|| io::Error::other("the guest refused it")))
    };
    match tokio::try_join!(guest, async { Ok(socket.connect().await) }) {
        Ok((guest, Some(host))) => splice(&guest, &host).await,
        Ok((_, None)) => {}
        Err(error) => logging::debug(format_args!("cannot open the stream of a connection to the host: {error}")),
    }
}

#[cfg(test)]
mod tests {
    use tokio::time::timeout;

    use super::*;

    #[tokio::test]
    async fn there_is_room_for_so_many_of_a_container_and_of_a_machine() {
        let room = Room(Arc::new(Semaphore::new(3)));
        let (first, second) = (Share::of(room.clone(), 2), Share::of(room, 2));
        let is_full = async |share: &Share| timeout(Duration::from_millis(20), share.place()).await.is_err();

        let places = [first.place().await, first.place().await];
        assert!(is_full(&first).await);
        let third = second.place().await;
        assert!(third.is_some() && is_full(&second).await);
        drop(places);
        assert!(second.place().await.is_some());
    }
}
