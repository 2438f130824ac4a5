// SPDX-License-Identifier: Apache-2.0
//! Callers, supervisors and machines that are killed, disks that are full, and verbs that come at once: nothing is left over,
//! and `state` stays true.

use std::fs::{self, File};
use std::io::{Read, Write};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::{Value, json};

use super::control::receive_descriptor;
use super::{Case, case};
use crate::bundle::Bundle;
use crate::detached::Detached;
use crate::env::{Env, Kind};
use crate::failure::{Result, ensure, ensure_eq, fail};
use crate::processes;

pub(super) const CASES: &[Case] = &[
    case!(starts_at_once).varies(),
    case!(deletes_at_once).varies(),
    case!(deletes_of_a_crashed_container_at_once).varies(),
    case!(thirty_processes_at_once).varies(),
    case!(processes_of_a_container_that_is_deleted).varies(),
    case!(callers_that_are_killed).limit(400).varies(),
    case!(caller_of_a_process_that_is_killed),
    case!(machine_that_dies_under_a_process),
    case!(supervisor_that_dies_under_a_process),
    case!(machine_that_hangs),
    case!(machine_that_hangs_when_a_process_is_added).slow(400),
    case!(disk_that_fills_up_under_root),
    case!(pid_file_on_a_full_disk),
    case!(console_whose_other_side_goes_away),
];

/// How long what is waited for may take.
const LIMIT: Duration = Duration::from_secs(60);

/// A container whose init says `up`, and handles TERM.
fn lasting(env: &Env) -> Result<Bundle> {
    let mut bundle = Bundle::busybox(env)?;
    bundle.sh("trap 'exit 3' TERM; echo up; while :; do sleep 0.1; done");
    Ok(bundle)
}

fn starts_at_once(env: &Env) -> Result {
    let container = Detached::create(env, &lasting(env)?)?;

    let starts: Vec<_> = (0..3).map(|_| container.verb(&["start"]).spawn()).collect::<Result<_>>()?;

    let mut started = 0;
    for start in starts {
        let output = start.finish()?;
        match output.status.code() {
            Some(0) => started += 1,
            _ => output.expect_error(&["cannot start an already running container"])?,
        }
    }
    ensure_eq!(started, 1, "the number of starts that succeeded");
    container.expect_status("running")?;
    container.wait_for("up\n")
}

/// Of several at once, each has deleted it, or finds that it does not exist any more.
fn delete_at_once(container: &Detached<'_>) -> Result {
    let deletes: Vec<_> = (0..4).map(|_| container.verb(&["delete"]).spawn()).collect::<Result<_>>()?;
    let mut deleted = 0;
    for delete in deletes {
        let output = delete.finish()?;
        match output.status.code() {
            Some(0) => deleted += 1,
            _ => output.expect_error(&["container does not exist"])?,
        }
    }
    ensure!(deleted > 0, "no delete has succeeded");
    container.verb(&["state"]).output()?.expect_error(&["container does not exist"])
}

fn deletes_at_once(env: &Env) -> Result {
    let container = Detached::run(env, &lasting(env)?)?;
    container.must_with(&["kill"], &["KILL"])?;
    container.wait_for_status("stopped")?;

    delete_at_once(&container)
}

/// Whoever removes what is left of a container does not make it look alive.
fn deletes_of_a_crashed_container_at_once(env: &Env) -> Result {
    env.only_bulkhead()?;
    let container = Detached::run(env, &lasting(env)?)?;
    kill(Pid::from_raw(container.pid), Signal::SIGKILL)?;
    container.wait_for_status("stopped")?;
    container.expect_exit_status(137)?;

    delete_at_once(&container)
}

fn thirty_processes_at_once(env: &Env) -> Result {
    let container = Detached::run(env, &lasting(env)?)?;
    container.wait_for("up\n")?;

    let execs: Vec<_> = (0..30)
        .map(|number| container.exec(&format!("echo {number}; exit {number}")).spawn())
        .collect::<Result<_>>()?;

    for (number, exec) in execs.into_iter().enumerate() {
        let output = exec.finish()?;
        output.expect_code(i32::try_from(number)?)?;
        ensure_eq!(output.stdout(), format!("{number}\n"), "the output of process {number}");
    }
    container.expect_status("running")
}

fn processes_of_a_container_that_is_deleted(env: &Env) -> Result {
    let container = Detached::run(env, &lasting(env)?)?;
    container.wait_for("up\n")?;
    let mut first = container.exec("echo ready; sleep 1000").spawn()?;
    first.wait_for("ready\n")?;
    let later: Vec<_> = (0..5).map(|_| container.exec("sleep 1000").spawn()).collect::<Result<_>>()?;

    container.must(&["delete", "--force"])?;

    first.finish()?.expect_code(137)?;
    for exec in later {
        // It was killed, or came too late.
        let output = exec.finish()?;
        match output.status.code() {
            Some(137) => {}
            _ => output.expect_error_code(255, &["exec failed"])?,
        }
    }
    container.verb(&["state"]).output()?.expect_error(&["container does not exist"])
}

/// Of a `create` that is killed nothing is left, or a container that has been created: whichever its caller finds.
fn callers_that_are_killed(env: &Env) -> Result {
    env.only_bulkhead()?;
    let bundle = lasting(env)?;
    bundle.write()?;
    let folder = bundle.folder.display().to_string();
    for delay in [0, 20, 60, 150, 400, 1000, 2500] {
        let id = env.id();
        let null = || File::options().write(true).open("/dev/null");
        let create = env.call(["create", "--bundle", &folder, &id]).stdout(null()?).stderr(null()?).spawn()?;
        thread::sleep(Duration::from_millis(delay));
        // The process itself, not what it has started. It may have ended.
        let _ = kill(Pid::from_raw(create.pid()), Signal::SIGKILL);
        create.finish()?;

        match settled(env, &id)?.as_deref() {
            None => {}
            Some("created") => env.call(["start", &id]).output()?.expect_code(0)?,
            Some(other) => fail!("killed after {delay} ms: the container is {other}"),
        }
        env.call(["delete", "--force", &id]).output()?.expect_code(0)?;
        ensure_eq!(status(env, &id)?, None, "the status after the deletion");
    }
    Ok(())
}

/// What a container is that somebody makes whose caller was killed: when that is no longer so, and stays, since it may not have begun.
fn settled(env: &Env, id: &str) -> Result<Option<String>> {
    let end = Instant::now() + LIMIT;
    loop {
        let seen = status(env, id)?;
        thread::sleep(Duration::from_millis(500));
        if seen.as_deref() != Some("creating") && status(env, id)? == seen {
            return Ok(seen);
        }
        ensure!(Instant::now() < end, "container {id} is being created for ever");
    }
}

/// What `state` says of a container, unless it does not exist.
fn status(env: &Env, id: &str) -> Result<Option<String>> {
    let output = env.call(["state", id]).output()?;
    if !output.status.success() {
        output.expect_error(&["container does not exist"])?;
        return Ok(None);
    }
    let state: Value = serde_json::from_slice(&output.stdout)?;
    Ok(state["status"].as_str().map(str::to_owned))
}

fn caller_of_a_process_that_is_killed(env: &Env) -> Result {
    let container = Detached::run(env, &lasting(env)?)?;
    container.wait_for("up\n")?;
    let mut exec = container.exec("echo ready; read line; exit 7").open_stdin().spawn()?;
    exec.wait_for("ready\n")?;

    kill(Pid::from_raw(exec.pid()), Signal::SIGKILL)?;
    exec.finish()?;

    // Engines know a process by the one that stands for it, and kill it so.
    let file = env.work.join("stubborn.pid");
    let output = fs::File::create(env.work.join("stubborn.out"))?;
    let options = ["exec", "--detach", "--pid-file", &file.display().to_string()];
    let stubborn = container.verb_with(&options, &["sh", "-c", ": stubborn; trap '' TERM; while :; do sleep 1; done"]);
    stubborn.stdout(output.try_clone()?).stderr(output).output()?.expect_code(0)?;
    ensure!(container.must(&["ps"])?.stdout().contains("stubborn"), "the process is not there");
    kill(Pid::from_raw(fs::read_to_string(&file)?.trim().parse()?), Signal::SIGKILL)?;
    let end = Instant::now() + LIMIT;
    while container.must(&["ps"])?.stdout().contains("stubborn") {
        ensure!(Instant::now() < end, "the process runs on");
        thread::sleep(Duration::from_millis(50));
    }

    container.exec("exit 4").output()?.expect_code(4)?;
    container.expect_status("running")?;
    container.must_with(&["kill"], &["TERM"])?;
    ensure_eq!(container.wait_with_orphans()?, 3, "the status of the container");
    Ok(())
}

/// The machine below the process that stands for a container.
fn machine(container: &Detached<'_>) -> Result<Pid> {
    match processes::wait_for_descendant(container.pid, "bulkhead-vmm", LIMIT) {
        Some(process) => Ok(Pid::from_raw(process.pid)),
        None => fail!("there is no bulkhead-vmm below process {}", container.pid),
    }
}

fn machine_that_dies_under_a_process(env: &Env) -> Result {
    env.only_bulkhead()?;
    let container = Detached::run(env, &lasting(env)?)?;
    let mut exec = container.exec("echo ready; sleep 1000").spawn()?;
    exec.wait_for("ready\n")?;

    kill(machine(&container)?, Signal::SIGKILL)?;

    exec.finish()?.expect_code(137)?;
    ensure_eq!(container.wait()?, 137, "the status of the container");
    container.expect_exit_status(137)?;
    container.must(&["delete"]).map(drop)
}

fn supervisor_that_dies_under_a_process(env: &Env) -> Result {
    env.only_bulkhead()?;
    let container = Detached::run(env, &lasting(env)?)?;
    let mut exec = container.exec("echo ready; sleep 1000").spawn()?;
    exec.wait_for("ready\n")?;

    kill(Pid::from_raw(container.pid), Signal::SIGKILL)?;

    let output = exec.finish()?;
    output.expect_code(255)?;
    output.expect_error_line(&["exec failed", "supervisor"])?;
    container.wait_for_status("stopped")?;
    container.expect_exit_status(137)?;
    container.exec("true").output()?.expect_error_code(255, &["cannot exec in a stopped container"])?;
    container.must(&["delete"]).map(drop)
}

/// Its verbs end, and it can be got rid of.
fn machine_that_hangs(env: &Env) -> Result {
    env.only_bulkhead()?;
    let container = Detached::run(env, &lasting(env)?)?;
    container.wait_for("up\n")?;

    kill(machine(&container)?, Signal::SIGSTOP)?;

    container.verb(&["ps"]).output()?.expect_error(&["does not answer"])?;
    container.expect_status("running")?;
    container.must(&["delete", "--force"])?;
    container.verb(&["state"]).output()?.expect_error(&["container does not exist"])
}

/// What it makes of the process when it goes on again does not run on.
fn machine_that_hangs_when_a_process_is_added(env: &Env) -> Result {
    env.only_bulkhead()?;
    let container = Detached::run(env, &lasting(env)?)?;
    container.wait_for("up\n")?;
    let machine = machine(&container)?;

    kill(machine, Signal::SIGSTOP)?;
    container.exec("exec sleep 4321").output()?.expect_error_code(255, &["exec failed", "does not answer"])?;
    kill(machine, Signal::SIGCONT)?;

    container.exec("exit 4").output()?.expect_code(4)?;
    let end = Instant::now() + LIMIT;
    while container.must(&["ps"])?.stdout().contains("4321") {
        ensure!(Instant::now() < end, "the process that came too late runs on");
        thread::sleep(Duration::from_millis(100));
    }
    container.expect_status("running")
}

/// A file system that is full, at that path.
fn fill(folder: &Path) -> Result<PathBuf> {
    let path = folder.join("filler");
    let mut filler = File::create(&path)?;
    while filler.write_all(&[0; 4096]).is_ok() {}
    Ok(path)
}

fn disk_that_fills_up_under_root(env: &Env) -> Result {
    let root = env.folder("small-root")?;
    env.mount("tmpfs", "tmpfs", &root, "size=4m")?;
    let bundle = lasting(env)?;
    bundle.write()?;
    let (id, folder) = (env.id(), bundle.folder.display().to_string());
    let null = || File::options().write(true).open("/dev/null");
    let create = env.call(["create", "--bundle", &folder, &id]).root(&root).stdout(null()?).stderr(null()?);
    create.output()?.expect_code(0)?;

    let filler = fill(&root)?;
    for (verb, after) in [("start", "running"), ("pause", "paused"), ("resume", "running")] {
        env.call([verb, &id]).root(&root).output()?.expect_code(0)?;
        let output = env.call(["state", &id]).root(&root).output()?;
        let state: Value = serde_json::from_slice(&output.stdout)?;
        ensure_eq!(state["status"], after, "the status after {verb}, on a full disk");
    }
    env.call(["exec", &id, "sh", "-c", "exit 4"]).root(&root).output()?.expect_code(4)?;
    env.call(["delete", "--force", &id]).root(&root).output()?.expect_code(0)?;

    fs::remove_file(filler)?;
    ensure_eq!(fs::read_dir(&root)?.count(), 0, "the number of files that are left");
    Ok(())
}

/// What was made is taken back, and no half of a pid file is left.
fn pid_file_on_a_full_disk(env: &Env) -> Result {
    let full = env.folder("full")?;
    env.mount("tmpfs", "tmpfs", &full, "size=64k")?;
    fill(&full)?;
    let pid_file = full.join("pid").display().to_string();
    let bundle = lasting(env)?;
    bundle.write()?;
    let (id, folder) = (env.id(), bundle.folder.display().to_string());

    let create = ["create", "--bundle", &folder, "--pid-file", &pid_file, &id];
    env.call(create).output()?.expect_error(&["pid file", &pid_file, "No space left on device"])?;
    env.call(["state", &id]).output()?.expect_error(&["container does not exist"])?;

    let container = Detached::run(env, &bundle)?;
    let exec = container.verb_with(&["exec", "--detach", "--pid-file", &pid_file], &["sleep", "4321"]);
    exec.output()?.expect_error_code(255, &["pid file", "No space left on device"])?;
    let end = Instant::now() + LIMIT;
    while container.must(&["ps"])?.stdout().contains("4321") {
        ensure!(Instant::now() < end, "the process without a pid file runs on");
        thread::sleep(Duration::from_millis(100));
    }
    if env.kind == Kind::Bulkhead {
        ensure_eq!(fs::read_dir(&full)?.count(), 1, "the number of files on the full disk");
    }
    Ok(())
}

fn console_whose_other_side_goes_away(env: &Env) -> Result {
    let mut bundle = Bundle::busybox(env)?;
    bundle.sh("trap 'exit 5' HUP; echo up; while read line; do :; done; exit 6").set("/process/terminal", json!(true));
    let path = env.work.join("console.sock");
    let listener = UnixListener::bind(&path)?;
    let peer = thread::spawn(move || receive_descriptor(&listener));

    let container = Detached::create_with_console(env, &bundle, &path.display().to_string())?;
    let Ok(received) = peer.join() else { fail!("the receiver of the console panicked") };
    let mut console = File::from(received?);
    container.must(&["start"])?;
    let mut shown = Vec::new();
    while !shown.ends_with(b"up") {
        let mut byte = [0];
        console.read_exact(&mut byte)?;
        shown.extend(byte);
    }

    drop(console);

    // A hang-up, or the end of what it reads: it learns of it.
    let status = container.wait()?;
    ensure!(matches!(status, 5 | 6), "the status is {status}");
    container.must(&["delete"]).map(drop)
}
