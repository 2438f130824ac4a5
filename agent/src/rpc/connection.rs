// SPDX-License-Identifier: Apache-2.0
//! Serves ttrpc on the one connection that the agent has opened itself, where ttrpc expects to accept connections.

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use bulkhead_protocol::agent_ttrpc::create_agent;
use futures_core::Stream;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::sync::oneshot;
use ttrpc::asynchronous::Server;
use ttrpc::asynchronous::transport::Listener;

use super::AgentService;
use crate::process::FdStream;

/// Serves until the host closes the connection or it breaks.
pub(crate) async fn serve_until_closed(connection: FdStream, service: AgentService) -> ttrpc::Result<()> {
    let (closed_sender, closed) = oneshot::channel();
    let listener = OneConnection(Some(HostConnection { stream: connection, closed: Some(closed_sender) }));
    let mut server =
        Server::new().add_listener(Listener::new(listener)).register_service(create_agent(Arc::new(service)));
    server.start().await?;
    // Either the end is told, or the connection is dropped without: both mean that it is over.
    let _ = closed.await;
    Ok(())
}

/// A source of connections that has one, and then waits for ever.
struct OneConnection(Option<HostConnection>);

impl Stream for OneConnection {
    type Item = io::Result<HostConnection>;

    fn poll_next(mut self: Pin<&mut Self>, _context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        match self.0.take() {
            Some(connection) => Poll::Ready(Some(Ok(connection))),
            // ttrpc takes the end of the source for the end of the server.
            None => Poll::Pending,
        }
    }
}

/// The connection; tells when its end is read.
struct HostConnection {
    stream: FdStream,
    closed: Option<oneshot::Sender<()>>,
}

impl AsyncRead for HostConnection {
    fn poll_read(mut self: Pin<&mut Self>, context: &mut Context<'_>, out: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let before = out.filled().len();
        let wanted = out.remaining() > 0;
        let result = Pin::new(&mut self.stream).poll_read(context, out);
        let over = match &result {
            Poll::Ready(Ok(())) => wanted && out.filled().len() == before,
            Poll::Ready(Err(_)) => true,
            Poll::Pending => false,
        };
        if over && let Some(closed) = self.closed.take() {
            // The receiver lives as long as the server.
            let _ = closed.send(());
        }
        result
    }
}

impl AsyncWrite for HostConnection {
    fn poll_write(mut self: Pin<&mut Self>, context: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(context, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(context)
    }
}
