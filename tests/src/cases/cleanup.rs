// SPDX-License-Identifier: Apache-2.0
//! Nothing is left over, however a run ends, and however many there are. What is looked for is in `leftovers`.

use std::ffi::OsString;
use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::json;

use super::network::{Namespace, container};
use super::verbs::FEW_FILES;
use super::{Case, case};
use crate::bundle::Bundle;
use crate::env::Env;
use crate::failure::{Context as _, Failure, Result, ensure, fail, skip};
use crate::processes::{self, Looks};

pub(super) const CASES: &[Case] = &[
    case!(killed_runtime_takes_its_machine_along),
    case!(killed_machine_ends_the_runtime),
    case!(killed_at_10_random_moments).limit(240),
    case!(killed_at_100_random_moments).slow(1800),
    case!(interrupted_during_the_boot),
    case!(signals_at_random_moments_of_the_start).limit(240),
    case!(ten_runs_in_a_row).limit(300),
    case!(two_hundred_runs_in_a_row).slow(1800),
    case!(five_at_once).limit(240).varies(),
    case!(twenty_at_once).slow(600).varies(),
    case!(same_id_at_once).limit(240).varies(),
    case!(stale_folder_with_other_things_in_it),
    case!(started_with_few_descriptors).limit(240),
    case!(killed_while_a_network_is_joined).limit(600),
];

fn sleeping(env: &Env) -> Result<Bundle> {
    let mut bundle = Bundle::busybox(env)?;
    bundle.sh("echo ready; exec sleep 1000");
    Ok(bundle)
}

/// No process is left below this one, at once.
fn ensure_no_processes(limit: Duration) -> Result {
    let end = Instant::now() + limit;
    let mut looks = Looks::begin();
    loop {
        processes::reap_orphans(&[]);
        let left = processes::descendants(std::process::id().cast_signed());
        if left.is_empty() {
            return Ok(());
        }
        ensure!(Instant::now() < end, "still there after {limit:?}: {:?}", left);
        looks.pause();
    }
}

fn killed_runtime_takes_its_machine_along(env: &Env) -> Result {
    env.only_bulkhead()?;
    let bundle = sleeping(env)?;

    let mut running = env.run(&bundle)?.spawn()?;
    running.wait_for("ready\n")?;
    running.signal(Signal::SIGKILL)?;
    running.finish()?;

    ensure_no_processes(Duration::from_secs(5))?;
    // The next run, of any container, removes what is left of the last.
    let mut next = Bundle::busybox(env)?;
    next.sh("echo next");
    env.run(&next)?.output()?.expect_stdout("next\n")
}

fn killed_machine_ends_the_runtime(env: &Env) -> Result {
    env.only_bulkhead()?;
    let bundle = sleeping(env)?;

    let mut running = env.run(&bundle)?.spawn()?;
    running.wait_for("ready\n")?;
    kill(Pid::from_raw(running.wait_for_vmm()?), Signal::SIGKILL)?;
    let killed = Instant::now();
    let output = running.finish()?;

    ensure!(killed.elapsed() < Duration::from_secs(3), "the runtime took {:?} to notice", killed.elapsed());
    output.expect_code(137)?;
    output.expect_error_line(&["VMM"])
}

/// Different on each run of the suite.
fn seed() -> u64 {
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    now.map_or(1, |now| now.subsec_nanos().into()) | 1
}

fn next_random(state: &mut u64) -> u64 {
    *state ^= *state << 13;
    *state ^= *state >> 7;
    *state ^= *state << 17;
    *state
}

/// A bundle that writes files, pumps output and ends, and the time that a run of it takes.
fn busy(env: &Env) -> Result<(Bundle, Duration)> {
    let mut bundle = Bundle::busybox(env)?;
    bundle.sh("n=0; while [ $n -lt 20 ]; do echo $n >/tmp/$n; seq 1 1000; n=$((n + 1)); done");
    let output = env.run(&bundle)?.output()?;
    output.expect_code(0)?;
    Ok((bundle, output.elapsed))
}

/// Kills one of a run's host processes at a random moment of its life, `count` times.
fn killed_at_random_moments(env: &Env, count: usize) -> Result {
    env.only_bulkhead()?;
    let (bundle, whole) = busy(env)?;
    let mut state = seed();
    let (mut runtimes, mut vmms) = (0, 0);
    for number in 0..count {
        let delay = Duration::from_micros(next_random(&mut state) % u64::try_from(whole.as_micros())?.max(1));
        let kill_vmm = next_random(&mut state).is_multiple_of(2);
        let running = env.run(&bundle)?.spawn()?;
        std::thread::sleep(delay);
        let vmm = processes::descendants(running.pid()).into_iter().find(|process| process.name == "bulkhead-vmm");
        let victim = match vmm {
            Some(process) if kill_vmm => {
                vmms += 1;
                process.pid
            }
            _ => {
                runtimes += 1;
                running.pid()
            }
        };
        // It may have ended by itself.
        let _ = kill(Pid::from_raw(victim), Signal::SIGKILL);
        let told = || {
            format!("kill {number} of {}, {delay:?} after the start", if kill_vmm { "the VMM" } else { "the runtime" })
        };
        let output = running.finish().map_err(|failure| at(told(), failure))?;
        if kill_vmm && vmm_was_killed(&output) {
            output.expect_error_line(&[]).map_err(|failure| at(told(), failure))?;
        }
        ensure_no_processes(Duration::from_secs(10)).map_err(|failure| at(told(), failure))?;
    }
    // Ten may all be of one kind.
    ensure!(count < 100 || runtimes.min(vmms) >= count / 5, "killed were {runtimes} runtimes and {vmms} VMMs");
    let mut last = Bundle::busybox(env)?;
    last.sh("echo last");
    env.run(&last)?.output()?.expect_stdout("last\n")
}

fn vmm_was_killed(output: &crate::output::Output) -> bool {
    output.status.code().is_some_and(|code| code != 0)
}

fn at(moment: String, failure: Failure) -> Failure {
    match failure {
        Failure::Failed(reason) => Failure::Failed(format!("{moment}: {reason}")),
        skipped @ Failure::Skipped(_) => skipped,
    }
}

fn killed_at_10_random_moments(env: &Env) -> Result {
    killed_at_random_moments(env, 10)
}

fn killed_at_100_random_moments(env: &Env) -> Result {
    killed_at_random_moments(env, 100)
}

fn interrupted_during_the_boot(env: &Env) -> Result {
    env.only_bulkhead()?;
    let bundle = sleeping(env)?;
    for (signal, code) in [(Signal::SIGINT, 130), (Signal::SIGTERM, 143), (Signal::SIGHUP, 129)] {
        let running = env.run(&bundle)?.spawn()?;
        running.wait_for_vmm()?;
        running.signal(signal)?;
        let sent = Instant::now();
        let output = running.finish()?;

        ensure!(sent.elapsed() < Duration::from_secs(5), "{signal} took {:?}", sent.elapsed());
        output.expect_code(code)?;
        output.expect_error_line(&[signal.as_str()])?;
    }
    Ok(())
}

/// Wherever it comes, SIGTERM is not lost: before the container has a handler it may be in vain, as without a runtime.
fn signals_at_random_moments_of_the_start(env: &Env) -> Result {
    env.only_bulkhead()?;
    let (_, whole) = busy(env)?;
    let mut bundle = Bundle::busybox(env)?;
    bundle.sh("trap 'exit 143' TERM; while :; do sleep 0.1; done");
    let mut state = seed();
    for number in 0..10u32 {
        let delay = Duration::from_micros(next_random(&mut state) % u64::try_from(whole.as_micros())?.max(1));
        let mut running = env.run(&bundle)?.spawn()?;
        std::thread::sleep(delay);
        while running.is_running()? {
            running.signal(Signal::SIGTERM)?;
            std::thread::sleep(Duration::from_millis(500));
        }
        let output = running.finish().map_err(|failure| at(format!("signal {number} after {delay:?}"), failure))?;
        // Before the runtime takes care of signals, they end it as any program.
        let ended = output.status.code() == Some(143) || output.status.code().is_none();
        ensure!(ended, "signal {number} after {delay:?}: {}", output.describe());
    }
    env.clean_up()
}

fn in_a_row(env: &Env, count: usize) -> Result {
    let mut bundle = Bundle::busybox(env)?;
    let open_before = fs::read_dir("/proc/self/fd")?.count();
    for number in 0..count {
        bundle.sh(&format!("echo {number}; exit {}", number % 100));
        let output = env.run(&bundle)?.output()?;
        if env.forgives(&output.stderr()) {
            continue;
        }
        output.expect_code(i32::try_from(number % 100)?)?;
        ensure!(output.stdout() == format!("{number}\n"), "run {number}: {}", output.describe());
    }
    ensure!(fs::read_dir("/proc/self/fd")?.count() <= open_before, "descriptors were left in the test itself");
    Ok(())
}

fn ten_runs_in_a_row(env: &Env) -> Result {
    in_a_row(env, 10)
}

fn two_hundred_runs_in_a_row(env: &Env) -> Result {
    in_a_row(env, 200)
}

fn at_once(env: &Env, count: usize) -> Result {
    let limit = Duration::from_secs(500);
    let mut running = Vec::new();
    for number in 0..count {
        let mut bundle = Bundle::busybox(env)?;
        bundle.sh(&format!("echo {number}; read line; echo \"$line\"; exit {number}"));
        bundle.annotation("io.bulkhead.memory_mib", "128");
        running.push(env.run(&bundle)?.open_stdin().limit(limit).spawn()?);
    }
    for (number, run) in running.iter_mut().enumerate() {
        run.wait_for(&format!("{number}\n"))
            .map_err(|failure| at(format!("container {number} of {count}"), failure))?;
    }
    for (number, mut run) in running.into_iter().enumerate() {
        run.write(format!("for {number}\n").as_bytes())?;
        let output = run.finish().map_err(|failure| at(format!("container {number} of {count}"), failure))?;
        output.expect_code(i32::try_from(number)?)?;
        ensure!(output.stdout() == format!("{number}\nfor {number}\n"), "container {number}: {}", output.describe());
    }
    Ok(())
}

fn five_at_once(env: &Env) -> Result {
    at_once(env, 5)
}

fn twenty_at_once(env: &Env) -> Result {
    at_once(env, 20)
}

/// Of several runs with one id at once, one wins, and the others say so.
fn same_id_at_once(env: &Env) -> Result {
    env.only_bulkhead()?;
    let bundle = sleeping(env)?;
    let id = env.id();
    let mut running = Vec::new();
    for _ in 0..5 {
        running.push(env.run_as(&bundle, &id)?.spawn()?);
    }
    let end = Instant::now() + Duration::from_secs(60);
    loop {
        let mut alive = 0;
        for run in &mut running {
            alive += usize::from(run.is_running()?);
        }
        match alive {
            0 => fail!("none of the runs won"),
            1 => break,
            _ => ensure!(Instant::now() < end, "{alive} runs have the same id"),
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    let mut refused = 0;
    for mut run in running {
        if run.is_running()? {
            run.wait_for("ready\n")?;
        } else {
            run.finish()?.expect_error(&[&id])?;
            refused += 1;
        }
    }
    ensure!(refused == 4, "{refused} runs were refused");
    env.clean_up()
}

/// Only what the runtime made is removed from `--root`.
fn stale_folder_with_other_things_in_it(env: &Env) -> Result {
    env.only_bulkhead()?;
    let root = env.folder("busy-root")?;
    fs::create_dir_all(root.join("mine/deep"))?;
    fs::write(root.join("mine/deep/file"), "kept\n")?;
    fs::write(root.join("note"), "kept\n")?;
    let mut bundle = Bundle::busybox(env)?;
    bundle.sh("echo fine").set("/annotations", json!({}));

    env.run(&bundle)?.root(&root).output()?.expect_stdout("fine\n")?;
    env.run_as(&bundle, "mine")?.root(&root).output()?.expect_error(&["mine"])?;

    for file in ["mine/deep/file", "note"] {
        let content = fs::read_to_string(root.join(file)).context(|| format!("reading {file}"))?;
        ensure!(content == "kept\n", "{file} was changed");
    }
    ensure!(fs::read_dir(&root)?.count() == 2, "something was left in the root");
    Ok(())
}

/// More requests than are made to the kernel for a network of one interface.
const MOST_REQUESTS: usize = 60;

/// Kills the runtime before each request that it makes to the kernel for its network: what it has made by then is undone by the
/// next command.
fn killed_while_a_network_is_joined(env: &Env) -> Result {
    let strace = Path::new("/usr/bin/strace");
    if !strace.exists() {
        skip!("there is no {} (package strace)", strace.display());
    }
    let namespace = Namespace::new(env, "joined")?.with_addresses(50)?;
    let before = namespace.leftovers()?;
    let bundle = container(env, &namespace, "echo joined")?;
    bundle.write()?;
    for number in 1..=MOST_REQUESTS {
        let kill = format!("inject=sendto:signal=SIGKILL:when={number}");
        let words = ["-f", "-o", "/dev/null", "-e", "trace=sendto", "-e", &kill].map(OsString::from).into_iter();
        let run: [OsString; 7] = [
            env.runtime.clone().into(),
            "--root".into(),
            env.root.clone().into(),
            "run".into(),
            "--bundle".into(),
            bundle.folder.clone().into(),
            env.id().into(),
        ];
        let output = env.tool(strace, words.chain(run)).output()?;
        env.call(["gc"]).output()?.expect_code(0)?;
        let end = Instant::now() + Duration::from_secs(5);
        while namespace.leftovers()? != before && Instant::now() < end {
            std::thread::sleep(Duration::from_millis(50));
        }
        let left = namespace.leftovers()?;
        ensure!(left == before, "what is left by a kill before request {number}: {left}");
        if output.status.success() {
            ensure!(number > 10, "only {number} requests were made");
            return output.expect_stdout("joined\n");
        }
    }
    fail!("more than {MOST_REQUESTS} requests were made")
}

/// Wherever it fails, it says so, and whatever hooks have made is undone by others.
fn started_with_few_descriptors(env: &Env) -> Result {
    env.only_bulkhead()?; // runc needs some to begin with.
    let mut bundle = Bundle::busybox(env)?;
    let told = env.work.join("told");
    let hook =
        |word: &str| json!([{ "path": "/bin/sh", "args": ["sh", "-c", format!("echo {word} >>{}", told.display())] }]);
    bundle.set("/hooks", json!({ "createRuntime": hook("made"), "poststop": hook("undone") })).args(&["true"]);
    let mut successes = 0;
    for files in (5..=65).step_by(4) {
        let run = env.run_as(&bundle, &format!("{}-{files}", env.id()))?;
        let output = run.wrapper(FEW_FILES).variable("FILES", files.to_string()).output()?;
        if output.status.success() {
            successes += 1;
        } else {
            // That hooks could not be run is a warning of its own.
            let said = output.stderr();
            let why = ["open files", "file table overflow"];
            ensure!(why.iter().any(|why| said.contains(why)), "with {files} descriptors: {}", output.describe());
            ensure!(!said.contains("internal error"), "with {files} descriptors: {}", output.describe());
        }
        let told = fs::read_to_string(&told).unwrap_or_default();
        let count = |word: &str| told.lines().filter(|line| *line == word).count();
        ensure!(count("made") == count("undone"), "with {files} descriptors: {told:?}: {}", output.describe());
        ensure_no_processes(Duration::from_secs(20))?;
    }
    ensure!(successes > 0, "more descriptors are needed than are tried");
    Ok(())
}
