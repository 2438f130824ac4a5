// SPDX-License-Identifier: Apache-2.0
//! dockerd and a containerd of its own, their state in the case's folder.

use std::ffi::OsString;
use std::fs::File;
use std::path::PathBuf;
use std::process::{Child, Command};
use std::thread;
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use serde_json::json;

use super::{
    Containerd, IMAGE, PAUSE, debian_program, image_archive, major_version, search_path, state_folder,
    wait_for_listener,
};
use crate::env::Env;
use crate::failure::{Context as _, Result, ensure, fail, skip};
use crate::output::Output;
use crate::run::Run;

/// How long the daemon may take to answer, to take the image, and to end.
const LIMIT: Duration = Duration::from_secs(240);

/// Words for a daemon that leaves the host's network alone.
const WITHOUT_NETWORK: [&str; 5] = ["--bridge", "none", "--iptables=false", "--ip6tables=false", "--ip-masq=false"];

/// Bulkhead's shim, which docker takes in the place of a runtime's name, and what it is called in the daemon's configuration.
pub(crate) const SHIM: &str = "io.containerd.bulkhead.v2";
pub(crate) const BY_NAME: &str = "by-name";

/// The first version that takes runtimes by their shims' names.
const FIRST_WITH_SHIMS: u32 = 23;

/// A daemon to give commands to; it ends when dropped.
#[derive(Debug)]
pub(crate) struct Docker<'a> {
    env: &'a Env,
    daemon: Child,
    client: PathBuf,
    state: PathBuf,
    /// What it uses, until that is ended: one that it starts itself has to answer within a time that is short for an emulated host.
    containerd: Option<Containerd<'a>>,
}

impl<'a> Docker<'a> {
    /// A daemon that has the image, the runtime under the name `tested`, and no network.
    pub(crate) fn new(env: &'a Env) -> Result<Self> {
        Self::with(env, &WITHOUT_NETWORK)
    }

    /// The same with its own default network: a bridge, and rules of iptables.
    pub(crate) fn with_bridge(env: &'a Env) -> Result<Self> {
        debian_program("/usr/sbin/iptables", "iptables")?;
        env.own_network()?;
        Self::with(env, &[])
    }

    /// The same as [`Self::new`], or a skipped case where the daemon takes no shims' names for runtimes.
    pub(crate) fn with_shims(env: &'a Env) -> Result<Self> {
        let version = major_version(&debian_program("/usr/sbin/dockerd", "docker.io")?)?;
        if version < FIRST_WITH_SHIMS {
            skip!(
                "this docker takes no shim for a runtime: that needs version {FIRST_WITH_SHIMS}, and this is {version} \
                 (tests/README.md tells how to try another)"
            );
        }
        Self::new(env)
    }

    fn with(env: &'a Env, words: &[&str]) -> Result<Self> {
        let program = debian_program("/usr/sbin/dockerd", "docker.io")?;
        let client = debian_program("/usr/bin/docker", "docker.io")?;
        debian_program("/usr/bin/containerd", "containerd")?;
        let state = state_folder(env, "docker")?;
        let config = state.join("daemon.json");
        // The same by the name of its shim, which older ones refuse.
        let by_name = json!({ "runtimes": { BY_NAME: { "runtimeType": SHIM } } });
        let settings = if major_version(&program)? < FIRST_WITH_SHIMS { json!({}) } else { by_name };
        std::fs::write(&config, settings.to_string())?;
        let folder = state.join("containerd");
        std::fs::create_dir(&folder)?;
        let mut containerd = Containerd::without_cri(env, folder, "native")?;
        containerd.start()?;
        let log = File::create(env.work.join("dockerd.log"))?;
        let mut daemon = Command::new(program);
        daemon.arg("--config-file").arg(config).env("PATH", search_path(env)?);
        daemon.arg("--containerd").arg(containerd.socket());
        daemon.arg("--data-root").arg(state.join("data")).arg("--exec-root").arg(state.join("exec"));
        daemon.arg("--pidfile").arg(state.join("pid")).arg("--host").arg(format!("unix://{}/d.sock", state.display()));
        daemon.arg("--add-runtime").arg(format!("tested={}", env.runtime.display()));
        daemon.args(["--storage-driver", "vfs"]).args(words);
        daemon.env("BULKHEAD_BOOT_TIMEOUT_MS", "90000").stdout(log.try_clone()?).stderr(log);
        let daemon = daemon.spawn().context(|| "starting dockerd".to_owned())?;
        let docker = Self { env, daemon, client, state, containerd: Some(containerd) };
        let end = Instant::now() + LIMIT;
        wait_for_listener(&docker.state.join("d.sock"), end);
        while docker.call(["version"]).output()?.status.code() != Some(0) {
            ensure!(Instant::now() < end, "dockerd does not answer: {}", docker.log());
            thread::sleep(PAUSE);
        }
        docker.call(["import", "-", IMAGE]).input(image_archive(env)?).limit(LIMIT).output()?.expect_code(0)?;
        Ok(docker)
    }

    /// What the daemon has logged.
    pub(crate) fn log(&self) -> String {
        std::fs::read_to_string(self.env.work.join("dockerd.log")).unwrap_or_default()
    }

    /// A command of the client's, its stdin empty.
    pub(crate) fn call<A: Into<OsString>>(&self, arguments: impl IntoIterator<Item = A>) -> Run<'_> {
        let host = format!("unix://{}/d.sock", self.state.display());
        self.env.tool(&self.client, arguments).variable("DOCKER_HOST", host)
    }

    /// Gives a command, which has to succeed.
    pub(crate) fn succeed<const N: usize>(&self, arguments: [&str; N]) -> Result<Output> {
        let output = self.call(arguments).output()?;
        output.expect_code(0)?;
        Ok(output)
    }

    /// `run` of the image by the tested runtime, without a network.
    pub(crate) fn run(&self, options: &[&str], command: &[&str]) -> Run<'_> {
        self.run_by("tested", options, command)
    }

    /// The same by a runtime of another name.
    pub(crate) fn run_by(&self, runtime: &str, options: &[&str], command: &[&str]) -> Run<'_> {
        let fixed = ["run", "--runtime", runtime, "--network", "none"];
        self.call(fixed.iter().chain(options).chain([&IMAGE]).chain(command))
    }

    /// `run` of the image by the tested runtime, on the daemon's bridge.
    pub(crate) fn run_on_bridge(&self, options: &[&str], command: &[&str]) -> Run<'_> {
        let fixed = ["run", "--runtime", "tested"];
        self.call(fixed.iter().chain(options).chain([&IMAGE]).chain(command))
    }

    /// Ends the daemon, which has to end by itself.
    pub(crate) fn end(mut self) -> Result {
        kill(Pid::from_raw(self.daemon.id().cast_signed()), Signal::SIGTERM)?;
        let end = Instant::now() + LIMIT;
        while self.daemon.try_wait()?.is_none() {
            if Instant::now() >= end {
                fail!("dockerd does not end: {}", self.log());
            }
            thread::sleep(Duration::from_millis(50));
        }
        self.containerd.take().map_or(Ok(()), Containerd::end)
    }
}

impl Drop for Docker<'_> {
    fn drop(&mut self) {
        if let Ok(None) = self.daemon.try_wait() {
            crate::processes::kill_tree(self.daemon.id().cast_signed());
            let _ = self.daemon.wait();
        }
    }
}
