// SPDX-License-Identifier: Apache-2.0
//! Containers under podman, as its users type it.

use std::fs;
use std::io::Read;
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use serde_json::Value;

use super::{Case, case};
use crate::engines::{PAUSE, Podman, USAGE, expect_usage_of_busy_box};
use crate::env::{Env, Kind};
use crate::failure::{Result, ensure, ensure_eq, fail, skip};
use crate::pty::Terminal;

/// How long what is waited for may take.
const LIMIT: Duration = Duration::from_secs(120);

pub(super) const CASES: &[Case] = &[
    case!(foreground),
    case!(detached),
    case!(detached_and_removed),
    case!(paused_and_killed),
    case!(limits),
    case!(usage_is_told),
    case!(file_systems),
    case!(socket_of_the_host),
    case!(identity),
    case!(terminals),
    case!(init_of_the_engine),
    case!(healthcheck).limit(600),
    case!(restarted).limit(600),
    case!(files_copied_both_ways).limit(600),
    case!(processes_shown),
    case!(stop_that_runs_out_of_time),
];

fn foreground(env: &Env) -> Result {
    let podman = Podman::new(env)?;

    podman.run(&[], &["echo", "hello"]).output()?.expect_stdout("hello\n")?;
    podman.run(&[], &["sh", "-c", "exit 7"]).output()?.expect_code(7)?;
    podman.run(&[], &["no-such-program"]).output()?.expect_code(127)?;
    podman.run(&[], &["/etc/passwd"]).output()?.expect_code(126)?;
    podman.run(&["-i"], &["wc", "-c"]).input(vec![b'x'; 300_000]).output()?.expect_stdout("300000\n")?;
    let kernel = podman.run(&[], &["uname", "-r"]).output()?;
    kernel.expect_code(0)?;
    let host = nix::sys::utsname::uname()?.release().to_string_lossy().into_owned();
    let is_host = kernel.stdout().trim() == host;
    ensure_eq!(is_host, env.kind == Kind::Other, "whether the container runs on the host's kernel");
    let left = podman.succeed(["ps", "--all", "--quiet"])?;
    left.expect_stdout("")
}

fn detached(env: &Env) -> Result {
    let podman = Podman::new(env)?;
    podman.run_detached("box", &["sh", "-c", "trap 'exit 3' TERM; echo up; while :; do sleep 0.1; done"])?;

    podman.succeed(["exec", "box", "sh", "-c", "while [ ! -d /proc/1 ]; do sleep 0.1; done; hostname; exit 0"])?;
    podman.call(["exec", "box", "sh", "-c", "exit 9"]).output()?.expect_code(9)?;
    podman.call(["exec", "-i", "box", "cat"]).input("through").output()?.expect_stdout("through")?;
    podman
        .call(["exec", "-u", "1000:1000", "-w", "/tmp", "-e", "A=b", "box", "sh", "-c", "id -u; pwd; echo $A"])
        .output()?
        .expect_stdout("1000\n/tmp\nb\n")?;
    fs::write(env.work.join("file"), "copied")?;
    let source = env.work.join("file").display().to_string();
    podman.succeed(["cp", &source, "box:/tmp/file"])?;
    podman.succeed(["logs", "box"])?.expect_in_stdout(&["up"])?;
    podman.succeed(["stop", "--time", "30", "box"])?;
    ensure_eq!(exit_code(&podman, "box")?, 3, "the exit code of a container that ends at SIGTERM");
    podman.succeed(["wait", "box"])?.expect_stdout("3\n")?;
    podman.succeed(["start", "box"])?;
    podman.succeed(["rm", "--force", "--time", "0", "box"])?;
    podman.succeed(["ps", "--all", "--quiet"])?.expect_stdout("")
}

/// What ends by itself is removed by conmon, which calls the engine.
fn detached_and_removed(env: &Env) -> Result {
    let podman = Podman::new(env)?;
    podman.run_detached_with("box", &["--rm"], &["sh", "-c", "while [ ! -e /tmp/end ]; do sleep 0.1; done"])?;
    podman.succeed(["ps", "--quiet", "--filter", "name=box", "--format", "{{.Names}}"])?.expect_stdout("box\n")?;

    podman.succeed(["exec", "box", "touch", "/tmp/end"])?;

    let deadline = Instant::now() + LIMIT;
    while !podman.succeed(["ps", "--all", "--quiet"])?.stdout().is_empty() {
        ensure!(Instant::now() < deadline, "a container of --rm is still there");
        thread::sleep(PAUSE);
    }
    Ok(())
}

fn paused_and_killed(env: &Env) -> Result {
    let podman = Podman::new(env)?;
    podman.run_detached("box", &["sleep", "1000"])?;

    podman.succeed(["pause", "box"])?;
    ensure_eq!(state(&podman, "box")?["Status"], "paused", "the state of a paused container");
    podman.succeed(["unpause", "box"])?;
    ensure_eq!(state(&podman, "box")?["Status"], "running", "the state of a container that goes on");
    podman.succeed(["kill", "box"])?;
    podman.succeed(["wait", "box"])?.expect_stdout("137\n")?;
    podman.succeed(["rm", "box"]).map(drop)
}

fn limits(env: &Env) -> Result {
    let podman = Podman::new(env)?;
    let script = "cat /sys/fs/cgroup/memory.max /sys/fs/cgroup/pids.max /sys/fs/cgroup/cpu.max; ulimit -n";
    let options = ["--memory", "128m", "--pids-limit", "50", "--cpus", "0.5", "--ulimit", "nofile=200:200"];

    let output = podman.run(&options, &["sh", "-c", script]).output()?;

    output.expect_stdout("134217728\n50\n50000 100000\n200\n")
}

/// What it uses is that of its machine: more than nothing, and within its limits.
fn usage_is_told(env: &Env) -> Result {
    let podman = Podman::new(env)?;
    podman.run_detached_with("box", &["--memory", "128m"], &["sh", "-c", "i=0; while :; do i=$((i+1)); done"])?;

    let told = podman.succeed(["stats", "--no-stream", "--format", USAGE, "box"])?;

    expect_usage_of_busy_box(&told.stdout())?;
    podman.succeed(["rm", "--force", "--time", "0", "box"]).map(drop)
}

fn file_systems(env: &Env) -> Result {
    let podman = Podman::new(env)?;
    let folder = env.folder("data")?;
    fs::write(folder.join("from-host"), "h")?;
    let volume = format!("{}:/data", folder.display());
    let script =
        "cat /data/from-host && echo c > /data/from-container && echo x > /scratch/x && ! touch /y 2>/dev/null";

    let options = ["--read-only", "--tmpfs", "/scratch", "-v", &volume];
    podman.run(&options, &["sh", "-c", script]).output()?.expect_stdout("h")?;

    ensure_eq!(fs::read_to_string(folder.join("from-container"))?, "c\n", "what the container wrote");
    let read_only = format!("{volume}:ro");
    let output = podman.run(&["-v", &read_only], &["touch", "/data/y"]).output()?;
    ensure!(output.status.code() == Some(1), "a read-only volume: {}", output.describe());
    Ok(())
}

fn socket_of_the_host(env: &Env) -> Result {
    let podman = Podman::new(env)?;
    let socket = env.work.join("s");
    let listener = UnixListener::bind(&socket)?;
    let server = thread::spawn(move || -> std::io::Result<String> {
        let mut text = String::new();
        listener.accept()?.0.read_to_string(&mut text)?;
        Ok(text)
    });
    let volume = format!("{}:/dev/log", socket.display());

    podman.run(&["-v", &volume], &["logger", "-t", "box", "from a container"]).output()?.expect_stdout("")?;

    let Ok(text) = server.join() else { fail!("the server panicked") };
    let text = text?;
    ensure!(text.contains("box: from a container"), "not what was sent: {text:?}");
    Ok(())
}

fn identity(env: &Env) -> Result {
    let podman = Podman::new(env)?;
    let script = "id -u; id -g; hostname; grep CapEff /proc/self/status; grep Seccomp: /proc/self/status";

    let options = ["--user", "1000:1000", "--hostname", "there", "--cap-drop", "all"];
    let output = podman.run(&options, &["sh", "-c", script]).output()?;
    output.expect_stdout("1000\n1000\nthere\nCapEff:\t0000000000000000\nSeccomp:\t2\n")?;

    let profile = env.work.join("profile.json");
    fs::write(
        &profile,
        r#"{"defaultAction": "SCMP_ACT_ALLOW", "syscalls": [{"names": ["mkdir", "mkdirat"], "action": "SCMP_ACT_ERRNO", "errnoRet": 2}]}"#,
    )?;
    let option = format!("seccomp={}", profile.display());
    let output = podman.run(&["--security-opt", &option], &["mkdir", "/tmp/x"]).output()?;
    ensure!(output.stderr().contains("No such file"), "a system call that is refused: {}", output.describe());
    Ok(())
}

fn terminals(env: &Env) -> Result {
    let podman = Podman::new(env)?;

    let mut terminal = Terminal::new(33, 77)?;
    let mut running = terminal.spawn(podman.run(&["-it", "--name", "box"], &["sh"]))?;
    terminal.type_text("tty; stty size; echo re''ady\n")?;
    terminal.wait_for("ready")?;
    ensure!(terminal.text().contains("33 77"), "the size of the terminal: {}", terminal.text());
    let mut second = Terminal::new(20, 60)?;
    let exec = second.spawn(podman.call(["exec", "-it", "box", "sh"]))?;
    second.type_text("stty size; echo sec''ond; exit 4\n")?;
    second.wait_for("second")?;
    exec.finish()?.expect_code(4)?;
    ensure!(second.text().contains("20 60"), "the size of the second terminal: {}", second.text());
    ensure!(running.is_running()?, "the end of a process is not the end of the container");
    terminal.type_text("exit 5\n")?;
    running.finish()?.expect_code(5)
}

fn init_of_the_engine(env: &Env) -> Result {
    let init = Path::new("/usr/bin/docker-init");
    if !init.exists() {
        skip!("there is no {} (package tini or docker.io)", init.display());
    }
    let podman = Podman::new(env)?;
    let path = init.display().to_string();
    let script = "tr '\\0' ' ' </proc/1/cmdline; echo; exit 5";

    let output = podman.run(&["--init", "--init-path", &path], &["sh", "-c", script]).output()?;

    output.expect_code(5)?;
    ensure!(output.stdout().contains("init -- sh -c"), "the command line of process 1: {}", output.describe());
    Ok(())
}

fn healthcheck(env: &Env) -> Result {
    let podman = Podman::new(env)?;
    // Without an interval, nobody asks systemd for a timer.
    let options = ["--health-cmd", "test -e /tmp/well", "--health-interval", "disable", "--health-retries", "1"];
    podman.run_detached_with("box", &options, &["sleep", "1000"])?;

    podman.call(["healthcheck", "run", "box"]).output()?.expect_code(1)?;
    ensure_eq!(state(&podman, "box")?["Health"]["Status"], "unhealthy", "the health without the file");
    podman.succeed(["exec", "box", "touch", "/tmp/well"])?;
    podman.succeed(["healthcheck", "run", "box"])?;
    ensure_eq!(state(&podman, "box")?["Health"]["Status"], "healthy", "the health with the file");
    podman.succeed(["rm", "--force", "--time", "0", "box"]).map(drop)
}

/// The same files, another machine.
fn restarted(env: &Env) -> Result {
    let podman = Podman::new(env)?;
    let script = "echo run >>/runs; trap 'exit 3' TERM; echo up; while :; do sleep 0.1; done";
    podman.run_detached("box", &["sh", "-c", script])?;
    wait_for_log(&podman, "box", 1)?;
    let before = state(&podman, "box")?["Pid"].clone();

    podman.succeed(["restart", "--time", "30", "box"])?;

    wait_for_log(&podman, "box", 2)?;
    podman.succeed(["exec", "box", "cat", "/runs"])?.expect_stdout("run\nrun\n")?;
    ensure!(state(&podman, "box")?["Pid"] != before, "the process that stands for it is the old one");
    podman.succeed(["rm", "--force", "--time", "0", "box"]).map(drop)
}

/// Waits until the container has said `up` as often.
fn wait_for_log(podman: &Podman<'_>, name: &str, times: usize) -> Result {
    let end = Instant::now() + LIMIT;
    loop {
        let log = podman.succeed(["logs", name])?;
        if log.stdout().matches("up\n").count() >= times {
            return Ok(());
        }
        ensure!(Instant::now() < end, "{name} has not said `up` {times} times: {}", log.describe());
        thread::sleep(PAUSE);
    }
}

fn files_copied_both_ways(env: &Env) -> Result {
    let podman = Podman::new(env)?;
    let (data, script) = (env.folder("data")?, "echo early >/early; echo up; exec sleep 1000");
    let volume = format!("{}:/tmp", data.display());
    podman.run_detached_with("box", &["-v", &volume], &["sh", "-c", script])?;
    wait_for_log(&podman, "box", 1)?;
    let (there, back) = (env.work.join("there"), env.work.join("back"));
    fs::write(&there, "to the container\n")?;
    let [from, to] = [&there, &back].map(|path| path.display().to_string());

    podman.succeed(["cp", &from, "box:/there"])?;
    podman.succeed(["exec", "box", "cat", "/there"])?.expect_stdout("to the container\n")?;
    ensure!(!Path::new("/there").exists(), "the file was copied to the host");
    podman.succeed(["cp", &from, "box:/tmp/there"])?;
    ensure_eq!(fs::read_to_string(data.join("there"))?, "to the container\n", "what was copied to a volume");
    podman.succeed(["exec", "box", "sh", "-c", "echo from the container >/back; sync"])?;
    podman.succeed(["cp", "box:/back", &to])?;
    ensure_eq!(fs::read_to_string(&back)?, "from the container\n", "what was copied from the container");
    // While it is paused, what it has written is there, and what it has read may be replaced.
    podman.succeed(["exec", "box", "sh", "-c", "cat /back; echo and later >>/back"])?;
    podman.succeed(["pause", "box"])?;
    podman.succeed(["cp", "box:/back", &to])?;
    podman.succeed(["cp", &from, "box:/back"])?;
    podman.succeed(["unpause", "box"])?;
    ensure_eq!(fs::read_to_string(&back)?, "from the container\nand later\n", "what was copied while it was paused");
    podman.succeed(["exec", "box", "cat", "/back"])?.expect_stdout("to the container\n")?;

    podman.succeed(["kill", "box"])?;
    podman.succeed(["wait", "box"])?.expect_stdout("137\n")?;
    podman.succeed(["cp", "box:/early", &to])?;
    ensure_eq!(fs::read_to_string(&back)?, "early\n", "what was copied from the container that has ended");
    podman.succeed(["rm", "box"]).map(drop)
}

/// podman reads /proc of the container's mount namespace; options that it does not know itself are for the container's own ps.
fn processes_shown(env: &Env) -> Result {
    let podman = Podman::new(env)?;
    podman.run_detached("box", &["sh", "-c", "sleep 4321 & exec sleep 1234"])?;

    let shown = podman.succeed(["top", "box", "pid", "ppid", "user", "state", "seccomp", "args"])?.stdout();
    let rows: Vec<Vec<&str>> = shown.lines().skip(1).map(|line| line.split_whitespace().collect()).collect();
    ensure_eq!(rows.len(), 2, "processes of the container in {shown:?}");
    ensure_eq!(rows[0], ["1", "0", "root", "S", "filter", "sleep", "1234"], "the first process");
    ensure_eq!(rows[1][1..], ["1", "root", "S", "filter", "sleep", "4321"], "the second process");
    let inside = podman.succeed(["exec", "box", "pidof", "sleep"])?.stdout();
    ensure!(inside.split_whitespace().any(|pid| pid == rows[1][0]), "{:?} is not among {inside:?}", rows[1][0]);

    // Times too, of another machine's clock.
    let of_default = podman.succeed(["top", "box"])?.stdout();
    let first = of_default.lines().nth(1).unwrap_or_default().trim_end();
    ensure!(first.starts_with("root ") && first.ends_with("sleep 1234"), "a row in {of_default:?}");
    let elapsed = first.split_whitespace().nth(4).unwrap_or_default();
    ensure!(elapsed.ends_with('s') && !elapsed.contains('h'), "it has run for {elapsed:?}");

    podman.succeed(["exec", "box", "sh", "-c", "kill -9 $(pidof sleep | tr ' ' '\n' | grep -vx 1)"])?;
    let shown = podman.succeed(["top", "box", "pid"])?.stdout();
    ensure_eq!(shown, "PID\n1\n", "what is left");
    podman.succeed(["top", "box", "-ef"])?.expect_in_stdout(&["sleep 1234"])?;
    podman.succeed(["rm", "--force", "--time", "0", "box"]).map(drop)
}

fn stop_that_runs_out_of_time(env: &Env) -> Result {
    let podman = Podman::new(env)?;
    podman.run_detached("box", &["sh", "-c", "trap '' TERM; echo up; while :; do sleep 0.1; done"])?;
    wait_for_log(&podman, "box", 1)?;
    let waiting = podman.call(["wait", "box"]).spawn()?;

    podman.call(["stop", "--time", "1", "box"]).output()?.expect_code(0)?;

    waiting.finish()?.expect_stdout("137\n")?;
    ensure_eq!(exit_code(&podman, "box")?, 137, "the exit code of a container that was killed");
    podman.succeed(["rm", "box"]).map(drop)
}

fn state(podman: &Podman<'_>, name: &str) -> Result<Value> {
    let inspected: Value = serde_json::from_slice(&podman.succeed(["inspect", name])?.stdout)?;
    Ok(inspected[0]["State"].clone())
}

fn exit_code(podman: &Podman<'_>, name: &str) -> Result<i64> {
    Ok(state(podman, name)?["ExitCode"].as_i64().unwrap_or(-1))
}
