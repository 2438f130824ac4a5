// SPDX-License-Identifier: Apache-2.0
//! dockerd with its own containerd, their state in the case's folder.

use std::ffi::OsString;
use std::fs::File;
use std::path::PathBuf;
use std::process::{Child, Command};
use std::thread;
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::{IMAGE, debian_program, image_archive, state_folder};
use crate::env::Env;
use crate::failure::{Context as _, Result, ensure, fail};
use crate::output::Output;
use crate::run::Run;

/// How long the daemon may take to answer, and to end.
const LIMIT: Duration = Duration::from_secs(60);

/// A daemon to give commands to; it ends when dropped.
#[derive(Debug)]
pub(crate) struct Docker<'a> {
    env: &'a Env,
    daemon: Child,
    client: PathBuf,
    state: PathBuf,
}

impl<'a> Docker<'a> {
    /// A daemon that has the image, and the runtime under the name `tested`.
    pub(crate) fn new(env: &'a Env) -> Result<Self> {
        let program = debian_program("/usr/sbin/dockerd", "docker.io")?;
        let client = debian_program("/usr/bin/docker", "docker.io")?;
        debian_program("/usr/bin/containerd", "containerd")?;
        let state = state_folder(env, "docker")?;
        let log = File::create(env.work.join("dockerd.log"))?;
        let mut daemon = Command::new(program);
        daemon.arg("--data-root").arg(state.join("data")).arg("--exec-root").arg(state.join("exec"));
        daemon.arg("--pidfile").arg(state.join("pid")).arg("--host").arg(format!("unix://{}/d.sock", state.display()));
        daemon.arg("--add-runtime").arg(format!("tested={}", env.runtime.display()));
        daemon.args(["--storage-driver", "vfs", "--bridge", "none"]);
        daemon.args(["--iptables=false", "--ip6tables=false", "--ip-masq=false"]);
        daemon.env("BULKHEAD_BOOT_TIMEOUT_MS", "90000").stdout(log.try_clone()?).stderr(log);
        let daemon = daemon.spawn().context(|| "starting dockerd".to_owned())?;
        let docker = Self { env, daemon, client, state };
        let end = Instant::now() + LIMIT;
        while docker.call(["version"]).output()?.status.code() != Some(0) {
            ensure!(Instant::now() < end, "dockerd does not answer: {}", docker.log());
            thread::sleep(Duration::from_millis(200));
        }
        docker.call(["import", "-", IMAGE]).input(image_archive(env)?).output()?.expect_code(0)?;
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
        let fixed = ["run", "--runtime", "tested", "--network", "none"];
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
        Ok(())
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
