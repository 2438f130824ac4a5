// SPDX-License-Identifier: Apache-2.0
//! One start: from before the fork to the output and to the exit.

use std::fs::{self, File};
use std::io::Read;
use std::os::fd::{AsFd, OwnedFd};
use std::process::{Child, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use nix::time::{ClockId, clock_gettime};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, pidfd_open};

use crate::cases::Invocation;
use crate::error::{BenchError, file};

/// Where a started program's messages go.
const MESSAGES: &str = "/tmp/messages";

/// How long a start may take; one that hangs must not hold up the others.
const TIME_LIMIT: Duration = Duration::from_secs(120);

/// Most bytes of output that are kept.
const OUTPUT_MAX: usize = 1 << 20;

/// What one start took.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Sample {
    /// When it began, on `CLOCK_MONOTONIC`, in nanoseconds.
    pub(crate) began_ns: u64,
    /// To the expected output; `None` when none is expected.
    pub(crate) first_output: Option<Duration>,
    /// To the exit of the started process.
    pub(crate) exit: Duration,
}

/// A process that runs, with its standard output.
#[derive(Debug)]
pub(crate) struct Running {
    case: String,
    child: Child,
    pidfd: OwnedFd,
    began: Instant,
    output: Vec<u8>,
}

/// What came of waiting.
#[derive(Debug, PartialEq, Eq)]
enum Event {
    Output,
    Exit,
}

impl Running {
    /// Starts `invocation` with a clean environment.
    ///
    /// # Errors
    ///
    /// The program cannot be started.
    pub(crate) fn start(case: &str, invocation: &Invocation) -> Result<Self, BenchError> {
        let messages = File::create(MESSAGES).map_err(file("create", MESSAGES))?;
        let mut command = invocation.command();
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(messages);
        let began = Instant::now();
        let child = command.spawn().map_err(file("start", &invocation.program))?;
        let pid = Pid::from_child(&child);
        let pidfd = pidfd_open(pid, PidfdFlags::empty()).map_err(file("open", "a pidfd"))?;
        Ok(Self { case: case.to_owned(), child, pidfd, began, output: Vec::new() })
    }

    /// The process' id.
    pub(crate) fn pid(&self) -> u32 {
        self.child.id()
    }

    /// All output so far.
    pub(crate) fn output(&self) -> String {
        String::from_utf8_lossy(&self.output).into_owned()
    }

    /// Waits until the output holds `text`; gives the time since the start.
    ///
    /// # Errors
    ///
    /// The process ended or the time limit passed before.
    pub(crate) fn wait_output(&mut self, text: &str) -> Result<Duration, BenchError> {
        while !contains(&self.output, text.as_bytes()) {
            if self.event()? == Event::Exit {
                self.drain()?;
                if contains(&self.output, text.as_bytes()) {
                    break;
                }
                let status = self.child.wait().map_err(file("wait for", &self.case))?;
                return Err(self.failure(&format!("ended with {status} without writing {text:?}")));
            }
        }
        Ok(self.began.elapsed())
    }

    /// Waits for the exit; gives the time since the start. Output goes on being read meanwhile.
    ///
    /// # Errors
    ///
    /// The process failed, or the time limit passed.
    pub(crate) fn wait_exit(&mut self) -> Result<Duration, BenchError> {
        while self.event()? == Event::Output {}
        let took = self.began.elapsed();
        let status: ExitStatus = self.child.wait().map_err(file("wait for", &self.case))?;
        self.drain()?;
        if status.success() { Ok(took) } else { Err(self.failure(&format!("ended with {status}"))) }
    }

    /// Ends the process; what it wrote stays.
    pub(crate) fn kill(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }

    /// Waits for output or exit, output first.
    fn event(&mut self) -> Result<Event, BenchError> {
        let left = TIME_LIMIT.saturating_sub(self.began.elapsed());
        let timeout = Timespec { tv_sec: left.as_secs().cast_signed(), tv_nsec: left.subsec_nanos().into() };
        let (output, exit) = {
            let mut fds = vec![PollFd::new(&self.pidfd, PollFlags::IN)];
            if let Some(stdout) = &self.child.stdout {
                fds.push(PollFd::from_borrowed_fd(stdout.as_fd(), PollFlags::IN));
            }
            if poll(&mut fds, Some(&timeout)).map_err(file("wait for", &self.case))? == 0 {
                self.kill();
                return Err(self.failure(&format!("had no end within {} s", TIME_LIMIT.as_secs())));
            }
            (fds.get(1).is_some_and(|fd| !fd.revents().is_empty()), !fds[0].revents().is_empty())
        };
        if output {
            self.read()?;
            return Ok(Event::Output);
        }
        debug_assert!(exit);
        Ok(Event::Exit)
    }

    /// Reads what is there; closes the output at its end.
    fn read(&mut self) -> Result<(), BenchError> {
        let Some(stdout) = &mut self.child.stdout else { return Ok(()) };
        let mut buffer = [0; 16384];
        let count = stdout.read(&mut buffer).map_err(file("read the output of", &self.case))?;
        if count == 0 {
            self.child.stdout = None;
        }
        let room = OUTPUT_MAX.saturating_sub(self.output.len());
        self.output.extend_from_slice(&buffer[..count.min(room)]);
        Ok(())
    }

    /// Reads what is still in the pipe, without waiting for others that hold it open.
    fn drain(&mut self) -> Result<(), BenchError> {
        while let Some(stdout) = &self.child.stdout {
            let mut fds = [PollFd::new(stdout, PollFlags::IN)];
            let none = Timespec { tv_sec: 0, tv_nsec: 0 };
            if poll(&mut fds, Some(&none)).map_err(file("read the output of", &self.case))? == 0 {
                break;
            }
            self.read()?;
        }
        Ok(())
    }

    fn failure(&self, why: &str) -> BenchError {
        let messages = fs::read_to_string(MESSAGES).unwrap_or_default();
        let tail = |text: &str| {
            text.lines().rev().take(5).collect::<Vec<_>>().into_iter().rev().collect::<Vec<_>>().join("\n")
        };
        let (messages, output) = (tail(&messages), tail(&self.output()));
        BenchError::Case {
            case: self.case.clone(),
            why: format!("{why}; its last messages: {messages:?}; output: {output:?}"),
        }
    }
}

/// Starts `invocation`, waits for its end, and checks that it wrote `output`.
///
/// # Errors
///
/// It could not be started, failed, or wrote something else.
pub(crate) fn measure(case: &str, invocation: &Invocation, output: &str) -> Result<Sample, BenchError> {
    let began_ns = now_ns();
    let mut running = Running::start(case, invocation)?;
    let first_output = if output.is_empty() { None } else { Some(running.wait_output(output)?) };
    let exit = running.wait_exit()?;
    Ok(Sample { began_ns, first_output, exit })
}

/// `CLOCK_MONOTONIC`, which `Instant` does not show.
fn now_ns() -> u64 {
    clock_gettime(ClockId::CLOCK_MONOTONIC)
        .map_or(0, |now| now.tv_sec().cast_unsigned() * 1_000_000_000 + now.tv_nsec().cast_unsigned())
}

fn contains(haystack: &[u8], needle: &[u8]) -> bool {
    needle.is_empty() || haystack.windows(needle.len()).any(|window| window == needle)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_is_found_anywhere() {
        assert!(contains(b"[ 0.1] bench: user space\r\n", b"user space"));
        assert!(!contains(b"us", b"user"));
        assert!(contains(b"", b""));
    }
}
