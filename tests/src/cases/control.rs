// SPDX-License-Identifier: Apache-2.0
//! What is done to a container that lives on: pause, resume, update, events, ps, list, a terminal for an engine, hooks.

use std::fs::{self, File};
use std::io::{IoSliceMut, Read, Write};
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::net::UnixListener;
use std::thread;
use std::time::{Duration, Instant};

use nix::cmsg_space;
use nix::sys::socket::{ControlMessageOwned, MsgFlags, recvmsg};
use serde_json::{Value, json};

use super::{Case, case};
use crate::bundle::Bundle;
use crate::detached::Detached;
use crate::env::{Env, Kind};
use crate::failure::{Result, ensure, ensure_eq, fail};
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
    let mut bundle = Bundle::busybox(env)?;
    bundle.sh("sleep 1001 & sleep 1002 & echo up; wait");
    let container = Detached::run(env, &bundle)?;
    container.wait_for("up\n")?;
    // What it has by its own account, but for those who look.
    let look = "for file in /proc/[0-9]*/cmdline; do tr '\\0' ' ' <$file 2>/dev/null; echo; done | grep '[s]leep'";
    let seen = container.exec(look).output()?.stdout();
    let seen: Vec<&str> = seen.lines().map(str::trim_end).collect();
    ensure_eq!(seen.len(), 3, "the processes that the container sees: {seen:?}");

    let pids: Vec<i32> = serde_json::from_slice(&container.must(&["ps", "--format", "json"])?.stdout)?;
    let table = container.must_with(&["ps"], &["-o", "pid,ppid,args"])?.stdout();
    let mut rows = Vec::new();
    for line in table.lines().skip(1) {
        let mut words = line.split_whitespace();
        let mut number = || words.next().unwrap_or_default().parse::<i32>();
        let (pid, parent) = (number()?, number()?);
        rows.push((pid, parent, words.collect::<Vec<_>>().join(" ")));
    }

    ensure_eq!(rows.iter().map(|row| row.2.as_str()).collect::<Vec<_>>(), seen, "the command lines in {table}");
    ensure_eq!(rows.iter().map(|row| row.0).collect::<Vec<_>>(), pids, "the pids, in the table and in JSON");
    ensure!(rows[1..].iter().all(|row| row.1 == pids[0]), "whose children they are: {table}");
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
    ensure_shown(&screen, "got hello\r\n")?;
    // runc's init ends when what was executed has been reaped, and that is this process' orphan.
    container.must_with(&["kill"], &["KILL"])?;
    ensure_eq!(container.wait_with_orphans()?, 137, "the status of the container");
    Ok(())
}
