// SPDX-License-Identifier: Apache-2.0
//! A terminal made here, as the one a person sits at.

use std::fs::File;
use std::io::Write;
use std::os::fd::{AsFd, OwnedFd};
use std::thread;
use std::time::{Duration, Instant};

use nix::pty::{Winsize, openpty};
use nix::sys::termios::{LocalFlags, Termios, tcgetattr};

use crate::failure::{Result, fail};
use crate::run::{Collector, Run, Running};

/// How long what is waited for may take.
const LIMIT: Duration = Duration::from_secs(120);

/// Gives the runtime the terminal that is its stdin for its controlling one, in a session of its own.
const WITH_TERMINAL: &str = "exec setsid --ctty \"$@\"";

/// A pseudo-terminal; its user's end is here.
#[derive(Debug)]
pub(crate) struct Terminal {
    user: File,
    line: OwnedFd,
    screen: Collector,
}

impl Terminal {
    pub(crate) fn new(rows: u16, columns: u16) -> Result<Self> {
        let size = Winsize { ws_row: rows, ws_col: columns, ws_xpixel: 0, ws_ypixel: 0 };
        let pair = openpty(Some(&size), None)?;
        let user = File::from(pair.master);
        Ok(Self { screen: Collector::start(user.try_clone()?), user, line: pair.slave })
    }

    /// Starts a run at this terminal.
    pub(crate) fn spawn(&self, run: Run<'_>) -> Result<Running> {
        let [stdin, stdout, stderr] = [self.line.try_clone()?, self.line.try_clone()?, self.line.try_clone()?];
        run.stdin(stdin).stdout(stdout).stderr(stderr).wrapper(WITH_TERMINAL).spawn()
    }

    pub(crate) fn type_text(&mut self, text: &str) -> Result {
        Ok(self.user.write_all(text.as_bytes())?)
    }

    /// All that has been shown.
    pub(crate) fn text(&self) -> String {
        String::from_utf8_lossy(&self.screen.bytes()).into_owned()
    }

    pub(crate) fn wait_for(&self, text: &str) -> Result {
        let shown = |bytes: &[u8], _| String::from_utf8_lossy(bytes).contains(text);
        if !self.screen.wait(LIMIT, shown) {
            fail!("{text:?} did not come on the terminal, which shows {:?}", self.text());
        }
        Ok(())
    }

    /// Changes the size, which tells the processes of the terminal by SIGWINCH.
    pub(crate) fn resize(&self, rows: u16, columns: u16) -> Result {
        let size = rustix::termios::Winsize { ws_row: rows, ws_col: columns, ws_xpixel: 0, ws_ypixel: 0 };
        Ok(rustix::termios::tcsetwinsize(self.user.as_fd(), size)?)
    }

    pub(crate) fn modes(&self) -> Result<Termios> {
        Ok(tcgetattr(&self.line)?)
    }

    /// Waits until keys go to the runtime as they are typed: not echoed, not made lines or signals.
    pub(crate) fn wait_for_raw_mode(&self) -> Result {
        let cooked = LocalFlags::ICANON | LocalFlags::ECHO | LocalFlags::ISIG;
        let end = Instant::now() + LIMIT;
        while self.modes()?.local_flags.intersects(cooked) {
            if Instant::now() >= end {
                fail!("the terminal has not become raw; it shows {:?}", self.text());
            }
            thread::sleep(Duration::from_millis(5));
        }
        Ok(())
    }
}
