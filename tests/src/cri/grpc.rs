// SPDX-License-Identifier: Apache-2.0
//! Unary calls of gRPC over a Unix socket: an HTTP/2 request with one length-prefixed message each way, and the status in the
//! trailers.

use std::path::{Path, PathBuf};
use std::time::Duration;

use bytes::{BufMut, Bytes, BytesMut};
use http::{HeaderMap, Method, Request};
use protobuf::Message;
use tokio::net::UnixStream;
use tokio::runtime::{Builder, Runtime};

use crate::failure::{Context as _, Result, ensure, fail};

/// A flag for compression, and the length of the message.
const PREFIX: usize = 5;

/// Makes calls, each on a connection of its own: the server may be another process by then.
#[derive(Debug)]
pub(crate) struct Client {
    socket: PathBuf,
    limit: Duration,
    runtime: Runtime,
}

impl Client {
    /// A client of the server on that socket, whose calls may take that long.
    pub(crate) fn new(socket: &Path, limit: Duration) -> Result<Self> {
        let runtime = Builder::new_current_thread().enable_all().build()?;
        Ok(Self { socket: socket.to_owned(), limit, runtime })
    }

    /// Calls `SERVICE/METHOD`. What the server says against it is the failure.
    pub(crate) fn call<A: Message>(&self, method: &str, request: &impl Message) -> Result<A> {
        let answer = async {
            match tokio::time::timeout(self.limit, self.exchange(method, request)).await {
                Ok(answer) => answer,
                Err(_) => fail!("{method}: no answer after {:?}", self.limit),
            }
        };
        Ok(A::parse_from_bytes(&self.runtime.block_on(answer)?)?)
    }

    async fn exchange(&self, method: &str, request: &impl Message) -> Result<Bytes> {
        let stream = UnixStream::connect(&self.socket).await.context(|| format!("{}", self.socket.display()))?;
        let (client, connection) = h2::client::handshake(stream).await?;
        let driver = tokio::spawn(connection);
        let mut client = client.ready().await?;
        let head = Request::builder()
            .method(Method::POST)
            .uri(format!("http://localhost/{method}"))
            .header("content-type", "application/grpc")
            .header("te", "trailers")
            .body(())?;
        let (answer, mut body) = client.send_request(head, false)?;
        body.send_data(frame(request)?, true)?;
        let answer = answer.await?;
        // A failure without a message has its status in the head.
        check(method, answer.headers())?;
        let mut stream = answer.into_body();
        let mut received = BytesMut::new();
        while let Some(data) = stream.data().await {
            let data = data?;
            stream.flow_control().release_capacity(data.len())?;
            received.extend_from_slice(&data);
        }
        check(method, &stream.trailers().await?.unwrap_or_default())?;
        driver.abort();
        ensure!(received.len() >= PREFIX, "{method}: an answer of {} bytes", received.len());
        Ok(received.split_off(PREFIX).freeze())
    }
}

fn frame(message: &impl Message) -> Result<Bytes> {
    let message = message.write_to_bytes()?;
    let mut framed = BytesMut::with_capacity(PREFIX + message.len());
    framed.put_u8(0);
    framed.put_u32(u32::try_from(message.len())?);
    framed.extend_from_slice(&message);
    Ok(framed.freeze())
}

/// Fails if these headers hold a status other than 0.
fn check(method: &str, headers: &HeaderMap) -> Result {
    let text = |name: &str| headers.get(name).map(|value| String::from_utf8_lossy(value.as_bytes()).into_owned());
    match text("grpc-status").as_deref() {
        None | Some("0") => Ok(()),
        Some(status) => fail!("{method}: status {status}: {}", text("grpc-message").unwrap_or_default()),
    }
}
