// SPDX-License-Identifier: Apache-2.0
//! Options and verbs beside `run`.

use std::fs;
use std::path::Path;

use serde_json::{Value, json};

use super::network::{Namespace, container, host};
use super::{Case, case};
use crate::bundle::Bundle;
use crate::detached::Detached;
use crate::env::Env;
use crate::failure::{Context as _, Result, ensure, ensure_eq, fail};

pub(super) const CASES: &[Case] = &[
    case!(version),
    case!(help),
    case!(check_says_yes),
    case!(check_in_json),
    case!(written_configuration_runs),
    case!(written_configuration_replaces_nothing),
    case!(bundle_is_the_current_folder),
    case!(pid_file),
    case!(log_in_json),
    case!(log_as_text),
    case!(log_of_each_verb),
    case!(log_of_a_wrong_command_line),
    case!(log_cannot_be_opened),
    case!(debugging_output),
    case!(trace),
    case!(trace_of_a_failed_run),
    case!(trace_of_a_network),
];

/// As engines take it apart.
fn version(env: &Env) -> Result {
    for option in ["--version", "-v"] {
        let output = env.call([option]).output()?;
        output.expect_code(0)?;
        let text = output.stdout();
        let lines: Vec<&str> = text.lines().collect();
        let first: Vec<&str> = lines[0].split(' ').collect();
        ensure_eq!(first.len(), 3, "the words of the first line of {text:?}");
        let name = env.runtime.file_name().unwrap_or_default().to_string_lossy();
        ensure_eq!((first[0], first[1]), (&*name, "version"), "what is told of");
        ensure!(first[2].starts_with(|first: char| first.is_ascii_digit()), "the version in {text:?}");
        for start in ["commit: ", "spec: 1."] {
            ensure!(lines[1..].iter().any(|line| line.starts_with(start)), "no line {start:?} in {text:?}");
        }
    }
    Ok(())
}

fn help(env: &Env) -> Result {
    env.call(["--help"]).output()?.expect_in_stdout(&["run", "spec", "events", "--root", "--log-format"])?;
    let run = env.call(["run", "--help"]).output()?;
    run.expect_in_stdout(&["--bundle", "--detach", "--pid-file"])?;
    ensure!(!run.stdout().contains("events"), "the help of a verb is that of all: {}", run.describe());
    Ok(())
}

fn check_says_yes(env: &Env) -> Result {
    env.only_bulkhead()?;
    let output = env.call(["check"]).output()?;

    output.expect_in_stdout(&["KVM", "kernel", "image", "vsock", "memory", "filters", "cgroup", "rights"])
}

fn check_in_json(env: &Env) -> Result {
    env.only_bulkhead()?;
    let output = env.call(["check", "--format", "json"]).output()?;

    output.expect_code(0)?;
    let items: Vec<Value> = serde_json::from_slice(&output.stdout).context(|| output.stdout())?;
    ensure!(
        items.len() >= 7 && items.iter().all(|item| item["ok"] == true && item["name"].is_string()),
        "{}",
        output.stdout()
    );
    Ok(())
}

fn written_configuration_runs(env: &Env) -> Result {
    let bundle = Bundle::busybox(env)?;

    env.call(["spec"]).in_folder(&bundle.folder).output()?.expect_stdout("")?;

    let text = fs::read_to_string(bundle.config())?;
    let mut spec: Value = serde_json::from_str(&text)?;
    ensure!(spec["process"]["args"].is_array(), "no process.args in {text}");
    // As people do with it; the terminal needs one.
    spec["process"]["terminal"] = json!(false);
    spec["process"]["args"] = json!(["echo", "it runs"]);
    fs::write(bundle.config(), spec.to_string())?;
    env.run_folder(&bundle.folder, &env.id()).output()?.expect_stdout("it runs\n")
}

fn written_configuration_replaces_nothing(env: &Env) -> Result {
    let folder = env.folder("bundle")?;
    fs::write(folder.join("config.json"), "mine")?;

    env.call(["spec"]).in_folder(&folder).output()?.expect_error(&["config.json"])?;

    ensure_eq!(fs::read_to_string(folder.join("config.json"))?, "mine", "the file");
    Ok(())
}

fn bundle_is_the_current_folder(env: &Env) -> Result {
    let mut bundle = Bundle::busybox(env)?;
    bundle.sh("echo here");
    bundle.write()?;

    env.call(["run".to_owned(), env.id()]).in_folder(&bundle.folder).output()?.expect_stdout("here\n")
}

fn pid_file(env: &Env) -> Result {
    let mut bundle = Bundle::busybox(env)?;
    bundle.sh("echo ready; read line");
    bundle.write()?;
    let file = env.work.join("pid");
    let arguments =
        ["run", "--bundle", &bundle.folder.display().to_string(), "--pid-file", &file.display().to_string(), &env.id()]
            .map(String::from);

    let mut running = env.call(arguments).open_stdin().spawn()?;
    running.wait_for("ready\n")?;
    // It may be written a moment later than the container prints.
    let end = std::time::Instant::now() + std::time::Duration::from_secs(5);
    while !file.exists() && std::time::Instant::now() < end {
        std::thread::sleep(std::time::Duration::from_millis(10));
    }
    let pid: i32 = fs::read_to_string(&file).context(|| format!("reading {}", file.display()))?.trim().parse()?;
    ensure!(nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), None).is_ok(), "there is no process {pid}");
    running.write(b"\n")?;

    running.finish()?.expect_code(0)
}

/// A run with a log that fails.
fn logged(env: &Env, format: &str) -> Result<String> {
    let folder = env.folder("empty")?;
    let log = env.work.join("log-of-the-run");
    let options = ["--log".into(), log.clone().into_os_string(), "--log-format".into(), format.into()];

    let output = env.run_folder(&folder, "some-id").globals(options).output()?;

    ensure!(!output.status.success(), "{}", output.describe());
    Ok(fs::read_to_string(&log)?)
}

fn log_in_json(env: &Env) -> Result {
    let text = logged(env, "json")?;

    let Some(last) = text.lines().last() else { fail!("the log is empty") };
    let line: Value = serde_json::from_str(last).context(|| text.clone())?;
    ensure_eq!(line["level"], json!("error"), "the level in {last}");
    let (message, time) = (line["msg"].as_str().unwrap_or_default(), line["time"].as_str().unwrap_or_default());
    ensure!(message.contains("config.json"), "the message in {last}");
    // RFC 3339.
    ensure!(time.len() >= 20 && time.as_bytes()[10] == b'T', "the time in {last}");
    Ok(())
}

fn log_as_text(env: &Env) -> Result {
    let text = logged(env, "text")?;

    ensure!(text.contains("level=error") && text.contains("config.json") && text.contains("time="), "{text}");
    Ok(())
}

/// The errors that a log in JSON tells of: a line each.
fn logged_errors(log: &Path) -> Result<Vec<String>> {
    let text = fs::read_to_string(log).context(|| format!("reading {}", log.display()))?;
    fs::remove_file(log)?;
    let message = |line: &str| -> Result<String> {
        let line: Value = serde_json::from_str(line).context(|| format!("{line:?} in {text:?}"))?;
        ensure_eq!(line["level"], "error", "the level in {line}");
        Ok(line["msg"].as_str().unwrap_or_default().to_owned())
    };
    text.lines().map(message).collect()
}

/// A shim takes the last line of it for the cause.
fn log_of_each_verb(env: &Env) -> Result {
    let mut bundle = Bundle::busybox(env)?;
    bundle.args(&["sleep", "1000"]);
    let container = Detached::run(env, &bundle)?;
    bundle.args(&["no-such-program"]);
    bundle.write()?;
    let (id, other, folder) = (container.id.as_str(), env.id(), bundle.folder.display().to_string());
    let log = env.work.join("log-of-the-verb");
    let options = ["--log".into(), log.clone().into_os_string(), "--log-format".into(), "json".into()];

    for (words, cause) in [
        (&["create", "--bundle", "/no/such/bundle", &other][..], "/no/such/bundle"),
        (&["create", "--bundle", &folder, &other], "no-such-program"),
        (&["exec", id, "nonesuch"], "nonesuch"),
        (&["exec", "--detach", id, "nonesuch"], "nonesuch"),
        (&["kill", &other, "KILL"], "does not exist"),
        (&["kill", id, "FOO"], "unknown signal"),
        (&["start", id], "cannot start"),
        (&["delete", id], "not stopped: running"),
    ] {
        let output = env.call(words.iter().copied()).globals(options.clone()).output()?;
        ensure!(!output.status.success(), "{words:?}: {}", output.describe());
        let errors = logged_errors(&log)?;
        ensure!(errors.len() == 1 && errors[0].contains(cause), "{words:?}: {errors:?}");
    }
    Ok(())
}

fn log_of_a_wrong_command_line(env: &Env) -> Result {
    let log = env.work.join("log-of-the-verb");
    for format in ["json", "text"] {
        let options = ["--log".into(), log.clone().into_os_string(), "--log-format".into(), format.into()];
        for (words, cause) in [
            (&["frobnicate"][..], "frobnicate"),
            (&["create", "--nosuch", "x"], "nosuch"),
            (&["exec", "--tty=maybe", "x", "true"], "maybe"),
            (&["state"], ""),
            (&["state", "a", "b"], ""),
        ] {
            let output = env.call(words.iter().copied()).globals(options.clone()).output()?;
            ensure!(!output.status.success(), "{words:?}: {}", output.describe());
            if format == "json" {
                let errors = logged_errors(&log)?;
                ensure!(errors.len() == 1 && errors[0].contains(cause), "{words:?}: {errors:?}");
                continue;
            }
            let text = fs::read_to_string(&log)?;
            fs::remove_file(&log)?;
            ensure!(text.contains("level=error msg=") && text.lines().count() == 1, "{words:?}: {text:?}");
        }
    }
    Ok(())
}

fn log_cannot_be_opened(env: &Env) -> Result {
    let bundle = Bundle::busybox(env)?;

    env.run(&bundle)?.globals(["--log", "/nowhere/log"]).output()?.expect_error(&["/nowhere/log"])
}

fn debugging_output(env: &Env) -> Result {
    let mut bundle = Bundle::busybox(env)?;
    bundle.sh("echo fine");
    let log = env.work.join("log-of-the-run");
    let options = ["--debug".into(), "--log".into(), log.clone().into_os_string()];

    env.run(&bundle)?.globals(options).output()?.expect_stdout("fine\n")?;

    ensure!(fs::read_to_string(&log)?.contains("level=debug"), "nothing in the log");
    Ok(())
}

/// The phases that `--trace` has to tell of, each as a part of some name.
const PHASES: &[&str] =
    &["spec", "vmm", "kvm", "kernel", "agent", "create", "exec", "first output", "exit", "teardown"];

fn trace(env: &Env) -> Result {
    env.only_bulkhead()?;
    let mut bundle = Bundle::busybox(env)?;
    bundle.sh("echo fine");
    let file = env.work.join("trace.json");

    env.run(&bundle)?.globals(["--trace".into(), file.clone().into_os_string()]).output()?.expect_stdout("fine\n")?;

    let text = fs::read_to_string(&file)?;
    let trace: Value = serde_json::from_str(&text).context(|| text.clone())?;
    let Some(events) = trace["traceEvents"].as_array().or(trace.as_array()) else { fail!("no events in {text}") };
    let timed: Vec<&Value> = events.iter().filter(|event| event["ph"] != "M").collect();
    for event in &timed {
        ensure!(
            event["name"].is_string() && event["ts"].is_number() && event["pid"].is_number(),
            "an event without a name or time: {event}"
        );
        ensure!(
            event["dur"].as_f64().is_none_or(|length| (0.0..60e6).contains(&length)),
            "an event of a strange length: {event}"
        );
    }
    for phase in PHASES {
        let told =
            timed.iter().any(|event| event["name"].as_str().is_some_and(|name| name.to_lowercase().contains(phase)));
        let names: Vec<_> = timed.iter().filter_map(|event| event["name"].as_str()).collect();
        ensure!(told, "no phase {phase:?} among {names:?}");
    }
    Ok(())
}

/// The name of the phase tells who moves the frames, also of an interface that comes later.
fn trace_of_a_network(env: &Env) -> Result {
    let namespace = Namespace::new(env, "trace")?.with_addresses(79)?;
    for (vhost, backend) in [("false", "tap"), ("true", "vhost-net")] {
        let mut bundle =
            container(env, &namespace, "echo ready; until test -e /sys/class/net/net1; do sleep 0.1; done")?;
        bundle.set("/annotations", json!({ "io.bulkhead.net.vhost": vhost }));
        let file = env.work.join("trace.json");

        let mut running = env.run(&bundle)?.globals(["--trace".into(), file.clone().into_os_string()]).spawn()?;
        running.wait_for("ready\n")?;
        host(&format!("ip link add bht-trace1 type veth peer name net1 netns {}", namespace.path.display()))?;
        running.finish()?.expect_stdout("ready\n")?;

        let text = fs::read_to_string(&file)?;
        ensure_eq!(text.matches(&format!("\"network ({backend})\"")).count(), 2, "phases of the network");
        host("ip link del bht-trace1")?;
    }
    Ok(())
}

fn trace_of_a_failed_run(env: &Env) -> Result {
    env.only_bulkhead()?;
    let mut bundle = Bundle::busybox(env)?;
    bundle.args(&["no-such-program"]);
    let file = env.work.join("trace.json");
    let options = ["--trace".into(), file.clone().into_os_string()];

    env.run(&bundle)?.globals(options).output()?.expect_error_code(127, &["no-such-program"])?;

    let text = fs::read_to_string(&file)?;
    serde_json::from_str::<Value>(&text).context(|| text.clone())?;
    env.run(&bundle)?.globals(["--trace", "/nowhere/trace"]).output()?.expect_error(&["/nowhere/trace"])
}
