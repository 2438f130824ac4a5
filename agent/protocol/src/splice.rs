// SPDX-License-Identifier: Apache-2.0
//! A connection that a stream between host and guest stands for: on either side, its end there and the stream are joined.
//!
//! What one side of the joint does, the other one sees: that it sends no more, that it takes no more, that it is gone. Nothing
//! is timed, and a side that does not read holds up nobody but those who send to it.

use std::future::Future;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::pin::pin;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::net::{Shutdown, shutdown};
use tokio::net::{TcpStream, UnixStream};

/// Bytes moved at once.
const CHUNK: usize = 64 << 10;

/// A connected stream socket, of whatever family, that does not block.
pub trait Socket: AsFd {
    /// Waits until there may be something to read, or the end.
    fn readable(&self) -> impl Future<Output = io::Result<()>> + Send;

    /// Reads what is there, without waiting: `None` if there is nothing, 0 at the end.
    ///
    /// # Errors
    ///
    /// As read(2).
    fn read_now(&self, buffer: &mut [u8]) -> io::Result<Option<usize>>;

    /// Writes all of `bytes`.
    fn write_all(&self, bytes: &[u8]) -> impl Future<Output = io::Result<()>> + Send;
}

macro_rules! socket {
    ($stream:ty) => {
        impl Socket for $stream {
            async fn readable(&self) -> io::Result<()> {
                Self::readable(self).await
            }

            fn read_now(&self, buffer: &mut [u8]) -> io::Result<Option<usize>> {
                match self.try_read(buffer) {
                    Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(None),
                    read => read.map(Some),
                }
            }

            async fn write_all(&self, mut bytes: &[u8]) -> io::Result<()> {
                while !bytes.is_empty() {
                    self.writable().await?;
                    match self.try_write(bytes) {
                        Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                        written => bytes = &bytes[written?..],
                    }
                }
                Ok(())
            }
        }
    };
}

socket!(UnixStream);
socket!(TcpStream);

/// What has ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Ended {
    /// One direction.
    Direction,
    /// The connection: one side is gone.
    Connection,
}

/// Moves bytes both ways until both directions have ended, or one side is gone. Whoever drops the sockets then closes them.
pub async fn splice(one: &(impl Socket + Sync), other: &(impl Socket + Sync)) {
    let mut there = pin!(direction(one, other));
    let mut back = pin!(direction(other, one));
    let (ended, is_there) = tokio::select! {
        ended = &mut there => (ended, true),
        ended = &mut back => (ended, false),
    };
    if ended == Ended::Direction {
        let _ = if is_there { back.await } else { there.await };
    }
}

/// Moves bytes until `from` sends no more, or `to` takes no more, and tells the other one.
async fn direction(from: &impl Socket, to: &impl Socket) -> Ended {
    if copy(from, to).await.is_err() {
        // Its peer is told by EPIPE. What `to` has sent is still to be delivered, whatever has become of it.
        let _ = shutdown(from.as_fd(), Shutdown::Read);
        return Ended::Direction;
    }
    if is_gone(from.as_fd()) {
        return Ended::Connection;
    }
    // It fails where it has been told otherwise.
    let _ = shutdown(to.as_fd(), Shutdown::Write);
    Ended::Direction
}

/// Copies to the end of `from`. The error is one of `to`; a `from` that fails has ended.
async fn copy(from: &impl Socket, to: &impl Socket) -> io::Result<()> {
    while from.readable().await.is_ok() {
        // It is there only while there is something to move: most connections are silent most of the time.
        let mut buffer = vec![0; CHUNK];
        match from.read_now(&mut buffer) {
            Ok(None) => {}
            Ok(Some(0)) | Err(_) => break,
            Ok(Some(len)) => to.write_all(&buffer[..len]).await?,
        }
    }
    Ok(())
}

/// Whether nobody is there any more who would take something, where the kernel tells: not of a vsock.
fn is_gone(socket: BorrowedFd<'_>) -> bool {
    let mut polled = [PollFd::from_borrowed_fd(socket, PollFlags::empty())];
    let now = Timespec { tv_sec: 0, tv_nsec: 0 };
    poll(&mut polled, Some(&now)).is_ok() && polled[0].revents().intersects(PollFlags::HUP | PollFlags::ERR)
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests")]
mod tests {
    use std::time::Duration;

    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::task::JoinHandle;
    use tokio::time::timeout;

    use super::*;

    /// The two ends of a connection that goes through a splice.
    fn spliced() -> (UnixStream, UnixStream, JoinHandle<()>) {
        let (near, one) = UnixStream::pair().unwrap();
        let (other, far) = UnixStream::pair().unwrap();
        let joint = tokio::spawn(async move { splice(&one, &other).await });
        (near, far, joint)
    }

    async fn ends(joint: JoinHandle<()>) {
        timeout(Duration::from_secs(20), joint).await.unwrap().unwrap();
    }

    fn pattern(length: usize) -> Vec<u8> {
        (0..length).map(|index| (index * 7 % 251) as u8).collect()
    }

    #[tokio::test]
    async fn bytes_pass_both_ways_at_once() {
        let (near, far, joint) = spliced();
        let (sent, answer) = (pattern(3_000_017), pattern(1_000_003));

        let exchange = |stream: UnixStream, bytes: Vec<u8>| async move {
            let (mut reader, mut writer) = stream.into_split();
            let sending = tokio::spawn(async move {
                writer.write_all(&bytes).await.unwrap();
                writer.shutdown().await.unwrap();
            });
            let mut received = Vec::new();
            reader.read_to_end(&mut received).await.unwrap();
            sending.await.unwrap();
            received
        };
        let (received_near, received_far) = tokio::join!(exchange(near, sent.clone()), exchange(far, answer.clone()));

        assert!(received_near == answer && received_far == sent);
        ends(joint).await;
    }

    #[tokio::test]
    async fn a_side_that_has_sent_all_still_receives() {
        let (mut near, mut far, joint) = spliced();

        near.write_all(b"question").await.unwrap();
        near.shutdown().await.unwrap();
        let mut question = String::new();
        far.read_to_string(&mut question).await.unwrap();
        far.write_all(b"answer").await.unwrap();
        drop(far);
        let mut answer = String::new();
        near.read_to_string(&mut answer).await.unwrap();

        assert_eq!((question.as_str(), answer.as_str()), ("question", "answer"));
        ends(joint).await;
    }

    #[tokio::test]
    async fn a_side_that_goes_ends_the_connection_when_its_bytes_have_arrived() {
        let (near, mut far, joint) = spliced();

        near.write_all(b"last words").await.unwrap();
        drop(near);
        let mut received = String::new();
        far.read_to_string(&mut received).await.unwrap();

        assert_eq!(received, "last words");
        // Though this side has not ended anything.
        ends(joint).await;
        assert!(far.write_all(b"too late").await.is_err());
    }

    #[tokio::test]
    async fn a_sender_is_told_that_nobody_receives_and_what_was_sent_back_arrives() {
        let (mut near, far, joint) = spliced();
        far.write_all(b"refused").await.unwrap();
        drop(far);

        let refused = timeout(Duration::from_secs(20), async { while near.write_all(&[0; 4096]).await.is_ok() {} });

        refused.await.unwrap();
        let mut received = [0; 7];
        near.read_exact(&mut received).await.unwrap();
        assert_eq!(received, *b"refused");
        ends(joint).await;
    }

    #[tokio::test]
    async fn one_that_does_not_read_holds_up_its_own_direction_only() {
        let (near, far, joint) = spliced();
        let (mut reader, mut writer) = near.into_split();
        // More than all buffers on the way hold.
        let flood = tokio::spawn(async move { writer.write_all(&vec![0; 16 << 20]).await });

        far.write_all(b"x").await.unwrap();

        assert_eq!(reader.read_u8().await.unwrap(), b'x');
        drop(far);
        assert!(flood.await.unwrap().is_err());
        ends(joint).await;
    }
}
