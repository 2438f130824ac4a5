// SPDX-License-Identifier: Apache-2.0
//! `binary://PROGRAM?KEY=VALUE`: a program that takes a process' output. It gets stdout and stderr as descriptors 3 and 4, and
//! closes 5 when it is ready; the keys are its arguments, each with its value after it, also one that has none.

use std::ffi::OsString;
use std::io::{self, PipeReader, PipeWriter};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::Duration;

use rustix::io::fcntl_dupfd_cloexec;
use thiserror::Error;
use tokio::io::AsyncReadExt;
use tokio::net::unix::pipe;
use tokio::time::timeout;

use super::uri::Uri;
use crate::apart::apart;
use crate::pidfd;

/// How long a program may take to be ready.
const READY_TIMEOUT: Duration = Duration::from_secs(10);

/// The program's descriptors: stdout, stderr, and the one that tells that it is ready.
const DESCRIPTORS: [i32; 3] = [3, 4, 5];

/// Above those, so that none of them is in the way of another.
const ABOVE: i32 = 10;

/// A program that does not take output.
#[derive(Debug, Error)]
pub(super) enum LoggerError {
    #[error("cannot make a pipe for the log program")]
    Pipe(#[source] io::Error),
    #[error("cannot start the log program {0:?}")]
    Start(PathBuf, #[source] io::Error),
    #[error("the log program {0:?} was not ready in time")]
    NotReady(PathBuf),
}

/// Whose output it is: the program is told.
#[derive(Debug, Clone, Copy)]
pub(super) struct Source<'a> {
    pub(super) namespace: &'a str,
    pub(super) id: &'a str,
}

/// Starts a program, and returns where stdout and stderr go once it is ready. It ends when both have.
pub(super) async fn start(uri: Uri, source: Source<'_>) -> Result<[OwnedFd; 2], LoggerError> {
    let Uri { path: program, query } = uri;
    let (stdout, to_stdout) = pipe()?;
    let (stderr, to_stderr) = pipe()?;
    let (ready, is_ready) = pipe()?;
    let above = |fd: &dyn AsFd| fcntl_dupfd_cloexec(fd.as_fd(), ABOVE).map_err(|error| LoggerError::Pipe(error.into()));
    let inherited = [above(&stdout)?, above(&stderr)?, above(&is_ready)?];
    let mut command = Command::new(&program);
    command.args(query.into_iter().flat_map(<[OsString; 2]>::from));
    command.env("CONTAINER_ID", source.id).env("CONTAINER_NAMESPACE", source.namespace);
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    let numbers = inherited.each_ref().map(AsRawFd::as_raw_fd);
    // SAFETY: between fork and exec the closure makes system calls only, on descriptors that are open until it has run.
    unsafe {
        command.pre_exec(move || {
            for (from, to) in numbers.into_iter().zip(DESCRIPTORS) {
                if libc::dup2(from, to) < 0 {
                    return Err(io::Error::last_os_error());
                }
            }
            Ok(())
        });
    }
    let spawned = apart("logger", move || {
        let spawned = crate::network::on_host(|| command.spawn()).flatten();
        drop((inherited, is_ready));
        spawned
    });
    let child = spawned.await.flatten().map_err(|error| LoggerError::Start(program.clone(), error))?;
    // It ends when it has taken the last output.
    pidfd::open(child.id()).map(pidfd::reap).map_err(LoggerError::Pipe)?;
    let mut ready = receiver(ready)?;
    match timeout(READY_TIMEOUT, ready.read_u8()).await {
        // A byte, or, more likely, the end.
        Ok(_) => Ok([to_stdout.into(), to_stderr.into()]),
        Err(_) => Err(LoggerError::NotReady(program)),
    }
}

fn pipe() -> Result<(PipeReader, PipeWriter), LoggerError> {
    io::pipe().map_err(LoggerError::Pipe)
}

fn receiver(reader: PipeReader) -> Result<pipe::Receiver, LoggerError> {
    pipe::Receiver::from_owned_fd(reader.into()).map_err(LoggerError::Pipe)
}

#[cfg(test)]
mod tests {
    use std::fs::{self, File};
    use std::io::Write;

    use super::*;
    use crate::test_program;

    const SOURCE: Source<'_> = Source { namespace: "ns", id: "c1" };

    #[tokio::test]
    async fn a_program_gets_names_arguments_and_both_outputs() {
        let dir = tempfile::tempdir().unwrap();
        let (script, log) = (dir.path().join("logger"), dir.path().join("log"));
        let text = "#!/bin/sh\nexec 5>&-\n{ echo $CONTAINER_NAMESPACE $CONTAINER_ID $1; cat <&3; cat <&4; } > $2.new\nmv $2.new $2\n";
        test_program::write(&script, text);
        let location = format!("{}?to={}", script.display(), log.display().to_string().replace('/', "%2F"));

        let [stdout, stderr] = start(Uri::parse(&location).unwrap(), SOURCE).await.unwrap();
        File::from(stdout).write_all(b"out\n").unwrap();
        File::from(stderr).write_all(b"err\n").unwrap();

        while !log.exists() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        assert_eq!(fs::read_to_string(log).unwrap(), "ns c1 to\nout\nerr\n");
    }

    #[tokio::test]
    async fn a_program_that_is_not_there_is_named() {
        let error = start(Uri::parse("/no/such/program?a=b").unwrap(), SOURCE).await.unwrap_err();

        assert_eq!(error.to_string(), "cannot start the log program \"/no/such/program\"");
    }
}
