// SPDX-License-Identifier: Apache-2.0
//! What a run of the runtime gave, and what it has to be.

use std::os::unix::process::ExitStatusExt;
use std::process::ExitStatus;
use std::time::Duration;

use crate::env::Kind;
use crate::failure::{Result, ensure, ensure_eq, fail};

/// Most bytes of an error line.
const MAX_ERROR_LINE: usize = 4096;

/// What only a debugging dump or a crash prints.
const DUMPS: &[&str] = &["panicked at", "RUST_BACKTRACE", "Err(", "Some(", "Os {", "Error {", " {\n", "core dumped"];

/// An ended run.
#[derive(Debug)]
pub(crate) struct Output {
    pub(crate) kind: Kind,
    pub(crate) status: ExitStatus,
    pub(crate) stdout: Vec<u8>,
    pub(crate) stderr: Vec<u8>,
    pub(crate) elapsed: Duration,
}

impl Output {
    pub(crate) fn stdout(&self) -> String {
        String::from_utf8_lossy(&self.stdout).into_owned()
    }

    pub(crate) fn stderr(&self) -> String {
        String::from_utf8_lossy(&self.stderr).into_owned()
    }

    /// Everything, for a message.
    pub(crate) fn describe(&self) -> String {
        let how = match (self.status.code(), self.status.signal()) {
            (Some(code), _) => format!("status {code}"),
            (None, Some(signal)) => format!("killed by signal {signal}"),
            (None, None) => "no status".to_owned(),
        };
        format!("{how}; stdout {:?}; stderr {:?}", tail(&self.stdout()), tail(&self.stderr()))
    }

    /// It exited with `code`.
    pub(crate) fn expect_code(&self, code: i32) -> Result {
        ensure!(self.status.code() == Some(code), "expected status {code}, seen {}", self.describe());
        Ok(())
    }

    /// It exited with 0, printed exactly `text`, and nothing on stderr.
    pub(crate) fn expect_stdout(&self, text: &str) -> Result {
        self.expect_code(0)?;
        ensure!(self.stdout() == text, "expected on stdout {text:?}, seen {}", self.describe());
        self.expect_silent_stderr()
    }

    /// It exited with 0 and each of `parts` is on stdout.
    pub(crate) fn expect_in_stdout(&self, parts: &[&str]) -> Result {
        self.expect_code(0)?;
        for part in parts {
            ensure!(self.stdout().contains(part), "expected {part:?} on stdout, seen {}", self.describe());
        }
        Ok(())
    }

    pub(crate) fn expect_silent_stderr(&self) -> Result {
        ensure!(self.stderr.is_empty(), "expected nothing on stderr, seen {}", self.describe());
        Ok(())
    }

    /// The runtime itself failed: a status of its own, nothing on stdout, and one line that names each of `words`.
    pub(crate) fn expect_error(&self, words: &[&str]) -> Result {
        let Some(code) = self.status.code() else { fail!("expected an error, seen {}", self.describe()) };
        ensure!(code != 0, "expected an error, seen {}", self.describe());
        ensure!(self.stdout.is_empty(), "expected nothing on stdout, seen {}", self.describe());
        self.expect_error_line(words)
    }

    /// As [`Self::expect_error`], with exactly that status where the runtime is Bulkhead.
    pub(crate) fn expect_error_code(&self, code: i32, words: &[&str]) -> Result {
        self.expect_error(words)?;
        if self.kind == Kind::Bulkhead {
            ensure_eq!(self.status.code(), Some(code), "the status ({})", self.describe());
        }
        Ok(())
    }

    /// Stderr is one line of the runtime that names each of `words`, and no dump. Others than Bulkhead word it freely.
    pub(crate) fn expect_error_line(&self, words: &[&str]) -> Result {
        if self.kind != Kind::Bulkhead {
            ensure!(!self.stderr.is_empty(), "expected an error on stderr, seen {}", self.describe());
            return Ok(());
        }
        let text = self.stderr();
        let line = text.strip_suffix('\n').unwrap_or(&text);
        ensure!(line.starts_with("bulkhead: "), "expected a line of bulkhead on stderr, seen {}", self.describe());
        ensure!(!line.chars().any(char::is_control), "expected one plain line on stderr, seen {}", self.describe());
        ensure!(line.len() <= MAX_ERROR_LINE, "an error line of {} bytes: {}", line.len(), self.describe());
        for dump in DUMPS {
            ensure!(!line.contains(dump), "a dump ({dump:?}) on stderr: {}", self.describe());
        }
        for word in words {
            ensure!(line.contains(word), "expected {word:?} in the error, seen {}", self.describe());
        }
        Ok(())
    }

    /// It took no longer than `limit`.
    pub(crate) fn expect_within(&self, limit: Duration) -> Result {
        ensure!(self.elapsed <= limit, "took {:?}, more than {limit:?}: {}", self.elapsed, self.describe());
        Ok(())
    }
}

/// The end of a long text.
fn tail(text: &str) -> &str {
    const MAX: usize = 1500;
    let mut start = text.len().saturating_sub(MAX);
    while !text.is_char_boundary(start) {
        start += 1;
    }
    &text[start..]
}
