// SPDX-License-Identifier: Apache-2.0
//! podman with conmon, its state in the case's folder.

use std::ffi::OsString;
use std::fs;
use std::path::PathBuf;
use std::time::Duration;

use super::{IMAGE, debian_program, image_archive, state_folder};
use crate::env::Env;
use crate::failure::Result;
use crate::output::Output;
use crate::run::Run;

/// How long it may take the image.
const IMPORT_LIMIT: Duration = Duration::from_secs(240);

/// Where it has its network namespaces.
const NAMESPACES: &str = "/run/netns";

/// Its runroot. The podman that conmon calls gets it as an option, and refuses one of more than 50 characters there.
const RUNROOT: &str = "/mnt";

/// An engine to give commands to.
#[derive(Debug)]
pub(crate) struct Podman<'a> {
    env: &'a Env,
    program: PathBuf,
    state: PathBuf,
}

impl<'a> Podman<'a> {
    /// An engine that has the image, and nothing else.
    pub(crate) fn new(env: &'a Env) -> Result<Self> {
        let program = debian_program("/usr/bin/podman", "podman")?;
        debian_program("/usr/bin/conmon", "conmon")?;
        let state = state_folder(env, "podman")?;
        env.mount("tmpfs", "tmpfs", RUNROOT.as_ref(), "mode=700")?;
        let storage = format!(
            "[storage]\ndriver = \"vfs\"\ngraphroot = \"{}/storage\"\nrunroot = \"{RUNROOT}\"\n",
            state.display()
        );
        fs::write(state.join("storage.conf"), storage)?;
        let settings = format!(
            "[network]\nnetwork_backend = \"netavark\"\nnetwork_config_dir = \"{0}/networks\"\n[engine]\n\
             cgroup_manager = \"cgroupfs\"\nevents_logger = \"file\"\ntmp_dir = \"{0}/libpod\"\n\
             [containers]\nlog_driver = \"k8s-file\"\n",
            state.display()
        );
        fs::write(state.join("containers.conf"), settings)?;
        fs::create_dir(state.join("tmp"))?;
        let podman = Self { env, program, state };
        podman.call(["import", "-", IMAGE]).input(image_archive(env)?).limit(IMPORT_LIMIT).output()?.expect_code(0)?;
        Ok(podman)
    }

    /// The same, with what it needs for networks.
    pub(crate) fn with_networks(env: &'a Env) -> Result<Self> {
        debian_program("/usr/lib/podman/netavark", "netavark")?;
        debian_program("/usr/sbin/iptables", "iptables")?;
        env.own_network()?;
        // What is no mount it makes one, and leaves it.
        fs::create_dir_all(NAMESPACES)?;
        env.mount("tmpfs", "tmpfs", NAMESPACES.as_ref(), "mode=755")?;
        Self::new(env)
    }

    /// A command of the engine's, its stdin empty.
    pub(crate) fn call<A: Into<OsString>>(&self, arguments: impl IntoIterator<Item = A>) -> Run<'_> {
        let words: Vec<OsString> = [OsString::from("--runtime"), self.env.runtime.clone().into()]
            .into_iter()
            .chain(arguments.into_iter().map(Into::into))
            .collect();
        self.env
            .tool(&self.program, words)
            .variable("CONTAINERS_CONF", self.state.join("containers.conf"))
            .variable("CONTAINERS_STORAGE_CONF", self.state.join("storage.conf"))
            .variable("TMPDIR", self.state.join("tmp"))
    }

    /// Gives a command, which has to succeed.
    pub(crate) fn succeed<const N: usize>(&self, arguments: [&str; N]) -> Result<Output> {
        let output = self.call(arguments).output()?;
        output.expect_code(0)?;
        Ok(output)
    }

    /// `run --rm` of the image, without a network.
    pub(crate) fn run(&self, options: &[&str], command: &[&str]) -> Run<'_> {
        self.run_on("none", options, command)
    }

    /// The same on a network.
    pub(crate) fn run_on(&self, network: &str, options: &[&str], command: &[&str]) -> Run<'_> {
        let fixed = ["run", "--rm", "--network", network];
        self.call(fixed.iter().chain(options).chain([&IMAGE]).chain(command))
    }

    /// `run -d` of the image under a name.
    pub(crate) fn run_detached(&self, name: &str, command: &[&str]) -> Result {
        self.run_detached_with(name, &[], command)
    }

    /// The same with options.
    pub(crate) fn run_detached_with(&self, name: &str, options: &[&str], command: &[&str]) -> Result {
        let fixed = ["run", "-d", "--network", "none", "--name", name];
        self.call(fixed.iter().chain(options).chain([&IMAGE]).chain(command)).output()?.expect_code(0)
    }
}

impl Drop for Podman<'_> {
    fn drop(&mut self) {
        // Whatever a failed case has left: its containers end with it.
        let _ = self.call(["rm", "--all", "--force", "--time", "0"]).output();
    }
}
