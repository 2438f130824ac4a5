// SPDX-License-Identifier: Apache-2.0
//! Moves bytes between a process's pipes or terminal and the host's streams.

use std::io;
use std::sync::Arc;

use super::FdStream;
use super::pumps::Drain;

/// Bytes moved at once: what a pipe holds.
const BUFFER_LEN: usize = 64 << 10;

/// Moves the host's bytes to the process until either side ends, then lets go of both: the process sees the end of its
/// input, or the host that its bytes are no longer wanted.
pub(crate) async fn input(stream: FdStream, pipe: FdStream) {
    copy(&stream, &pipe, None).await;
}

/// Moves the host's bytes to the terminal until the host ends. A terminal has no end of input: it stays as it is.
pub(crate) async fn terminal_input(stream: FdStream, terminal: Arc<FdStream>) {
    copy(&stream, &terminal, None).await;
}

/// Moves the host's bytes to a socket of the process's, and then tells it that there are no more.
pub(crate) async fn received(stream: Arc<FdStream>, socket: Arc<FdStream>) {
    copy(&stream, &socket, None).await;
    // A process that is gone need not be told.
    let _ = socket.shutdown_write();
}

/// Moves what the process sends at a socket to the host, and then tells it that there is no more.
pub(crate) async fn sent(socket: Arc<FdStream>, stream: Arc<FdStream>, drain: Drain) {
    copy(&socket, &stream, Some(drain)).await;
    // A host that is gone need not be told.
    let _ = stream.shutdown_write();
}

/// Moves the process's bytes to the host until every writer has gone. If the host no longer wants them, lets go of the
/// pipe, so that the process is told by SIGPIPE.
pub(crate) async fn output(pipe: FdStream, stream: FdStream, drain: Drain) {
    copy(&pipe, &stream, Some(drain)).await;
}

/// Moves the terminal's bytes to the host, until nobody has the terminal open. Where the host does not want them they
/// are read all the same: a full terminal would stop the process.
pub(crate) async fn terminal_output(terminal: Arc<FdStream>, stream: Option<FdStream>, drain: Drain) {
    if let Some(stream) = stream {
        copy(&terminal, &stream, Some(drain)).await;
    }
    discard(&terminal).await;
}

/// Copies until `from` ends or either side fails. Failing is how a peer that has gone away shows (EPIPE, ECONNRESET, and
/// EIO for a terminal), so there is nothing to report.
async fn copy(from: &FdStream, to: &FdStream, mut drain: Option<Drain>) {
    // From the process's end on: how much of what is to come may be its own. Processes that it has left behind may be writing
    // faster than the host reads.
    let mut own: Option<u64> = None;
    while readable_or_ended(from, drain.as_mut()).await.is_ok() {
        if own.is_none() && drain.as_ref().is_some_and(Drain::has_ended) {
            own = Some(from.held().unwrap_or(u64::MAX));
        }
        // The buffer is there only while there is something to move: most streams are silent most of the time.
        let mut buffer = vec![0; BUFFER_LEN];
        match from.read_now(&mut buffer) {
            Ok(None) if own.is_some() => drain = None,
            Ok(None) => {}
            Ok(Some(0)) | Err(_) => return,
            Ok(Some(len)) => {
                if to.write_all(&buffer[..len]).await.is_err() {
                    return;
                }
                own = own.map(|left| left.saturating_sub(len as u64));
                if own == Some(0) {
                    drain = None;
                }
            }
        }
    }
}

/// Waits until there may be something to read, or until the process that writes has ended.
async fn readable_or_ended(from: &FdStream, drain: Option<&mut Drain>) -> io::Result<()> {
    match drain {
        Some(drain) => tokio::select! {
            result = from.readable() => result,
            () = drain.ended() => Ok(()),
        },
        None => from.readable().await,
    }
}

async fn discard(from: &FdStream) {
    let mut buffer = vec![0; 4096];
    while !matches!(from.read(&mut buffer).await, Ok(0) | Err(_)) {}
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::net::UnixStream;
    use tokio::io::AsyncReadExt;

    fn pipe() -> (FdStream, FdStream) {
        let (read, write) = rustix::pipe::pipe().unwrap();
        (FdStream::new(read).unwrap(), FdStream::new(write).unwrap())
    }

    fn sockets() -> (FdStream, FdStream) {
        let (ours, theirs) = UnixStream::pair().unwrap();
        (FdStream::new(ours.into()).unwrap(), FdStream::new(theirs.into()).unwrap())
    }

    #[tokio::test(flavor = "current_thread")]
    async fn input_ends_when_the_host_shuts_down() {
        let (stream, host) = sockets();
        let (mut read, write) = pipe();
        let task = tokio::spawn(input(stream, write));

        host.write_all(b"hello").await.unwrap();
        host.shutdown_write().unwrap();

        let mut received = Vec::new();
        read.read_to_end(&mut received).await.unwrap();
        assert_eq!(received, b"hello");
        task.await.unwrap();
    }

    #[tokio::test(flavor = "current_thread")]
    async fn large_output_arrives_whole_and_ends() {
        let (stream, mut host) = sockets();
        let (read, write) = pipe();
        let sent: Vec<u8> = (0..1_000_000_u32).map(|number| number as u8).collect();
        let expected = sent.clone();
        let writer = tokio::spawn(async move { write.write_all(&sent).await });
        let pump = tokio::spawn(async move { copy(&read, &stream, None).await });

        let mut received = Vec::new();
        host.read_to_end(&mut received).await.unwrap();

        assert!(received == expected);
        writer.await.unwrap().unwrap();
        pump.await.unwrap();
    }

    #[tokio::test(flavor = "current_thread")]
    async fn writer_is_told_when_the_host_goes_away() {
        let (stream, host) = sockets();
        let (read, write) = pipe();
        let pump = tokio::spawn(async move { copy(&read, &stream, None).await });

        drop(host);
        write.write_all(b"lost").await.unwrap();
        pump.await.unwrap();

        assert!(write.write_all(b"refused").await.is_err());
    }
}
