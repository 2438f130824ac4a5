// SPDX-License-Identifier: Apache-2.0
//! Pods under containerd, made as its CRI makes them: a sandbox, and containers that are to share it.

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::{Case, case};
use crate::engines::Containerd;
use crate::env::Env;
use crate::failure::{Result, ensure, ensure_eq, fail};
use crate::processes;
use crate::run::Run;

pub(super) const CASES: &[Case] = &[case!(killed_vmm)];

/// Says what it has seen and lives on.
const LIVE: &str = "trap 'exit 3' TERM; while :; do sleep 0.1; done";

/// A pod: its sandbox runs.
struct Pod<'a> {
    containerd: &'a Containerd<'a>,
    id: String,
    /// Of the process that stands for the sandbox.
    pid: i32,
}

/// The annotations that tell what a container is to a pod.
fn annotations(kind: &str, pod: &str) -> Vec<String> {
    let values = [("container-type", kind), ("sandbox-id", pod)];
    let words = values.map(|(key, value)| ["--annotation".to_owned(), format!("io.kubernetes.cri.{key}={value}")]);
    words.into_iter().flatten().collect()
}

fn words(words: &[String]) -> Vec<&str> {
    words.iter().map(String::as_str).collect()
}

impl<'a> Pod<'a> {
    fn new(env: &Env, containerd: &'a Containerd<'a>) -> Result<Self> {
        let id = env.id();
        let mut options = vec!["--detach".to_owned(), "--null-io".to_owned()];
        options.extend(annotations("sandbox", &id));
        containerd.run(&words(&options), &id, &["sleep", "1000"]).output()?.expect_code(0)?;
        let pid = containerd.wait_for(&id, "RUNNING")?;
        Ok(Self { containerd, id, pid })
    }

    /// `run` of a container in it.
    fn run(&self, options: &[&str], id: &str, command: &[&str]) -> Run<'_> {
        let mut all: Vec<String> = options.iter().map(|option| (*option).to_owned()).collect();
        all.extend(annotations("container", &self.id));
        for kind in ["ipc", "uts", "network"] {
            let name = if kind == "network" { "net" } else { kind };
            all.extend(["--with-ns".to_owned(), format!("{kind}:/proc/{}/ns/{name}", self.pid)]);
        }
        self.containerd.run(&words(&all), id, command)
    }

    /// A container that lives on, without streams.
    fn run_detached(&self, options: &[&str], id: &str, script: &str) -> Result {
        let options: Vec<&str> = ["--detach", "--null-io"].iter().chain(options).copied().collect();
        self.run(&options, id, &["sh", "-c", script]).output()?.expect_code(0)
    }
}

/// Deletes what has ended with that status.
fn delete(containerd: &Containerd<'_>, id: &str, status: &str) -> Result {
    let deleted = containerd.call(["task", "delete", id]).output()?;
    ensure!(deleted.stderr().contains(status), "the exit status of {id}: {}", deleted.describe());
    containerd.succeed(["container", "delete", id]).map(drop)
}

/// The processes of a program that a case has started.
fn named(name: &str) -> Vec<processes::Process> {
    let below = processes::descendants(std::process::id().cast_signed());
    below.into_iter().filter(|process| process.name.starts_with(name) && process.state != 'Z').collect()
}

fn killed_vmm(env: &Env) -> Result {
    env.only_bulkhead()?;
    let containerd = Containerd::new(env, "native")?;
    let pod = Pod::new(env, &containerd)?;
    let ids = [env.id(), env.id()];
    for id in &ids {
        pod.run_detached(&[], id, LIVE)?;
    }
    let machines = named("bulkhead-vmm");
    ensure_eq!(machines.len(), 1, "machines of the pod");

    let Some(machine) = machines.first() else { fail!("no machine") };
    kill(Pid::from_raw(machine.pid), Signal::SIGKILL)?;

    for id in ids.iter().chain([&pod.id]) {
        containerd.wait_for(id, "STOPPED")?;
        delete(&containerd, id, "137")?;
    }
    containerd.end()
}
