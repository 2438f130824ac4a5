// SPDX-License-Identifier: Apache-2.0
//! `--console-socket`: a terminal of the host's for a detached process, whose master side goes to the engine.

use std::fs::File;
use std::io::{self, IoSlice};
use std::mem::MaybeUninit;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};

use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
use rustix::process::ioctl_tiocsctty;
use rustix::pty::{OpenptFlags, grantpt, ioctl_tiocgptpeer, openpt, ptsname, unlockpt};
use rustix::stdio::{dup2_stderr, dup2_stdin, dup2_stdout};
use thiserror::Error;

/// A console that cannot be handed over.
#[derive(Debug, Error)]
pub(crate) enum ConsoleError {
    #[error("cannot make a terminal")]
    Make(#[source] io::Error),
    #[error("cannot connect to the console socket {}", .0.display())]
    Connect(PathBuf, #[source] io::Error),
    #[error("cannot send the terminal to the console socket {}", .0.display())]
    Send(PathBuf, #[source] io::Error),
    #[error("cannot allocate tty for a detached process without --console-socket, which is who gets it")]
    Missing,
    #[error("--console-socket is given, but the process has no terminal, or is not detached")]
    NotWanted,
}

/// Checks that there is a socket where, and only where, a terminal is to be sent.
pub(crate) fn check(terminal: bool, detached: bool, socket: Option<&Path>) -> Result<(), ConsoleError> {
    match socket {
        None if terminal && detached => Err(ConsoleError::Missing),
        Some(_) if !(terminal && detached) => Err(ConsoleError::NotWanted),
        _ => Ok(()),
    }
}

/// Makes a terminal, sends its master side to the socket, and makes the other side this process' standard streams and its
/// controlling terminal: so its changes of size arrive as a signal, and its hang-up too. Stderr becomes /dev/null: the
/// terminal is the container's alone, and the caller waits for the end of its own.
pub(crate) fn attach(socket: &Path) -> Result<(), ConsoleError> {
    let make = |error: rustix::io::Errno| ConsoleError::Make(error.into());
    let master = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC).map_err(make)?;
    grantpt(&master).map_err(make)?;
    unlockpt(&master).map_err(make)?;
    let flags = OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC;
    let terminal = ioctl_tiocgptpeer(&master, flags).map_err(make)?;
    let name = ptsname(&master, Vec::new()).map_err(make)?;

    let stream = UnixStream::connect(socket).map_err(|error| ConsoleError::Connect(socket.to_owned(), error))?;
    let descriptors = [master.as_fd()];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    control.push(SendAncillaryMessage::ScmRights(&descriptors));
    // A descriptor needs at least a byte to travel with; the name is what runc sends.
    sendmsg(&stream, &[IoSlice::new(name.as_bytes())], &mut control, SendFlags::NOSIGNAL)
        .map_err(|error| ConsoleError::Send(socket.to_owned(), error.into()))?;

    ioctl_tiocsctty(&terminal).map_err(make)?;
    let null = File::options().write(true).open("/dev/null").map_err(ConsoleError::Make)?;
    dup2_stdin(&terminal).map_err(make)?;
    dup2_stdout(&terminal).map_err(make)?;
    dup2_stderr(&null).map_err(make)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_socket_goes_with_a_detached_terminal_only() {
        let socket = Some(Path::new("/s"));

        assert!(check(true, true, socket).is_ok());
        assert!(check(true, false, None).is_ok());
        assert!(check(false, true, None).is_ok());
        assert!(matches!(check(true, true, None), Err(ConsoleError::Missing)));
        for (terminal, detached) in [(true, false), (false, true), (false, false)] {
            assert!(matches!(check(terminal, detached, socket), Err(ConsoleError::NotWanted)));
        }
    }
}
