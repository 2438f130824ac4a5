// SPDX-License-Identifier: Apache-2.0
//! What every process of a container, its init or an exec'd one, does to itself before it executes its program. The
//! order matters: each step needs what later ones take away.

use std::collections::HashSet;
use std::ffi::CString;
use std::os::fd::{AsFd, OwnedFd};

use rustix::fs::Mode;
use rustix::io::Errno;
use rustix::process::Pid;

use super::channel::ChildEnd;
use super::spec::Namespaces;
use super::{Failure, ProcessSpec, Stage};
use crate::process::{credentials, exec, preserved, rlimits, stdio, terminal, users};
use crate::sys;

/// First descriptor that is not a standard stream.
const FIRST_OTHER_DESCRIPTOR: u32 = 3;

/// What becomes a process's program.
#[derive(Debug)]
pub(super) struct Program {
    path: CString,
    env: Vec<CString>,
}

impl Program {
    /// Gives it its descriptors from 3 on, takes the last of what the spec does not give, and executes the program. Returns
    /// only if that failed.
    pub(super) fn execute(&self, process: &ProcessSpec, stdio: &stdio::ChildStdio) -> Failure {
        match preserved::install(&stdio.preserved).and_then(|()| credentials::seal(process)) {
            Ok(()) => exec::execute(&self.path, &process.args, &self.env),
            Err(failure) => failure,
        }
    }
}

/// Says how readily a process, or the calling one, is to be killed for its memory. /proc has to be the agent's.
pub(super) fn set_oom_score(process: &ProcessSpec, pid: Option<i32>) -> Result<(), Failure> {
    let Some(adjustment) = process.oom_score_adj else { return Ok(()) };
    let directory = pid.map_or_else(|| "self".to_owned(), |pid| pid.to_string());
    std::fs::write(format!("/proc/{directory}/oom_score_adj"), adjustment.to_string())
        .map_err(|error| Failure::new(Stage::OomScore, adjustment.to_string(), error))
}

/// Gives a process that is set up, and waits in a user namespace of its own, what it could not take there: limits above
/// the agent's, and priorities.
pub(super) fn give(process: &ProcessSpec, pid: i32) -> Result<(), Failure> {
    rlimits::apply(Pid::from_raw(pid), &process.rlimits)?;
    process.scheduling.apply(pid)
}

/// Makes the calling process a fresh one: no signal is ignored or blocked, it leads a session, and it creates files with
/// the very modes that it asks for.
pub(super) fn begin() -> Result<(), Failure> {
    sys::reset_signals().map_err(|error| Failure::new(Stage::Process, "reset its signals", error))?;
    rustix::process::setsid().map_err(|error| Failure::new(Stage::Terminal, "make a session", error))?;
    rustix::process::umask(Mode::empty());
    Ok(())
}

/// Gives the calling process, which is in the container's root, all that the spec says of it, and waits to be started.
/// Its standard streams are `terminal`, else `pipes`. In a user namespace of its own, the agent does the rest ([`give`]).
pub(super) fn finish(
    process: &ProcessSpec,
    namespaces: Namespaces,
    channel: &ChildEnd,
    pipes: &stdio::ChildStdio,
    terminal: Option<&OwnedFd>,
) -> Result<Program, Failure> {
    install_stdio(process, pipes, terminal)?;
    if !namespaces.user {
        rlimits::apply(None, &process.rlimits)?;
        process.scheduling.apply(0)?;
    }
    process.scheduling.apply_personality()?;
    let env = environment(process)?;
    become_user(process)?;
    rustix::process::umask(Mode::from_raw_mode(process.umask));
    let path = exec::find(&process.args[0], &env)?;
    // All of the agent's descriptors are opened that way; this is for one that was forgotten.
    sys::close_on_exec_from(FIRST_OTHER_DESCRIPTOR)
        .map_err(|error| Failure::new(Stage::Process, "keep the agent's descriptors from it", error))?;
    channel.ready()?;
    Ok(Program { path, env })
}

fn install_stdio(process: &ProcessSpec, pipes: &stdio::ChildStdio, terminal: Option<&OwnedFd>) -> Result<(), Failure> {
    if let Some(device) = terminal {
        stdio::install_terminal(device, process.uid)?;
        return terminal::control(device.as_fd());
    }
    match &pipes.standard {
        Some([stdin, stdout, stderr]) => stdio::install(stdin.as_fd(), stdout.as_fd(), stderr.as_fd()),
        None => Ok(()),
    }
}

/// The process's environment: of several entries of a name the last, as programs would else find the first; and HOME, if the spec
/// has none.
fn environment(process: &ProcessSpec) -> Result<Vec<CString>, Failure> {
    let mut names = HashSet::new();
    let name = |entry: &CString| entry.to_bytes().split(|byte| *byte == b'=').next().map(<[u8]>::to_vec);
    let mut env: Vec<CString> = process.env.iter().rev().filter(|entry| names.insert(name(entry))).cloned().collect();
    env.reverse();
    if !env.iter().any(|entry| entry.to_bytes().starts_with(b"HOME=")) {
        let home = CString::new(format!("HOME={}", users::home(process.uid))).map_err(|_| {
            Failure::explained(Stage::Process, "the home directory in /etc/passwd has a NUL byte in it")
        })?;
        env.push(home);
    }
    Ok(env)
}

/// Changes directory and user. A working directory that root may not enter (on a network share) may be the user's own.
fn become_user(process: &ProcessSpec) -> Result<(), Failure> {
    let failed = |error: Errno| Failure::new(Stage::WorkingDirectory, process.cwd.clone(), error);
    let entered = match rustix::process::chdir(process.cwd.as_str()) {
        Ok(()) => true,
        Err(Errno::ACCESS | Errno::PERM) => false,
        Err(error) => return Err(failed(error)),
    };
    credentials::apply(process)?;
    if entered { Ok(()) } else { rustix::process::chdir(process.cwd.as_str()).map_err(failed) }
}
