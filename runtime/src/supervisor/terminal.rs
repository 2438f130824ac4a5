// SPDX-License-Identifier: Apache-2.0
//! The user's terminal: raw while the container has it, restored on every way out.

use std::io;

use rustix::stdio::stdin;
use rustix::termios::{OptionalActions, Termios, isatty, tcgetattr, tcgetwinsize, tcsetattr};
use thiserror::Error;

/// A terminal that a container is to have and that is not there.
#[derive(Debug, Error)]
pub(crate) enum TerminalError {
    #[error(
        "process.terminal is true, but stdin is not a terminal (start it from one, or set process.terminal to false)"
    )]
    NotATerminal,
    #[error("a terminal is asked for, but stdin is not one (start it from one, or leave --tty out)")]
    NotATerminalForExec,
    #[error("cannot switch the terminal to raw mode")]
    Raw(#[source] io::Error),
}

/// Rows and columns.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Size {
    pub(crate) rows: u32,
    pub(crate) columns: u32,
}

/// Checks that stdin is a terminal.
pub(crate) fn require() -> Result<(), TerminalError> {
    if isatty(stdin()) { Ok(()) } else { Err(TerminalError::NotATerminal) }
}

/// Checks that stdin is a terminal, for a process that is added to a container.
pub(crate) fn require_for_exec() -> Result<(), TerminalError> {
    if isatty(stdin()) { Ok(()) } else { Err(TerminalError::NotATerminalForExec) }
}

/// The terminal's size, unless it does not know it.
pub(crate) fn size() -> Option<Size> {
    let size = tcgetwinsize(stdin()).ok()?;
    let (rows, columns) = (u32::from(size.ws_row), u32::from(size.ws_col));
    (rows > 0 && columns > 0).then_some(Size { rows, columns })
}

/// Raw mode of the terminal on stdin; the old mode comes back when it is dropped.
#[derive(Debug)]
pub(crate) struct RawTerminal {
    before: Termios,
}

impl RawTerminal {
    /// Switches to raw mode.
    pub(crate) fn enter() -> Result<Self, TerminalError> {
        let before = tcgetattr(stdin()).map_err(|error| TerminalError::Raw(error.into()))?;
        let mut raw = before.clone();
        raw.make_raw();
        tcsetattr(stdin(), OptionalActions::Now, &raw).map_err(|error| TerminalError::Raw(error.into()))?;
        Ok(Self { before })
    }
}

impl Drop for RawTerminal {
    fn drop(&mut self) {
        // Without waiting for output to drain: a terminal that is stopped or gone must not hold up the exit.
        let _ = tcsetattr(stdin(), OptionalActions::Now, &self.before);
    }
}
