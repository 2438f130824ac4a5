// SPDX-License-Identifier: Apache-2.0
//! One run of the runtime: how it is started, and how it is talked to while it goes on.

use std::ffi::OsString;
use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::bundle::Bundle;
use crate::env::{Env, Kind};
use crate::failure::{Context as _, Result, ensure, fail};
use crate::output::Output;
use crate::processes;

/// How long a run may take unless told otherwise; an emulated host is slow.
const LIMIT: Duration = Duration::from_secs(120);

/// How long the streams of an ended runtime may stay open.
const END_OF_STREAMS: Duration = Duration::from_secs(10);

/// A run to be started.
#[derive(Debug)]
pub(crate) struct Run<'a> {
    env: &'a Env,
    /// Another program than the runtime.
    program: Option<PathBuf>,
    root: PathBuf,
    globals: Vec<OsString>,
    arguments: Vec<OsString>,
    variables: Vec<(OsString, OsString)>,
    folder: Option<PathBuf>,
    wrapper: Option<&'static str>,
    input: Option<Vec<u8>>,
    stdin: Option<Stdio>,
    stdout: Option<Stdio>,
    stderr: Option<Stdio>,
    limit: Duration,
}

impl Env {
    /// The runtime with these arguments, its stdin empty.
    pub(crate) fn call<A: Into<OsString>>(&self, arguments: impl IntoIterator<Item = A>) -> Run<'_> {
        Run {
            env: self,
            program: None,
            root: self.root.clone(),
            globals: Vec::new(),
            arguments: arguments.into_iter().map(Into::into).collect(),
            // An emulated host on a busy machine may be ten times slower than usual.
            variables: vec![("BULKHEAD_BOOT_TIMEOUT_MS".into(), "90000".into())],
            folder: None,
            wrapper: None,
            input: None,
            stdin: None,
            stdout: None,
            stderr: None,
            limit: LIMIT,
        }
    }

    /// Another program, such as a container engine, with these arguments.
    pub(crate) fn tool<A: Into<OsString>>(&self, program: &Path, arguments: impl IntoIterator<Item = A>) -> Run<'_> {
        Run { program: Some(program.to_owned()), ..self.call(arguments) }
    }

    /// `run` of a bundle under a new id.
    pub(crate) fn run(&self, bundle: &Bundle) -> Result<Run<'_>> {
        self.run_as(bundle, &self.id())
    }

    /// `run` of a bundle under that id.
    pub(crate) fn run_as(&self, bundle: &Bundle, id: &str) -> Result<Run<'_>> {
        bundle.write()?;
        Ok(self.run_folder(&bundle.folder, id))
    }

    /// `run` of whatever is in a folder.
    pub(crate) fn run_folder(&self, folder: &Path, id: &str) -> Run<'_> {
        self.call([OsString::from("run"), "--bundle".into(), folder.into(), id.into()])
    }
}

impl Run<'_> {
    /// Another `--root`.
    pub(crate) fn root(mut self, root: &Path) -> Self {
        self.root = root.to_owned();
        self
    }

    /// Options before the verb.
    pub(crate) fn globals<A: Into<OsString>>(mut self, options: impl IntoIterator<Item = A>) -> Self {
        self.globals.extend(options.into_iter().map(Into::into));
        self
    }

    /// An environment variable of the runtime.
    pub(crate) fn variable(mut self, name: &str, value: impl Into<OsString>) -> Self {
        self.variables.push((name.into(), value.into()));
        self
    }

    /// The runtime's current folder.
    pub(crate) fn in_folder(mut self, folder: &Path) -> Self {
        self.folder = Some(folder.to_owned());
        self
    }

    /// A shell script that starts the runtime as `exec "$@"`, with what it does to descriptors.
    pub(crate) fn wrapper(mut self, script: &'static str) -> Self {
        self.wrapper = Some(script);
        self
    }

    /// What stdin delivers before its end.
    pub(crate) fn input(mut self, bytes: impl Into<Vec<u8>>) -> Self {
        self.input = Some(bytes.into());
        self
    }

    /// Stdin is a pipe that stays open until [`Running::close_stdin`].
    pub(crate) fn open_stdin(mut self) -> Self {
        self.stdin = Some(Stdio::piped());
        self
    }

    pub(crate) fn stdin(mut self, stdin: impl Into<Stdio>) -> Self {
        self.stdin = Some(stdin.into());
        self
    }

    /// Stdout goes there and is not collected.
    pub(crate) fn stdout(mut self, stdout: impl Into<Stdio>) -> Self {
        self.stdout = Some(stdout.into());
        self
    }

    /// Stderr goes there and is not collected.
    pub(crate) fn stderr(mut self, stderr: impl Into<Stdio>) -> Self {
        self.stderr = Some(stderr.into());
        self
    }

    /// How long it may take.
    pub(crate) fn limit(mut self, limit: Duration) -> Self {
        self.limit = limit;
        self
    }

    fn words(&self) -> Vec<OsString> {
        let mut words: Vec<OsString> = Vec::new();
        if let Some(script) = self.wrapper {
            words.extend(["/bin/sh".into(), "-c".into(), script.into(), "sh".into()]);
        }
        match &self.program {
            Some(program) => words.push(program.clone().into()),
            None => words.extend([self.env.runtime.clone().into(), "--root".into(), self.root.clone().into()]),
        }
        words.extend(self.globals.iter().chain(&self.arguments).cloned());
        words
    }

    /// The command, with its streams as set up.
    fn command(&mut self) -> Command {
        let words = self.words();
        let mut command = Command::new(&words[0]);
        command.args(&words[1..]).envs(self.variables.drain(..));
        if let Some(folder) = &self.folder {
            command.current_dir(folder);
        }
        let input = if self.input.is_some() { Stdio::piped() } else { Stdio::null() };
        command.stdin(self.stdin.take().unwrap_or(input));
        command.stdout(self.stdout.take().unwrap_or_else(Stdio::piped));
        command.stderr(self.stderr.take().unwrap_or_else(Stdio::piped));
        command
    }

    /// Starts it.
    pub(crate) fn spawn(mut self) -> Result<Running> {
        let mut command = self.command();
        let started = Instant::now();
        let mut child = command.spawn().context(|| format!("starting {:?}", self.words()))?;
        let mut stdin = child.stdin.take();
        if let Some(input) = self.input.take()
            && let Some(mut pipe) = stdin.take()
        {
            // A container that ends early leaves the rest unread; that is not the feeder's business.
            thread::spawn(move || {
                let _ = pipe.write_all(&input);
            });
        }
        Ok(Running {
            stdin,
            stdout: child.stdout.take().map(Collector::start),
            stderr: child.stderr.take().map(Collector::start),
            kind: self.env.kind,
            child,
            started,
            limit: self.limit,
            ended: false,
        })
    }

    /// Runs it to its end.
    pub(crate) fn output(self) -> Result<Output> {
        self.spawn()?.finish()
    }
}

/// A run that goes on. Dropped, it and all below it are killed.
#[derive(Debug)]
pub(crate) struct Running {
    child: Child,
    pub(crate) stdin: Option<ChildStdin>,
    stdout: Option<Collector>,
    stderr: Option<Collector>,
    kind: Kind,
    started: Instant,
    limit: Duration,
    ended: bool,
}

impl Running {
    pub(crate) fn pid(&self) -> i32 {
        self.child.id().cast_signed()
    }

    /// Whether it has not ended yet.
    pub(crate) fn is_running(&mut self) -> Result<bool> {
        Ok(self.child.try_wait()?.is_none())
    }

    pub(crate) fn signal(&self, signal: Signal) -> Result {
        kill(Pid::from_raw(self.pid()), signal).context(|| format!("sending {signal} to the runtime"))
    }

    /// Sends a signal that nix has no name for.
    pub(crate) fn real_time_signal(&self, number: i32) -> Result {
        let status = Command::new("kill").args([format!("-{number}"), self.pid().to_string()]).status()?;
        ensure!(status.success(), "sending signal {number} to the runtime: {status}");
        Ok(())
    }

    pub(crate) fn close_stdin(&mut self) {
        self.stdin = None;
    }

    pub(crate) fn write(&mut self, bytes: &[u8]) -> Result {
        let Some(stdin) = &mut self.stdin else { fail!("stdin is not open") };
        stdin.write_all(bytes)?;
        Ok(stdin.flush()?)
    }

    /// Waits until `text` has come on stdout.
    pub(crate) fn wait_for(&mut self, text: &str) -> Result {
        let Some(stdout) = &self.stdout else { fail!("stdout is not collected") };
        if stdout.wait(self.limit / 2, |bytes, _| contains(bytes, text.as_bytes())) {
            return Ok(());
        }
        let seen = String::from_utf8_lossy(&stdout.bytes()).into_owned();
        let errors = self.stderr.as_ref().map(|stderr| String::from_utf8_lossy(&stderr.bytes()).into_owned());
        fail!("{text:?} did not come on stdout: seen {seen:?}, on stderr {:?}", errors.unwrap_or_default())
    }

    /// Waits until stdout has ended, though the runtime may go on.
    pub(crate) fn wait_for_end_of_stdout(&self) -> Result {
        let ended = self.stdout.as_ref().is_some_and(|stdout| stdout.wait(self.limit / 2, |_, ended| ended));
        ensure!(ended, "stdout has not ended after {:?}", self.limit / 2);
        Ok(())
    }

    /// The running VMM below it.
    pub(crate) fn wait_for_vmm(&self) -> Result<i32> {
        match processes::wait_for_descendant(self.pid(), "bulkhead-vmm", self.limit) {
            Some(process) => Ok(process.pid),
            None => fail!("no bulkhead-vmm below the runtime after {:?}", self.limit),
        }
    }

    /// Waits for its end, and the end of its streams.
    pub(crate) fn finish(mut self) -> Result<Output> {
        self.stdin = None;
        let left = self.limit.saturating_sub(self.started.elapsed());
        let Some(status) = processes::wait_for_end(&mut self.child, left)? else {
            let told = |stream: &Option<Collector>| {
                stream.as_ref().map(|stream| String::from_utf8_lossy(&stream.bytes()).into_owned())
            };
            fail!(
                "no end after {:?}; stdout so far {:?}, stderr {:?}",
                self.limit,
                told(&self.stdout).unwrap_or_default(),
                told(&self.stderr).unwrap_or_default()
            );
        };
        let elapsed = self.started.elapsed();
        self.ended = true;
        let take = |stream: Option<Collector>, name: &str| -> Result<Vec<u8>> {
            let Some(stream) = stream else { return Ok(Vec::new()) };
            ensure!(
                stream.wait(END_OF_STREAMS, |_, ended| ended),
                "something holds {name} open after the runtime's end"
            );
            Ok(stream.bytes())
        };
        let stdout = take(self.stdout.take(), "stdout")?;
        let stderr = take(self.stderr.take(), "stderr")?;
        Ok(Output { kind: self.kind, status, stdout, stderr, elapsed })
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        if !self.ended {
            processes::kill_tree(self.pid());
            let _ = self.child.wait();
        }
    }
}

/// The bytes so far, and whether they have ended.
type Collected = (Vec<u8>, bool);

/// Reads a stream to its end in a thread.
#[derive(Debug, Clone)]
pub(crate) struct Collector {
    shared: Arc<(Mutex<Collected>, Condvar)>,
}

impl Collector {
    pub(crate) fn start(mut stream: impl Read + Send + 'static) -> Self {
        let shared = Arc::new((Mutex::new((Vec::new(), false)), Condvar::new()));
        let collector = Self { shared: Arc::clone(&shared) };
        thread::spawn(move || {
            let (state, changed) = &*shared;
            let mut buffer = vec![0; 1 << 16];
            loop {
                let count = stream.read(&mut buffer).unwrap_or(0);
                let mut state = state.lock().unwrap_or_else(PoisonError::into_inner);
                state.0.extend_from_slice(&buffer[..count]);
                state.1 = count == 0;
                changed.notify_all();
                if count == 0 {
                    return;
                }
            }
        });
        collector
    }

    /// What has come so far.
    pub(crate) fn bytes(&self) -> Vec<u8> {
        self.shared.0.lock().unwrap_or_else(PoisonError::into_inner).0.clone()
    }

    /// Waits until `is_enough` of the bytes, and of whether they have ended, or until the end; whether it was enough.
    pub(crate) fn wait(&self, limit: Duration, is_enough: impl Fn(&[u8], bool) -> bool) -> bool {
        let (state, changed) = &*self.shared;
        let end = Instant::now() + limit;
        let mut state = state.lock().unwrap_or_else(PoisonError::into_inner);
        loop {
            if is_enough(&state.0, state.1) {
                return true;
            }
            let left = end.saturating_duration_since(Instant::now());
            if left.is_zero() || state.1 {
                return false;
            }
            state = changed.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0;
        }
    }
}

fn contains(bytes: &[u8], part: &[u8]) -> bool {
    bytes.windows(part.len().max(1)).any(|window| window == part)
}
