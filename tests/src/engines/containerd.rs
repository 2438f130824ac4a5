// SPDX-License-Identifier: Apache-2.0
//! containerd with a configuration and a state of its own, and its client `ctr`.

use std::ffi::OsString;
use std::fs::{self, File};
use std::path::PathBuf;
use std::process::{Child, Command};
use std::thread;
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::{PAUSE, debian_program, docker_archive, major_version, search_path, state_folder, wait_for_listener};
use crate::env::{Env, Kind};
use crate::failure::{Context as _, Result, ensure, fail};
use crate::output::Output;
use crate::processes::{self, Looks};
use crate::run::{Run, Running};

/// How long the daemon may take to answer, and to end, and what is waited for to happen.
const LIMIT: Duration = Duration::from_secs(180);

/// The image, by the name that containerd gives it.
pub(super) const IMAGE: &str = "docker.io/library/bulkhead-e2e:latest";

/// `ctr`'s namespace of its own, where CRI is not needed.
const DEFAULT: &str = "default";

/// Where sockets of shims are.
const SOCKETS: &str = "/run/containerd/s";

/// A daemon to give commands to; it ends when dropped, with all shims.
#[derive(Debug)]
pub(crate) struct Containerd<'a> {
    env: &'a Env,
    daemon: Option<Child>,
    program: PathBuf,
    client: PathBuf,
    /// Of containerd.
    major_version: u32,
    state: PathBuf,
    snapshotter: &'static str,
    namespace: &'static str,
    /// Sockets that failed cases have left.
    old_sockets: Vec<PathBuf>,
}

impl<'a> Containerd<'a> {
    /// A daemon that has the image, unpacked by a snapshotter.
    pub(crate) fn new(env: &'a Env, snapshotter: &'static str) -> Result<Self> {
        let mut containerd = Self::without_cri(env, state_folder(env, "containerd")?, snapshotter)?;
        containerd.begin()?;
        Ok(containerd)
    }

    /// A daemon that has a configuration and has not been started.
    pub(super) fn without_cri(env: &'a Env, state: PathBuf, snapshotter: &'static str) -> Result<Self> {
        let containerd = Self::in_folder(env, state, snapshotter, DEFAULT)?;
        let plugins = match containerd.config_version() {
            2 => "\"io.containerd.grpc.v1.cri\"",
            _ => "\"io.containerd.grpc.v1.cri\", \"io.containerd.cri.v1.images\", \"io.containerd.cri.v1.runtime\"",
        };
        containerd.configure(&format!("disabled_plugins = [{plugins}]\n"), "")?;
        Ok(containerd)
    }

    /// A daemon whose state is to be there; it has neither a configuration nor been started.
    pub(super) fn in_folder(
        env: &'a Env,
        state: PathBuf,
        snapshotter: &'static str,
        namespace: &'static str,
    ) -> Result<Self> {
        let program = debian_program("/usr/bin/containerd", "containerd")?;
        let client = debian_program("/usr/bin/ctr", "containerd")?;
        let major_version = major_version(&program)?;
        let old_sockets = sockets();
        Ok(Self { env, daemon: None, program, client, major_version, state, snapshotter, namespace, old_sockets })
    }

    /// The newest version of a configuration that it understands.
    pub(super) fn config_version(&self) -> u32 {
        if self.major_version < 2 { 2 } else { 3 }
    }

    /// Writes its configuration, to which settings are added before and after the first table.
    pub(super) fn configure(&self, first: &str, last: &str) -> Result {
        let (version, state) = (self.config_version(), self.state.display());
        let places = format!("version = {version}\nroot = \"{state}/root\"\nstate = \"{state}/state\"\n");
        let text = format!("{places}{first}[grpc]\naddress = \"{state}/c.sock\"\n{last}");
        Ok(fs::write(self.config(), text)?)
    }

    /// Where its configuration is.
    pub(crate) fn config(&self) -> PathBuf {
        self.state.join("config.toml")
    }

    /// Starts the daemon for the first time, and gives it the image.
    pub(super) fn begin(&mut self) -> Result {
        self.start()?;
        self.import()
    }

    /// Starts the daemon.
    pub(crate) fn start(&mut self) -> Result {
        let log = File::options().append(true).create(true).open(self.env.work.join("containerd.log"))?;
        let mut daemon = Command::new(&self.program);
        daemon.arg("--config").arg(self.config());
        daemon.env("BULKHEAD_BOOT_TIMEOUT_MS", "90000").env("BULKHEAD_ROOT", self.shim_root());
        daemon.env("PATH", search_path(self.env)?).stdout(log.try_clone()?).stderr(log);
        self.daemon = Some(daemon.spawn().context(|| "starting containerd".to_owned())?);
        let end = Instant::now() + LIMIT;
        wait_for_listener(&self.socket(), end);
        while self.call(["version"]).output()?.status.code() != Some(0) {
            ensure!(Instant::now() < end, "containerd does not answer: {}", self.log());
            thread::sleep(PAUSE);
        }
        Ok(())
    }

    /// Ends the daemon, which has to end by itself; shims go on.
    pub(crate) fn stop(&mut self) -> Result {
        let Some(mut daemon) = self.daemon.take() else {
            return Ok(());
        };
        kill(Pid::from_raw(daemon.id().cast_signed()), Signal::SIGTERM)?;
        let end = Instant::now() + LIMIT;
        while daemon.try_wait()?.is_none() {
            if Instant::now() >= end {
                fail!("containerd does not end: {}", self.log());
            }
            thread::sleep(Duration::from_millis(50));
        }
        Ok(())
    }

    /// Kills the daemon; shims go on.
    pub(crate) fn kill(&mut self) -> Result {
        if let Some(mut daemon) = self.daemon.take() {
            daemon.kill()?;
            daemon.wait()?;
        }
        Ok(())
    }

    /// What the daemon has logged.
    pub(crate) fn log(&self) -> String {
        fs::read_to_string(self.env.work.join("containerd.log")).unwrap_or_default()
    }

    /// Where Bulkhead's shims keep their state.
    pub(crate) fn shim_root(&self) -> PathBuf {
        self.state.join("bulkhead")
    }

    fn import(&self) -> Result {
        let archive = self.state.join("image.tar");
        docker_archive(self.env, IMAGE, &archive)?;
        let path = archive.display().to_string();
        // From 2.0 on the daemon itself imports, into snapshotters that its configuration lists for that.
        let local: &[&str] = if self.major_version < 2 { &[] } else { &["--local"] };
        let words = [&["image", "import", "--snapshotter", self.snapshotter], local, &[path.as_str()]].concat();
        self.call(words).output()?.expect_code(0)?;
        Ok(fs::remove_file(archive)?)
    }

    /// The daemon's socket.
    pub(super) fn socket(&self) -> PathBuf {
        self.state.join("c.sock")
    }

    /// A command of the client's, its stdin empty.
    pub(crate) fn call<A: Into<OsString>>(&self, arguments: impl IntoIterator<Item = A>) -> Run<'_> {
        let fixed: [OsString; 4] =
            ["--address".into(), self.socket().into(), "--namespace".into(), self.namespace.into()];
        self.env.tool(&self.client, fixed.into_iter().chain(arguments.into_iter().map(Into::into)))
    }

    /// Gives a command, which has to succeed.
    pub(crate) fn succeed<const N: usize>(&self, arguments: [&str; N]) -> Result<Output> {
        let output = self.call(arguments).output()?;
        output.expect_code(0)?;
        Ok(output)
    }

    /// `run` of the image.
    pub(crate) fn run(&self, options: &[&str], id: &str, command: &[&str]) -> Run<'_> {
        let runtime = match self.env.kind {
            Kind::Bulkhead => "io.containerd.bulkhead.v2",
            Kind::Other => "io.containerd.runc.v2",
        };
        let fixed = ["run", "--runtime", runtime, "--snapshotter", self.snapshotter];
        self.call(fixed.iter().chain(options).chain(&[IMAGE, id]).chain(command))
    }

    /// `run` of a container that lives on, without streams.
    pub(crate) fn run_detached(&self, id: &str, command: &[&str]) -> Result {
        self.run(&["--detach", "--null-io"], id, command).output()?.expect_code(0)
    }

    /// `task exec` of a shell script.
    pub(crate) fn exec(&self, options: &[&str], id: &str, script: &str) -> Run<'_> {
        let exec_id = self.env.id();
        let fixed = ["task", "exec", "--exec-id", &exec_id];
        self.call(fixed.iter().chain(options).chain(&[id, "sh", "-c", script]))
    }

    /// The state of a task, in containerd's word, and its process id.
    pub(crate) fn task(&self, id: &str) -> Result<Option<(String, i32)>> {
        let listed = self.succeed(["task", "list"])?.stdout();
        let line = listed.lines().map(|line| line.split_whitespace().collect::<Vec<_>>());
        Ok(line
            .filter(|words| words.first() == Some(&id))
            .find_map(|words| Some(((*words.get(2)?).to_owned(), words.get(1)?.parse().ok()?))))
    }

    /// Waits until a task has that state; its process id.
    pub(crate) fn wait_for(&self, id: &str, state: &str) -> Result<i32> {
        let end = Instant::now() + LIMIT;
        let mut looks = Looks::begin();
        loop {
            let task = self.task(id)?;
            match task {
                Some((now, pid)) if now == state => return Ok(pid),
                task if Instant::now() >= end => fail!("the task is {task:?}, not {state}: {}", self.log()),
                _ => looks.pause(),
            }
        }
    }

    /// Deletes a task that has ended, and its container.
    pub(crate) fn delete(&self, id: &str) -> Result {
        self.succeed(["task", "delete", id])?;
        self.succeed(["container", "delete", id]).map(drop)
    }

    /// Prints events as they come.
    pub(crate) fn events(&self) -> Result<Running> {
        self.call(["events"]).spawn()
    }

    /// Ends the daemon, after which nothing of its containers may be left.
    pub(crate) fn end(mut self) -> Result {
        let end = Instant::now() + LIMIT;
        let mut looks = Looks::begin();
        loop {
            let below = self.daemon.as_ref().map_or(0, Child::id).cast_signed();
            let left: Vec<_> = processes::descendants(std::process::id().cast_signed())
                .into_iter()
                .filter(|process| process.pid != below && process.state != 'Z')
                .map(|process| process.command_line())
                .collect();
            if left.is_empty() {
                break;
            }
            ensure!(Instant::now() < end, "processes that are left: {left:?}");
            looks.pause();
        }
        self.stop()?;
        let states: Vec<_> =
            fs::read_dir(self.shim_root().join(self.namespace)).into_iter().flatten().flatten().collect();
        ensure!(states.is_empty(), "state that is left: {states:?}; {}", self.log());
        let sockets: Vec<_> = sockets().into_iter().filter(|path| !self.old_sockets.contains(path)).collect();
        ensure!(sockets.is_empty(), "sockets that are left: {sockets:?}");
        Ok(())
    }
}

/// The sockets of shims.
fn sockets() -> Vec<PathBuf> {
    fs::read_dir(SOCKETS).into_iter().flatten().flatten().map(|entry| entry.path()).collect()
}

impl Drop for Containerd<'_> {
    fn drop(&mut self) {
        // The shims are orphans, which this process reaps.
        for process in processes::descendants(std::process::id().cast_signed()) {
            if process.name.starts_with("containerd") {
                processes::kill_tree(process.pid);
            }
        }
        if let Some(mut daemon) = self.daemon.take() {
            let _ = daemon.wait();
        }
    }
}
