// SPDX-License-Identifier: Apache-2.0
//! Descriptors of the caller's that a process is given beside its standard streams, as `--preserve-fds` and `LISTEN_FDS` ask for.
//! What they carry is carried by a stream: a guest's kernel has no other files than its own.

use std::fmt;
use std::io;
use std::net::Shutdown;
use std::os::fd::{AsFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::{env, process};

use bulkhead_protocol::MAX_PRESERVED;
use bulkhead_protocol::agent::PreservedDescriptor;
use rustix::fs::{FileType, OFlags, fcntl_getfl, fstat};
use rustix::io::{FdFlags, fcntl_getfd, fcntl_setfd};
use rustix::net::{SocketType, getpeername, shutdown, sockopt};
use thiserror::Error;
use tokio::sync::oneshot;

use super::copy::copy;
use super::{OpenStreamError, Outputs, is_null_device, start};
use crate::spec::PreservedKind;

/// The number of the first.
const FIRST: RawFd = 3;

/// What they are called in errors, and their threads.
pub(super) const NAME: &str = "preserved descriptor";

/// A descriptor that cannot be handed on.
#[derive(Debug, Error)]
pub(crate) enum PreservedError {
    #[error("{0}: at most {MAX_PRESERVED} descriptors can be handed on")]
    TooMany(Asked),
    #[error("{asked}: descriptor {number} is not open")]
    Closed { asked: Asked, number: RawFd },
    #[error("{asked}: descriptor {number} cannot be handed to a virtual machine: it is {what}")]
    Kind { asked: Asked, number: RawFd, what: &'static str },
    #[error("{asked}: cannot look at descriptor {number}")]
    Look { asked: Asked, number: RawFd, source: io::Error },
}

/// How many are to be handed on, and who says so.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Asked {
    /// `LISTEN_FDS`: the first ones.
    pub(crate) environment: u32,
    /// `--preserve-fds`: those after them.
    pub(crate) option: u32,
}

impl Asked {
    /// With what the environment says is for this process: see sd_listen_fds(3).
    pub(crate) fn with_environment(option: u32) -> Self {
        let number = |name| env::var(name).ok()?.parse::<u32>().ok();
        let is_for_this = number("LISTEN_PID") == Some(process::id());
        Self { environment: number("LISTEN_FDS").filter(|_| is_for_this).unwrap_or(0), option }
    }

    /// As the option alone says.
    pub(crate) fn by_option(option: u32) -> Self {
        Self { environment: 0, option }
    }

    fn count(self) -> u32 {
        self.environment.saturating_add(self.option)
    }
}

impl fmt::Display for Asked {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self { environment: 0, option } => write!(formatter, "--preserve-fds {option}"),
            Self { environment, option: 0 } => write!(formatter, "LISTEN_FDS={environment}"),
            Self { environment, option } => write!(formatter, "LISTEN_FDS={environment} and --preserve-fds {option}"),
        }
    }
}

/// Descriptors from 3 on, in their order.
#[derive(Debug, Default)]
pub(crate) struct Preserved(Vec<(PreservedKind, OwnedFd)>);

impl Preserved {
    /// Takes so many of this process', which have to be the caller's. They close on exec from here on.
    pub(crate) fn take(asked: Asked) -> Result<Self, PreservedError> {
        let count = asked.count();
        if count > MAX_PRESERVED {
            return Err(PreservedError::TooMany(asked));
        }
        // Each is looked at before one is taken.
        let kinds = (FIRST..).take(count as usize).map(|number| Ok((kind_of_own(number, asked)?, number)));
        let kinds = kinds.collect::<Result<Vec<_>, PreservedError>>()?;
        // SAFETY: they are open, and were inherited: nothing here owns them.
        Ok(Self(kinds.into_iter().map(|(kind, number)| (kind, unsafe { OwnedFd::from_raw_fd(number) })).collect()))
    }

    /// What they are, for the agent; their streams have no numbers yet.
    pub(crate) fn to_wire(&self) -> Vec<PreservedDescriptor> {
        self.kinds().map(PreservedKind::to_wire).collect()
    }

    /// What they are.
    pub(crate) fn kinds(&self) -> impl Iterator<Item = PreservedKind> {
        self.0.iter().map(|(kind, _)| *kind)
    }

    /// How many need a stream.
    pub(crate) fn carried(&self) -> u32 {
        self.kinds().filter(|kind| *kind != PreservedKind::Null).map(|_| 1).sum()
    }

    /// Starts the pumps between them and their streams, which are as many as are carried.
    pub(super) fn pump(self, streams: Vec<UnixStream>, outputs: &mut Outputs) -> Result<(), OpenStreamError> {
        let carried = self.0.into_iter().filter(|(kind, _)| *kind != PreservedKind::Null);
        for ((kind, descriptor), stream) in carried.zip(streams) {
            match kind {
                PreservedKind::Null => {}
                PreservedKind::Input => outputs.start_input(NAME, Some(stream), move |to| {
                    let _ = copy(descriptor.as_fd(), to, || {});
                })?,
                PreservedKind::Output => outputs.start(NAME, Some(stream), Some(descriptor), || {})?,
                PreservedKind::Connection => join(descriptor, stream, outputs)?,
            }
        }
        Ok(())
    }
}

/// Joins a connection of the caller's with its stream, each direction for itself.
fn join(socket: OwnedFd, stream: UnixStream, outputs: &mut Outputs) -> Result<(), OpenStreamError> {
    let (socket, stream) = (Arc::new(socket), Arc::new(stream));
    let (sender, ended) = oneshot::channel();
    outputs.add(&stream, ended);
    let (from, to) = (Arc::clone(&socket), Arc::clone(&stream));
    start(NAME, move || {
        let _ = copy(from.as_fd(), to.as_fd(), || {});
        let _ = to.shutdown(Shutdown::Write);
    })?;
    start(NAME, move || {
        // Whoever is gone need not be told.
        let _ = match copy(stream.as_fd(), socket.as_fd(), || {}) {
            Ok(()) => shutdown(&*socket, rustix::net::Shutdown::Write).map_err(io::Error::from),
            // The guest learns that nobody takes what it sends.
            Err(_) => stream.shutdown(Shutdown::Both),
        };
        let _ = sender.send(());
    })
}

/// What that descriptor of this process is, which closes on exec from here on.
fn kind_of_own(number: RawFd, asked: Asked) -> Result<PreservedKind, PreservedError> {
    // SAFETY: used for questions only; a number that is not open gets an error for an answer.
    let descriptor = unsafe { BorrowedFd::borrow_raw(number) };
    // All that this program opens closes on exec: such a one is not the caller's.
    if !fcntl_getfd(descriptor).is_ok_and(|flags| !flags.contains(FdFlags::CLOEXEC)) {
        return Err(PreservedError::Closed { asked, number });
    }
    let look = |source| PreservedError::Look { asked, number, source };
    let kind = kind_of(descriptor).map_err(look)?;
    let kind = kind.map_err(|what| PreservedError::Kind { asked, number, what })?;
    fcntl_setfd(descriptor, FdFlags::CLOEXEC).map_err(|error| look(error.into()))?;
    Ok(kind)
}

/// What a descriptor is, or why a stream cannot stand for it.
fn kind_of(descriptor: BorrowedFd<'_>) -> io::Result<Result<PreservedKind, &'static str>> {
    let flags = fcntl_getfl(descriptor)?;
    Ok(match FileType::from_raw_mode(fstat(descriptor)?.st_mode) {
        _ if flags.contains(OFlags::PATH) => Err("a path that has not been opened"),
        FileType::Fifo | FileType::RegularFile => match flags & OFlags::RWMODE {
            OFlags::RDONLY => Ok(PreservedKind::Input),
            OFlags::WRONLY => Ok(PreservedKind::Output),
            _ => Err("open for reading and writing at once"),
        },
        FileType::CharacterDevice if is_null_device(descriptor) => Ok(PreservedKind::Null),
        FileType::CharacterDevice | FileType::BlockDevice => Err("a device"),
        FileType::Directory => Err("a folder; use a bind mount"),
        FileType::Socket if sockopt::socket_type(descriptor)? != SocketType::STREAM => Err("a socket of packets"),
        FileType::Socket if sockopt::socket_acceptconn(descriptor)? => Err("a socket that listens"),
        FileType::Socket if getpeername(descriptor).is_err() => Err("a socket without a connection"),
        FileType::Socket => Ok(PreservedKind::Connection),
        FileType::Symlink | FileType::Unknown => {
            Err("something of this kernel alone (an event, a timer, a process...)")
        }
    })
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::net::{TcpListener, TcpStream};
    use std::os::unix::net::UnixDatagram;

    use super::*;

    fn kind(descriptor: impl AsFd) -> Result<PreservedKind, &'static str> {
        kind_of(descriptor.as_fd()).unwrap()
    }

    #[test]
    fn what_a_stream_can_stand_for_is_told_from_the_rest() {
        let (reader, writer) = io::pipe().unwrap();
        assert_eq!(kind(&reader), Ok(PreservedKind::Input));
        assert_eq!(kind(&writer), Ok(PreservedKind::Output));
        assert_eq!(kind(UnixStream::pair().unwrap().0), Ok(PreservedKind::Connection));
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        assert_eq!(kind(TcpStream::connect(listener.local_addr().unwrap()).unwrap()), Ok(PreservedKind::Connection));
        assert_eq!(kind(File::open("/proc/self/exe").unwrap()), Ok(PreservedKind::Input));
        assert_eq!(kind(File::options().write(true).open("/dev/null").unwrap()), Ok(PreservedKind::Null));

        assert_eq!(kind(&listener), Err("a socket that listens"));
        assert_eq!(kind(UnixDatagram::pair().unwrap().0), Err("a socket of packets"));
        assert_eq!(kind(tempfile::tempfile().unwrap()), Err("open for reading and writing at once"));
        assert_eq!(kind(File::open("/dev/zero").unwrap()), Err("a device"));
        assert_eq!(kind(File::open("/").unwrap()), Err("a folder; use a bind mount"));
    }

    #[test]
    fn more_than_can_be_are_refused_and_so_are_those_that_are_not_open() {
        for asked in
            [Asked::by_option(33), Asked { environment: 32, option: 1 }, Asked { environment: u32::MAX, option: 9 }]
        {
            assert!(matches!(Preserved::take(asked), Err(PreservedError::TooMany(told)) if told == asked));
        }
        // Not the caller's: it closes on exec, as all that is opened here.
        let file = File::open("/dev/null").unwrap();
        let number = std::os::fd::AsRawFd::as_raw_fd(&file);
        assert!(matches!(kind_of_own(number, Asked::by_option(1)), Err(PreservedError::Closed { .. })));
        assert_eq!(Preserved::take(Asked::by_option(0)).unwrap().carried(), 0);
    }

    #[test]
    fn errors_name_who_asks() {
        let texts = [(0, 2), (1, 0), (1, 2)].map(|(environment, option)| Asked { environment, option }.to_string());

        assert_eq!(texts, ["--preserve-fds 2", "LISTEN_FDS=1", "LISTEN_FDS=1 and --preserve-fds 2"]);
    }
}
