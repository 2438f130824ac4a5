// SPDX-License-Identifier: Apache-2.0
//! What is done to a container that lives on: pause, resume, update, events, ps, list, a terminal for an engine, hooks.

use std::fs::{self, File};
use std::io::{IoSliceMut, Read, Write};
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::net::UnixListener;
use std::thread;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use nix::cmsg_space;
use nix::sys::signal::{Signal, kill};
use nix::sys::socket::{ControlMessageOwned, MsgFlags, recvmsg};
use nix::unistd::Pid;
use serde_json::{Value, json};

use super::{Case, case};
use crate::bundle::Bundle;
use crate::detached::Detached;
use crate::env::{Env, Kind};
use crate::failure::{Failure, Result, ensure, ensure_eq, fail};
use crate::processes;
use crate::run::Collector;

pub(super) const CASES: &[Case] = &[
    case!(paused_container_stands_still),
    case!(paused_container_can_be_deleted),
    case!(limits_are_changed),
    case!(usage_is_told),
    case!(processes_are_listed),
    case!(containers_are_listed),
    case!(console_goes_to_the_engine),
    case!(consoles_have_their_size),
    case!(hooks_of_a_container_that_lives_on),
    case!(verbs_and_kills_in_random_order).slow(1200),
];

/// A container that writes dots.
fn ticking(env: &Env) -> Result<Detached<'_>> {
    let mut bundle = Bundle::busybox(env)?;
    bundle.sh("while :; do printf .; sleep 0.1; done");
    let container = Detached::run(env, &bundle)?;
    container.wait_for("..")?;
    Ok(container)
}

fn paused_container_stands_still(env: &Env) -> Result {
    let container = ticking(env)?;

    container.must(&["pause"])?;
    container.expect_status("paused")?;
    // What was on its way when it was frozen arrives.
    thread::sleep(Duration::from_secs(1));
    let before = container.output()?.len();
    thread::sleep(Duration::from_secs(2));
    ensure_eq!(container.output()?.len(), before, "the length of a paused container's output");
    container.exec("true").output()?.expect_error(&["paused"])?;
    container.must(&["resume"])?;
    container.expect_status("running")?;

    let end = Instant::now() + Duration::from_secs(60);
    while container.output()?.len() <= before {
        ensure!(Instant::now() < end, "nothing comes after resume");
        thread::sleep(Duration::from_millis(50));
    }
    container.verb(&["resume"]).output()?.expect_error(&["not paused"])
}

fn paused_container_can_be_deleted(env: &Env) -> Result {
    let container = ticking(env)?;

    container.must(&["pause"])?;
    container.must(&["delete", "--force"])?;

    container.verb(&["state"]).output()?.expect_error(&["does not exist"])
}

fn limits_are_changed(env: &Env) -> Result {
    let container = ticking(env)?;
    let limits = "cat /sys/fs/cgroup/pids.max /sys/fs/cgroup/cpu.max /sys/fs/cgroup/memory.max";

    container.must(&["update", "--pids-limit", "40", "--cpu-quota", "30000", "--cpu-period", "60000"])?;
    container.exec(limits).output()?.expect_stdout("40\n30000 60000\nmax\n")?;
    let resources = json!({ "pids": { "limit": 41 }, "memory": { "limit": 100 << 20 } }).to_string();
    let output = container.verb(&["update", "--resources", "-"]).input(resources).output()?;
    output.expect_code(0)?;
    container.exec(limits).output()?.expect_stdout("41\n30000 60000\n104857600\n")?;
    container.verb(&["update", "--resources", "-"]).input("{").output()?.expect_error(&["limits", "JSON"])
}

fn usage_is_told(env: &Env) -> Result {
    let container = ticking(env)?;

    let output = container.must(&["events", "--stats"])?;

    let event: Value = serde_json::from_slice(&output.stdout)?;
    ensure_eq!(event["type"], "stats", "the type");
    ensure_eq!(event["id"], container.id.as_str(), "the id");
    for path in ["/data/cpu/usage/total", "/data/memory/usage/usage", "/data/pids/current"] {
        ensure!(event.pointer(path).and_then(Value::as_u64).is_some_and(|value| value > 0), "{path} in {event}");
    }
    Ok(())
}

fn processes_are_listed(env: &Env) -> Result {
    let container = ticking(env)?;

    let pids: Vec<i32> = serde_json::from_slice(&container.must(&["ps", "--format", "json"])?.stdout)?;
    ensure!(!pids.is_empty() && pids.iter().all(|pid| *pid > 0), "the pids {pids:?}");
    container.must(&["ps"])?.expect_in_stdout(&["PID", "sh -c"])
}

fn containers_are_listed(env: &Env) -> Result {
    let container = ticking(env)?;

    let listed: Vec<Value> = serde_json::from_slice(&env.call(["list", "--format", "json"]).output()?.stdout)?;
    ensure_eq!(listed.len(), 1, "the number of containers");
    ensure_eq!(listed[0]["id"], container.id.as_str(), "the id");
    ensure_eq!(listed[0]["status"], "running", "the status");
    env.call(["list", "--quiet"]).output()?.expect_stdout(&format!("{}\n", container.id))?;
    env.call(["list"]).output()?.expect_in_stdout(&["ID", "STATUS", "BUNDLE", &container.id])
}

fn console_goes_to_the_engine(env: &Env) -> Result {
    let mut bundle = Bundle::busybox(env)?;
    bundle.sh("tty; read line; echo \"got $line\"; exit 6").set("/process/terminal", json!(true));
    let path = env.work.join("console.sock");
    let listener = UnixListener::bind(&path)?;
    let receiver = thread::spawn(move || receive_descriptor(&listener));

    let container = Detached::create_with_console(env, &bundle, &path.display().to_string())?;
    let Ok(console) = receiver.join() else { fail!("the receiver of the console panicked") };
    let mut console = File::from(console?);
    container.must(&["start"])?;
    console.write_all(b"hello\n")?;

    ensure_eq!(container.wait()?, 6, "the status");
    let mut shown = Vec::new();
    // A terminal whose other side is closed fails instead of ending.
    let _ = console.read_to_end(&mut shown);
    let shown = String::from_utf8_lossy(&shown).into_owned();
    ensure!(shown.contains("/dev/") && shown.contains("got hello"), "what the terminal shows: {shown:?}");
    Ok(())
}

/// The descriptor that comes with the first message of the first connection.
pub(super) fn receive_descriptor(listener: &UnixListener) -> Result<OwnedFd> {
    let (stream, _) = listener.accept()?;
    let mut name = [0; 4096];
    let mut space = cmsg_space!([i32; 1]);
    let mut parts = [IoSliceMut::new(&mut name)];
    let message = recvmsg::<()>(stream.as_raw_fd(), &mut parts, Some(&mut space), MsgFlags::MSG_CMSG_CLOEXEC)?;
    for control in message.cmsgs()? {
        if let ControlMessageOwned::ScmRights(descriptors) = control
            && let [descriptor] = descriptors[..]
        {
            // SAFETY: it has just been received, so nobody else owns it.
            return Ok(unsafe { OwnedFd::from_raw_fd(descriptor) });
        }
    }
    fail!("no descriptor came with the console's message")
}

fn hooks_of_a_container_that_lives_on(env: &Env) -> Result {
    let mut bundle = Bundle::busybox(env)?;
    let order = bundle.folder.join("order");
    let mut hooks = json!({});
    for kind in ["prestart", "createRuntime", "createContainer", "poststart", "poststop"] {
        let script = format!("echo {kind} >> {}", order.display());
        hooks[kind] = json!([{ "path": "/bin/sh", "args": ["sh", "-c", script] }]);
    }
    bundle.set("/hooks", hooks).sh("exit 0");
    let seen = || -> Result<String> { Ok(fs::read_to_string(&order)?.replace('\n', " ")) };

    let container = Detached::create(env, &bundle)?;
    // runc 1.1 runs the poststart hooks before the start.
    if env.kind == Kind::Bulkhead {
        ensure_eq!(seen()?, "prestart createRuntime createContainer ", "the hooks of create");
    }
    container.must(&["start"])?;
    ensure_eq!(seen()?, "prestart createRuntime createContainer poststart ", "the hooks up to start");
    container.wait()?;
    container.must(&["delete"])?;
    ensure_eq!(seen()?, "prestart createRuntime createContainer poststart poststop ", "the hooks up to delete");
    Ok(())
}

/// How long the random test goes on.
const RANDOM_TEST: Duration = Duration::from_secs(600);

/// Drives one container after the other through random verbs, kills its processes at random, and looks at what `state`
/// says each time. The seed is told on failure.
fn verbs_and_kills_in_random_order(env: &Env) -> Result {
    env.only_bulkhead()?;
    let seed = u64::from(SystemTime::now().duration_since(UNIX_EPOCH)?.subsec_nanos()) | 1;
    let mut random = Random(seed);
    let end = Instant::now() + RANDOM_TEST;
    let mut containers = 0;
    while Instant::now() < end {
        match random_life(env, &mut random) {
            Err(Failure::Failed(reason)) => fail!("container {containers} of seed {seed}: {reason}"),
            result => result?,
        }
        containers += 1;
    }
    ensure!(containers > 3, "only {containers} containers in {RANDOM_TEST:?}");
    env.call(["list", "--quiet"]).output()?.expect_stdout("")
}

/// What a container should be.
struct Expected {
    status: &'static str,
    started: bool,
}

impl Expected {
    /// Whether a verb succeeds. Changes to what the container is then.
    fn apply(&mut self, verb: &str) -> bool {
        self.status = match (verb, self.status) {
            ("state" | "ps", status) => status,
            ("update" | "events", "created" | "running" | "paused") => self.status,
            ("start", "created") => {
                self.started = true;
                "running"
            }
            ("pause", "created" | "running") => "paused",
            ("resume", "paused") => {
                if self.started {
                    "running"
                } else {
                    "created"
                }
            }
            // SIGKILL reaches what is frozen, too.
            ("kill", "created" | "running" | "paused") => "stopped",
            ("delete", "created" | "stopped") => "deleted",
            _ => return false,
        };
        true
    }
}

fn random_life(env: &Env, random: &mut Random) -> Result {
    let mut bundle = Bundle::busybox(env)?;
    bundle.sh("while :; do sleep 0.1; done");
    let container = match Detached::create(env, &bundle) {
        Err(Failure::Failed(reason)) if env.forgives(&reason) => return Ok(()),
        created => created?,
    };
    let mut expected = Expected { status: "created", started: false };
    for _ in 0..16 {
        let words: &[&str] = match random.below(15) {
            0..3 => &["start"],
            3 => &["pause"],
            4 | 5 => &["resume"],
            6 if random.below(2) == 0 => &["delete"],
            7 if random.below(2) == 0 => &["kill"],
            8 => {
                let output = container.exec("exit 4").output()?;
                let code = if matches!(expected.status, "created" | "running") { 4 } else { 255 };
                ensure!(output.status.code() == Some(code), "exec while {}: {}", expected.status, output.describe());
                continue;
            }
            9 if random.below(2) == 0 && expected.status != "stopped" => {
                kill_something(&container, random);
                container.wait_for_status("stopped")?;
                expected.status = "stopped";
                continue;
            }
            10 => &["ps"],
            11 => &["update", "--pids-limit", "64"],
            12 => &["events", "--stats"],
            // Of a container whose supervisor was killed there is something to be taken away.
            13 if expected.status != "stopped" => {
                env.call(["gc"]).output()?.expect_stdout("")?;
                continue;
            }
            14 if matches!(expected.status, "created" | "running") => {
                kill_process_of_exec(env, &container)?;
                container.expect_status(expected.status)?;
                continue;
            }
            _ => &["state"],
        };
        // SIGKILL is the one signal that an init without handlers heeds.
        let output = match words {
            ["kill"] => container.verb_with(words, &["KILL"]).output()?,
            _ => container.verb(words).output()?,
        };
        let before = expected.status;
        let succeeds = expected.apply(words[0]);
        ensure!(output.status.success() == succeeds, "{} while {before}: {}", words[0], output.describe());
        match expected.status {
            "deleted" => return container.verb(&["state"]).output()?.expect_error(&["does not exist"]),
            // The end follows what causes it.
            "stopped" => container.wait_for_status("stopped")?,
            status => container.expect_status(status)?,
        }
    }
    container.must(&["delete", "--force"]).map(drop)
}

/// Kills the supervisor or its VMM.
fn kill_something(container: &Detached<'_>, random: &mut Random) {
    let below = processes::descendants(container.pid);
    let vmm = below.iter().find(|process| process.name.starts_with("bulkhead-vmm")).map(|process| process.pid);
    let victim = vmm.filter(|_| random.below(2) == 0).unwrap_or(container.pid);
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
}

/// How long what is waited for may take.
const LIMIT: Duration = Duration::from_secs(60);

/// A terminal as an engine holds it: what it shows is collected.
fn engines_console(receiver: thread::JoinHandle<Result<OwnedFd>>) -> Result<(File, Collector)> {
    let Ok(console) = receiver.join() else { fail!("the receiver of the console panicked") };
    let console = File::from(console?);
    let screen = Collector::start(console.try_clone()?);
    Ok((console, screen))
}

fn ensure_shown(screen: &Collector, text: &str) -> Result {
    let shown = screen.wait(LIMIT, |bytes, _| String::from_utf8_lossy(bytes).contains(text));
    ensure!(shown, "{text:?} is not shown: {:?}", String::from_utf8_lossy(&screen.bytes()));
    Ok(())
}

/// `process.consoleSize` where the terminal knows none, and then what the engine sets; and a further process' terminal.
fn consoles_have_their_size(env: &Env) -> Result {
    let mut bundle = Bundle::busybox(env)?;
    bundle.sh("trap 'stty size' WINCH; stty size; echo ready; while :; do sleep 0.1; done");
    bundle.set("/process/terminal", json!(true)).set("/process/consoleSize", json!({ "height": 44, "width": 123 }));
    let path = env.work.join("console.sock");
    let listener = UnixListener::bind(&path)?;
    let receiver = thread::spawn(move || receive_descriptor(&listener));
    let container = Detached::create_with_console(env, &bundle, &path.display().to_string())?;
    let (console, screen) = engines_console(receiver)?;
    container.must(&["start"])?;
    ensure_shown(&screen, "44 123\r\nready\r\n")?;
    let size = rustix::termios::Winsize { ws_row: 50, ws_col: 132, ws_xpixel: 0, ws_ypixel: 0 };
    rustix::termios::tcsetwinsize(console.as_fd(), size)?;
    // Where the container's terminal is the engine's own, nobody has to pass it on.
    ensure_shown(&screen, "50 132\r\n")?;

    let path = env.work.join("exec.sock");
    let listener = UnixListener::bind(&path)?;
    let receiver = thread::spawn(move || receive_descriptor(&listener));
    let socket = path.display().to_string();
    let options = ["exec", "--detach", "--tty", "--console-socket", &socket];
    container.must_with(&options, &["sh", "-c", "tty; echo re''ady; read line; echo \"got $line\"; sleep 1000"])?;
    let (mut console, screen) = engines_console(receiver)?;
    ensure_shown(&screen, "ready\r\n")?;
    console.write_all(b"hello\n")?;
    ensure_shown(&screen, "got hello\r\n")
}
