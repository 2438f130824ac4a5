// SPDX-License-Identifier: Apache-2.0
//! Verbs and options that take a container along, or none.

use std::fs;
use std::thread;
use std::time::Duration;

use serde_json::{Value, json};

use super::{Case, case};
use crate::bundle::Bundle;
use crate::detached::Detached;
use crate::env::{Env, Kind};
use crate::failure::{Context as _, Result, ensure, ensure_eq};
use crate::output::Output;
use crate::run::Running;

pub(super) const CASES: &[Case] = &[
    case!(console_of_the_guest_is_printed),
    case!(events_come_until_the_end),
    case!(events_tell_of_each_kill),
    case!(process_for_a_paused_container),
    case!(options_that_change_nothing),
    case!(texts_made_from_the_command_line),
    case!(verbs_at_once).varies(),
];

/// `logs`, while it runs and until it is deleted; and the annotations that say what the kernel is told, and its memory.
fn console_of_the_guest_is_printed(env: &Env) -> Result {
    env.only_bulkhead()?;
    let mut bundle = Bundle::busybox(env)?;
    let annotations =
        json!({ "io.bulkhead.kernel_args": "ignore_loglevel  bulkhead.test=1", "io.bulkhead.memory_mib": "200" });
    bundle.set("/annotations", annotations);
    bundle.sh("sed -n 's/MemTotal: *\\(.*\\) kB/\\1/p' /proc/meminfo; cat /proc/cmdline; sleep 1000");
    let container = Detached::run(env, &bundle)?;
    container.wait_for(" ignore_loglevel bulkhead.test=1\n")?;
    let output = container.output()?;
    let total: u64 = output.lines().next().and_then(|line| line.parse().ok()).unwrap_or_default();
    ensure!((130 << 10..=200 << 10).contains(&total), "the guest has {total} KiB");

    let boot = ["Unpacking initramfs...", "NET: Registered PF_VSOCK protocol family"];
    container.must(&["logs"])?.expect_in_stdout(&boot)?;
    container.must_with(&["kill"], &["KILL"])?;
    ensure_eq!(container.wait()?, 137, "the status");
    container.must(&["logs"])?.expect_in_stdout(&boot)?;
    container.must(&["delete"])?;
    container.verb(&["logs"]).output()?.expect_error(&["does not exist"])
}

fn events_come_until_the_end(env: &Env) -> Result {
    let mut bundle = Bundle::busybox(env)?;
    bundle.args(&["sleep", "1000"]);
    bundle.set("/linux/resources", json!({ "memory": { "limit": 32 << 20, "swap": 32 << 20 } }));
    let container = Detached::run(env, &bundle)?;
    let mut events = container.verb(&["events", "--interval", "200ms"]).spawn()?;
    events.wait_for("\"type\":\"stats\"")?;

    let killed = container.exec("tail /dev/zero; echo \"tail: $?\"").output()?;
    ensure!(killed.stdout().ends_with("tail: 137\n"), "{}", killed.describe());
    events.wait_for("\"type\":\"oom\"")?;
    ensure!(events.is_running()?, "the events have ended before the container");
    container.must_with(&["kill"], &["KILL"])?;

    let output = events.finish()?;
    output.expect_code(0)?;
    let mut stats = 0;
    for line in output.stdout().lines() {
        let event: Value = serde_json::from_str(line).context(|| line.to_owned())?;
        ensure_eq!(event["id"], container.id.as_str(), "the id in {line}");
        stats += u32::from(event["type"] == "stats");
    }
    ensure!(stats >= 2, "{stats} times: {}", output.describe());
    Ok(())
}

/// Also of one that ends the container, between two looks at what it uses.
fn events_tell_of_each_kill(env: &Env) -> Result {
    env.only_bulkhead()?; // Others tell of each change that a kill makes.
    let mut bundle = Bundle::busybox(env)?;
    bundle.sh("while [ ! -e /go ]; do sleep 0.1; done; exec tail /dev/zero");
    bundle.set("/linux/resources", json!({ "memory": { "limit": 32 << 20, "swap": 32 << 20 } }));
    let container = Detached::run(env, &bundle)?;
    let before = container.exec("tail /dev/zero; echo $?").output()?;
    ensure!(before.stdout().ends_with("137\n"), "{}", before.describe());
    let mut events = container.verb(&["events", "--interval", "1h"]).spawn()?;
    events.wait_for("\"type\":\"stats\"")?;

    container.exec("for i in 1 2 3; do tail /dev/zero; done; true").output()?.expect_code(0)?;
    events.wait_for("\"type\":\"oom\"")?;
    ensure!(events.is_running()?, "the events have ended before the container");
    container.exec("touch /go").output()?.expect_code(0)?;

    let output = events.finish()?;
    output.expect_code(0)?;
    let text = output.stdout();
    let counted = ["stats", "oom"].map(|kind| text.matches(&format!("\"type\":\"{kind}\"")).count());
    ensure_eq!(counted, [1, 4], "lines of statistics and of kills in {text}");
    ensure_eq!(container.wait()?, 137, "the status");
    Ok(())
}

/// `exec --ignore-paused`, and a signal that has no name of its own.
fn process_for_a_paused_container(env: &Env) -> Result {
    let mut bundle = Bundle::busybox(env)?;
    bundle.sh("trap 'echo got 37' 37; echo up; while :; do sleep 0.1; done");
    let container = Detached::run(env, &bundle)?;
    container.wait_for("up\n")?;
    // runc knows such signals by their numbers only.
    let name = if env.kind == Kind::Bulkhead { "RTMIN+3" } else { "37" };
    container.must_with(&["kill"], &[name])?;
    container.wait_for("got 37\n")?;

    container.must(&["pause"])?;
    let mut exec = container.verb_with(&["exec", "--ignore-paused"], &["echo", "thawed"]).spawn()?;
    thread::sleep(Duration::from_secs(2));
    ensure!(exec.is_running()?, "it has ended in a paused container");
    container.expect_status("paused")?;
    container.must(&["resume"])?;

    exec.finish()?.expect_stdout("thawed\n")?;
    container.expect_status("running")
}

fn options_that_change_nothing(env: &Env) -> Result {
    env.only_bulkhead()?; // The others heed them.
    let mut bundle = Bundle::busybox(env)?;
    bundle.sh("echo fine");
    bundle.write()?;
    let (folder, id) = (bundle.folder.display().to_string(), env.id());

    let globals = ["--systemd-cgroup", "--rootless", "false", "--cgroup-manager", "disabled", "--criu", "/no/such"];
    let options = ["--no-pivot", "--no-new-keyring", "--no-subreaper", "--preserve-fds", "0"];
    // An option before the verb may stand behind it as well.
    let words = [&["run"][..], &options, &["--bundle", folder.as_str(), id.as_str(), "--debug"]].concat();
    let log = env.work.join("log-of-the-run").display().to_string();
    env.call(words).globals(globals).globals(["--log", log.as_str()]).output()?.expect_stdout("fine\n")?;

    env.call(["run", "--console-socket", "/no/such", "--bundle", folder.as_str(), id.as_str()])
        .output()?
        .expect_error(&["--console-socket"])
}

fn texts_made_from_the_command_line(env: &Env) -> Result {
    env.only_bulkhead()?;
    let folder = env.folder("bundle")?;
    env.call(["spec", "--bundle", &folder.display().to_string()]).output()?.expect_stdout("")?;
    let spec: Value = serde_json::from_str(&fs::read_to_string(folder.join("config.json"))?)?;
    ensure!(spec["ociVersion"].is_string() && spec["process"]["args"].is_array(), "{spec}");

    for shell in ["bash", "zsh", "fish"] {
        let output = env.call(["completion", shell]).output()?;
        output.expect_in_stdout(&["bulkhead", "ignore-paused", "console-socket", "dry-run"])?;
    }
    let pages = env.work.join("man8");
    env.call(["man", &pages.display().to_string()]).output()?.expect_stdout("")?;
    let verbs = [
        "run",
        "create",
        "start",
        "state",
        "kill",
        "exec",
        "delete",
        "list",
        "ps",
        "pause",
        "resume",
        "update",
        "events",
        "logs",
        "gc",
        "features",
        "spec",
        "check",
        "install-containerd",
        "completion",
    ];
    let names = verbs.map(|verb| format!("bulkhead-{verb}.8"));
    for name in names.iter().map(String::as_str).chain(["bulkhead.8"]) {
        let page = fs::read_to_string(pages.join(name)).context(|| format!("reading {name}"))?;
        ensure!(page.contains(".TH") && page.contains(".SH NAME"), "{name} is no page: {page}");
    }
    ensure_eq!(fs::read_dir(&pages)?.count(), verbs.len() + 1, "the pages");
    Ok(())
}

/// The same verb by several callers at the same time.
fn at_once(container: &Detached<'_>, words: &[&str], count: usize) -> Result<Vec<Output>> {
    let running = (0..count).map(|_| container.verb(words).spawn()).collect::<Result<Vec<_>>>()?;
    running.into_iter().map(Running::finish).collect()
}

/// One caller does it, or all do; whoever does not is told why, in a line.
fn verbs_at_once(env: &Env) -> Result {
    env.only_bulkhead()?; // Others are not made for it.
    let mut bundle = Bundle::busybox(env)?;
    bundle.sh("echo up; while :; do sleep 0.1; done");
    let container = Detached::create(env, &bundle)?;

    let started = at_once(&container, &["start"], 4)?;
    for output in started.iter().filter(|output| !output.status.success()) {
        output.expect_error(&["cannot start an already running container"])?;
    }
    ensure_eq!(started.iter().filter(|output| output.status.success()).count(), 1, "starts that succeed");
    container.wait_for("up\n")?;

    for words in [&["state"][..], &["ps"], &["events", "--stats"], &["update", "--pids-limit", "60"]] {
        for output in at_once(&container, words, 3)? {
            output.expect_code(0)?;
        }
    }
    let turns: Vec<_> = (0..8).map(|turn| if turn % 2 == 0 { "pause" } else { "resume" }).collect();
    let running = turns.iter().map(|verb| container.verb(&[*verb]).spawn()).collect::<Result<Vec<_>>>()?;
    for (verb, run) in turns.iter().zip(running) {
        let output = run.finish()?;
        if !output.status.success() {
            output.expect_error(&[if *verb == "pause" { "container not running" } else { "container not paused" }])?;
        }
    }
    if container.state()?["status"] == "paused" {
        container.must(&["resume"])?;
    }
    container.expect_status("running")?;
    let execs = (0..4).map(|_| container.exec("echo alive").spawn()).collect::<Result<Vec<_>>>()?;
    for exec in execs {
        exec.finish()?.expect_stdout("alive\n")?;
    }

    for output in at_once(&container, &["delete", "--force"], 4)? {
        output.expect_code(0)?;
    }
    container.verb(&["state"]).output()?.expect_error(&["does not exist"])
}
