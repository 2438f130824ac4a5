// SPDX-License-Identifier: Apache-2.0
//! A container that lives on when the command that made it has ended.

use std::ffi::OsString;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use nix::sys::wait::{WaitStatus, waitpid};
use nix::unistd::Pid;
use serde_json::Value;

use crate::bundle::Bundle;
use crate::env::{Env, Kind};
use crate::failure::{Context as _, Result, ensure, ensure_eq, fail};
use crate::output::Output;
use crate::processes::{self, Looks, Process};
use crate::run::Run;

/// How long what is waited for may take.
const LIMIT: Duration = Duration::from_secs(60);

/// The container. Dropped, it is deleted by force.
#[derive(Debug)]
pub(crate) struct Detached<'a> {
    env: &'a Env,
    pub(crate) id: String,
    /// Where its output goes.
    output: PathBuf,
    /// The process that stands for it.
    pub(crate) pid: i32,
}

impl<'a> Detached<'a> {
    /// `create`: it waits for `start`.
    pub(crate) fn create(env: &'a Env, bundle: &Bundle) -> Result<Self> {
        Self::make(env, bundle, &["create"])
    }

    /// `run --detach`.
    pub(crate) fn run(env: &'a Env, bundle: &Bundle) -> Result<Self> {
        Self::make(env, bundle, &["run", "--detach"])
    }

    /// `create` with a terminal, which is sent to that socket.
    pub(crate) fn create_with_console(env: &'a Env, bundle: &Bundle, socket: &str) -> Result<Self> {
        Self::make(env, bundle, &["create", "--console-socket", socket])
    }

    /// `create` for a service manager that has that socket.
    pub(crate) fn create_told(env: &'a Env, bundle: &Bundle, manager: &Path) -> Result<Self> {
        Self::make_with(env, bundle, &["create"], |run| run.variable("NOTIFY_SOCKET", manager))
    }

    /// `run --detach` likewise.
    pub(crate) fn run_told(env: &'a Env, bundle: &Bundle, manager: &Path) -> Result<Self> {
        Self::make_with(env, bundle, &["run", "--detach"], |run| run.variable("NOTIFY_SOCKET", manager))
    }

    fn make(env: &'a Env, bundle: &Bundle, verb: &[&str]) -> Result<Self> {
        Self::make_with(env, bundle, verb, |run| run)
    }

    fn make_with(env: &'a Env, bundle: &Bundle, verb: &[&str], set: impl FnOnce(Run<'a>) -> Run<'a>) -> Result<Self> {
        bundle.write()?;
        let id = env.id();
        let (output, pid_file) = (env.work.join(format!("{id}.out")), env.work.join(format!("{id}.pid")));
        let mut arguments: Vec<OsString> = verb.iter().map(OsString::from).collect();
        arguments.extend(["--bundle".into(), bundle.folder.clone().into(), "--pid-file".into()]);
        arguments.extend([pid_file.clone().into(), id.clone().into()]);
        let mut made = Self { env, id, output, pid: 0 };
        // Its streams are the container's from then on, so they are no pipes of this process.
        let file = File::create(&made.output)?;
        let end = set(env.call(arguments)).stdout(file.try_clone()?).stderr(file).output()?;
        let said = fs::read_to_string(&made.output)?;
        ensure!(end.status.success(), "{verb:?} failed: {}; on its streams {said:?}", end.describe());
        made.pid = fs::read_to_string(&pid_file)?.parse().context(|| "reading the pid file".to_owned())?;
        Ok(made)
    }

    /// A verb for this container, its words before the id.
    pub(crate) fn verb(&self, words: &[&str]) -> Run<'a> {
        self.verb_with(words, &[])
    }

    /// A verb for this container, with words before and after the id.
    pub(crate) fn verb_with(&self, before: &[&str], after: &[&str]) -> Run<'a> {
        self.env.call(before.iter().copied().chain([self.id.as_str()]).chain(after.iter().copied()))
    }

    /// A verb that has to succeed.
    pub(crate) fn must(&self, words: &[&str]) -> Result<Output> {
        let output = self.verb(words).output()?;
        ensure!(output.status.success(), "{words:?} failed: {}", output.describe());
        Ok(output)
    }

    /// The same with words before and after the id.
    pub(crate) fn must_with(&self, before: &[&str], after: &[&str]) -> Result<Output> {
        let output = self.verb_with(before, after).output()?;
        ensure!(output.status.success(), "{before:?} … {after:?} failed: {}", output.describe());
        Ok(output)
    }

    /// `exec` of a shell script.
    pub(crate) fn exec(&self, script: &str) -> Run<'a> {
        self.verb_with(&["exec"], &["sh", "-c", script])
    }

    /// What `state` prints.
    pub(crate) fn state(&self) -> Result<Value> {
        let output = self.must(&["state"])?;
        serde_json::from_slice(&output.stdout).context(|| format!("parsing {}", output.describe()))
    }

    pub(crate) fn expect_status(&self, status: &str) -> Result {
        ensure_eq!(self.state()?["status"], Value::from(status), "the status");
        Ok(())
    }

    /// It has ended, and with that status, which others than Bulkhead do not tell.
    pub(crate) fn expect_exit_status(&self, status: i32) -> Result {
        let state = self.state()?;
        ensure_eq!(state["status"], "stopped", "the status");
        if self.env.kind == Kind::Bulkhead {
            ensure_eq!(state["exitStatus"], status, "the exit status in its state");
        }
        Ok(())
    }

    /// Waits until the state says so.
    pub(crate) fn wait_for_status(&self, status: &str) -> Result {
        let end = Instant::now() + LIMIT;
        let mut looks = Looks::begin();
        while self.state()?["status"] != status {
            if Instant::now() >= end {
                fail!("the container has not become {status}: {}", self.state()?);
            }
            looks.pause();
        }
        Ok(())
    }

    /// What it has written so far.
    pub(crate) fn output(&self) -> Result<String> {
        fs::read_to_string(&self.output).context(|| format!("reading {}", self.output.display()))
    }

    /// Waits until it has written that.
    pub(crate) fn wait_for(&self, text: &str) -> Result {
        let end = Instant::now() + LIMIT;
        while !self.output()?.contains(text) {
            if Instant::now() >= end {
                fail!("{text:?} did not come; seen {:?}", self.output()?);
            }
            thread::sleep(Duration::from_millis(20));
        }
        Ok(())
    }

    /// Waits for the end of the process that stands for it, as an engine does; its exit status.
    pub(crate) fn wait(&self) -> Result<i32> {
        match waitpid(Pid::from_raw(self.pid), None)? {
            WaitStatus::Exited(_, status) => Ok(status),
            // Where the container's init itself stands for it.
            WaitStatus::Signaled(_, signal, _) => Ok(128 + signal as i32),
            other => fail!("the process that stands for the container: {other:?}"),
        }
    }

    /// The same where its processes are, without a process that stands for them, orphans of this one: their namespace ends when
    /// all of them have been reaped. No run may be going on.
    pub(crate) fn wait_with_orphans(&self) -> Result<i32> {
        let end = Instant::now() + LIMIT;
        let mut looks = Looks::begin();
        while Process::of(self.pid).is_some_and(|process| process.state != 'Z') {
            ensure!(Instant::now() < end, "process {} does not end", self.pid);
            processes::reap_orphans(&[self.pid]);
            looks.pause();
        }
        self.wait()
    }
}

impl Drop for Detached<'_> {
    fn drop(&mut self) {
        let _ = self.verb(&["delete", "--force"]).output();
    }
}
