// SPDX-License-Identifier: Apache-2.0
//! Containers under containerd, by its client `ctr`.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::{Case, case};
use crate::engines::Containerd;
use crate::env::{Env, Kind};
use crate::failure::{Result, ensure, ensure_eq, fail, skip};
use crate::processes;
use crate::pty::Terminal;

pub(super) const CASES: &[Case] = &[
    case!(foreground),
    case!(detached),
    case!(overlay),
    case!(terminals),
    case!(logs),
    case!(events_in_order),
    case!(out_of_memory),
    case!(refused),
    case!(restarted),
    case!(killed_shim),
    case!(killed_vmm),
    case!(many_in_a_row).slow(900),
];

fn foreground(env: &Env) -> Result {
    let containerd = Containerd::new(env, "native")?;
    let run = |command: &[&str]| containerd.run(&["--rm"], &env.id(), command);

    run(&["echo", "hello"]).output()?.expect_stdout("hello\n")?;
    run(&["sh", "-c", "exit 7"]).output()?.expect_code(7)?;
    run(&["wc", "-c"]).input(vec![b'x'; 300_000]).output()?.expect_stdout("300000\n")?;
    let much = run(&["sh", "-c", "head -c 3000000 /dev/zero"]).output()?;
    much.expect_code(0)?;
    ensure_eq!(much.stdout.len(), 3_000_000, "bytes of output");
    let kernel = run(&["uname", "-r"]).output()?;
    let host = nix::sys::utsname::uname()?.release().to_string_lossy().into_owned();
    ensure_eq!(kernel.stdout().trim() == host, env.kind == Kind::Other, "whether it runs on the host's kernel");
    let absent = run(&["no-such-program"]).output()?;
    ensure!(!absent.status.success(), "a program that is not there: {}", absent.describe());
    ensure!(absent.stderr().contains("no-such-program"), "what is not there: {}", absent.describe());
    containerd.end()
}

fn detached(env: &Env) -> Result {
    let containerd = Containerd::new(env, "native")?;
    let id = env.id();
    containerd.run_detached(&id, &["sh", "-c", "trap 'exit 3' TERM; sleep 1000 & touch /up; wait"])?;

    containerd.wait_for(&id, "RUNNING")?;
    containerd.exec(&[], &id, "while ! test -e /up; do sleep 0.1; done").output()?.expect_code(0)?;
    containerd.exec(&[], &id, "echo out; echo err >&2; exit 9").output()?.expect_code(9)?;
    containerd.exec(&[], &id, "cat").input("through").output()?.expect_stdout("through")?;
    let listed = containerd.succeed(["task", "ps", &id])?.stdout();
    let pids = listed.lines().skip(1).map(|line| line.split_whitespace().next().unwrap_or_default().parse());
    let pids = pids.collect::<std::result::Result<Vec<u32>, _>>()?;
    ensure!(pids.len() == 2 && pids[0] != pids[1] && !pids.contains(&0), "the shell and its child: {listed}");
    let metrics = containerd.succeed(["task", "metrics", &id])?.stdout();
    let value =
        |name: &str| metrics.lines().find_map(|line| line.strip_prefix(name)).and_then(|text| text.trim().parse().ok());
    ensure!(value("memory.usage ").is_some_and(|used: u64| used > 0), "no memory in use: {metrics}");
    ensure!(value("cpu.usage_usec ").is_some_and(|used| used > 0), "no time of a processor: {metrics}");
    ensure_eq!(value("pids.current "), Some(2), "processes, by {metrics}");
    containerd.succeed(["task", "pause", &id])?;
    containerd.wait_for(&id, "PAUSED")?;
    containerd.succeed(["task", "resume", &id])?;
    containerd.wait_for(&id, "RUNNING")?;
    containerd.succeed(["task", "kill", &id])?;
    containerd.wait_for(&id, "STOPPED")?;
    let again = containerd.call(["task", "kill", &id]).output()?;
    ensure!(again.stderr().contains("already finished"), "a signal to what has ended: {}", again.describe());
    delete_with(&containerd, &id, 3)?;
    containerd.end()
}

/// Deletes a container and its task, which has ended with that status.
fn delete_with(containerd: &Containerd<'_>, id: &str, status: u32) -> Result {
    let deleted = containerd.call(["task", "delete", id]).output()?;
    ensure!(deleted.stderr().contains(&format!("exit code {status}")), "the exit code: {}", deleted.describe());
    containerd.succeed(["container", "delete", id]).map(drop)
}

fn overlay(env: &Env) -> Result {
    let containerd = Containerd::new(env, "overlayfs")?;

    let script = "echo new > /new && rm /bin/wc && cat /new && ls /bin/wc; exit 5";
    let output = containerd.run(&["--rm"], &env.id(), &["sh", "-c", script]).output()?;
    ensure_eq!(output.stdout(), "new\n", "what was written");
    output.expect_code(5)?;
    containerd.run(&["--rm", "--read-only"], &env.id(), &["sh", "-c", "! touch /x"]).output()?.expect_code(0)?;
    containerd.run(&["--rm"], &env.id(), &["ls", "/bin/wc"]).output()?.expect_stdout("/bin/wc\n")?;
    containerd.end()
}

fn terminals(env: &Env) -> Result {
    let containerd = Containerd::new(env, "native")?;
    let id = env.id();

    let mut terminal = Terminal::new(33, 77)?;
    let mut running = terminal.spawn(containerd.run(&["--rm", "--tty"], &id, &["sh"]))?;
    terminal.type_text("tty; echo re''ady\n")?;
    terminal.wait_for("ready")?;
    terminal.type_text("stty size\n")?;
    terminal.wait_for("33 77")?;
    terminal.resize(20, 60)?;
    terminal.type_text("sleep 1; stty size\n")?;
    terminal.wait_for("20 60")?;
    let mut second = Terminal::new(24, 80)?;
    let exec = second.spawn(containerd.exec(&["--tty"], &id, "tty; exec sh"))?;
    second.wait_for("/dev/pts/")?;
    second.type_text("echo sec''ond; exit 4\n")?;
    second.wait_for("second")?;
    exec.finish()?.expect_code(4)?;
    ensure!(running.is_running()?, "the end of a process is not the end of the container");
    terminal.type_text("exit 5\n")?;
    running.finish()?.expect_code(5)?;
    containerd.end()
}

fn logs(env: &Env) -> Result {
    let containerd = Containerd::new(env, "native")?;
    let (file, program, taken) = (env.work.join("a log"), env.work.join("a+logger"), env.work.join("taken & kept"));
    // runc's shim ends it by a signal.
    let text = "#!/bin/sh\ntrap '' TERM\nexec 5>&-\n{ echo $CONTAINER_ID; cat <&3; cat <&4; } > \"$2.new\"\nmv \"$2.new\" \"$2\"\n";
    fs::write(&program, text)?;
    fs::set_permissions(&program, fs::Permissions::from_mode(0o755))?;
    let (to_file, to_program) = (env.id(), env.id());
    let locations = [
        (&to_file, format!("file://{}", file.display().to_string().replace(' ', "%20"))),
        (&to_program, format!("binary://{}?_TO={}", program.display(), in_query(&taken))),
    ];
    for (id, location) in locations {
        let options = ["--detach", "--log-uri", location.as_str()];
        containerd.run(&options, id, &["sh", "-c", "echo out; echo err >&2"]).output()?.expect_code(0)?;
        containerd.wait_for(id, "STOPPED")?;
        containerd.delete(id)?;
    }

    let logged = fs::read_to_string(&file)?;
    ensure!(logged.contains("out\n") && logged.contains("err\n"), "what the file has: {logged:?}");
    let end = Instant::now() + Duration::from_secs(30);
    while !taken.exists() && Instant::now() < end {
        std::thread::sleep(Duration::from_millis(50));
    }
    ensure_eq!(fs::read_to_string(&taken)?, format!("{to_program}\nout\nerr\n"), "what the program has taken");
    containerd.end()
}

/// A path as nerdctl puts it into the query of a URI.
fn in_query(path: &Path) -> String {
    path.display().to_string().replace('/', "%2F").replace('&', "%26").replace(' ', "+")
}

fn events_in_order(env: &Env) -> Result {
    let containerd = Containerd::new(env, "native")?;
    let id = env.id();
    let mut events = containerd.events()?;

    containerd.run_detached(&id, &["sleep", "1000"])?;
    containerd.exec(&[], &id, "exit 9").output()?.expect_code(9)?;
    containerd.succeed(["task", "pause", &id])?;
    containerd.succeed(["task", "resume", &id])?;
    containerd.succeed(["task", "kill", "--signal", "KILL", &id])?;
    containerd.wait_for(&id, "STOPPED")?;
    containerd.delete(&id)?;

    events.wait_for("/containers/delete")?;
    events.signal(Signal::SIGTERM)?;
    let output = events.finish()?.stdout();
    let topics: Vec<&str> =
        output.lines().filter_map(|line| line.split(' ').find(|word| word.starts_with("/tasks/"))).collect();
    let expected = ["create", "start", "exec-added", "exec-started", "exit", "paused", "resumed", "exit", "delete"];
    let expected: Vec<String> = expected.iter().map(|name| format!("/tasks/{name}")).collect();
    ensure_eq!(topics, expected, "the events");
    for part in ["\"exit_status\":9", "\"exit_status\":137"] {
        ensure!(output.contains(part), "{part} is not in {output}");
    }
    containerd.end()
}

fn out_of_memory(env: &Env) -> Result {
    let containerd = Containerd::new(env, "native")?;
    let id = env.id();
    let mut events = containerd.events()?;
    let limit = (96 << 20).to_string();

    let options = ["--detach", "--null-io", "--memory-limit", &limit];
    containerd.run(&options, &id, &["sh", "-c", "tail /dev/zero; sleep 1000"]).output()?.expect_code(0)?;

    events.wait_for("/tasks/oom")?;
    containerd.wait_for(&id, "RUNNING")?;
    containerd.succeed(["task", "kill", "--signal", "KILL", &id])?;
    containerd.wait_for(&id, "STOPPED")?;
    containerd.delete(&id)?;
    events.signal(Signal::SIGTERM)?;
    let output = events.finish()?.stdout();
    let told = output.lines().find(|line| line.contains("/tasks/oom")).unwrap_or_default();
    ensure!(told.contains(&format!("\"container_id\":\"{id}\"")), "the event: {told}");
    containerd.end()
}

fn refused(env: &Env) -> Result {
    env.only_bulkhead()?;
    let containerd = Containerd::new(env, "native")?;

    let id = env.id();
    containerd.run_detached(&id, &["sleep", "1000"])?;
    let images = env.work.display().to_string();
    let output = containerd.call(["task", "checkpoint", "--image-path", &images, &id]).output()?;
    ensure!(output.stderr().contains("cannot be saved"), "a checkpoint: {}", output.describe());
    containerd.succeed(["task", "kill", "--signal", "KILL", &id])?;
    containerd.wait_for(&id, "STOPPED")?;
    containerd.delete(&id)?;
    containerd.end()
}

fn restarted(env: &Env) -> Result {
    let mut containerd = Containerd::new(env, "native")?;
    let (lasting, ending, paused) = (env.id(), env.id(), env.id());
    containerd.run_detached(&lasting, &["sleep", "1000"])?;
    containerd.run_detached(&paused, &["sleep", "1000"])?;
    containerd.succeed(["task", "pause", &paused])?;
    containerd.run_detached(&ending, &["sh", "-c", "sleep 3; exit 6"])?;

    containerd.stop()?;
    std::thread::sleep(Duration::from_secs(5));
    containerd.start()?;

    if env.kind == Kind::Other && containerd.task(&ending)?.is_none() {
        skip!("this containerd forgets tasks of runc's shim that end while it is away");
    }
    containerd.wait_for(&ending, "STOPPED")?;
    containerd.wait_for(&lasting, "RUNNING")?;
    containerd.wait_for(&paused, "PAUSED")?;
    containerd.succeed(["task", "resume", &paused])?;
    for id in [&lasting, &paused] {
        containerd.exec(&[], id, "echo there").output()?.expect_stdout("there\n")?;
    }
    delete_with(&containerd, &ending, 6)?;
    for id in [&lasting, &paused] {
        containerd.succeed(["task", "kill", "--signal", "KILL", id])?;
        containerd.wait_for(id, "STOPPED")?;
        containerd.delete(id)?;
    }
    containerd.end()
}

/// The VMM's process below a shim.
fn vmm_of(shim: i32) -> Result<i32> {
    let below = processes::descendants(shim);
    match below.iter().find(|process| process.name.starts_with("bulkhead-vmm")) {
        Some(vmm) => Ok(vmm.pid),
        None => fail!("no VMM below the shim: {below:?}"),
    }
}

fn killed_shim(env: &Env) -> Result {
    env.only_bulkhead()?;
    let containerd = Containerd::new(env, "native")?;
    let id = env.id();
    let mut events = containerd.events()?;
    containerd.run_detached(&id, &["sleep", "1000"])?;
    let shim = containerd.wait_for(&id, "RUNNING")?;
    let vmm = vmm_of(shim)?;
    events.wait_for("/tasks/start")?;

    kill(Pid::from_raw(shim), Signal::SIGKILL)?;

    let end = Instant::now() + Duration::from_secs(30);
    while processes::Process::of(vmm).is_some_and(|process| process.state != 'Z') {
        ensure!(Instant::now() < end, "the VMM lives on without its shim");
        std::thread::sleep(Duration::from_millis(50));
    }
    events.wait_for("/tasks/delete")?;
    events.signal(Signal::SIGTERM)?;
    let told = events.finish()?.stdout();
    let exit = told.lines().find(|line| line.contains("/tasks/exit")).unwrap_or_default();
    ensure!(exit.contains(&id) && exit.contains("\"exit_status\":137"), "what is told of its end: {told}");
    let task = containerd.task(&id)?;
    ensure!(task.as_ref().is_none_or(|(state, _)| state == "STOPPED"), "the task of a killed shim: {task:?}");
    if task.is_some() {
        containerd.succeed(["task", "delete", &id])?;
    }
    containerd.succeed(["container", "delete", &id])?;
    containerd.end()
}

fn killed_vmm(env: &Env) -> Result {
    env.only_bulkhead()?;
    let containerd = Containerd::new(env, "native")?;
    let id = env.id();
    containerd.run_detached(&id, &["sleep", "1000"])?;
    let shim = containerd.wait_for(&id, "RUNNING")?;

    kill(Pid::from_raw(vmm_of(shim)?), Signal::SIGKILL)?;

    containerd.wait_for(&id, "STOPPED")?;
    delete_with(&containerd, &id, 137)?;
    containerd.end()
}

fn many_in_a_row(env: &Env) -> Result {
    let containerd = Containerd::new(env, "native")?;
    for number in 0..20 {
        let text = format!("{number}\n");
        containerd.run(&["--rm"], &env.id(), &["echo", text.trim()]).output()?.expect_stdout(&text)?;
    }
    containerd.end()
}
