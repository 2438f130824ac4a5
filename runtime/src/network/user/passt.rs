// SPDX-License-Identifier: Apache-2.0
//! The process of passt(1): started with one end of a socket, killed when dropped.
//!
//! It ends when the socket's other end, which is the VMM's, is closed; and it is sent SIGKILL when the supervisor ends, even if it
//! is stopped. Root starts it as nobody: it would become that itself, and lose the latter thereby.

use std::env;
use std::ffi::OsString;
use std::fs;
use std::io::{self, PipeReader};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use rustix::fs::{Mode, fchmod};
use rustix::io::{FdFlags, fcntl_setfd};
use rustix::process::{Gid, Signal, Uid, WaitId, WaitIdOptions, set_parent_process_death_signal, waitid};
use rustix::thread::{set_thread_gid, set_thread_groups, set_thread_uid};
use thiserror::Error;
use tokio::io::AsyncReadExt;
use tokio::net::unix::pipe;
use tokio::time::timeout;

use crate::pidfd;
use crate::said::Said;
use crate::spec::Published;
use crate::text;
use crate::user_namespace;

/// The program's name.
const NAME: &str = "passt";

/// Where it is looked for if the environment does not say.
const DEFAULT_PATH: &str = "/usr/local/bin:/usr/bin:/bin";

/// How long it may take to be ready.
const READY_TIMEOUT: Duration = Duration::from_secs(30);

/// User and group `nobody`.
const NOBODY: u32 = 65_534;

/// What passt says of a system logger that is not there, of each of its messages.
const NO_SYSLOG: &str = "Failed to send ";

/// A passt that cannot be had.
#[derive(Debug, Error)]
pub(crate) enum PasstError {
    #[error(
        "cannot find passt, which io.bulkhead.net.user needs, in {} (apt install passt)", path.display()
    )]
    Find { path: PathBuf },
    #[error("this host has no default route, so io.bulkhead.net.user leads nowhere")]
    NoRoute,
    #[error("cannot publish the port {port}")]
    Port { port: Published, source: io::Error },
    #[error("cannot {doing} for passt")]
    Prepare { doing: &'static str, source: io::Error },
    #[error("cannot start {}, which io.bulkhead.net.user needs (apt install passt)", path.display())]
    Start { path: PathBuf, source: io::Error },
    #[error("passt ended before the container's network was ready: {said}")]
    Ended { said: String },
    #[error("passt was not ready within {} s", READY_TIMEOUT.as_secs())]
    NotReady,
}

/// Finds passt in the folders of `PATH`.
///
/// # Errors
///
/// It is in none of them.
pub(crate) fn find() -> Result<PathBuf, PasstError> {
    let path = env::var_os("PATH").filter(|path| !path.is_empty()).unwrap_or_else(|| OsString::from(DEFAULT_PATH));
    let mut programs = env::split_paths(&path).filter(|folder| folder.is_absolute()).map(|folder| folder.join(NAME));
    programs.find(|program| is_program(program)).ok_or_else(|| PasstError::Find { path: path.clone().into() })
}

fn is_program(path: &Path) -> bool {
    fs::metadata(path).is_ok_and(|metadata| metadata.is_file() && metadata.permissions().mode() & 0o111 != 0)
}

/// The process.
#[derive(Debug)]
pub(crate) struct Passt {
    child: Child,
    pidfd: OwnedFd,
    /// Where it writes its number when it is ready.
    ready: PipeReader,
    stderr: Said,
}

impl Passt {
    /// Starts it. `socket` is what it has of the guest.
    pub(super) fn start(path: &Path, arguments: &[String], socket: &UnixStream) -> Result<Self, PasstError> {
        let prepare = |doing| move |source: io::Error| PasstError::Prepare { doing, source };
        let (ready, is_ready) = io::pipe().map_err(prepare("make a pipe"))?;
        // It opens that by name, and is somebody else by then.
        fchmod(&is_ready, Mode::from_raw_mode(0o666)).map_err(|error| prepare("open a pipe")(error.into()))?;
        let stderr = Said::new("passt-stderr").map_err(prepare("make a file in memory"))?;
        let mut command = Command::new(path);
        command
            .args(["--foreground", "--quiet", "--pid=/proc/self/fd/1"])
            .arg(format!("--fd={}", socket.as_raw_fd()))
            .args(arguments)
            .env_clear()
            .current_dir("/")
            .stdin(Stdio::null())
            .stdout(is_ready)
            .stderr(stderr.to_stdio().map_err(prepare("duplicate a descriptor"))?)
            // Ctrl-C on the terminal is for the container.
            .process_group(0);
        prepare_child(&mut command, socket.as_raw_fd());
        let start = |source| PasstError::Start { path: path.to_owned(), source };
        let mut child = command.spawn().map_err(start)?;
        match pidfd::open(child.id()) {
            Ok(pidfd) => Ok(Self { child, pidfd, ready, stderr }),
            Err(error) => {
                let _ = child.kill();
                let _ = child.wait();
                Err(start(error))
            }
        }
    }

    /// Waits until it is ready: its ports are the container's then.
    ///
    /// # Errors
    ///
    /// It has ended, and what it has said; or it takes too long.
    pub(crate) fn ready(&self) -> impl Future<Output = Result<(), PasstError>> + use<> {
        let duplicated = self.ready.try_clone().and_then(|ready| Ok((ready, self.stderr.try_clone()?)));
        async move {
            let prepare = |source| PasstError::Prepare { doing: "wait", source };
            let (ready, stderr) = duplicated.map_err(prepare)?;
            let mut ready = pipe::Receiver::from_owned_fd(ready.into()).map_err(prepare)?;
            match timeout(READY_TIMEOUT, ready.read_u8()).await {
                Ok(Ok(_)) => Ok(()),
                Ok(Err(_)) => Err(PasstError::Ended { said: last_word(&stderr) }),
                Err(_) => Err(PasstError::NotReady),
            }
        }
    }

    /// Waits for its end, and tells of it; `None` where it has ended in order, since the VMM has gone or has closed the socket.
    pub(crate) fn end(&self) -> io::Result<impl Future<Output = Option<String>> + use<>> {
        let (pidfd, ended, stderr) = (self.pidfd.try_clone()?, self.pidfd.try_clone()?, self.stderr.try_clone()?);
        Ok(async move {
            pidfd::ended(pidfd).await.ok()?;
            // Who owns the process reaps it.
            let status = waitid(WaitId::PidFd(ended.as_fd()), WaitIdOptions::EXITED | WaitIdOptions::NOWAIT).ok()??;
            match (status.exit_status(), status.terminating_signal()) {
                (Some(0), _) => None,
                (_, Some(signal)) => Some(format!("passt was killed by signal {signal}")),
                _ => Some(format!("passt failed: {}", last_word(&stderr))),
            }
        })
    }
}

impl Drop for Passt {
    fn drop(&mut self) {
        // Of one that has ended, both do nothing. Its ports are free then.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Has a command be started with `socket`, as nobody where this is root, and end with the calling thread.
fn prepare_child(command: &mut Command, socket: i32) {
    let is_root = user_namespace::is_root_of_host();
    // SAFETY: the descriptor is open until the closure has run: whoever calls this owns it.
    let socket = unsafe { BorrowedFd::borrow_raw(socket) };
    // SAFETY: between fork and exec the closure makes system calls only.
    unsafe {
        command.pre_exec(move || {
            fcntl_setfd(socket, FdFlags::empty())?;
            if is_root {
                set_thread_groups(&[])?;
                set_thread_gid(Gid::from_raw(NOBODY))?;
                set_thread_uid(Uid::from_raw(NOBODY))?;
            }
            Ok(set_parent_process_death_signal(Some(Signal::KILL))?)
        });
    }
}

/// What it has said last, in one line.
fn last_word(stderr: &Said) -> String {
    let said = stderr.text();
    let last = said.lines().rfind(|line| !line.trim().is_empty() && !line.starts_with(NO_SYSLOG));
    text::one_line(last.unwrap_or("it did not say why"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::test_program;

    /// A script in passt's place.
    fn start(script: &str) -> (tempfile::TempDir, Passt, UnixStream) {
        let dir = tempfile::tempdir().unwrap();
        fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o755)).unwrap();
        let path = dir.path().join(NAME);
        test_program::write(&path, &format!("#!/bin/sh\n{script}\n"));
        let (ours, theirs) = UnixStream::pair().unwrap();
        let passt = Passt::start(&path, &["--option".to_owned()], &theirs).unwrap();
        (dir, passt, ours)
    }

    #[tokio::test]
    async fn it_tells_when_it_is_ready_and_is_gone_when_dropped() {
        let (_dir, passt, ours) = start("echo $$ >/proc/self/fd/1; exec sleep 100");

        passt.ready().await.unwrap();
        drop(passt);

        assert_eq!(rustix::net::recv(&ours, &mut [0; 1], rustix::net::RecvFlags::empty()).unwrap().1, 0);
    }

    #[tokio::test]
    async fn its_last_word_says_why_it_is_not() {
        let (_dir, passt, _ours) =
            start("printf 'first\\nno port for you\\nFailed to send 9 bytes to syslog\\n' >&2; exit 1");

        let error = passt.ready().await.unwrap_err();

        assert_eq!(error.to_string(), "passt ended before the container's network was ready: no port for you");
        assert_eq!(passt.end().unwrap().await.as_deref(), Some("passt failed: no port for you"));
    }

    #[tokio::test]
    async fn an_end_by_a_signal_is_told_and_one_in_order_is_not() {
        let (_dir, passt, _ours) = start("kill -9 $$");
        assert_eq!(passt.end().unwrap().await.as_deref(), Some("passt was killed by signal 9"));
        let (_dir, passt, _ours) = start("exit 0");
        assert_eq!(passt.end().unwrap().await, None);
    }

    #[test]
    fn an_absent_program_is_named_with_its_package() {
        let (_ours, theirs) = UnixStream::pair().unwrap();
        let error = Passt::start(Path::new("/no/such/passt"), &[], &theirs).unwrap_err();
        assert!(
            error.to_string().starts_with("cannot start /no/such/passt")
                && error.to_string().contains("apt install passt")
        );
    }
}
