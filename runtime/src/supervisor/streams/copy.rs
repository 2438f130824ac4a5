// SPDX-License-Identifier: Apache-2.0
//! Moving bytes from one descriptor to another, whatever they are.

use std::io::ErrorKind;
use std::os::fd::BorrowedFd;

use rustix::event::{PollFd, PollFlags, poll};
use rustix::fs::{FileType, fstat};
use rustix::io::Errno;
use rustix::pipe::{SpliceFlags, splice};

/// Bytes moved at once.
pub(super) const CHUNK: usize = 64 * 1024;

/// Copies until the end of `from`, or until `to` takes no more, which is not told apart: either way it is over. Calls
/// `moved` whenever bytes have arrived.
pub(super) fn copy(from: BorrowedFd<'_>, to: BorrowedFd<'_>, moved: impl Fn()) -> Result<(), Errno> {
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
        write_all_then(to, &buffer[..length], &moved)?;
    }
}

/// Writes all of it, waiting where that is needed.
pub(super) fn write_all(to: BorrowedFd<'_>, bytes: &[u8]) -> Result<(), Errno> {
    write_all_then(to, bytes, &|| {})
}

fn write_all_then(to: BorrowedFd<'_>, bytes: &[u8], moved: &impl Fn()) -> Result<(), Errno> {
    let mut rest = bytes;
    while !rest.is_empty() {
        match rustix::io::write(to, rest) {
            Ok(written) => {
                rest = &rest[written..];
                moved();
            }
            Err(error) => retry(error, to, PollFlags::OUT)?,
        }
    }
    Ok(())
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
pub(super) fn retry(error: Errno, fd: BorrowedFd<'_>, readiness: PollFlags) -> Result<(), Errno> {
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
    use std::io::{self, Read, Seek, Write};
    use std::os::fd::AsFd;
    use std::os::unix::net::UnixStream;
    use std::thread;

    use super::*;

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
}
