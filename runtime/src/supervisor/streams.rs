// SPDX-License-Identifier: Apache-2.0
//! The container's standard streams: one connection through the guest's vsock each, and one thread each that moves bytes
//! between it and this process' own descriptor.
//!
//! Blocking threads, because a standard stream may be anything: a pipe, a terminal, a regular file (which epoll refuses),
//! a socket. Where it is a pipe the bytes are spliced and never seen. Each thread holds at most one buffer, so a slow
//! reader slows the container down, as with runc. End of stream is end of output: nothing is timed.

use std::io::{self, ErrorKind};
use std::net::Shutdown;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;

use bulkhead_protocol::STREAM_PORT;
use rustix::event::{PollFd, PollFlags, poll};
use rustix::fs::{FileType, fstat};
use rustix::io::Errno;
use rustix::pipe::{SpliceFlags, splice};
use rustix::stdio;
use thiserror::Error;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::sync::oneshot;

use crate::trace;

/// Bytes moved at once.
const CHUNK: usize = 64 * 1024;

/// Stack of a pump: it has no frames to speak of.
const STACK_SIZE: usize = 64 * 1024;

/// Longest answer to `CONNECT`.
const MAX_ANSWER: usize = 32;

/// The streams' names in the agent protocol.
const STDIN: u32 = 1;
const STDOUT: u32 = 2;
const STDERR: u32 = 3;

/// A stream that cannot be opened.
#[derive(Debug, Error)]
pub(crate) enum OpenStreamError {
    #[error("cannot connect the container's {0} to the guest")]
    Connect(&'static str, #[source] io::Error),
    #[error("the guest refused the connection for the container's {0}")]
    Refused(&'static str),
    #[error("cannot start a thread for the container's {0}")]
    Thread(&'static str, #[source] io::Error),
}

/// Which streams a container gets; 0 for none, which is /dev/null in the container.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct StreamIds {
    pub(crate) stdin: u32,
    pub(crate) stdout: u32,
    pub(crate) stderr: u32,
}

impl StreamIds {
    /// A terminal's one stream a direction, or one for each standard descriptor that is not /dev/null here: it need not
    /// be carried to be /dev/null there.
    pub(crate) fn choose(terminal: bool) -> Self {
        if terminal {
            return Self { stdin: STDIN, stdout: STDOUT, stderr: 0 };
        }
        let carried = |fd: BorrowedFd<'_>, id| if is_null_device(fd) { 0 } else { id };
        Self {
            stdin: carried(stdio::stdin(), STDIN),
            stdout: carried(stdio::stdout(), STDOUT),
            stderr: carried(stdio::stderr(), STDERR),
        }
    }
}

fn is_null_device(fd: BorrowedFd<'_>) -> bool {
    fstat(fd).is_ok_and(|stat| {
        FileType::from_raw_mode(stat.st_mode) == FileType::CharacterDevice && stat.st_rdev == rustix::fs::makedev(1, 3)
    })
}

/// The running pumps of the output streams.
#[derive(Debug)]
pub(crate) struct Outputs {
    ended: Vec<oneshot::Receiver<()>>,
    first_output_ns: Arc<AtomicU64>,
}

impl Outputs {
    /// Returns when all output has been delivered, or has nobody left to take it.
    pub(crate) async fn drained(&mut self) {
        while let Some(ended) = self.ended.last_mut() {
            // A pump that is gone without a word has ended too.
            let _ = ended.await;
            self.ended.pop();
        }
    }

    /// When the first byte of output was delivered, on the host's `CLOCK_MONOTONIC`.
    pub(crate) fn first_output_ns(&self) -> Option<u64> {
        Some(self.first_output_ns.load(Ordering::Relaxed)).filter(|ns| *ns != 0)
    }
}

/// The open streams, before a byte has moved.
#[derive(Debug)]
pub(crate) struct Opened {
    stdin: Option<UnixStream>,
    stdout: Option<UnixStream>,
    stderr: Option<UnixStream>,
}

/// Opens the streams through the vsock socket at `path`.
pub(crate) async fn open(path: &Path, ids: StreamIds) -> Result<Opened, OpenStreamError> {
    let (stdin, stdout, stderr) = tokio::try_join!(
        connect(path, ids.stdin, "stdin"),
        connect(path, ids.stdout, "stdout"),
        connect(path, ids.stderr, "stderr"),
    )?;
    Ok(Opened { stdin, stdout, stderr })
}

impl Opened {
    /// Starts the pumps.
    pub(crate) fn pump(self) -> Result<Outputs, OpenStreamError> {
        let Self { stdin, stdout, stderr } = self;
        let mut outputs = Outputs { ended: Vec::new(), first_output_ns: Arc::default() };
        for (name, stream, fd) in [("stdout", stdout, stdio::stdout()), ("stderr", stderr, stdio::stderr())] {
            if let Some(stream) = stream {
                let (sender, ended) = oneshot::channel();
                let first_output_ns = Arc::clone(&outputs.first_output_ns);
                start(name, move || {
                    // Closing the stream is how the guest learns that nobody takes its output any more.
                    let _ = copy(stream.as_fd(), fd, || {
                        if first_output_ns.load(Ordering::Relaxed) == 0 {
                            let _ = first_output_ns.compare_exchange(
                                0,
                                trace::now_ns(),
                                Ordering::Relaxed,
                                Ordering::Relaxed,
                            );
                        }
                    });
                    drop(stream);
                    if name == "stdout" {
                        end_own_stdout();
                    }
                    let _ = sender.send(());
                })?;
                outputs.ended.push(ended);
            }
        }
        if let Some(stream) = stdin {
            start("stdin", move || {
                let _ = copy(stdio::stdin(), stream.as_fd(), || {});
                // The container's end of file. Its own output streams are others.
                let _ = stream.shutdown(Shutdown::Write);
                // Kept open: closing it would say that the guest's side is not wanted either.
                std::mem::forget(stream);
            })?;
        }
        Ok(outputs)
    }
}

/// Lets the reader of our stdout see its end when the container has ended its own, though we live on: nothing else is
/// written there during a run. Our stderr stays, for what we have to say ourselves.
fn end_own_stdout() {
    if let Ok(null) = std::fs::File::options().write(true).open("/dev/null") {
        // Where it fails, the reader sees the end when we exit.
        let _ = stdio::dup2_stdout(null);
    }
}

fn start(name: &'static str, pump: impl FnOnce() + Send + 'static) -> Result<(), OpenStreamError> {
    let started = thread::Builder::new().name(format!("pump-{name}")).stack_size(STACK_SIZE).spawn(pump);
    started.map(drop).map_err(|error| OpenStreamError::Thread(name, error))
}

async fn connect(path: &Path, id: u32, name: &'static str) -> Result<Option<UnixStream>, OpenStreamError> {
    if id == 0 {
        return Ok(None);
    }
    match handshake(path.to_owned(), id).await {
        Ok(Some(stream)) => Ok(Some(stream)),
        Ok(None) => Err(OpenStreamError::Refused(name)),
        Err(error) => Err(OpenStreamError::Connect(name, error)),
    }
}

/// Connects to the agent's stream port; `None` if it is refused.
async fn handshake(path: PathBuf, id: u32) -> io::Result<Option<UnixStream>> {
    let mut stream = tokio::net::UnixStream::connect(path).await?;
    stream.write_all(format!("CONNECT {STREAM_PORT}\n").as_bytes()).await?;
    let mut answer = Vec::with_capacity(MAX_ANSWER);
    // Byte by byte: what follows the line belongs to the stream.
    while answer.last() != Some(&b'\n') {
        let mut byte = [0];
        if answer.len() == MAX_ANSWER || stream.read(&mut byte).await? == 0 {
            return Ok(None);
        }
        answer.push(byte[0]);
    }
    if !answer.starts_with(b"OK ") {
        return Ok(None);
    }
    stream.write_all(&id.to_le_bytes()).await?;
    // It stays non-blocking: splice(2) heeds the socket's own flag when it writes to one.
    Ok(Some(stream.into_std()?))
}

/// Copies until the end of `from`, or until `to` takes no more, which is not told apart: either way it is over. Calls
/// `moved` whenever bytes have arrived.
fn copy(from: BorrowedFd<'_>, to: BorrowedFd<'_>, moved: impl Fn()) -> Result<(), Errno> {
    if is_pipe(from) || is_pipe(to) {
        match copy_by_splice(from, to, &moved) {
            // Some files cannot be spliced; nothing has been lost then.
            Err(Errno::INVAL) => {}
            done => return done,
        }
    }
    let mut buffer = vec![0; CHUNK];
    loop {
        let length = match rustix::io::read(from, &mut buffer[..]) {
            Ok(0) => return Ok(()),
            Ok(length) => length,
            Err(error) => {
                retry(error, from, PollFlags::IN)?;
                continue;
            }
        };
        let mut rest = &buffer[..length];
        while !rest.is_empty() {
            match rustix::io::write(to, rest) {
                Ok(written) => {
                    rest = &rest[written..];
                    moved();
                }
                Err(error) => retry(error, to, PollFlags::OUT)?,
            }
        }
    }
}

fn is_pipe(fd: BorrowedFd<'_>) -> bool {
    fstat(fd).is_ok_and(|stat| FileType::from_raw_mode(stat.st_mode) == FileType::Fifo)
}

/// Never waits inside splice(2): the kernel keeps the pipe locked meanwhile, against its reader, and, where stdout and
/// stderr are one pipe, against the other pump and this process' own messages.
fn copy_by_splice(from: BorrowedFd<'_>, to: BorrowedFd<'_>, moved: &impl Fn()) -> Result<(), Errno> {
    loop {
        match splice(from, None, to, None, CHUNK, SpliceFlags::NONBLOCK) {
            Ok(0) => return Ok(()),
            Ok(_) => moved(),
            // Which side would block is not said. Waiting for both is right in each case: neither can lose its
            // readiness to another, but for an output that several share, and that is tried again.
            Err(Errno::AGAIN) => {
                wait_for(from, PollFlags::IN)?;
                wait_for(to, PollFlags::OUT)?;
            }
            Err(Errno::INTR) => {}
            Err(error) => return Err(error),
        }
    }
}

/// Waits where waiting helps; otherwise gives the error back.
fn retry(error: Errno, fd: BorrowedFd<'_>, readiness: PollFlags) -> Result<(), Errno> {
    match error.kind() {
        ErrorKind::Interrupted => Ok(()),
        ErrorKind::WouldBlock => wait_for(fd, readiness),
        _ => Err(error),
    }
}

fn wait_for(fd: BorrowedFd<'_>, readiness: PollFlags) -> Result<(), Errno> {
    match poll(&mut [PollFd::from_borrowed_fd(fd, readiness)], None) {
        Ok(_) | Err(Errno::INTR) => Ok(()),
        Err(error) => Err(error),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::File;
    use std::io::{Read, Seek, Write};
    use std::os::unix::net::UnixListener;

    fn pattern(length: usize) -> Vec<u8> {
        (0..length).map(|index| (index * 7 % 251) as u8).collect()
    }

    #[test]
    fn bytes_pass_unchanged_between_pipes_sockets_and_files() {
        let bytes = pattern(1_000_003);
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(&bytes).unwrap();
        file.rewind().unwrap();
        let (socket_in, socket_out) = UnixStream::pair().unwrap();
        let (mut pipe_out, pipe_in) = io::pipe().unwrap();

        let received = thread::scope(|scope| {
            scope.spawn(move || {
                copy(file.as_fd(), socket_in.as_fd(), || {}).unwrap();
            });
            scope.spawn(move || {
                copy(socket_out.as_fd(), pipe_in.as_fd(), || {}).unwrap();
            });
            let mut received = Vec::new();
            pipe_out.read_to_end(&mut received).unwrap();
            received
        });

        assert!(received == bytes);
    }

    #[test]
    fn a_pipe_is_spliced_to_a_socket() {
        let bytes = pattern(300_000);
        let (pipe_out, mut pipe_in) = io::pipe().unwrap();
        let (socket_in, mut socket_out) = UnixStream::pair().unwrap();

        let received = thread::scope(|scope| {
            let bytes = &bytes;
            scope.spawn(move || pipe_in.write_all(bytes).unwrap());
            scope.spawn(move || {
                copy_by_splice(pipe_out.as_fd(), socket_in.as_fd(), &|| {}).unwrap();
            });
            let mut received = Vec::new();
            socket_out.read_to_end(&mut received).unwrap();
            received
        });

        assert!(received == bytes);
    }

    #[test]
    fn an_idle_stream_does_not_hold_up_another_in_the_same_pipe() {
        let (mut pipe_out, pipe_in) = io::pipe().unwrap();
        let (idle, idle_out) = UnixStream::pair().unwrap();
        let (mut busy, busy_out) = UnixStream::pair().unwrap();
        let (sender, received) = std::sync::mpsc::channel();
        let reader = thread::spawn(move || {
            let mut byte = [0];
            while pipe_out.read(&mut byte).unwrap() == 1 {
                let _ = sender.send(byte[0]);
            }
        });

        let in_time = thread::scope(|scope| {
            for stream in [idle_out, busy_out] {
                let pipe = pipe_in.try_clone().unwrap();
                scope.spawn(move || copy_by_splice(stream.as_fd(), pipe.as_fd(), &|| {}).unwrap());
            }
            let mut in_time = Vec::new();
            for byte in [1, 2, 3] {
                busy.write_all(&[byte]).unwrap();
                in_time.push(received.recv_timeout(std::time::Duration::from_secs(5)).ok());
            }
            drop((idle, busy));
            in_time
        });

        drop(pipe_in);
        reader.join().unwrap();
        assert_eq!(in_time, [Some(1), Some(2), Some(3)]);
    }

    #[test]
    fn a_reader_that_is_gone_ends_the_copy() {
        let (pipe_out, pipe_in) = io::pipe().unwrap();
        let (socket_in, socket_out) = UnixStream::pair().unwrap();
        (&socket_in).write_all(b"x").unwrap();
        drop(pipe_out);

        assert_eq!(copy(socket_out.as_fd(), pipe_in.as_fd(), || {}), Err(Errno::PIPE));
    }

    #[test]
    fn a_non_blocking_pipe_is_waited_for() {
        let bytes = pattern(500_000);
        let (mut pipe_out, pipe_in) = io::pipe().unwrap();
        rustix::io::ioctl_fionbio(&pipe_in, true).unwrap();
        let (mut socket_in, socket_out) = UnixStream::pair().unwrap();

        let received = thread::scope(|scope| {
            let bytes = &bytes;
            scope.spawn(move || socket_in.write_all(bytes).unwrap());
            scope.spawn(move || {
                copy(socket_out.as_fd(), pipe_in.as_fd(), || {}).unwrap();
            });
            let mut received = Vec::new();
            pipe_out.read_to_end(&mut received).unwrap();
            received
        });

        assert!(received == bytes);
    }

    #[test]
    fn only_the_null_device_is_the_null_device() {
        assert!(is_null_device(File::open("/dev/null").unwrap().as_fd()));
        assert!(!is_null_device(File::open("/dev/zero").unwrap().as_fd()));
        assert!(!is_null_device(tempfile::tempfile().unwrap().as_fd()));
    }

    async fn answered(answer: &'static [u8]) -> (io::Result<Option<UnixStream>>, Vec<u8>) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        let listener = UnixListener::bind(&path).unwrap();
        let guest = thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            let mut request = [0; 13];
            stream.read_exact(&mut request).unwrap();
            assert_eq!(&request, b"CONNECT 1025\n");
            stream.write_all(answer).unwrap();
            if !answer.starts_with(b"OK ") {
                return Vec::new();
            }
            let mut id = [0; 4];
            let read = stream.read(&mut id).unwrap();
            id[..read].to_vec()
        });
        let result = handshake(path, 7).await;
        let result = result.map(|stream| {
            stream.inspect(|stream| {
                stream.shutdown(Shutdown::Write).unwrap();
            })
        });
        (result, guest.join().unwrap())
    }

    #[tokio::test]
    async fn a_stream_is_opened_by_its_id_and_keeps_what_follows_the_answer() {
        let (stream, id) = answered(b"OK 1073741824\nhello").await;

        assert_eq!(id, [7, 0, 0, 0]);
        let mut rest = String::new();
        let mut stream = stream.unwrap().unwrap();
        stream.set_nonblocking(false).unwrap();
        stream.read_to_string(&mut rest).unwrap();
        assert_eq!(rest, "hello");
    }

    #[tokio::test]
    async fn a_refusal_is_not_a_stream() {
        assert!(answered(b"").await.0.unwrap().is_none());
        assert!(answered(b"NO\n").await.0.unwrap().is_none());
        assert!(answered(b"OKOKOKOKOKOKOKOKOKOKOKOKOKOKOKOKOKOKOKOK").await.0.unwrap().is_none());
    }
}
