// SPDX-License-Identifier: Apache-2.0
//! The container's standard streams: one connection through the guest's vsock each, and one thread each that moves bytes
//! between it and this process' own descriptor.
//!
//! Blocking threads, because a standard stream may be anything: a pipe, a terminal, a regular file (which epoll refuses),
//! a socket. Where it is a pipe the bytes are spliced and never seen. Each thread holds at most one buffer, so a slow
//! reader slows the container down, as with runc. End of stream is end of output: nothing is timed.

mod copy;
mod ends;
mod preserved;

use std::io;
use std::net::Shutdown;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::thread;
use std::time::Duration;

use bulkhead_protocol::agent::{DescriptorKind, Process};
use bulkhead_protocol::{MAX_PRESERVED, STREAM_PORT};
use rustix::fs::{FileType, fstat};
use rustix::stdio;
use thiserror::Error;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::sync::oneshot;
use tokio::time::timeout;

use self::copy::copy;
pub(crate) use self::ends::{Ends, GivenEnds, Input, InputCloser};
pub(crate) use self::preserved::{Asked, Preserved, PreservedError};
use crate::trace;

/// Stack of a pump: it has no frames to speak of.
const STACK_SIZE: usize = 64 * 1024;

/// How long the guest may take to take a stream.
const OPEN_LIMIT: Duration = Duration::from_secs(60);

/// Longest answer to `CONNECT`.
const MAX_ANSWER: usize = 32;

/// The streams' names in the agent protocol.
const STDIN: u32 = 1;
const STDOUT: u32 = 2;
const STDERR: u32 = 3;
/// The first of those that are preserved.
const PRESERVED: u32 = 4;

/// The first number that no stream of an init has.
pub(super) const FIRST_FREE: u32 = PRESERVED + MAX_PRESERVED;

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

/// Which streams a process gets; 0 for none, which is /dev/null in the container.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct StreamIds {
    pub(crate) stdin: u32,
    pub(crate) stdout: u32,
    pub(crate) stderr: u32,
    /// The first of those of its descriptors from 3 on, and how many these are.
    pub(crate) preserved: (u32, u32),
}

impl StreamIds {
    /// A terminal's one stream a direction, or one for each standard descriptor that is not /dev/null here: it need not
    /// be carried to be /dev/null there.
    pub(crate) fn choose(terminal: bool) -> Self {
        if terminal {
            return Self { stdin: STDIN, stdout: STDOUT, ..Self::default() };
        }
        let carried = [stdio::stdin(), stdio::stdout(), stdio::stderr()].map(|fd| !is_null_device(fd));
        Self::of_init(false, carried)
    }

    /// The same streams of a guest with others of these numbers: by so much higher ones.
    pub(crate) fn shifted(self, by: u32) -> Self {
        let shift = |id: u32| if id == 0 { 0 } else { id.wrapping_add(by) };
        let (first, count) = self.preserved;
        Self {
            stdin: shift(self.stdin),
            stdout: shift(self.stdout),
            stderr: shift(self.stderr),
            preserved: (shift(first), count),
        }
    }

    /// The same with so many for descriptors from 3 on.
    pub(crate) fn with_preserved(self, first: u32, count: u32) -> Self {
        Self { preserved: (first, count), ..self }
    }

    /// Names them to the agent.
    pub(crate) fn name_in(self, process: &mut Process) {
        process.stdin_stream = self.stdin;
        process.stdout_stream = self.stdout;
        process.stderr_stream = self.stderr;
        let carried = process.preserved.iter_mut().filter(|one| one.kind != DescriptorKind::NULL_DEVICE.into());
        for (number, descriptor) in (self.preserved.0..).zip(carried) {
            descriptor.stream = number;
        }
    }

    /// Those of an init that are to be carried. A terminal's output is one stream.
    fn of_init(terminal: bool, [stdin, stdout, stderr]: [bool; 3]) -> Self {
        let number = |carried, id| if carried { id } else { 0 };
        Self {
            stdin: number(stdin, STDIN),
            stdout: number(stdout, STDOUT),
            stderr: number(stderr && !terminal, STDERR),
            ..Self::default()
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
    streams: OutputStreams,
    first_output_ns: Arc<AtomicU64>,
    /// Kept open: closing one would say that the guest's side is not wanted either.
    inputs: Vec<UnixStream>,
}

/// What can be done to the output streams while they are pumped; copies mean the same.
#[derive(Debug, Clone, Default)]
pub(crate) struct OutputStreams {
    /// The guest's ends, as long as their pumps have them.
    guests: Vec<Weak<UnixStream>>,
    /// See [`GivenEnds::held`].
    held: Arc<Mutex<Vec<OwnedFd>>>,
}

impl OutputStreams {
    /// The process has ended: from here on a reader that is gone is gone, and what it has not taken is given up, by the pipe's
    /// own error. A reader that is there has all its time.
    pub(crate) fn let_go(&self) {
        // Nothing panics while the lock is held.
        self.held.lock().unwrap_or_else(PoisonError::into_inner).clear();
    }

    /// Ends them, so that the guest learns that nobody takes its output any more, though a pump may wait for its reader.
    pub(crate) fn give_up(&self) {
        for stream in self.guests.iter().filter_map(Weak::upgrade) {
            // One that the guest has ended already needs no end.
            let _ = stream.shutdown(Shutdown::Both);
        }
    }
}

impl Outputs {
    /// What the pumps can be helped by to their end.
    pub(crate) fn streams(&self) -> OutputStreams {
        self.streams.clone()
    }

    /// Returns when all output has been delivered, or has nobody left to take it.
    pub(crate) async fn drained(&mut self) {
        self.streams.let_go();
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
    preserved: Vec<UnixStream>,
}

/// Opens the streams through the vsock socket at `path`.
pub(crate) async fn open(path: &Path, ids: StreamIds) -> Result<Opened, OpenStreamError> {
    let (stdin, stdout, stderr) = tokio::try_join!(
        connect(path, ids.stdin, "stdin"),
        connect(path, ids.stdout, "stdout"),
        connect(path, ids.stderr, "stderr"),
    )?;
    let (first, count) = ids.preserved;
    let mut preserved = Vec::new();
    for number in (first..).take(count as usize) {
        preserved.extend(connect(path, number, preserved::NAME).await?);
    }
    Ok(Opened { stdin, stdout, stderr, preserved })
}

impl Opened {
    /// Starts the pumps between the streams and their ends on the host.
    pub(crate) fn pump(self, ends: Ends) -> Result<Outputs, OpenStreamError> {
        let Self { stdin, stdout, stderr, preserved } = self;
        let mut outputs = Outputs {
            ended: Vec::new(),
            streams: OutputStreams::default(),
            first_output_ns: Arc::default(),
            inputs: Vec::new(),
        };
        match ends {
            Ends::Own(descriptors) => {
                outputs.start("stdout", stdout, Some(stdio::stdout()), end_own_stdout)?;
                outputs.start("stderr", stderr, Some(stdio::stderr()), || {})?;
                outputs.start_input("stdin", stdin, |to| {
                    let _ = copy(stdio::stdin(), to, || {});
                })?;
                descriptors.pump(preserved, &mut outputs)?;
            }
            Ends::Given(ends) => {
                outputs.streams.held = Arc::new(Mutex::new(ends.held));
                outputs.start("stdout", stdout, ends.stdout, || {})?;
                outputs.start("stderr", stderr, ends.stderr, || {})?;
                if let Some(input) = ends.stdin {
                    outputs.start_input("stdin", stdin, move |to| {
                        let _ = input.copy(to);
                    })?;
                }
            }
        }
        Ok(outputs)
    }
}

impl Outputs {
    /// Starts the pump of an output, if both of its ends are there; `done` is called at its end.
    fn start(
        &mut self,
        name: &'static str,
        stream: Option<UnixStream>,
        end: Option<impl AsFd + Send + 'static>,
        done: impl FnOnce() + Send + 'static,
    ) -> Result<(), OpenStreamError> {
        let (Some(stream), Some(end)) = (stream, end) else {
            return Ok(());
        };
        let (sender, ended) = oneshot::channel();
        let stream = Arc::new(stream);
        self.add(&stream, ended);
        let first_output_ns = Arc::clone(&self.first_output_ns);
        start(name, move || {
            // Closing the stream is how the guest learns that nobody takes its output any more.
            let _ = copy(stream.as_fd(), end.as_fd(), || {
                if first_output_ns.load(Ordering::Relaxed) == 0 {
                    let _ = first_output_ns.compare_exchange(0, trace::now_ns(), Ordering::Relaxed, Ordering::Relaxed);
                }
            });
            drop((stream, end));
            done();
            let _ = sender.send(());
        })
    }

    /// Adds a stream of outputs, whose pump tells its end.
    fn add(&mut self, stream: &Arc<UnixStream>, ended: oneshot::Receiver<()>) {
        self.streams.guests.push(Arc::downgrade(stream));
        self.ended.push(ended);
    }

    /// Starts the pump of an input, if there is one.
    fn start_input(
        &mut self,
        name: &'static str,
        stream: Option<UnixStream>,
        pump: impl FnOnce(BorrowedFd<'_>) + Send + 'static,
    ) -> Result<(), OpenStreamError> {
        let Some(stream) = stream else {
            return Ok(());
        };
        let kept = stream.try_clone().map_err(|error| OpenStreamError::Connect(name, error))?;
        start(name, move || {
            pump(stream.as_fd());
            // The process' end of file. Its own output streams are others.
            let _ = stream.shutdown(Shutdown::Write);
        })?;
        self.inputs.push(kept);
        Ok(())
    }
}

impl Drop for Outputs {
    fn drop(&mut self) {
        // A pump that waits until the guest reads is not to wait for a process that has ended.
        for input in &self.inputs {
            // One that the guest has ended already needs no end.
            let _ = input.shutdown(Shutdown::Both);
        }
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
    let failed = |error| OpenStreamError::Connect(name, error);
    match open_one(path.to_owned(), id).await {
        // It stays non-blocking: splice(2) heeds the socket's own flag when it writes to one.
        Ok(Some(stream)) => stream.into_std().map(Some).map_err(failed),
        Ok(None) => Err(OpenStreamError::Refused(name)),
        Err(error) => Err(failed(error)),
    }
}

/// Opens one stream through the vsock socket at `path`; `None` if it is refused. A guest that does neither is not waited for
/// without end.
pub(crate) async fn open_one(path: PathBuf, id: u32) -> io::Result<Option<tokio::net::UnixStream>> {
    open_within(path, id, OPEN_LIMIT).await
}

async fn open_within(path: PathBuf, id: u32, limit: Duration) -> io::Result<Option<tokio::net::UnixStream>> {
    timeout(limit, ask_for(path, id)).await.unwrap_or_else(|_| {
        let why = format!("the guest has not taken the stream within {limit:?}");
        Err(io::Error::new(io::ErrorKind::TimedOut, why))
    })
}

async fn ask_for(path: PathBuf, id: u32) -> io::Result<Option<tokio::net::UnixStream>> {
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
    Ok(Some(stream))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::File;
    use std::io::{Read, Write};
    use std::os::unix::net::UnixListener;

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
        let result = open_one(path, 7).await;
        let result = result.map(|stream| {
            stream.map(|stream| stream.into_std().unwrap()).inspect(|stream| {
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
    async fn a_guest_that_does_not_answer_is_not_waited_for_without_end() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        let _listener = UnixListener::bind(&path).unwrap();

        let error = open_within(path, 7, Duration::from_millis(20)).await.unwrap_err();

        assert_eq!(error.kind(), io::ErrorKind::TimedOut);
        assert!(error.to_string().contains("within 20ms"), "{error}");
    }

    #[test]
    fn an_input_that_nobody_reads_ends_with_its_process() {
        let (stream, _guest) = UnixStream::pair().unwrap();
        stream.set_nonblocking(true).unwrap();
        let mut outputs = Outputs {
            ended: Vec::new(),
            streams: OutputStreams::default(),
            first_output_ns: Arc::default(),
            inputs: Vec::new(),
        };
        let (sender, ended) = std::sync::mpsc::channel();
        outputs
            .start_input("stdin", Some(stream), move |to| {
                // More than fits on the way.
                let written = copy::write_all(to, &vec![0; 16 << 20]);
                sender.send(written.is_err()).unwrap();
            })
            .unwrap();
        assert!(ended.recv_timeout(Duration::from_millis(200)).is_err(), "it waits");

        drop(outputs);

        assert!(ended.recv_timeout(Duration::from_secs(20)).unwrap());
    }

    #[tokio::test]
    async fn a_refusal_is_not_a_stream() {
        assert!(answered(b"").await.0.unwrap().is_none());
        assert!(answered(b"NO\n").await.0.unwrap().is_none());
        assert!(answered(b"OKOKOKOKOKOKOKOKOKOKOKOKOKOKOKOKOKOKOKOK").await.0.unwrap().is_none());
    }
}
