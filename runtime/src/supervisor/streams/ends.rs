// SPDX-License-Identifier: Apache-2.0
//! Where a process' streams lead on the host: to this process' own, or to what an engine has named.

use std::io::{self, PipeReader, PipeWriter};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use bulkhead_protocol::agent::PreservedDescriptor;
use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::{Errno, ioctl_fionbio, read};

use super::copy::{CHUNK, retry, write_all};
use super::preserved::Preserved;
use super::{PRESERVED, StreamIds};

/// The host's ends of a process' streams.
#[derive(Debug)]
pub(crate) enum Ends {
    /// This process' standard streams, and what else it was called with for the process.
    Own(Preserved),
    Given(GivenEnds),
}

impl Default for Ends {
    fn default() -> Self {
        Self::Own(Preserved::default())
    }
}

/// Ends that have been opened for the process. What is absent is /dev/null for it.
#[derive(Debug, Default)]
pub(crate) struct GivenEnds {
    pub(crate) stdin: Option<Input>,
    pub(crate) stdout: Option<OwnedFd>,
    /// Unused with a terminal.
    pub(crate) stderr: Option<OwnedFd>,
    /// The other ends of named pipes among the outputs, held while the process lives, and no longer: so a reader may go, and
    /// another one come, without the process noticing.
    pub(crate) held: Vec<OwnedFd>,
}

impl GivenEnds {
    /// Which streams there are, for [`super::super::execs`] to number.
    pub(crate) fn wanted(&self) -> [bool; 3] {
        [self.stdin.is_some(), self.stdout.is_some(), self.stderr.is_some()]
    }
}

impl Ends {
    /// The streams of a container's init.
    pub(crate) fn ids(&self, terminal: bool) -> StreamIds {
        match self {
            Self::Own(preserved) => StreamIds::choose(terminal).with_preserved(PRESERVED, preserved.carried()),
            Self::Given(ends) => StreamIds::of_init(terminal, ends.wanted()),
        }
    }

    /// What the process is given beside its standard streams.
    pub(crate) fn preserved(&self) -> Vec<PreservedDescriptor> {
        match self {
            Self::Own(preserved) => preserved.to_wire(),
            Self::Given(_) => Vec::new(),
        }
    }
}

/// What a process' stdin is read from: until its end, or until somebody asks for the end.
#[derive(Debug)]
pub(crate) struct Input {
    from: OwnedFd,
    closing: PipeReader,
}

/// Asks for the end of an input when it is dropped.
#[derive(Debug)]
pub(crate) struct InputCloser {
    _end: PipeWriter,
}

impl Input {
    /// An input that can be ended from elsewhere.
    pub(crate) fn new(from: OwnedFd) -> io::Result<(Self, InputCloser)> {
        ioctl_fionbio(&from, true)?;
        let (closing, end) = io::pipe()?;
        Ok((Self { from, closing }, InputCloser { _end: end }))
    }

    /// Copies until the end. What was there before the end was asked for is copied too.
    pub(super) fn copy(&self, to: BorrowedFd<'_>) -> Result<(), Errno> {
        let mut buffer = vec![0; CHUNK];
        loop {
            // Before each read: of a named pipe that nobody has opened for writing yet, a read would tell the end.
            let mut polled = [PollFd::new(&self.from, PollFlags::IN), PollFd::new(&self.closing, PollFlags::IN)];
            match poll(&mut polled, None) {
                Err(Errno::INTR) => continue,
                result => result?,
            };
            if !polled[0].revents().is_empty() {
                match read(&self.from, &mut buffer[..]) {
                    Ok(0) => return Ok(()),
                    Ok(length) => write_all(to, &buffer[..length])?,
                    Err(error) => retry(error, self.from.as_fd(), PollFlags::IN)?,
                }
            } else if !polled[1].revents().is_empty() {
                return Ok(());
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::os::fd::AsFd;
    use std::os::unix::net::UnixStream;
    use std::thread;

    use super::*;

    #[test]
    fn an_input_ends_when_asked_to_and_not_before_what_was_written() {
        let (from, mut writer) = io::pipe().unwrap();
        let (to, mut received) = UnixStream::pair().unwrap();
        let (input, closer) = Input::new(from.into()).unwrap();
        writer.write_all(b"before").unwrap();
        drop(closer);

        thread::spawn(move || input.copy(to.as_fd())).join().unwrap().unwrap();

        let mut text = String::new();
        received.read_to_string(&mut text).unwrap();
        assert_eq!(text, "before");
        // The writer was there all the time.
        drop(writer);
    }

    #[test]
    fn an_input_ends_with_its_writer() {
        let (from, writer) = io::pipe().unwrap();
        let (to, _received) = UnixStream::pair().unwrap();
        let (input, _closer) = Input::new(from.into()).unwrap();
        drop(writer);

        assert_eq!(input.copy(to.as_fd()), Ok(()));
    }
}
