// SPDX-License-Identifier: Apache-2.0
//! Programs that the spec wants run in the container before its own.

use std::ffi::CString;
use std::fs::File;
use std::io::{self, Seek, SeekFrom, Write};
use std::os::fd::AsFd;
use std::os::unix::ffi::OsStringExt;
use std::os::unix::fs::FileExt;
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use bulkhead_protocol::agent as wire;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{MemfdFlags, memfd_create};
use rustix::process::{Pid, PidfdFlags, pidfd_open};

use super::spec::{SpecError, absolute, c_strings};
use super::{Failure, Stage};

/// What a failure quotes of a hook's output.
const QUOTED_OUTPUT: usize = 512;

/// The hooks, and what they read from stdin.
#[derive(Debug, Default)]
pub(crate) struct StartHooks {
    hooks: Vec<Hook>,
    state: String,
}

#[derive(Debug)]
struct Hook {
    path: String,
    args: Vec<CString>,
    env: Vec<CString>,
    timeout: Option<Duration>,
}

impl StartHooks {
    pub(crate) fn from_wire(hooks: Vec<wire::Hook>, state: String) -> Result<Self, SpecError> {
        let hook = |wire: wire::Hook| {
            absolute("hook", &wire.path)?;
            Ok(Hook {
                path: wire.path,
                args: c_strings("argument of a hook", wire.args)?,
                env: c_strings("environment variable of a hook", wire.env)?,
                timeout: (wire.timeout_s != 0).then(|| Duration::from_secs(wire.timeout_s)),
            })
        };
        Ok(Self { hooks: hooks.into_iter().map(hook).collect::<Result<_, _>>()?, state })
    }

    /// Runs them as children of the calling process, one after the other, up to the first that fails.
    pub(crate) fn run(&self) -> Result<(), Failure> {
        self.hooks.iter().try_for_each(|hook| hook.run(&self.state))
    }
}

impl Hook {
    fn run(&self, state: &str) -> Result<(), Failure> {
        let failed = |error: io::Error| Failure::new(Stage::Hook, self.path.clone(), error);
        let output = File::from(memfd_create("hook-output", MemfdFlags::CLOEXEC).map_err(|e| failed(e.into()))?);
        let mut child = self.spawn(state, &output).map_err(failed)?;
        let ended = wait_for_end(&child, self.timeout);
        if !matches!(ended, Ok(true)) {
            // Of one that has ended meanwhile, nothing is left to be killed.
            let _ = child.kill();
        }
        let status = child.wait().map_err(failed)?;
        if !ended.map_err(failed)? {
            let seconds = self.timeout.unwrap_or_default().as_secs();
            return Err(Failure::explained(Stage::Hook, format!("{}: it did not end within {seconds} s", self.path)));
        }
        if status.success() {
            return Ok(());
        }
        Err(Failure::explained(Stage::Hook, format!("{}: {status}{}", self.path, end_of(&output))))
    }

    fn spawn(&self, state: &str, output: &File) -> io::Result<Child> {
        // A file, so that nobody waits for a hook that does not read it.
        let mut stdin = File::from(memfd_create("container-state", MemfdFlags::CLOEXEC)?);
        stdin.write_all(state.as_bytes())?;
        stdin.seek(SeekFrom::Start(0))?;
        let os = |text: &CString| std::ffi::OsString::from_vec(text.as_bytes().to_vec());
        let mut command = Command::new(&self.path);
        if let Some((name, args)) = self.args.split_first() {
            command.arg0(os(name)).args(args.iter().map(os));
        }
        command.env_clear();
        for entry in &self.env {
            let entry = entry.as_bytes();
            let at = entry.iter().position(|byte| *byte == b'=').unwrap_or(entry.len());
            let (name, value) = (&entry[..at], entry.get(at + 1..).unwrap_or_default());
            command.env(std::ffi::OsString::from_vec(name.to_vec()), std::ffi::OsString::from_vec(value.to_vec()));
        }
        command.stdin(stdin).stdout(Stdio::from(output.try_clone()?)).stderr(Stdio::from(output.try_clone()?)).spawn()
    }
}

/// Whether the process has ended in time.
fn wait_for_end(child: &Child, timeout: Option<Duration>) -> io::Result<bool> {
    let pid = Pid::from_raw(child.id().cast_signed()).ok_or(io::ErrorKind::NotFound)?;
    let pidfd = pidfd_open(pid, PidfdFlags::empty())?;
    // More than the kernel can count is for ever.
    let timeout = timeout.and_then(|timeout| Timespec::try_from(timeout).ok());
    let ready = poll(&mut [PollFd::from_borrowed_fd(pidfd.as_fd(), PollFlags::IN)], timeout.as_ref())?;
    Ok(ready > 0)
}

/// The end of what a hook said, after a colon.
fn end_of(output: &File) -> String {
    let length = output.metadata().map_or(0, |metadata| metadata.len());
    let mut end = vec![0; QUOTED_OUTPUT];
    let read = output.read_at(&mut end, length.saturating_sub(QUOTED_OUTPUT as u64)).unwrap_or(0);
    let said = String::from_utf8_lossy(&end[..read]);
    if said.trim().is_empty() { String::new() } else { format!(": {}", said.trim()) }
}
