// SPDX-License-Identifier: Apache-2.0
//! Further processes in a container.

use std::fs;
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::sys::wait::{WaitStatus, waitpid};
use nix::unistd::Pid;
use serde_json::json;

use super::{Case, case};
use crate::bundle::Bundle;
use crate::detached::Detached;
use crate::env::Env;
use crate::failure::{Result, ensure, ensure_eq};
use crate::pty::Terminal;

pub(super) const CASES: &[Case] = &[
    case!(status_is_that_of_the_process),
    case!(streams_are_the_callers),
    case!(process_is_in_the_container),
    case!(options_change_the_process),
    case!(process_file_describes_it_all),
    case!(process_file_that_says_little),
    case!(missing_program_is_named),
    case!(detached_process_has_a_process_that_stands_for_it),
    case!(signals_are_forwarded),
    case!(one_process_does_not_hold_up_another),
    case!(process_ends_with_the_container),
    case!(terminal_is_given_and_given_back),
    case!(stopped_container_takes_no_process),
    case!(foreground_container_takes_processes),
];

fn sleeping(env: &Env) -> Result<Detached<'_>> {
    let mut bundle = Bundle::busybox(env)?;
    bundle.args(&["sleep", "1000"]);
    Detached::run(env, &bundle)
}

fn status_is_that_of_the_process(env: &Env) -> Result {
    let container = sleeping(env)?;

    container.exec("exit 0").output()?.expect_code(0)?;
    container.exec("exit 23").output()?.expect_code(23)?;
    container.exec("kill -9 $$").output()?.expect_code(137)
}

fn streams_are_the_callers(env: &Env) -> Result {
    let container = sleeping(env)?;
    let bytes = "0123456789abcdef".repeat(20_000);

    let output = container.exec("cat; echo on stderr >&2").input(bytes.clone()).output()?;

    output.expect_code(0)?;
    ensure!(output.stdout() == bytes, "stdout differs: {} bytes of {}", output.stdout.len(), bytes.len());
    ensure_eq!(output.stderr(), "on stderr\n", "stderr");
    Ok(())
}

fn process_is_in_the_container(env: &Env) -> Result {
    let container = sleeping(env)?;

    let script = "hostname; cat /proc/1/cmdline | tr '\\0' ' '; echo; cat /proc/self/cgroup; touch /made-here";
    container.exec(script).output()?.expect_in_stdout(&["bulkhead-test\n", "sleep 1000 \n", "0::/\n"])?;

    container.exec("ls /made-here").output()?.expect_stdout("/made-here\n")
}

fn options_change_the_process(env: &Env) -> Result {
    let container = sleeping(env)?;
    let options = ["exec", "--cwd", "/tmp", "--env", "A=b", "--env", "C=d", "--user", "1000:1001", "-g", "7"];

    container
        .verb_with(&options, &["sh", "-c", "pwd; echo $A $C; id -u; id -g; id -G"])
        .output()?
        .expect_stdout("/tmp\nb d\n1000\n1001\n1001 7\n")
}

fn process_file_describes_it_all(env: &Env) -> Result {
    let container = sleeping(env)?;
    let file = env.work.join("process.json");
    let process = json!({
        "args": ["sh", "-c", "pwd; echo $X; id -u; exit 6"], "env": ["PATH=/bin", "X=y"], "cwd": "/etc",
        "user": { "uid": 5, "gid": 5 },
    });
    fs::write(&file, process.to_string())?;

    let output = container.verb(&["exec", "--process", &file.display().to_string()]).output()?;

    output.expect_code(6)?;
    ensure_eq!(output.stdout(), "/etc\ny\n5\n", "stdout");
    Ok(())
}

/// What it does not say is the container's own, as far as with runc.
fn process_file_that_says_little(env: &Env) -> Result {
    let mut bundle = Bundle::busybox(env)?;
    let of_container = ["CAP_CHOWN", "CAP_KILL", "CAP_SETPCAP"];
    let sets = json!({ "bounding": of_container, "effective": of_container, "permitted": of_container });
    bundle.args(&["sleep", "1000"]).set("/process/capabilities", sets).set("/process/oomScoreAdj", json!(321));
    let rule = json!({ "names": ["sethostname"], "action": "SCMP_ACT_ERRNO" });
    bundle.set("/linux/seccomp", json!({ "defaultAction": "SCMP_ACT_ALLOW", "syscalls": [rule] }));
    let container = Detached::run(env, &bundle)?;
    let file = env.work.join("process.json");
    let exec = container.verb(&["exec", "--process", &file.display().to_string()]);
    let of_file = ["CAP_KILL"];
    let own = json!({ "bounding": of_file, "effective": of_file, "permitted": of_file });

    let script = "sed -n 's/^Cap[BEP][a-z]*:.0*//p; s/^NoNewPrivs:.//p; s/^Seccomp:.//p' /proc/self/status; cat /proc/self/oom_score_adj";
    let mut process = json!({
        "args": ["sh", "-c", script], "env": ["PATH=/bin"], "cwd": "/", "user": { "uid": 0, "gid": 0 },
    });
    fs::write(&file, process.to_string())?;
    exec.output()?.expect_stdout("121\n121\n121\n0\n2\n321\n")?;

    process["capabilities"] = own;
    fs::write(&file, process.to_string())?;
    let exec = container.verb(&["exec", "--process", &file.display().to_string()]);
    exec.output()?.expect_stdout("20\n20\n20\n0\n2\n321\n")
}

fn missing_program_is_named(env: &Env) -> Result {
    let container = sleeping(env)?;

    container.verb_with(&["exec"], &["nonesuch"]).output()?.expect_error_code(255, &["exec failed", "nonesuch"])?;
    container.verb(&["exec"]).output()?.expect_error_code(255, &["args cannot be empty"])?;
    container.exec("echo fine").output()?.expect_stdout("fine\n")
}

fn detached_process_has_a_process_that_stands_for_it(env: &Env) -> Result {
    let container = sleeping(env)?;
    let pid_file = env.work.join("exec.pid");
    let options = ["exec", "--detach", "--pid-file", &pid_file.display().to_string()].map(str::to_owned);
    let options: Vec<&str> = options.iter().map(String::as_str).collect();

    let null = || fs::File::options().write(true).open("/dev/null");
    let run = container.verb_with(&options, &["sh", "-c", "sleep 1; exit 11"]).stdout(null()?).stderr(null()?);
    run.output()?.expect_code(0)?;

    let pid = Pid::from_raw(fs::read_to_string(&pid_file)?.parse().unwrap_or(0));
    ensure_eq!(waitpid(pid, None)?, WaitStatus::Exited(pid, 11), "the end of the process that stands for it");
    Ok(())
}

fn signals_are_forwarded(env: &Env) -> Result {
    let container = sleeping(env)?;

    let mut exec =
        container.exec("trap 'echo got it; exit 3' TERM; echo ready; while :; do sleep 0.1; done").spawn()?;
    exec.wait_for("ready\n")?;
    exec.signal(Signal::SIGTERM)?;

    let output = exec.finish()?;
    output.expect_code(3)?;
    ensure_eq!(output.stdout(), "ready\ngot it\n", "stdout");
    Ok(())
}

fn one_process_does_not_hold_up_another(env: &Env) -> Result {
    let container = sleeping(env)?;
    let mut first = container.exec("echo ready; read line; echo \"<$line>\"").open_stdin().spawn()?;
    first.wait_for("ready\n")?;

    container.exec("echo second").output()?.expect_stdout("second\n")?;
    container.expect_status("running")?;

    first.write(b"late\n")?;
    first.finish()?.expect_stdout("ready\n<late>\n")
}

fn process_ends_with_the_container(env: &Env) -> Result {
    let container = sleeping(env)?;
    let mut exec = container.exec("echo ready; sleep 1000").spawn()?;
    exec.wait_for("ready\n")?;
    let begin = Instant::now();

    container.verb_with(&["kill"], &["KILL"]).output()?.expect_code(0)?;

    exec.finish()?.expect_code(137)?;
    ensure_eq!(container.wait()?, 137, "the container's status");
    ensure!(begin.elapsed() < Duration::from_secs(30), "it took {:?}", begin.elapsed());
    Ok(())
}

fn terminal_is_given_and_given_back(env: &Env) -> Result {
    let container = sleeping(env)?;
    let mut terminal = Terminal::new(31, 97)?;
    let before = terminal.modes()?;

    let script = "tty; stty size; echo ready; read line; echo \"<$line>\"";
    let running = terminal.spawn(container.verb_with(&["exec", "--tty"], &["sh", "-c", script]))?;
    terminal.wait_for("31 97\r\nready\r\n")?;
    terminal.type_text("typed\r")?;
    running.finish()?.expect_code(0)?;

    terminal.wait_for("<typed>\r\n")?;
    ensure_eq!(terminal.modes()?.local_flags, before.local_flags, "the local modes");
    container.verb_with(&["exec", "--tty"], &["true"]).output()?.expect_error(&["terminal"])
}

fn stopped_container_takes_no_process(env: &Env) -> Result {
    let container = sleeping(env)?;
    container.verb_with(&["kill"], &["KILL"]).output()?.expect_code(0)?;
    container.wait_for_status("stopped")?;

    container.exec("true").output()?.expect_error_code(255, &["cannot exec in a stopped container"])
}

fn foreground_container_takes_processes(env: &Env) -> Result {
    let mut bundle = Bundle::busybox(env)?;
    bundle.sh("echo ready; exec sleep 1000");
    let id = env.id();
    let mut running = env.run_as(&bundle, &id)?.spawn()?;
    running.wait_for("ready\n")?;

    env.call(["exec", &id, "echo", "inside"]).output()?.expect_stdout("inside\n")?;
    env.call(["kill", &id, "KILL"]).output()?.expect_code(0)?;

    let pid = running.pid();
    running.finish()?.expect_code(137)?;
    ensure!(kill(Pid::from_raw(pid), None).is_err(), "the runtime is still there");
    env.call(["state", &id]).output()?.expect_error(&["does not exist"])
}
