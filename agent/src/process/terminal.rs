// SPDX-License-Identifier: Apache-2.0
//! The container's terminal: a pseudoterminal out of the container's own devpts.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::fs::OFlags;
use rustix::pty::OpenptFlags;
use rustix::termios::{Winsize, tcsetwinsize};

use crate::container::{Failure, Stage, TerminalSize};
use crate::storage::resolve::{self, Kind};
use crate::storage::tree;

/// Both ends of a terminal.
#[derive(Debug)]
pub(crate) struct Terminal {
    /// The end that the agent reads and writes.
    pub(crate) controller: OwnedFd,
    /// The end that is the container's stdio.
    pub(crate) device: OwnedFd,
}

/// Makes a terminal out of the devpts in the container's root file system.
pub(crate) fn make(root: BorrowedFd<'_>, size: TerminalSize) -> Result<Terminal, Failure> {
    let failed = |what: &'static str| move |error: io::Error| Failure::new(Stage::Terminal, what, error);
    let controller = resolve::open(root, "/dev/pts/ptmx", OFlags::RDWR | OFlags::NOCTTY)
        .map_err(failed("open /dev/pts/ptmx (a terminal needs a devpts mount at /dev/pts)"))?;
    rustix::pty::unlockpt(&controller).map_err(|error| failed("unlock it")(error.into()))?;
    let flags = OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC;
    let device = rustix::pty::ioctl_tiocgptpeer(&controller, flags)
        .map_err(|error| failed("open its other end")(error.into()))?;
    resize(controller.as_fd(), size).map_err(failed("set its size"))?;
    Ok(Terminal { controller, device })
}

/// Binds the terminal over the container's `/dev/console`.
pub(crate) fn bind_console(root: BorrowedFd<'_>, device: BorrowedFd<'_>) -> Result<(), Failure> {
    let bind = || {
        let place = resolve::existing_or_made(root, "/dev/console", Kind::File)?;
        tree::attach(tree::clone_at(device, false)?.as_fd(), place.as_fd())
    };
    bind().map_err(|error: io::Error| Failure::new(Stage::Terminal, "bind it over /dev/console", error))
}

/// Sets the terminal's size and tells its processes. 0 by 0 leaves it.
pub(crate) fn resize(controller: BorrowedFd<'_>, size: TerminalSize) -> io::Result<()> {
    if size == TerminalSize::default() {
        return Ok(());
    }
    let size = Winsize { ws_row: size.rows, ws_col: size.columns, ws_xpixel: 0, ws_ypixel: 0 };
    Ok(tcsetwinsize(controller, size)?)
}

/// Makes `device` the controlling terminal of the calling process, which leads a session that has none.
pub(crate) fn control(device: BorrowedFd<'_>) -> Result<(), Failure> {
    rustix::process::ioctl_tiocsctty(device)
        .map_err(|error| Failure::new(Stage::Terminal, "make it the controlling terminal", error))
}
