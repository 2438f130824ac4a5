// SPDX-License-Identifier: Apache-2.0
//! Connections that are made on the host to the loopback addresses of the machine's network namespace: each is joined, by a
//! stream, with one that the agent makes to the same address in the guest.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use bulkhead_protocol::splice::splice;
use thiserror::Error;
use tokio::net::{TcpStream, UnixStream};
use tokio::task::JoinSet;
use tokio::time::timeout;

use super::agent::AgentError;
use super::container::Container;
use super::streams;
use crate::logging;
use crate::network::Listening;
use crate::text;

/// Connections at once; further ones wait until the kernel has no room for them, as with any server.
const MAX_CONNECTIONS: usize = 256;

/// How long the guest may take to take a stream.
const STREAM_LIMIT: Duration = Duration::from_secs(10);

/// A connection that does not reach the guest.
#[derive(Debug, Error)]
enum ForwardError {
    #[error(transparent)]
    Agent(#[from] AgentError),
    #[error("cannot open a stream to the guest")]
    Stream(#[from] std::io::Error),
    #[error("the guest refused the stream")]
    Refused,
}

/// Joins connections with the guest's, for ever; those that are open end with this.
pub(super) async fn forward(listening: Listening, container: Arc<Container>) {
    let mut connections = JoinSet::new();
    loop {
        tokio::select! {
            (connection, dialled) = listening.accept(), if connections.len() < MAX_CONNECTIONS => {
                connections.spawn(join(connection, dialled, Arc::clone(&container)));
            }
            Some(_) = connections.join_next() => {}
        }
    }
}

/// Joins one. Whoever made it has been accepted by the kernel by then: where the guest refuses, the connection is reset.
async fn join(connection: TcpStream, dialled: SocketAddr, container: Arc<Container>) {
    match open(dialled, &container).await {
        Ok(stream) => {
            // Who sends has had its pieces put together, if it wants that. It may have gone.
            let _ = connection.set_nodelay(true);
            splice(&connection, &stream).await;
        }
        Err(error) => {
            let why = text::chain(&error);
            logging::debug(format_args!("a connection to {dialled} does not reach the guest: {why}"));
            // Where it fails, the connection is ended in order.
            let _ = connection.set_zero_linger();
        }
    }
}

/// Has the agent connect, and opens the stream to that.
async fn open(dialled: SocketAddr, container: &Container) -> Result<UnixStream, ForwardError> {
    let number = container.execs.stream_number();
    container.agent.connect_port(dialled, number).await?;
    let stream = timeout(STREAM_LIMIT, streams::open_one(container.vsock_path(), number)).await;
    stream.map_err(std::io::Error::from)??.ok_or(ForwardError::Refused)
}
