// SPDX-License-Identifier: Apache-2.0
//! A container that tells the service manager of its caller that it is ready (sd_notify(3)). The case is the manager.

use std::fs;
use std::os::unix::fs::symlink;
use std::os::unix::net::UnixDatagram;
use std::path::{Path, PathBuf};
use std::time::Duration;

use nix::sys::signal::Signal;

use super::{Case, case};
use crate::bundle::Bundle;
use crate::detached::Detached;
use crate::engines::{IMAGE, Podman};
use crate::env::{Env, Kind};
use crate::failure::{Result, ensure, ensure_eq, skip};
use crate::run::Run;

pub(super) const CASES: &[Case] = &[
    case!(start_waits_until_it_is_ready),
    case!(detached_run_waits_until_it_is_ready),
    case!(foreground_run_hands_it_on),
    case!(container_that_ends_without),
    case!(read_only_root),
    case!(message_that_is_too_long),
    case!(start_without_and_create_without),
    case!(start_that_is_killed),
    case!(sockets_that_are_none),
    case!(what_a_container_sends_besides),
    case!(podman_container),
];

/// How long what is told may take.
const LIMIT: Duration = Duration::from_secs(100);

/// Sends its first argument, with as many letters behind it as the second says, as often as the third says. busybox has no program for
/// that.
const TELL: &str = "tell() { perl -e 'socket(S, 1, 2, 0) or die; $to = pack(\"Sa108\", 1, $ENV{NOTIFY_SOCKET}); \
                    $t = $ARGV[0]; $t =~ s/;/\\n/g; \
                    for (1..$ARGV[2]) { defined(send(S, $t . (\"x\" x $ARGV[1]), 0, $to)) or die \"$!\\n\" }' \
                    \"$1\" \"${2:-0}\" \"${3:-1}\"; }; ";

/// What waits until the case has made that file.
const WAIT: &str = "until [ -e /go ]; do sleep 0.1; done; ";

/// A manager that is told.
struct Manager {
    path: PathBuf,
    socket: UnixDatagram,
}

impl Manager {
    fn new(env: &Env) -> Result<Self> {
        if !Path::new("/usr/bin/perl").exists() {
            skip!("there is no /usr/bin/perl (package perl-base)");
        }
        let path = env.work.join("manager");
        let socket = UnixDatagram::bind(&path)?;
        socket.set_read_timeout(Some(LIMIT))?;
        Ok(Self { path, socket })
    }

    /// The next message.
    fn told(&self) -> Result<String> {
        let mut buffer = [0; 1 << 16];
        let length = self.socket.recv(&mut buffer)?;
        Ok(String::from_utf8_lossy(&buffer[..length]).into_owned())
    }

    fn expect_ready(&self, pid: i32) -> Result {
        ensure_eq!(self.told()?, "READY=1\n", "the first message");
        ensure_eq!(self.told()?, format!("MAINPID={pid}\n"), "the second message");
        self.expect_nothing()
    }

    fn expect_nothing(&self) -> Result {
        self.socket.set_nonblocking(true)?;
        let more = self.told();
        self.socket.set_nonblocking(false)?;
        ensure!(more.is_err(), "a message that should not have come: {more:?}");
        Ok(())
    }
}

/// A shell script that can tell; it has this machine's perl.
fn telling(env: &Env, script: &str) -> Result<Bundle> {
    let mut bundle = Bundle::busybox(env)?;
    for name in ["lib", "lib64"] {
        symlink(format!("usr/{name}"), bundle.path(name))?;
    }
    bundle.sh(&format!("{TELL}{script}")).bind("/usr".as_ref(), "/usr", &["ro"]);
    Ok(bundle)
}

fn run<'a>(env: &'a Env, bundle: &Bundle, manager: &Manager) -> Result<Run<'a>> {
    Ok(env.run(bundle)?.variable("NOTIFY_SOCKET", &manager.path))
}

fn start_waits_until_it_is_ready(env: &Env) -> Result {
    let manager = Manager::new(env)?;
    let script = format!(
        "echo $NOTIFY_SOCKET; grep ' /run/notify ' /proc/mounts | cut -d' ' -f4; touch /run/notify/x || echo no; \
         stat -c '%A' /run/notify/notify.sock; {WAIT}tell 'READY=1;STATUS=up'; sleep 1000"
    );
    let mut bundle = telling(env, &script)?;
    let path = "PATH=/bin:/usr/bin";
    bundle.set("/process/env", serde_json::json!([path, "NOTIFY_SOCKET=/of/the/configuration"]));
    let container = Detached::create_told(env, &bundle, &manager.path)?;

    let mut start = container.verb(&["start"]).variable("NOTIFY_SOCKET", &manager.path).spawn()?;
    container.wait_for("srwxrwxrwx\n")?;
    container.expect_status("running")?;
    ensure!(start.is_running()?, "the start has not waited");
    manager.expect_nothing()?;
    container.exec("touch /go").output()?.expect_code(0)?;
    start.finish()?.expect_code(0)?;

    let pid = container.state()?["pid"].as_i64().unwrap_or_default();
    manager.expect_ready(i32::try_from(pid).unwrap_or_default())?;
    let told = container.output()?;
    let lines: Vec<&str> = told.lines().collect();
    ensure_eq!(lines[0], "/run/notify/notify.sock", "what the environment names");
    let flags = ["ro", "nosuid", "nodev", "noexec"];
    let has = |flag: &&str| lines[1].split(',').any(|word| word == *flag);
    ensure!(flags.iter().all(has), "the flags of the mount: {told:?}");
    ensure!(lines.contains(&"no"), "the folder can be written to: {told:?}");
    Ok(())
}

fn detached_run_waits_until_it_is_ready(env: &Env) -> Result {
    let manager = Manager::new(env)?;
    let bundle = telling(env, "sleep 2; touch /told; tell READY=1; sleep 1000")?;

    let container = Detached::run_told(env, &bundle, &manager.path)?;

    container.exec("ls /told").output()?.expect_stdout("/told\n")?;
    manager.expect_ready(container.pid)
}

fn foreground_run_hands_it_on(env: &Env) -> Result {
    let manager = Manager::new(env)?;
    let bundle = telling(env, "tell READY=1; read line; exit 7")?;

    let mut running = run(env, &bundle, &manager)?.open_stdin().spawn()?;
    manager.expect_ready(running.pid())?;
    ensure!(running.is_running()?, "it has ended");
    running.write(b"on\n")?;

    running.finish()?.expect_code(7)
}

fn container_that_ends_without(env: &Env) -> Result {
    let manager = Manager::new(env)?;
    let bundle = telling(env, "exit 3")?;
    let container = Detached::create_told(env, &bundle, &manager.path)?;

    let start = container.verb(&["start"]).variable("NOTIFY_SOCKET", &manager.path).spawn()?;
    ensure_eq!(container.wait()?, 3, "its exit status");
    start.finish()?.expect_code(0)?;
    container.expect_status("stopped")?;

    if env.kind == Kind::Bulkhead {
        // These wait for ever with runc.
        let detached = Detached::run_told(env, &bundle, &manager.path)?;
        ensure_eq!(detached.wait()?, 3, "the exit status of one that is detached");
        run(env, &bundle, &manager)?.output()?.expect_code(3)?;
    }
    manager.expect_nothing()
}

fn read_only_root(env: &Env) -> Result {
    let manager = Manager::new(env)?;
    let mut bundle = telling(env, "tell READY=1; sleep 1000")?;
    bundle.set("/root/readonly", true.into());
    ensure!(!bundle.path("run").exists(), "the mount point is there already");

    let container = Detached::run_told(env, &bundle, &manager.path)?;

    manager.expect_ready(container.pid)
}

fn message_that_is_too_long(env: &Env) -> Result {
    let manager = Manager::new(env)?;
    let bundle = telling(env, "tell 'READY=1;STATUS=' 50000; sleep 1000")?;

    let container = Detached::run_told(env, &bundle, &manager.path)?;

    manager.expect_ready(container.pid)
}

fn start_without_and_create_without(env: &Env) -> Result {
    let manager = Manager::new(env)?;
    let bundle = telling(env, "echo ${NOTIFY_SOCKET-none}; sleep 1000")?;

    let container = Detached::create_told(env, &bundle, &manager.path)?;
    container.must(&["start"])?;
    container.wait_for("/run/notify/notify.sock\n")?;
    drop(container);

    let container = Detached::create(env, &bundle)?;
    let refused = container.verb(&["start"]).variable("NOTIFY_SOCKET", &manager.path).output()?;
    refused.expect_error(if env.kind == Kind::Bulkhead {
        &["NOTIFY_SOCKET", "created without"]
    } else {
        &["notify"]
    })?;
    container.expect_status("created")?;
    container.must(&["start"])?;
    container.wait_for("none\n")?;
    manager.expect_nothing()
}

fn start_that_is_killed(env: &Env) -> Result {
    let manager = Manager::new(env)?;
    let container = Detached::create_told(env, &telling(env, "sleep 1000")?, &manager.path)?;
    let start = container.verb(&["start"]).variable("NOTIFY_SOCKET", &manager.path).spawn()?;
    container.wait_for_status("running")?;

    start.signal(Signal::SIGKILL)?;
    let end = start.finish()?;

    ensure!(end.status.code().is_none(), "it has ended otherwise: {}", end.describe());
    container.expect_status("running")?;
    container.exec("echo it runs").output()?.expect_stdout("it runs\n")?;
    container.must_with(&["kill"], &["KILL"])?;
    ensure_eq!(container.wait()?, 137, "its exit status");
    container.wait_for_status("stopped")
}

/// What the environment names is no address, or nobody is there.
fn sockets_that_are_none(env: &Env) -> Result {
    let manager = Manager::new(env)?;
    let absent = env.work.join("absent");
    let bundle = telling(env, "echo it runs; sleep 1000")?;
    let container = Detached::create_told(env, &bundle, &absent)?;
    let start = container.verb(&["start"]).variable("NOTIFY_SOCKET", &absent).output()?;
    let absent = absent.display().to_string();
    start.expect_error(&[&absent])?;
    // As with runc, it has been started.
    container.wait_for("it runs\n")?;
    container.expect_status("running")?;

    if env.kind == Kind::Bulkhead {
        for name in ["manager", "vsock:2:1", "@"] {
            let told = env.run(&bundle)?.variable("NOTIFY_SOCKET", name).output()?;
            told.expect_error(&[&format!("NOTIFY_SOCKET={name} is not supported")])?;
            let told = container.verb(&["start"]).variable("NOTIFY_SOCKET", name).output()?;
            told.expect_error(&[&format!("NOTIFY_SOCKET={name} is not supported")])?;
        }
        let ends = telling(env, "tell READY=1; echo it ran")?;
        let told = env.run(&ends)?.variable("NOTIFY_SOCKET", &absent).output()?;
        told.expect_code(0)?;
        ensure!(told.stdout() == "it ran\n" && told.stderr().contains(&absent), "{}", told.describe());
    }
    manager.expect_nothing()
}

/// It is thrown away, and holds nobody up.
fn what_a_container_sends_besides(env: &Env) -> Result {
    env.only_bulkhead()?; // runc reads no more once it knows, and what is sent then fails or waits.
    let manager = Manager::new(env)?;
    let script = "tell STATUS= 4000 300; tell 'READY=\u{1b}[2J'; tell 'STATUS=up;READY=1;MAINPID=1'; tell READY=2 0 300; echo done";

    let running = run(env, &telling(env, script)?, &manager)?.spawn()?;
    let pid = running.pid();

    running.finish()?.expect_stdout("done\n")?;
    manager.expect_ready(pid)
}

/// podman puts a socket of conmon's into the container, and conmon hands on that it is ready.
fn podman_container(env: &Env) -> Result {
    let manager = Manager::new(env)?;
    let podman = Podman::new(env)?;
    let script = format!("ln -s usr/lib usr/lib64 /; {TELL}echo $NOTIFY_SOCKET; {WAIT}tell READY=1; sleep 1000");
    let options = ["--sdnotify", "container", "-v", "/usr:/usr:ro", "--env", "PATH=/bin:/usr/bin"];
    let fixed = ["run", "-d", "--network", "none", "--name", "box"];
    let command = ["sh", "-c", &script];
    let words = fixed.iter().chain(&options).chain([&IMAGE]).chain(&command);
    podman.call(words).variable("NOTIFY_SOCKET", &manager.path).output()?.expect_code(0)?;

    // podman itself tells of conmon.
    let first = manager.told()?;
    ensure!(first.starts_with("MAINPID="), "the first message: {first:?}");
    manager.expect_nothing()?;
    podman.succeed(["exec", "box", "touch", "/go"])?;

    let second = manager.told()?;
    ensure_eq!(second.trim_end(), "READY=1", "the second message");
    podman.succeed(["rm", "--force", "--time", "0", "box"])?;
    fs::remove_file(&manager.path)?;
    Ok(())
}
