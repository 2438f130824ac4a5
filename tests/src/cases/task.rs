// SPDX-License-Identifier: Apache-2.0
//! The Task API of a shim, by calls that are made here: its named pipes, and calls that others may not hold up.

use std::fs::{self, File};
use std::io::{ErrorKind, Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use containerd_shim_protos::TaskClient;
use containerd_shim_protos::api::{
    CreateTaskRequest, DeleteRequest, DeleteResponse, ExecProcessRequest, KillRequest, PidsRequest, ShutdownRequest,
    StartRequest, StateRequest, Status, WaitRequest, WaitResponse,
};
use containerd_shim_protos::ttrpc::context::{Context, with_duration};
use nix::sys::stat::Mode;
use nix::unistd::mkfifo;
use protobuf::MessageField;
use protobuf::well_known_types::any::Any;
use serde_json::{Value, json};

use super::shim::Shim;
use super::{Case, case};
use crate::bundle::Bundle;
use crate::env::Env;
use crate::failure::{Result, ensure, ensure_eq, fail};

pub(super) const CASES: &[Case] = &[
    case!(readers_that_have_gone),
    case!(slow_readers),
    case!(output_is_given_up),
    case!(signals_to_all),
    case!(a_create_that_hangs),
    case!(a_create_that_is_given_up),
];

pub(super) const KILL: u32 = 9;
const USR1: u32 = 10;
const TERM: u32 = 15;

/// Writes until it is ended, by SIGTERM.
const WRITER: &str = "trap 'exit 4' TERM; yes & wait";

/// More than there is room for on the way.
pub(super) const MUCH: usize = 2_000_000;

/// How long a call may take.
pub(super) fn limit() -> Context {
    with_duration(Duration::from_secs(120))
}

/// A shim that is called.
pub(super) struct Tasks<'a> {
    env: &'a Env,
    pub(super) shim: Shim<'a>,
    pub(super) calls: TaskClient,
}

impl<'a> Tasks<'a> {
    pub(super) fn new(env: &'a Env) -> Result<Self> {
        Self::of(env, Shim::new(env)?)
    }

    fn of(env: &'a Env, shim: Shim<'a>) -> Result<Self> {
        let calls = shim.tasks()?;
        Ok(Self { env, shim, calls })
    }

    /// The same with a pod's sandbox that runs.
    pub(super) fn with_pod(env: &'a Env) -> Result<Self> {
        Self::with_pod_of(env, Shim::new(env)?)
    }

    /// The same of a shim that has not been started.
    pub(super) fn with_pod_of(env: &'a Env, shim: Shim<'a>) -> Result<Self> {
        let tasks = Self::of(env, shim)?;
        let mut bundle = Bundle::busybox(env)?;
        bundle.annotation("io.kubernetes.cri.container-type", "sandbox");
        tasks.create(&tasks.shim.id, &bundle, "")?;
        tasks.start(&tasks.shim.id, "")?;
        Ok(tasks)
    }

    /// A bundle of a container of the pod that runs a script.
    pub(super) fn member(&self, script: &str) -> Result<Bundle> {
        let mut bundle = Bundle::busybox(self.env)?;
        let cri =
            json!({ "io.kubernetes.cri.container-type": "container", "io.kubernetes.cri.sandbox-id": self.shim.id });
        let own = json!([{"type": "pid"}, {"type": "mount"}]);
        bundle.sh(script).set("/annotations", cri).set("/linux/namespaces", own).set("/hostname", json!(""));
        Ok(bundle)
    }

    /// Runs a container of the pod.
    pub(super) fn run_member(&self, script: &str, stdout: &str) -> Result<String> {
        let id = self.env.id();
        self.create(&id, &self.member(script)?, stdout)?;
        self.start(&id, "")?;
        Ok(id)
    }

    pub(super) fn create(&self, id: &str, bundle: &Bundle, stdout: &str) -> Result {
        bundle.write()?;
        self.calls.create(limit(), &creation(id, bundle, stdout))?;
        Ok(())
    }

    pub(super) fn start(&self, id: &str, exec_id: &str) -> Result {
        let (id, exec_id) = (id.to_owned(), exec_id.to_owned());
        self.calls.start(limit(), &StartRequest { id, exec_id, ..StartRequest::default() })?;
        Ok(())
    }

    /// Starts a further process.
    fn exec(&self, id: &str, script: &str, stdout: &Path) -> Result<String> {
        let process: Value =
            json!({ "args": ["sh", "-c", script], "cwd": "/", "env": ["PATH=/bin"], "user": { "uid": 0, "gid": 0 } });
        let spec = Any { value: serde_json::to_vec(&process)?, ..Any::default() };
        let exec_id = self.env.id();
        let request = ExecProcessRequest {
            id: id.to_owned(),
            exec_id: exec_id.clone(),
            stdout: stdout.display().to_string(),
            spec: MessageField::some(spec),
            ..ExecProcessRequest::default()
        };
        self.calls.exec(limit(), &request)?;
        self.start(id, &exec_id)?;
        Ok(exec_id)
    }

    pub(super) fn kill(&self, id: &str, exec_id: &str, signal: u32, all: bool) -> Result {
        let (id, exec_id) = (id.to_owned(), exec_id.to_owned());
        self.calls.kill(limit(), &KillRequest { id, exec_id, signal, all, ..KillRequest::default() })?;
        Ok(())
    }

    pub(super) fn wait(&self, id: &str, exec_id: &str) -> Result<WaitResponse> {
        let (id, exec_id) = (id.to_owned(), exec_id.to_owned());
        Ok(self.calls.wait(limit(), &WaitRequest { id, exec_id, ..WaitRequest::default() })?)
    }

    pub(super) fn status(&self, id: &str) -> Result<Status> {
        let request = StateRequest { id: id.to_owned(), ..StateRequest::default() };
        Ok(self.calls.state(limit(), &request)?.status.enum_value_or_default())
    }

    /// How many processes the container has in its guest.
    fn processes(&self, id: &str) -> Result<usize> {
        let shim = self.shim.pid()?.unsigned_abs();
        let listed = self.calls.pids(limit(), &PidsRequest { id: id.to_owned(), ..PidsRequest::default() })?;
        // Of a container without any, the shim is named.
        Ok(listed.processes.iter().filter(|process| process.pid != shim).count())
    }

    pub(super) fn delete(&self, id: &str) -> Result<DeleteResponse> {
        Ok(self.calls.delete(limit(), &DeleteRequest { id: id.to_owned(), ..DeleteRequest::default() })?)
    }

    /// Ends a container and the shim, after which nothing is left.
    pub(super) fn shut_down(self, last: &str) -> Result {
        if self.status(last)? != Status::STOPPED {
            self.kill(last, "", KILL, false)?;
        }
        self.wait(last, "")?;
        self.delete(last)?;
        let pid = self.shim.pid()?;
        self.calls.shutdown(limit(), &ShutdownRequest { id: last.to_owned(), ..ShutdownRequest::default() })?;
        Shim::ends(pid)?;
        let left: Vec<_> = fs::read_dir(self.shim.root().join("e2e")).into_iter().flatten().flatten().collect();
        ensure!(left.is_empty(), "state that is left: {left:?}");
        Ok(())
    }
}

pub(super) fn creation(id: &str, bundle: &Bundle, stdout: &str) -> CreateTaskRequest {
    CreateTaskRequest {
        id: id.to_owned(),
        bundle: bundle.folder.display().to_string(),
        stdout: stdout.to_owned(),
        ..CreateTaskRequest::default()
    }
}

/// A named pipe of that name, which nobody reads.
pub(super) fn named_pipe(env: &Env, name: &str) -> Result<PathBuf> {
    let path = env.work.join(name);
    mkfifo(&path, Mode::S_IRWXU)?;
    Ok(path)
}

/// A reader that is there, and reads when it is asked to.
pub(super) struct Reader {
    pipe: File,
    bytes: usize,
}

impl Reader {
    pub(super) fn open(path: &Path) -> Result<Self> {
        let pipe = File::options().read(true).custom_flags(libc::O_NONBLOCK).open(path)?;
        Ok(Self { pipe, bytes: 0 })
    }

    /// Reads some, if there is something; whether that was not the end.
    fn read_some(&mut self) -> Result<bool> {
        match self.pipe.read(&mut [0; 16 << 10]) {
            Ok(0) => return Ok(false),
            Ok(length) => self.bytes += length,
            Err(error) if error.kind() == ErrorKind::WouldBlock => thread::sleep(Duration::from_millis(10)),
            Err(error) => return Err(error.into()),
        }
        Ok(true)
    }

    /// Reads as much as is needed for something to happen.
    pub(super) fn read_until(&mut self, mut happened: impl FnMut() -> Result<bool>) -> Result {
        while !happened()? {
            self.read_some()?;
            ensure!(self.bytes < MUCH, "it has not happened, though all was read");
        }
        Ok(())
    }

    /// Reads so many bytes, if there are as many, or a few more.
    pub(super) fn read_more(&mut self, bytes: usize) -> Result {
        let (enough, end) = (self.bytes + bytes, Instant::now() + Duration::from_secs(60));
        while self.bytes < enough && self.read_some()? {
            ensure!(Instant::now() < end, "no more than {} bytes come", self.bytes);
        }
        Ok(())
    }

    fn read_to_end(&mut self) -> Result {
        let end = Instant::now() + Duration::from_secs(60);
        while self.read_some()? {
            ensure!(Instant::now() < end, "the output does not end, after {} bytes", self.bytes);
        }
        Ok(())
    }
}

/// Waits until a pipe that nobody reads is full, and what is before it.
fn fill(path: &Path) -> Result {
    let reader = Reader::open(path)?;
    let end = Instant::now() + Duration::from_secs(60);
    let mut before = 0;
    loop {
        thread::sleep(Duration::from_secs(2));
        let now = rustix::io::ioctl_fionread(&reader.pipe)?;
        if now > 0 && now == before {
            return Ok(());
        }
        ensure!(Instant::now() < end, "the pipe does not become full, but holds {now} bytes");
        before = now;
    }
}

fn readers_that_have_gone(env: &Env) -> Result {
    let tasks = Tasks::new(env)?;
    let id = tasks.shim.id.clone();
    let (own, others) = (named_pipe(env, "own")?, named_pipe(env, "others")?);
    let mut bundle = Bundle::busybox(env)?;
    tasks.create(&id, bundle.sh(WRITER), &own.display().to_string())?;
    tasks.start(&id, "")?;
    let exec_id = tasks.exec(&id, WRITER, &others)?;
    fill(&own)?;
    fill(&others)?;

    tasks.kill(&id, &exec_id, TERM, false)?;
    ensure_eq!(tasks.wait(&id, &exec_id)?.exit_status, 4, "the exit status of the further process");
    ensure_eq!(tasks.status(&id)?, Status::RUNNING, "the container then");
    tasks.kill(&id, "", TERM, false)?;
    ensure_eq!(tasks.wait(&id, "")?.exit_status, 4, "the exit status");
    ensure_eq!(tasks.status(&id)?, Status::STOPPED, "the container in the end");
    tasks.shut_down(&id)
}

fn slow_readers(env: &Env) -> Result {
    let tasks = Tasks::with_pod(env)?;
    let script = format!("head -c {MUCH} /dev/zero; exit 4");

    // A container's own output.
    let path = named_pipe(env, "own")?;
    let mut reader = Reader::open(&path)?;
    let id = tasks.run_member(&script, &format!("fifo://{}", path.display()))?;
    reader.read_until(|| Ok(tasks.processes(&id)? == 0))?;
    // Longer than anything in the shim takes that is timed, but for what is told in the documents.
    thread::sleep(Duration::from_secs(8));
    ensure_eq!(tasks.status(&id)?, Status::RUNNING, "the container while there is output to be read");
    let before = SystemTime::now().duration_since(UNIX_EPOCH)?;
    reader.read_to_end()?;
    ensure_eq!(reader.bytes, MUCH, "bytes of the container's output");
    let ended = tasks.wait(&id, "")?;
    ensure_eq!(ended.exit_status, 4, "the exit status");
    let at = Duration::new(ended.exited_at.seconds.unsigned_abs(), ended.exited_at.nanos.unsigned_abs());
    ensure!(at < before, "it ended at {at:?}, and its output was read from {before:?} on");
    tasks.delete(&id)?;

    // That of a further process, when its container ends.
    let path = named_pipe(env, "others")?;
    let mut reader = Reader::open(&path)?;
    let id = tasks.run_member("sleep 1000", "")?;
    let exec_id = tasks.exec(&id, &script, &path)?;
    reader.read_until(|| Ok(tasks.processes(&id)? == 1))?;
    tasks.kill(&id, "", KILL, false)?;
    thread::sleep(Duration::from_secs(8));
    reader.read_to_end()?;
    ensure_eq!(reader.bytes, MUCH, "bytes of the further process' output");
    ensure_eq!(tasks.wait(&id, &exec_id)?.exit_status, 4, "the further process' exit status");
    ensure_eq!(tasks.wait(&id, "")?.exit_status, 137, "the exit status of what was killed");
    tasks.delete(&id)?;
    let sandbox = tasks.shim.id.clone();
    tasks.shut_down(&sandbox)
}

fn output_is_given_up(env: &Env) -> Result {
    let tasks = Tasks::with_pod(env)?;
    let path = named_pipe(env, "own")?;
    let mut reader = Reader::open(&path)?;
    let id = tasks.run_member(&format!("head -c {MUCH} /dev/zero; exit 4"), &path.display().to_string())?;
    reader.read_until(|| Ok(tasks.processes(&id)? == 0))?;

    // The guest may know of the end a moment before the shim.
    let end = Instant::now() + Duration::from_secs(20);
    while tasks.status(&id)? != Status::STOPPED {
        ensure!(Instant::now() < end, "SIGKILL does not give up what nobody reads");
        let _ = tasks.kill(&id, "", KILL, false);
        thread::sleep(Duration::from_millis(200));
    }

    ensure_eq!(tasks.wait(&id, "")?.exit_status, 4, "the exit status");
    tasks.delete(&id)?;
    let sandbox = tasks.shim.id.clone();
    tasks.shut_down(&sandbox)
}

/// Waits until a file has a line.
pub(super) fn wait_for_line(file: &Path, line: &str) -> Result {
    let end = Instant::now() + Duration::from_secs(60);
    loop {
        let text = fs::read_to_string(file).unwrap_or_default();
        if text.lines().any(|found| found == line) {
            return Ok(());
        }
        ensure!(Instant::now() < end, "{line:?} is not in {text:?}");
        thread::sleep(Duration::from_millis(50));
    }
}

fn signals_to_all(env: &Env) -> Result {
    let tasks = Tasks::new(env)?;
    let id = tasks.shim.id.clone();
    let output = env.work.join("the output");
    let child = "trap 'echo child; exit' USR1; echo ready; while :; do sleep 0.1; done";
    let script = format!("trap 'echo init' USR1; sh -c \"{child}\" & while :; do sleep 0.1; done");
    let mut bundle = Bundle::busybox(env)?;
    let location = format!("file://{}", output.display().to_string().replace(' ', "%20"));
    tasks.create(&id, bundle.sh(&script), &location)?;
    tasks.start(&id, "")?;
    wait_for_line(&output, "ready")?;

    tasks.kill(&id, "", USR1, false)?;
    wait_for_line(&output, "init")?;
    ensure!(!fs::read_to_string(&output)?.contains("child"), "a signal to init has reached its child");
    tasks.kill(&id, "", USR1, true)?;
    wait_for_line(&output, "child")?;
    tasks.shut_down(&id)
}

/// A file system that answers nobody; dropped, all who wait for it are told that it is gone.
pub(super) struct Hanging {
    device: File,
}

impl Hanging {
    pub(super) fn mount(env: &Env, place: &Path) -> Result<Self> {
        let device = File::options().read(true).write(true).open("/dev/fuse")?;
        let options = format!("fd={},rootmode=40000,user_id=0,group_id=0", device.as_raw_fd());
        env.mount("fuse", "hanging", place, &options)?;
        let mut hanging = Self { device };
        // FUSE_INIT, and its answer: version 7.31, and no features.
        let unique = hanging.request()?;
        let mut answer = [0_u8; 80];
        for (place, word) in [(0, 80_u32), (16, 7), (20, 31), (36, 4096)] {
            answer[place..place + 4].copy_from_slice(&word.to_le_bytes());
        }
        answer[8..16].copy_from_slice(&unique);
        hanging.device.write_all(&answer)?;
        Ok(hanging)
    }

    /// Waits until somebody asks it something; the number of that request.
    pub(super) fn request(&mut self) -> Result<[u8; 8]> {
        let mut request = vec![0; 1 << 17];
        let length = self.device.read(&mut request)?;
        ensure!(length >= 40, "a request of {length} bytes");
        let mut unique = [0; 8];
        unique.copy_from_slice(&request[8..16]);
        Ok(unique)
    }
}

fn a_create_that_hangs(env: &Env) -> Result {
    let tasks = Tasks::with_pod(env)?;
    let other = tasks.run_member("sleep 1000", "")?;
    let place = env.folder("hanging")?;
    let mut hanging = Hanging::mount(env, &place)?;
    let mut bundle = tasks.member("true")?;
    bundle.bind(&place.join("volume"), "/mnt", &[]).write()?;
    let (id, calls) = (env.id(), tasks.shim.tasks()?);
    let request = creation(&id, &bundle, "");
    let creating = thread::spawn(move || calls.create(limit(), &request).err().map(|error| error.to_string()));
    hanging.request()?;

    ensure_eq!(tasks.status(&other)?, Status::RUNNING, "the state of another container");
    tasks.kill(&other, "", KILL, false)?;
    ensure_eq!(tasks.wait(&other, "")?.exit_status, 137, "its exit status");
    tasks.delete(&other)?;
    ensure!(!creating.is_finished(), "nothing has hung");

    drop(hanging);
    let Ok(Some(why)) = creating.join() else { fail!("the container is made") };
    ensure!(why.contains(&place.display().to_string()), "it cannot be made, as {why:?}");
    let sandbox = tasks.shim.id.clone();
    tasks.shut_down(&sandbox)
}

fn a_create_that_is_given_up(env: &Env) -> Result {
    let tasks = Tasks::with_pod(env)?;
    let gate = named_pipe(env, "gate")?;
    let mut bundle = tasks.member("sleep 1000")?;
    let script = format!("cat {}", gate.display());
    bundle.set("/hooks/createRuntime", json!([{ "path": "/bin/sh", "args": ["sh", "-c", script] }])).write()?;
    let id = env.id();

    let given_up = tasks.calls.create(with_duration(Duration::from_secs(2)), &creation(&id, &bundle, ""));
    ensure!(given_up.is_err(), "the create was not held up");
    let (asked, is_asked) = mpsc::channel();
    let (calls, request) = (tasks.shim.tasks()?, DeleteRequest { id: id.clone(), ..DeleteRequest::default() });
    let deleting = thread::spawn(move || {
        let _ = asked.send(());
        calls.delete(limit(), &request).map_err(|error| error.to_string())
    });
    is_asked.recv()?;
    thread::sleep(Duration::from_secs(1));
    ensure!(!deleting.is_finished(), "the delete has not waited: {:?}", deleting.join());
    drop(File::options().write(true).open(&gate)?);

    let Ok(deleted) = deleting.join() else { fail!("the call has panicked") };
    ensure!(deleted.as_ref().is_ok_and(|deleted| deleted.exit_status == 137), "what was deleted: {deleted:?}");
    let left = tasks.status(&id).map(|status| format!("{status:?}")).unwrap_or_else(|error| format!("{error:?}"));
    ensure!(left.contains("does not exist"), "what is left of it: {left}");
    let sandbox = tasks.shim.id.clone();
    tasks.shut_down(&sandbox)
}
