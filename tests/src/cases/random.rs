// SPDX-License-Identifier: Apache-2.0
//! Verbs in random order, and processes that are killed at random, also in the middle of a verb: `state` is true at each step, and
//! nothing is left over.

use std::fs::{self, File};
use std::thread;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;

use super::surroundings::{KINDS, LOOK, Surroundings};
use super::{Case, case};
use crate::bundle::Bundle;
use crate::detached::Detached;
use crate::env::Env;
use crate::failure::{Context as _, Failure, Result, ensure, ensure_eq, fail};
use crate::output::Output;
use crate::processes;
use crate::run::Run;

pub(super) const CASES: &[Case] = &[
    case!(verbs_and_kills_for_a_minute).limit(600).varies(),
    case!(verbs_and_kills_for_ten_minutes).slow(1200).varies(),
];

/// The environment variable that has a sequence drawn again.
const SEED: &str = "BULKHEAD_TEST_SEED";

/// Containers at least, where all is slow.
const FEWEST_LIVES: u32 = 4;

/// Steps of a container at most.
const STEPS: usize = 16;

/// The status of what SIGKILL has ended.
const KILLED: i32 = 137;

/// How long a verb, or a run, may have gone on when something is killed.
const LATEST_KILL_MS: u64 = 400;
const LATEST_KILL_OF_A_RUN_MS: u64 = 4000;

fn verbs_and_kills_for_a_minute(env: &Env) -> Result {
    drive(env, Duration::from_secs(60))
}

fn verbs_and_kills_for_ten_minutes(env: &Env) -> Result {
    drive(env, Duration::from_secs(600))
}

fn drive(env: &Env, time: Duration) -> Result {
    env.only_bulkhead()?;
    let seed = seed()?;
    let mut random = Random(seed);
    let end = Instant::now() + time;
    let mut lives = 0;
    while Instant::now() < end || lives < FEWEST_LIVES {
        let life = if random.below(6) == 0 { life_in_the_foreground } else { detached_life };
        match life(env, &mut random).and_then(|()| nothing_is_left(env)) {
            Err(Failure::Failed(reason)) => fail!("container {lives} of {SEED}={seed}: {reason}"),
            result => result?,
        }
        lives += 1;
    }
    Ok(())
}

/// Never 0, from which nothing is drawn.
fn seed() -> Result<u64> {
    match std::env::var(SEED) {
        Ok(text) => Ok(text.parse::<u64>().context(|| format!("{SEED}={text}"))?.max(1)),
        Err(_) => Ok(u64::from(SystemTime::now().duration_since(UNIX_EPOCH)?.subsec_nanos()) | 1),
    }
}

fn nothing_is_left(env: &Env) -> Result {
    env.call(["list", "--quiet"]).output()?.expect_stdout("")?;
    let left: Vec<_> = fs::read_dir(&env.root)?.flatten().map(|entry| entry.file_name()).collect();
    ensure!(left.is_empty(), "left below --root: {left:?}");
    Ok(())
}

/// `run`, left to itself, or ended by a signal at a random moment.
fn life_in_the_foreground(env: &Env, random: &mut Random) -> Result {
    let mut bundle = Bundle::busybox(env)?;
    bundle.sh("sleep 0.2; exit 5");
    let surroundings = Surroundings::draw(env, &mut bundle, random.below(1 << KINDS))?;
    let id = env.id();
    let running = env.run_as(&bundle, &id)?.spawn()?;
    let signal = [None, Some(Signal::SIGTERM), Some(Signal::SIGKILL)][random.index(3)];
    if let Some(signal) = signal {
        thread::sleep(random.below_ms(LATEST_KILL_OF_A_RUN_MS));
        // It may have ended.
        let _ = kill(Pid::from_raw(running.pid()), signal);
    }
    let output = running.finish()?;
    if env.forgives(&output.stderr()) {
        return Ok(());
    }
    match signal {
        None => output.expect_code(5)?,
        // An init that handles no signals takes none; before there is one the start is given up, or has not begun.
        Some(Signal::SIGTERM) => {
            ensure!(matches!(output.status.code(), Some(5 | 143) | None), "after SIGTERM: {}", output.describe());
        }
        Some(_) => {
            ensure!(matches!(output.status.code(), Some(5) | None), "after SIGKILL: {}", output.describe());
            env.call(["gc"]).output()?.expect_code(0)?;
        }
    }
    env.call(["state", &id]).output()?.expect_error(&["does not exist"])?;
    surroundings.ensure_gone(signal.is_none())
}

/// What a container should be.
#[derive(Debug, Clone, Copy)]
struct Expected {
    status: &'static str,
    started: bool,
}

impl Expected {
    /// Whether a verb succeeds. Changes to what the container is then.
    fn apply(&mut self, verb: &str) -> bool {
        self.status = match (verb, self.status) {
            ("state" | "ps" | "logs", status) => status,
            ("update" | "events", "created" | "running" | "paused") => self.status,
            ("start", "created") => {
                self.started = true;
                "running"
            }
            ("pause", "created" | "running") => "paused",
            ("resume", "paused") => self.thawed(),
            // SIGKILL reaches what is frozen, too.
            ("kill", "created" | "running" | "paused") => "stopped",
            ("delete", "created" | "stopped") => "deleted",
            _ => return false,
        };
        true
    }

    fn thawed(&self) -> &'static str {
        if self.started { "running" } else { "created" }
    }

    fn has_ended(&self) -> bool {
        matches!(self.status, "stopped" | "deleted")
    }
}

/// One thing that is done to a container.
#[derive(Debug, Clone, Copy)]
enum Step {
    Verb(&'static str),
    /// The verb's own process is killed meanwhile; then it is given again.
    BrokenOff(&'static str),
    /// The supervisor, or its VMM, is killed meanwhile.
    Undermined(&'static str),
    Exec,
    ExecThoughPaused,
    KillSupervisorOrMachine,
    KillProcessOfExec,
    List,
    Gc,
}

impl Step {
    fn draw(random: &mut Random) -> Self {
        const VERBS: [&str; 11] =
            ["start", "start", "start", "pause", "resume", "resume", "ps", "update", "events", "logs", "state"];
        const BROKEN_OFF: [&str; 6] = ["start", "pause", "resume", "update", "events", "ps"];
        const UNDERMINED: [&str; 8] = ["start", "pause", "resume", "update", "events", "ps", "kill", "exec"];
        match random.below(24) {
            0..11 => Self::Verb(VERBS[random.index(VERBS.len())]),
            11 if random.below(2) == 0 => Self::Verb("delete"),
            12 if random.below(2) == 0 => Self::Verb("kill"),
            13 | 14 => Self::BrokenOff(BROKEN_OFF[random.index(BROKEN_OFF.len())]),
            15 => Self::Undermined(UNDERMINED[random.index(UNDERMINED.len())]),
            16 if random.below(2) == 0 => Self::KillSupervisorOrMachine,
            17 | 18 => Self::Exec,
            19 | 20 => Self::ExecThoughPaused,
            21 => Self::KillProcessOfExec,
            22 => Self::Gc,
            _ => Self::List,
        }
    }
}

fn detached_life(env: &Env, random: &mut Random) -> Result {
    let mut bundle = Bundle::busybox(env)?;
    bundle.sh("while :; do sleep 0.1; done");
    let surroundings = Surroundings::draw(env, &mut bundle, random.below(1 << KINDS))?;
    let is_started = random.below(3) == 0;
    let made = if is_started { Detached::run(env, &bundle) } else { Detached::create(env, &bundle) };
    let container = match made {
        Err(Failure::Failed(reason)) if env.forgives(&reason) => return Ok(()),
        made => made?,
    };
    let status = if is_started { "running" } else { "created" };
    live(env, &container, Expected { status, started: is_started }, random)?;
    surroundings.ensure_gone(true)
}

/// Takes steps until the container is deleted.
fn live(env: &Env, container: &Detached<'_>, mut expected: Expected, random: &mut Random) -> Result {
    for _ in 0..STEPS {
        let (step, before) = (Step::draw(random), expected);
        take(env, container, step, &mut expected, random).map_err(|failure| match failure {
            Failure::Failed(reason) => Failure::Failed(format!("{step:?} while {}: {reason}", before.status)),
            skipped @ Failure::Skipped(_) => skipped,
        })?;
        match expected.status {
            "deleted" => return container.verb(&["state"]).output()?.expect_error(&["does not exist"]),
            // The end follows what causes it.
            "stopped" => {
                container.wait_for_status("stopped")?;
                // Whoever it was that was killed: init, the machine, or the supervisor and with it the machine.
                container.expect_exit_status(KILLED)?;
            }
            status => container.expect_status(status)?,
        }
    }
    container.must(&["delete", "--force"]).map(drop)
}

/// Takes one step, and says what the container is then.
fn take(env: &Env, container: &Detached<'_>, step: Step, expected: &mut Expected, random: &mut Random) -> Result {
    match step {
        Step::Verb(verb) => {
            let output = call(container, verb).output()?;
            ensure_eq!(output.status.success(), expected.apply(verb), "whether it succeeds: {}", output.describe());
        }
        Step::BrokenOff(verb) if expected.clone().apply(verb) => {
            let running = call(container, verb).spawn()?;
            thread::sleep(random.below_ms(LATEST_KILL_MS));
            // It may have ended.
            let _ = kill(Pid::from_raw(running.pid()), Signal::SIGKILL);
            running.finish()?;
            expected.apply(verb);
            let again = call(container, verb).output()?;
            if !again.status.success() {
                again.expect_error(&[match verb {
                    "start" => "cannot start an already running container",
                    "pause" => "container not running",
                    _ => "container not paused",
                }])?;
            }
            // A start that is under way is not waited for by a second one.
            container.wait_for_status(expected.status)?;
        }
        Step::Undermined(verb) if !expected.has_ended() => {
            let running = call(container, verb).spawn()?;
            thread::sleep(random.below_ms(LATEST_KILL_MS));
            kill_something(container, random);
            expect_undermined(verb, &running.finish()?)?;
            expected.status = "stopped";
        }
        Step::Exec => {
            let output = container.exec(&format!("{LOOK} exit 4")).output()?;
            let code = if matches!(expected.status, "created" | "running") { 4 } else { 255 };
            output.expect_code(code)?;
        }
        Step::ExecThoughPaused => exec_though_paused(container, expected)?,
        Step::KillSupervisorOrMachine if !expected.has_ended() => {
            kill_something(container, random);
            expected.status = "stopped";
        }
        Step::KillProcessOfExec if matches!(expected.status, "created" | "running") => {
            kill_process_of_exec(env, container)?;
        }
        // Of a container whose supervisor was killed there is something to be taken away.
        Step::Gc if !expected.has_ended() => env.call(["gc"]).output()?.expect_stdout("")?,
        Step::List => {
            let listed: Vec<Value> = serde_json::from_slice(&env.call(["list", "-f", "json"]).output()?.stdout)?;
            let own = listed.iter().find(|state| state["id"] == container.id.as_str());
            ensure!(own.is_some_and(|own| own["status"] == expected.status), "listed: {listed:?}");
        }
        Step::BrokenOff(_)
        | Step::Undermined(_)
        | Step::KillSupervisorOrMachine
        | Step::KillProcessOfExec
        | Step::Gc => {}
    }
    Ok(())
}

/// How a verb has ended that something was killed under: it was done before, or it could not be, and one line says why.
fn expect_undermined(verb: &str, output: &Output) -> Result {
    /// What of the container was not there any more, or not as it has to be.
    const REASONS: [&str; 7] = [
        "supervisor",
        "the connection to the guest's agent was lost",
        "does not answer",
        "VMM",
        "not running",
        "cannot start a",
        "not paused",
    ];
    match (verb, output.status.code()) {
        ("exec", Some(4 | KILLED)) => Ok(()),
        ("exec", _) => output.expect_error_code(255, &["exec failed"]),
        (_, Some(0)) => Ok(()),
        _ => {
            output.expect_error_code(1, &[])?;
            let why = output.stderr();
            ensure!(
                REASONS.iter().any(|reason| why.contains(reason)),
                "{verb} fails for another reason: {}",
                output.describe()
            );
            Ok(())
        }
    }
}

/// A verb with what it needs.
fn call<'a>(container: &Detached<'a>, verb: &'static str) -> Run<'a> {
    match verb {
        // SIGKILL is the one signal that an init without handlers heeds.
        "kill" => container.verb_with(&["kill"], &["KILL"]),
        "exec" => container.exec("sleep 0.2; exit 4"),
        "update" => container.verb(&["update", "--pids-limit", "64"]),
        "events" => container.verb(&["events", "--stats"]),
        verb => container.verb(&[verb]),
    }
}

/// It runs when the container goes on.
fn exec_though_paused(container: &Detached<'_>, expected: &mut Expected) -> Result {
    let mut exec = container.verb_with(&["exec", "--ignore-paused"], &["sh", "-c", "exit 4"]).spawn()?;
    if expected.status == "paused" {
        thread::sleep(Duration::from_secs(1));
        ensure!(exec.is_running()?, "it has ended in a paused container");
        container.must(&["resume"])?;
        expected.status = expected.thawed();
    }
    let code = if expected.has_ended() { 255 } else { 4 };
    exec.finish()?.expect_code(code)
}

/// Kills the supervisor, or its VMM if that is there.
fn kill_something(container: &Detached<'_>, random: &mut Random) {
    // Drawn in any case: what is drawn later is not to depend on how long something has taken.
    let is_vmm = random.below(2) == 0;
    let below = processes::descendants(container.pid);
    let vmm = below.iter().find(|process| process.name.starts_with("bulkhead-vmm")).map(|process| process.pid);
    let victim = vmm.filter(|_| is_vmm).unwrap_or(container.pid);
    // It may have ended meanwhile.
    let _ = kill(Pid::from_raw(victim), Signal::SIGKILL);
}

/// Executes something that goes on, and kills the process that stands for it on the host.
fn kill_process_of_exec(env: &Env, container: &Detached<'_>) -> Result {
    let file = env.work.join("exec.pid");
    let options = ["exec", "--detach", "--pid-file", &file.display().to_string()];
    let output = File::create(env.work.join("exec.out"))?;
    let exec = container.verb_with(&options, &["sleep", "1000"]).stdout(output.try_clone()?).stderr(output);
    exec.output()?.expect_code(0)?;
    let pid = fs::read_to_string(&file)?.trim().parse()?;
    kill(Pid::from_raw(pid), Signal::SIGKILL)?;
    Ok(())
}

/// xorshift64: enough for choosing.
struct Random(u64);

impl Random {
    fn below(&mut self, bound: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % bound
    }

    fn index(&mut self, length: usize) -> usize {
        // Of no more than a few.
        self.below(length as u64) as usize
    }

    fn below_ms(&mut self, bound: u64) -> Duration {
        Duration::from_millis(self.below(bound))
    }
}
