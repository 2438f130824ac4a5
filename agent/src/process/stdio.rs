// SPDX-License-Identifier: Apache-2.0
//! Standard input, output and error of a process: pipes to the agent, `/dev/null`, or a terminal made later.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::fs::{CWD, Mode, OFlags, Uid};
use rustix::pipe::{PipeFlags, pipe_with};

use super::preserved::{self, AgentPreserved, PreservedSpec};
use crate::container::{Failure, Stage, StdioSpec};

/// The process's ends.
#[derive(Debug)]
pub(crate) struct ChildStdio {
    /// 0, 1 and 2; absent with a terminal, which is made later.
    pub(crate) standard: Option<[OwnedFd; 3]>,
    /// 3 and on.
    pub(crate) preserved: Vec<OwnedFd>,
}

impl ChildStdio {
    /// All of them.
    pub(crate) fn descriptors(&self) -> impl Iterator<Item = BorrowedFd<'_>> {
        self.standard.iter().flatten().chain(&self.preserved).map(AsFd::as_fd)
    }
}

/// The agent's ends; `None` where the process has `/dev/null`.
#[derive(Debug, Default)]
pub(crate) struct AgentStdio {
    pub(crate) stdin: Option<OwnedFd>,
    pub(crate) stdout: Option<OwnedFd>,
    pub(crate) stderr: Option<OwnedFd>,
    pub(crate) preserved: Vec<Option<AgentPreserved>>,
}

/// Makes what a process has beside a terminal, owned by its user, who may want to open it again by name.
pub(crate) fn make_pipes(
    spec: &StdioSpec,
    preserved: &[PreservedSpec],
    uid: u32,
) -> io::Result<(ChildStdio, AgentStdio)> {
    let (child_preserved, agent_preserved) = preserved::make(preserved, uid)?;
    let (standard, agent) = match spec.terminal {
        Some(_) => (None, AgentStdio::default()),
        None => make_standard(spec, uid).map(|(child, agent)| (Some(child), agent))?,
    };
    let child = ChildStdio { standard, preserved: child_preserved };
    Ok((child, AgentStdio { preserved: agent_preserved, ..agent }))
}

fn make_standard(spec: &StdioSpec, uid: u32) -> io::Result<([OwnedFd; 3], AgentStdio)> {
    let (stdin, agent_stdin) = match spec.stdin {
        Some(_) => {
            let (read, write) = pipe_of(uid)?;
            (read, Some(write))
        }
        None => (null()?, None),
    };
    let output = |stream: Option<u32>| -> io::Result<(OwnedFd, Option<OwnedFd>)> {
        match stream {
            Some(_) => {
                let (read, write) = pipe_of(uid)?;
                Ok((write, Some(read)))
            }
            None => Ok((null()?, None)),
        }
    };
    let (stdout, agent_stdout) = output(spec.stdout)?;
    let (stderr, agent_stderr) = output(spec.stderr)?;
    let agent = AgentStdio { stdin: agent_stdin, stdout: agent_stdout, stderr: agent_stderr, ..AgentStdio::default() };
    Ok(([stdin, stdout, stderr], agent))
}

/// Read end and write end.
pub(super) fn pipe_of(uid: u32) -> io::Result<(OwnedFd, OwnedFd)> {
    let (read, write) = pipe_with(PipeFlags::CLOEXEC)?;
    if uid != 0 {
        // Both ends are one inode.
        rustix::fs::fchown(&read, Some(Uid::from_raw(uid)), None)?;
    }
    Ok((read, write))
}

/// The guest's own `/dev/null`, open.
pub(crate) fn null() -> io::Result<OwnedFd> {
    Ok(rustix::fs::openat(CWD, "/dev/null", OFlags::RDWR | OFlags::CLOEXEC, Mode::empty())?)
}

/// Makes the descriptors the calling process's 0, 1 and 2.
pub(crate) fn install(stdin: BorrowedFd<'_>, stdout: BorrowedFd<'_>, stderr: BorrowedFd<'_>) -> Result<(), Failure> {
    let failed = |error: rustix::io::Errno| Failure::new(Stage::Stdio, "put them in place", error);
    rustix::stdio::dup2_stdin(stdin).map_err(failed)?;
    rustix::stdio::dup2_stdout(stdout).map_err(failed)?;
    rustix::stdio::dup2_stderr(stderr).map_err(failed)
}

/// Makes the terminal the calling process's 0, 1 and 2, owned by its user.
pub(crate) fn install_terminal(device: &OwnedFd, uid: u32) -> Result<(), Failure> {
    rustix::fs::fchown(device, Some(Uid::from_raw(uid)), None)
        .map_err(|error| Failure::new(Stage::Stdio, format!("give the terminal to user {uid}"), error))?;
    install(device.as_fd(), device.as_fd(), device.as_fd())
}
