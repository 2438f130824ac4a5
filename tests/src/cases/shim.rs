// SPDX-License-Identifier: Apache-2.0
//! The program `containerd-shim-bulkhead-v2` as each version of containerd calls it.

use std::fs;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use protobuf::Message;

use super::{Case, case};
use crate::env::Env;
use crate::failure::{Result, ensure, ensure_eq, fail};
use crate::messages::shim::{Any, BootstrapParams, BootstrapResult, DeleteResponse, RuntimeInfo};
use crate::output::Output;
use crate::processes::{self, Process};
use crate::run::Run;

pub(super) const CASES: &[Case] = &[case!(start_and_delete), case!(information), case!(refused)];

/// `log_level` of the bootstrap parameters.
const DEBUG: i32 = -4;

/// A shim's program, and a bundle to call it in.
pub(super) struct Shim<'a> {
    env: &'a Env,
    program: PathBuf,
    pub(super) bundle: PathBuf,
    pub(super) id: String,
}

impl<'a> Shim<'a> {
    fn new(env: &'a Env) -> Result<Self> {
        let shim = Self::bare(env)?;
        fs::write(shim.bundle.join("config.json"), r#"{"ociVersion": "1.0.2"}"#)?;
        Ok(shim)
    }

    /// The same with a bundle that has no configuration.
    pub(super) fn bare(env: &'a Env) -> Result<Self> {
        env.only_bulkhead()?;
        let program = env.runtime.with_file_name("containerd-shim-bulkhead-v2");
        let id = env.id();
        let bundle = env.folder(&id)?;
        Ok(Self { env, program, bundle, id })
    }

    fn call(&self, words: &[&str]) -> Run<'_> {
        self.env.tool(&self.program, words).variable("BULKHEAD_ROOT", self.root()).in_folder(&self.bundle)
    }

    /// Where the state of its containers is.
    pub(super) fn root(&self) -> PathBuf {
        self.env.work.join("shims")
    }

    /// The process of the server that was started.
    pub(super) fn pid(&self) -> Result<i32> {
        let record = fs::read_to_string(self.bundle.join("shim.pid"))?;
        Ok(record.split_whitespace().next().unwrap_or_default().parse()?)
    }

    /// Waits until the server has ended.
    pub(super) fn ends(pid: i32) -> Result {
        let end = Instant::now() + Duration::from_secs(10);
        loop {
            processes::reap_orphans(&[]);
            if Process::of(pid).is_none_or(|process| process.state == 'Z') {
                return Ok(());
            }
            ensure!(Instant::now() < end, "the server {pid} goes on");
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    fn flags(&self) -> [&str; 8] {
        ["-namespace", "e2e", "-address", "/c.sock", "-publish-binary", "/bin/false", "-id", &self.id]
    }

    /// `start`, with those bytes on stdin.
    pub(super) fn start(&self, stdin: Vec<u8>) -> Result<Output> {
        let output = self.call(&[self.flags().as_slice(), &["start"]].concat()).input(stdin).output()?;
        output.expect_code(0)?;
        output.expect_silent_stderr()?;
        Ok(output)
    }

    /// `delete` of a server at that address, after which nothing is left.
    fn delete(&self, address: &str) -> Result {
        let Some(socket) = address.strip_prefix("unix://") else { fail!("{address:?} is no address") };
        UnixStream::connect(socket)?;
        let pid = self.pid()?;
        let bundle = self.bundle.display().to_string();
        let output = self.call(&[self.flags().as_slice(), &["-bundle", &bundle, "delete"]].concat()).output()?;
        output.expect_code(0)?;
        let answer = DeleteResponse::parse_from_bytes(&output.stdout)?;
        ensure_eq!((answer.pid, answer.exit_status), (pid.unsigned_abs(), 137), "what was deleted");
        Self::ends(pid)?;
        ensure!(!Path::new(socket).exists(), "{socket} is left");
        Ok(())
    }
}

fn start_and_delete(env: &Env) -> Result {
    let shim = Shim::new(env)?;
    // containerd 1.6 to 2.2: nothing on stdin, or the runtime's options.
    let options = Any { type_url: "runtimeoptions.v1.Options".to_owned(), value: vec![0xff; 300], ..Any::default() };
    let plain = shim.start(Vec::new())?.stdout();
    ensure!(plain.starts_with("unix:///run/containerd/s/") && plain.lines().count() == 1, "the address is {plain:?}");
    ensure_eq!(shim.start(options.write_to_bytes()?)?.stdout(), plain, "the address of the server that is there");
    ensure_eq!(fs::read_to_string(shim.bundle.join("address"))?, plain, "the address in the bundle");
    shim.delete(&plain)?;

    // From 2.3 on.
    // The path of a socket has to be short.
    let folder = tempfile::tempdir_in("/run")?;
    let sockets = folder.path();
    let params = BootstrapParams {
        instance_id: shim.id.clone(),
        namespace: "e2e".to_owned(),
        log_level: DEBUG,
        containerd_ttrpc_address: "unix:///c.sock.ttrpc".to_owned(),
        socket_dir: Some(sockets.display().to_string()),
        ..BootstrapParams::default()
    };
    let answer = BootstrapResult::parse_from_bytes(&shim.start(params.write_to_bytes()?)?.stdout)?;
    ensure_eq!((answer.version, answer.protocol.as_str()), (3, "ttrpc"), "the answer");
    ensure!(answer.address.starts_with(&format!("unix://{}/", sockets.display())), "the address is {}", answer.address);
    shim.delete(&answer.address)
}

fn information(env: &Env) -> Result {
    let shim = Shim::new(env)?;

    let version = shim.call(&["-v"]).output()?;
    version.expect_in_stdout(&["containerd-shim-bulkhead-v2:\n", "Version:"])?;
    let output = shim.call(&["-info"]).output()?;
    output.expect_code(0)?;
    let info = RuntimeInfo::parse_from_bytes(&output.stdout)?;
    ensure_eq!(info.name, "io.containerd.bulkhead.v2", "the name");
    ensure!(version.stdout().contains(&info.version.version), "the version: {info:?}");
    let features: serde_json::Value = serde_json::from_slice(&info.features.value)?;
    ensure!(features["ociVersionMax"].is_string(), "the features: {features}");
    Ok(())
}

fn refused(env: &Env) -> Result {
    let shim = Shim::new(env)?;
    for (words, named) in [
        (&["-namespace", "e2e", "-id", "../up", "start"] as &[&str], "-id is \"../up\""),
        (&["-namespace", "e2e", "start"], "the flag -id is missing"),
        (&["-namespace", "e2e", "-id", "c", "serve"], "\"serve\" is not a verb"),
    ] {
        shim.call(words).output()?.expect_error(&[named])?;
    }
    let relative = BootstrapParams {
        instance_id: shim.id.clone(),
        namespace: "e2e".to_owned(),
        socket_dir: Some("sockets".to_owned()),
        ..BootstrapParams::default()
    };
    let words = [shim.flags().as_slice(), &["start"]].concat();
    shim.call(&words).input(relative.write_to_bytes()?).output()?.expect_error(&["socket_dir", "\"sockets\""])
}
