// SPDX-License-Identifier: Apache-2.0
//! create, start, state, kill and delete, as engines call them.

use std::fs::{self, File};
use std::os::unix::fs::symlink;
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::Pid;
use serde_json::json;

use super::task::{MUCH, Reader, named_pipe};
use super::{Case, case};
use crate::bundle::Bundle;
use crate::detached::Detached;
use crate::env::{Env, Kind};
use crate::failure::{Failure, Result, ensure, ensure_eq};

pub(super) const CASES: &[Case] = &[
    case!(created_container_waits_for_its_start),
    case!(state_tells_what_the_specification_asks_for),
    case!(container_starts_once),
    case!(run_detached_returns_while_the_container_runs),
    case!(deleting_asks_for_an_end_or_force),
    case!(created_container_is_deleted_as_it_is),
    case!(signals_have_names_and_numbers),
    case!(kill_ends_a_created_container),
    case!(kill_all_reaches_every_process),
    case!(verbs_of_an_init_that_has_ended),
    case!(ended_container_is_told_from_one_that_never_was),
    case!(kept_state_outlives_a_foreground_run),
    case!(id_is_taken_until_it_is_deleted),
    case!(missing_program_leaves_nothing),
    case!(failed_start_ends_the_container),
    case!(binds_of_a_container_that_lives_on),
    case!(killed_supervisor_leaves_a_stopped_container),
    case!(garbage_is_what_a_crash_left),
    case!(streams_of_the_caller_end_with_the_container),
];

/// A container that says `ready` and runs until it is told to end.
fn waiting(env: &Env) -> Result<Bundle> {
    let mut bundle = Bundle::busybox(env)?;
    bundle.sh("trap 'echo terminated; exit 7' TERM; echo ready; while :; do sleep 0.1; done");
    Ok(bundle)
}

fn created_container_waits_for_its_start(env: &Env) -> Result {
    let mut bundle = Bundle::busybox(env)?;
    bundle.sh("echo started; exit 9");

    let container = Detached::create(env, &bundle)?;
    container.expect_status("created")?;
    ensure_eq!(container.output()?, "", "the output before the start");
    container.must(&["start"])?;

    ensure_eq!(container.wait()?, 9, "the status of the process that stands for the container");
    container.expect_status("stopped")?;
    ensure_eq!(container.output()?, "started\n", "the output");
    container.must(&["delete"])?;
    container.verb(&["state"]).output()?.expect_error(&["does not exist"])
}

fn state_tells_what_the_specification_asks_for(env: &Env) -> Result {
    let mut bundle = waiting(env)?;
    bundle.annotation("org.example.key", "value");

    let container = Detached::create(env, &bundle)?;
    let state = container.state()?;

    ensure_eq!(state["id"], container.id.as_str(), "the id");
    ensure_eq!(state["pid"], container.pid, "the pid");
    ensure_eq!(state["bundle"], bundle.folder.display().to_string(), "the bundle");
    ensure_eq!(state["rootfs"], bundle.rootfs().display().to_string(), "the rootfs");
    ensure_eq!(state["annotations"]["org.example.key"], "value", "the annotation");
    for key in ["ociVersion", "created", "owner"] {
        ensure!(state[key].is_string(), "{key} is missing in {state}");
    }
    Ok(())
}

fn container_starts_once(env: &Env) -> Result {
    let container = Detached::create(env, &waiting(env)?)?;

    container.must(&["start"])?;
    container.expect_status("running")?;
    container.verb(&["start"]).output()?.expect_error(&["already running"])?;
    container.wait_for("ready\n")?;
    container.must(&["kill"])?;

    ensure_eq!(container.wait()?, 7, "the status");
    container.verb(&["start"]).output()?.expect_error(&["stopped"])
}

fn run_detached_returns_while_the_container_runs(env: &Env) -> Result {
    let container = Detached::run(env, &waiting(env)?)?;

    container.expect_status("running")?;
    container.wait_for("ready\n")?;
    container.must(&["kill"])?;

    ensure_eq!(container.wait()?, 7, "the status");
    ensure_eq!(container.output()?, "ready\nterminated\n", "the output");
    container.must(&["delete"]).map(drop)
}

fn deleting_asks_for_an_end_or_force(env: &Env) -> Result {
    let container = Detached::run(env, &waiting(env)?)?;

    container.verb(&["delete"]).output()?.expect_error(&["not stopped: running"])?;
    container.expect_status("running")?;
    container.must(&["delete", "--force"])?;

    container.verb(&["delete"]).output()?.expect_error(&["does not exist"])?;
    container.must(&["delete", "--force"]).map(drop)
}

fn created_container_is_deleted_as_it_is(env: &Env) -> Result {
    let container = Detached::create(env, &waiting(env)?)?;

    container.must(&["delete"])?;

    ensure_eq!(container.wait()?, 137, "the status");
    Ok(())
}

fn signals_have_names_and_numbers(env: &Env) -> Result {
    let mut bundle = Bundle::busybox(env)?;
    bundle.sh("trap 'echo got USR1' USR1; trap 'echo got HUP' HUP; echo ready; while :; do sleep 0.1; done");
    let container = Detached::run(env, &bundle)?;
    container.wait_for("ready\n")?;

    for (signal, name) in [("USR1", "USR1"), ("SIGHUP", "HUP"), ("10", "USR1")] {
        let seen = container.output()?.matches(&format!("got {name}\n")).count();
        container.verb_with(&["kill"], &[signal]).output()?.expect_code(0)?;
        let expected = format!("got {name}\n").repeat(seen + 1);
        container.wait_for(&expected[expected.len() - name.len() - 5..])?;
    }
    container.verb_with(&["kill"], &["NONESUCH"]).output()?.expect_error(&["NONESUCH"])?;
    container.verb_with(&["kill"], &["KILL"]).output()?.expect_code(0)?;

    ensure_eq!(container.wait()?, 137, "the status");
    Ok(())
}

fn kill_ends_a_created_container(env: &Env) -> Result {
    let container = Detached::create(env, &waiting(env)?)?;

    container.must(&["kill"])?;

    container.wait_for_status("stopped")?;
    container.verb(&["start"]).output()?.expect_error(&["stopped"])?;
    ensure_eq!(container.output()?, "", "the output");
    Ok(())
}

fn kill_all_reaches_every_process(env: &Env) -> Result {
    let mut bundle = Bundle::busybox(env)?;
    bundle.sh(
        "trap '' USR1; (trap 'echo child got it; exit' USR1; echo ready; while :; do sleep 0.1; done) & wait; wait",
    );
    let container = Detached::run(env, &bundle)?;
    container.wait_for("ready\n")?;

    container.verb_with(&["kill", "--all"], &["USR1"]).output()?.expect_code(0)?;

    container.wait_for("child got it\n")
}

/// Until somebody reads what it has written last it is running, but there is nobody to send a signal to, or to do anything else
/// with: whether the guest still holds some of it or has handed all on.
fn verbs_of_an_init_that_has_ended(env: &Env) -> Result {
    env.only_bulkhead()?; // What others' init writes is read, or keeps it from ending.
    let mut bundle = Bundle::busybox(env)?;
    bundle.sh(&format!("head -c {MUCH} /dev/zero; exit 4"));
    bundle.write()?;
    let (id, pipe) = (env.id(), named_pipe(env, "output")?);
    let mut reader = Reader::open(&pipe)?;
    let run = ["run", "--detach", "--bundle", &bundle.folder.display().to_string(), &id].map(str::to_owned);
    let null = File::options().write(true).open("/dev/null")?;
    env.call(run).stdout(File::options().write(true).open(&pipe)?).stderr(null).output()?.expect_code(0)?;
    let verb = |words: &[&str]| env.call(words.iter().copied()).output();
    let processes = || {
        let ps = verb(&["ps", "--format", "json", &id])?;
        ps.expect_code(0)?;
        Ok::<_, Failure>(ps.stdout() != "null\n")
    };
    let mut turns = (0..).map(|turn| turn % 3 == 0);
    reader.read_until(|| Ok(turns.next() == Some(true) && !processes()?))?;

    // Then the same with what the guest alone holds, and more, taken from it.
    for more in [200_000, 0] {
        verb(&["state", &id])?.expect_in_stdout(&["\"status\": \"running\""])?;
        verb(&["kill", &id, "TERM"])?.expect_error(&["container not running"])?;
        verb(&["kill", "--all", &id, "TERM"])?.expect_stdout("")?;
        verb(&["exec", &id, "true"])?.expect_error(&["cannot exec in a stopped container"])?;
        verb(&["pause", &id])?.expect_error(&["container not running"])?;
        verb(&["update", "--pids-limit", "50", &id])?.expect_error(&["container not running"])?;
        verb(&["events", "--stats", &id])?.expect_code(0)?;
        verb(&["state", &id])?.expect_in_stdout(&["\"status\": \"running\""])?;
        reader.read_more(more)?;
        ensure!(!processes()?, "there are processes again");
    }
    // This gives the output up.
    verb(&["kill", &id, "KILL"])?.expect_stdout("")?;
    let end = Instant::now() + Duration::from_secs(60);
    while !verb(&["state", &id])?.stdout().contains("\"status\": \"stopped\"") {
        ensure!(Instant::now() < end, "SIGKILL does not give up what nobody reads");
    }
    verb(&["state", &id])?.expect_in_stdout(&["\"exitStatus\": 4"])?;
    verb(&["kill", &id, "KILL"])?.expect_error(&["container not running"])?;
    verb(&["delete", &id])?.expect_stdout("")
}

fn ended_container_is_told_from_one_that_never_was(env: &Env) -> Result {
    let mut bundle = Bundle::busybox(env)?;
    bundle.sh("sleep 1; exit 7");
    let container = Detached::run(env, &bundle)?;
    // With its end there is its status, at once.
    let end = Instant::now() + Duration::from_secs(60);
    let state = loop {
        let state = container.state()?;
        if state["status"] == "stopped" {
            break state;
        }
        ensure!(Instant::now() < end, "it does not end: {state}");
    };
    if env.kind == Kind::Bulkhead {
        ensure_eq!(state["exitStatus"], 7, "the status in its state");
    }
    ensure_eq!(container.wait()?, 7, "the status");

    container.verb(&["kill"]).output()?.expect_error(&["container not running"])?;
    container.verb(&["kill", "--all"]).output()?.expect_code(0)?;
    container.must(&["delete"])?;
    for verb in ["kill", "start", "state", "ps", "pause", "resume", "delete"] {
        container.verb(&[verb]).output()?.expect_error(&["does not exist"])?;
    }
    Ok(())
}

fn kept_state_outlives_a_foreground_run(env: &Env) -> Result {
    let mut bundle = Bundle::busybox(env)?;
    bundle.sh("exit 4");
    bundle.write()?;
    let id = env.id();

    let run = ["run", "--keep", "--bundle", &bundle.folder.display().to_string(), &id].map(str::to_owned);
    env.call(run).output()?.expect_code(4)?;

    env.call(["state", &id]).output()?.expect_in_stdout(&["\"status\": \"stopped\"", "\"pid\": 0"])?;
    env.call(["delete", &id]).output()?.expect_code(0)
}

fn id_is_taken_until_it_is_deleted(env: &Env) -> Result {
    let mut bundle = Bundle::busybox(env)?;
    bundle.args(&["true"]);
    let container = Detached::run(env, &bundle)?;
    ensure_eq!(container.wait()?, 0, "the status");

    env.run_as(&bundle, &container.id)?.output()?.expect_error(&["already exists"])?;
    container.must(&["delete"])?;

    env.run_as(&bundle, &container.id)?.output()?.expect_code(0)
}

/// At a link, and where the root file system has something else, which a tmpfs of the container's hides.
fn binds_of_a_container_that_lives_on(env: &Env) -> Result {
    let mut bundle = Bundle::busybox(env)?;
    let data = env.folder("data")?;
    fs::write(data.join("file"), "data\n")?;
    fs::create_dir(bundle.path("there"))?;
    symlink("there", bundle.path("link"))?;
    fs::create_dir(bundle.path("own"))?;
    bundle.add_file("own/place", "", 0o644)?;
    bundle.bind(&data, "/link", &[]).mount("tmpfs", "tmpfs", "/own", &[]).bind(&data, "/own/place", &[]);
    bundle.sh("cat /there/file /own/place/file; sleep 1000");

    let container = Detached::run(env, &bundle)?;

    container.wait_for("data\ndata\n")
}

fn missing_program_leaves_nothing(env: &Env) -> Result {
    let mut bundle = Bundle::busybox(env)?;
    bundle.args(&["/no/such/program"]);
    bundle.write()?;
    let id = env.id();

    let create = ["create", "--bundle", &bundle.folder.display().to_string(), &id].map(str::to_owned);
    env.call(create).output()?.expect_error(&["/no/such/program"])?;

    env.call(["state", &id]).output()?.expect_error(&["does not exist"])
}

/// An engine that is told of the failure looks for the end of the process that stands for the container at once.
fn failed_start_ends_the_container(env: &Env) -> Result {
    env.only_bulkhead()?; // The `start` of others is over before the program is executed.
    let mut bundle = Bundle::busybox(env)?;
    bundle.add_file("opt/script", "#!/no/such/interpreter\n", 0o755)?;
    bundle.args(&["/opt/script"]);
    let container = Detached::create(env, &bundle)?;

    container.verb(&["start"]).output()?.expect_error(&["/no/such/interpreter", "no such file or directory"])?;

    container.expect_status("stopped")?;
    let end = waitpid(Pid::from_raw(container.pid), Some(WaitPidFlag::WNOHANG))?;
    ensure!(matches!(end, WaitStatus::Exited(..)), "the process that stands for it: {end:?}");
    container.must(&["delete"]).map(drop)
}

fn killed_supervisor_leaves_a_stopped_container(env: &Env) -> Result {
    env.only_bulkhead()?;
    let container = Detached::run(env, &waiting(env)?)?;

    kill(Pid::from_raw(container.pid), Signal::SIGKILL)?;
    container.wait_for_status("stopped")?;

    container.expect_exit_status(137)?;
    container.verb(&["kill"]).output()?.expect_error(&["container not running"])?;
    container.must(&["delete"]).map(drop)
}

fn garbage_is_what_a_crash_left(env: &Env) -> Result {
    env.only_bulkhead()?;
    let mut bundle = waiting(env)?;
    let told = bundle.folder.join("told");
    let script = format!("cat >{}", told.display());
    bundle.set("/hooks", json!({ "poststop": [{ "path": "/bin/sh", "args": ["sh", "-c", script] }] }));
    let (crashed, running) = (Detached::run(env, &bundle)?, Detached::run(env, &waiting(env)?)?);
    kill(Pid::from_raw(crashed.pid), Signal::SIGKILL)?;
    crashed.wait_for_status("stopped")?;
    let line = format!("{}\n", env.root.join(&crashed.id).display());

    env.call(["gc", "--dry-run"]).output()?.expect_stdout(&line)?;
    crashed.expect_status("stopped")?;
    ensure!(!told.exists(), "the hooks were run before the container is gone");
    env.call(["gc"]).output()?.expect_stdout(&line)?;
    ensure!(fs::read_to_string(&told)?.contains(&crashed.id), "what the hook was told");

    crashed.verb(&["state"]).output()?.expect_error(&["does not exist"])?;
    running.expect_status("running")
}

fn streams_of_the_caller_end_with_the_container(env: &Env) -> Result {
    let mut bundle = Bundle::busybox(env)?;
    bundle.sh("cat; echo end");
    bundle.write()?;
    let id = env.id();

    // The runtime returns at once, and its stdout ends when the container does.
    let create = ["run", "--detach", "--bundle", &bundle.folder.display().to_string(), &id].map(str::to_owned);
    let end = env.call(create).input("in\n").limit(Duration::from_secs(120)).output()?;

    end.expect_stdout("in\nend\n")?;
    env.call(["delete", "--force", &id]).output()?.expect_code(0)?;
    ensure!(!fs::exists(env.root.join(&id))?, "the state is left");
    Ok(())
}
