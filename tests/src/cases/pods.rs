// SPDX-License-Identifier: Apache-2.0
//! Pods under containerd, made as its CRI makes them: a sandbox, and containers that are to share it.

use std::fs;
use std::thread;
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::{Case, case};
use crate::engines::Containerd;
use crate::env::{Env, Kind};
use crate::failure::{Result, ensure, ensure_eq, fail};
use crate::processes;
use crate::run::Run;

pub(super) const CASES: &[Case] = &[
    case!(shared).limit(600),
    case!(ends_of_their_own).limit(600),
    case!(killed_vmm),
    case!(killed_shim),
    case!(no_sandbox),
];

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

    /// Ends it as CRI does.
    fn end(&self) -> Result {
        self.containerd.succeed(["task", "kill", "--signal", "KILL", &self.id])?;
        self.containerd.wait_for(&self.id, "STOPPED")?;
        self.containerd.delete(&self.id)
    }
}

fn shared(env: &Env) -> Result {
    let containerd = Containerd::new(env, "native")?;
    let pod = Pod::new(env, &containerd)?;
    let (first, second) = (env.id(), env.id());
    let folder = env.folder("shared")?;
    fs::write(folder.join("before"), "before\n")?;
    let shm = std::path::Path::new("/dev/shm").join(env.id());
    fs::create_dir(&shm)?;
    let bind = |source: &std::path::Path, target: &str, mode: &str| {
        format!("type=bind,src={},dst={target},options=rbind:{mode}", source.display())
    };
    let (writable, readable) = (bind(&folder, "/shared", "rw"), bind(&folder, "/shared", "ro"));
    let memory = bind(&shm, "/dev/shm", "rw");

    let script = format!(
        "mkfifo /shared/pipe; echo memory > /dev/shm/made; hostname > /shared/name; \
         cat /proc/sys/kernel/random/boot_id > /shared/boot; nc -l -p 8080 -e echo hello & \
         cat /shared/pipe > /shared/taken; {LIVE}"
    );
    pod.run_detached(&["--mount", &writable, "--mount", &memory], &first, &script)?;
    pod.run_detached(&["--mount", &readable, "--mount", &memory], &second, LIVE)?;
    // A pipe is one pipe only where both have the same file.
    let script = "cat /proc/sys/kernel/random/boot_id; hostname; cat /dev/shm/made /shared/before; \
                  ! touch /shared/x 2>/dev/null && echo through > /shared/pipe; \
                  nc 127.0.0.1 8080 < /dev/null; ps | grep -c [/]shared/pipe";
    let seen = containerd.exec(&[], &second, script).output()?;

    let read = |name: &str| fs::read_to_string(folder.join(name)).unwrap_or_default();
    let expected = format!("{}{}memory\nbefore\nhello\n0\n", read("boot"), read("name"));
    ensure_eq!(seen.stdout(), expected, "what the second container has seen");
    let host = fs::read_to_string("/proc/sys/kernel/random/boot_id")?;
    ensure_eq!(read("boot") == host, env.kind == Kind::Other, "whether the pod has the host's kernel");
    let end = Instant::now() + Duration::from_secs(30);
    while read("taken") != "through\n" {
        ensure!(Instant::now() < end, "what went through the pipe did not arrive");
        thread::sleep(Duration::from_millis(100));
    }

    for id in [&first, &second] {
        containerd.succeed(["task", "kill", "--signal", "KILL", id])?;
        containerd.wait_for(id, "STOPPED")?;
        containerd.delete(id)?;
    }
    pod.end()?;
    fs::remove_dir_all(&shm)?;
    containerd.end()
}

fn ends_of_their_own(env: &Env) -> Result {
    let containerd = Containerd::new(env, "overlayfs")?;
    let pod = Pod::new(env, &containerd)?;
    let (first, second) = (env.id(), env.id());

    pod.run_detached(&[], &first, LIVE)?;
    // One after the other comes and goes, with its streams and its status.
    for status in [5, 6] {
        let script = format!("echo out $(cat); echo err >&2; exit {status}");
        let run = pod.run(&["--rm"], &second, &["sh", "-c", &script]).input("in").output()?;
        ensure_eq!((run.stdout(), run.stderr()), ("out in\n".to_owned(), "err\n".to_owned()), "its streams");
        run.expect_code(status)?;
    }
    let absent = pod.run(&["--rm"], &env.id(), &["no-such-program"]).output()?;
    ensure!(absent.stderr().contains("no-such-program"), "what is not there: {}", absent.describe());
    containerd.exec(&[], &first, "echo alive").output()?.expect_stdout("alive\n")?;
    containerd.succeed(["task", "metrics", &first])?.expect_in_stdout(&["memory.usage", "pids.current"])?;
    containerd.succeed(["task", "kill", &first])?;
    containerd.wait_for(&first, "STOPPED")?;
    delete(&containerd, &first, "3")?;
    pod.end()?;
    containerd.end()
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

fn killed_shim(env: &Env) -> Result {
    env.only_bulkhead()?;
    let containerd = Containerd::new(env, "native")?;
    let pod = Pod::new(env, &containerd)?;
    let id = env.id();
    pod.run_detached(&[], &id, LIVE)?;
    ensure_eq!(containerd.wait_for(&id, "RUNNING")?, pod.pid, "the process that stands for a container");

    kill(Pid::from_raw(pod.pid), Signal::SIGKILL)?;

    for id in [&id, &pod.id] {
        let end = Instant::now() + Duration::from_secs(60);
        while containerd.task(id)?.is_some_and(|(state, _)| state == "RUNNING") {
            ensure!(Instant::now() < end, "containerd has not noticed that {id} is gone");
            thread::sleep(Duration::from_millis(100));
        }
        let _ = containerd.call(["task", "delete", id]).output()?;
        containerd.succeed(["container", "delete", id])?;
    }
    containerd.end()
}

fn no_sandbox(env: &Env) -> Result {
    env.only_bulkhead()?;
    let containerd = Containerd::new(env, "native")?;
    let (id, absent) = (env.id(), env.id());
    let options = annotations("container", &absent);

    let refused = containerd.run(&words(&options), &id, &["true"]).output()?;

    ensure!(refused.stderr().contains(&format!("the sandbox \"{absent}\"")), "what is missing: {}", refused.describe());
    containerd.succeed(["container", "delete", &id])?;
    containerd.end()
}
