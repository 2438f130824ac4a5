// SPDX-License-Identifier: Apache-2.0
//! Each verb in each state, word for word: statuses, and the words that engines and scripts look for.

use std::fs;

use nix::sys::wait::{WaitStatus, waitpid};
use nix::unistd::Pid;
use serde_json::{Value, json};

use super::{Case, case};
use crate::bundle::Bundle;
use crate::detached::Detached;
use crate::env::{Env, Kind};
use crate::failure::{Context as _, Result, ensure, ensure_eq};

pub(super) const CASES: &[Case] = &[
    case!(verbs_without_a_container),
    case!(verbs_in_each_state).limit(600),
    case!(verbs_of_a_container_that_ends_unstarted),
    case!(options_of_exec),
    case!(options_of_update),
    case!(shapes_of_what_is_printed),
    case!(process_in_a_cgroup_of_the_container),
    case!(cgroups_in_cgroups),
    case!(verbs_with_few_descriptors),
];

/// Of which the variable `FILES` says how many there may be.
pub(super) const FEW_FILES: &str = "ulimit -n \"$FILES\"; exec \"$@\"";

/// A command line, in which `ID` stands for the container; the status; and what is said. Where the status is 0, that is on stdout:
/// all of it if it is nothing, or ends with an end of line, else a part. Otherwise it is a part of the error.
type Step<'a> = (&'a str, i32, &'a str);

pub(super) fn follow(env: &Env, id: &str, steps: &[Step<'_>]) -> Result {
    for (line, code, words) in steps {
        let arguments: Vec<&str> = line.split(' ').map(|word| if word == "ID" { id } else { word }).collect();
        let output = env.call(arguments).output()?;
        ensure!(output.status.code() == Some(*code), "{line}: expected status {code}, seen {}", output.describe());
        let said = if *code == 0 { output.stdout() } else { output.stderr() };
        let is_whole = *code == 0 && (words.is_empty() || words.ends_with('\n'));
        let is_said = if is_whole { said == *words } else { said.contains(words) };
        ensure!(is_said, "{line}: expected {words:?}, seen {}", output.describe());
        if *code != 0 && env.kind == Kind::Bulkhead && !said.is_empty() {
            output.expect_error(&[])?;
        }
    }
    Ok(())
}

/// A container whose init says `up`, and handles TERM.
fn lasting(env: &Env) -> Result<Bundle> {
    let mut bundle = Bundle::busybox(env)?;
    bundle.sh("trap 'exit 3' TERM; echo up; while :; do sleep 0.1; done");
    Ok(bundle)
}

fn verbs_without_a_container(env: &Env) -> Result {
    follow(
        env,
        "absent",
        &[
            ("state ID", 1, "container does not exist"),
            ("start ID", 1, "container does not exist"),
            ("kill ID", 1, "container does not exist"),
            ("delete ID", 1, "container does not exist"),
            ("delete --force ID", 0, ""),
            ("delete -f ID", 0, ""),
            ("exec ID true", 255, "exec failed: container does not exist"),
            ("ps ID", 1, "container does not exist"),
            ("pause ID", 1, "container does not exist"),
            ("resume ID", 1, "container does not exist"),
            ("update --pids-limit 5 ID", 1, "container does not exist"),
            ("events --stats ID", 1, "container does not exist"),
            ("list", 0, "ID          PID         STATUS      BUNDLE      CREATED     OWNER\n"),
            ("list --quiet", 0, ""),
            ("list -f json", 0, "null\n"),
            ("list --format xml", 1, "invalid"),
            ("frobnicate", 3, "frobnicate"),
            ("state", 1, ""),
            ("state a b", 1, ""),
            ("list extra", 1, ""),
            ("create --nosuch ID", 1, "nosuch"),
            ("state a/b", 1, "invalid container ID format"),
            ("create --bundle /no/such/bundle ID", 1, "/no/such/bundle"),
            ("--log-format xml list", 1, "xml"),
            ("list --quiet --quiet", 0, ""),
            ("list --quiet=true", 0, ""),
            ("list --quiet=true --quiet=false", 0, "PID"),
            ("list --quiet=maybe", 1, "maybe"),
            ("--log-format json --log-format text list --format json --format table -q", 0, ""),
            ("--systemd-cgroup --rootless true --log-format json list -q", 0, ""),
            ("features", 0, "\"ociVersionMax\""),
            ("create --help", 0, "--console-socket"),
            ("exec -h", 0, "--additional-gids"),
        ],
    )?;
    if env.kind == Kind::Bulkhead {
        // runc looks for the bundle first.
        for verb in ["create a/b", "run .."] {
            follow(env, "", &[(verb, 1, "invalid container ID format")])?;
        }
        // Engines ask for the help to learn whether it can be done.
        for verb in ["checkpoint", "restore"] {
            for option in ["--help", "--image-path"] {
                env.call([verb, option]).output()?.expect_error(&["not supported", "CRIU"])?;
            }
        }
        for verb in ["events", "gc", "logs", "check", "spec", "list", "update", "kill"] {
            env.call([verb, "-h"]).output()?.expect_in_stdout(&["Usage: "])?;
        }
    }
    let none = env.call([""; 0]).output()?;
    none.expect_in_stdout(&["create", "start", "exec"])
}

fn verbs_in_each_state(env: &Env) -> Result {
    let container = Detached::create(env, &lasting(env)?)?;
    let id = container.id.as_str();
    follow(
        env,
        id,
        &[
            ("state ID", 0, "\"status\": \"created\""),
            ("create ID", 1, ""),
            ("exec ID echo early", 0, "early\n"),
            ("kill ID 0", 0, ""),
            ("kill ID SIGFOO", 1, "unknown signal"),
            ("kill ID FOO", 1, "unknown signal"),
            ("resume ID", 1, "container not paused"),
            ("update --pids-limit 50 ID", 0, ""),
            ("events --stats ID", 0, "\"type\":\"stats\""),
            ("ps -f json ID", 0, "["),
            ("start ID", 0, ""),
            ("start ID", 1, "cannot start an already running container"),
            ("state ID", 0, "\"status\": \"running\""),
            ("list", 0, "running"),
            ("delete ID", 1, "that is not stopped: running"),
            ("kill ID WINCH", 0, ""),
            ("kill ID SIGWINCH", 0, ""),
            ("kill ID sigwinch", 0, ""),
            ("kill ID 28", 0, ""),
            ("kill --all ID CONT", 0, ""),
            ("kill -a ID CONT", 0, ""),
            ("kill ID CONT --all", 0, ""),
            ("kill ID 99", 1, ""),
            ("ps ID -ef", 0, "CMD"),
            ("ps ID -o pid,ppid,args", 0, "PPID COMMAND"),
            ("ps -f xml ID", 1, "invalid"),
            ("events --interval 0s ID", 1, ""),
            ("pause ID", 0, ""),
            ("pause ID", 1, "container not running"),
            ("state ID", 0, "\"status\": \"paused\""),
            ("exec ID true", 255, "exec failed: cannot exec in a paused container (use --ignore-paused to override)"),
            ("start ID", 1, "cannot start a container in the paused state"),
            ("delete ID", 1, "that is not stopped: paused"),
            ("update --pids-limit 51 ID", 0, ""),
            ("events --stats ID", 0, "\"limit\":51"),
            ("ps --format json ID", 0, "["),
            ("kill ID CONT", 0, ""),
            ("list -q", 0, "e2e-"),
            ("resume ID", 0, ""),
            ("resume ID", 1, "container not paused"),
            ("state ID", 0, "\"status\": \"running\""),
            ("pause ID", 0, ""),
            ("kill ID KILL", 0, ""),
        ],
    )?;
    ensure_eq!(container.wait()?, 137, "the status of a container that was killed");
    container.wait_for_status("stopped")?;
    follow(
        env,
        id,
        &[
            ("state ID", 0, "\"pid\": 0"),
            ("list", 0, "0           stopped"),
            ("kill ID TERM", 1, "container not running"),
            ("kill ID KILL", 1, "container not running"),
            ("kill --all ID KILL", 0, ""),
            ("start ID", 1, "cannot start a container that has stopped"),
            ("exec ID true", 255, "exec failed: cannot exec in a stopped container"),
            ("pause ID", 1, "container not running"),
            ("resume ID", 1, "container not paused"),
            ("ps ID", 0, "CMD"),
            ("ps -f json ID", 0, "null\n"),
            ("update --pids-limit 5 ID", 1, "container not running"),
            ("events --stats ID", 1, "is not running"),
            ("events ID", 1, "is not running"),
            ("delete ID", 0, ""),
            ("delete ID", 1, "container does not exist"),
            ("delete --force ID", 0, ""),
            ("state ID", 1, "container does not exist"),
        ],
    )
}

/// It is named twice, and signalled before its start.
fn verbs_of_a_container_that_ends_unstarted(env: &Env) -> Result {
    let bundle = lasting(env)?;
    let container = Detached::create(env, &bundle)?;
    let folder = bundle.folder.display().to_string();
    for verb in ["create", "run"] {
        let again = env.call([verb, "--bundle", &folder, &container.id]).output()?;
        again.expect_code(1)?;
        ensure!(again.stderr().contains("container with given ID already exists"), "{}", again.describe());
    }
    follow(env, &container.id, &[("kill ID", 0, "")])?;
    container.wait_for_status("stopped")?;
    follow(env, &container.id, &[("kill ID KILL", 1, "container not running"), ("delete ID", 0, "")])
}

fn options_of_exec(env: &Env) -> Result {
    let mut bundle = lasting(env)?;
    bundle.set("/process/noNewPrivileges", json!(false));
    let container = Detached::run(env, &bundle)?;
    container.wait_for("up")?;
    follow(
        env,
        &container.id,
        &[
            ("exec ID", 255, "exec failed: process args cannot be empty"),
            ("exec --process /no/such/file ID", 255, "/no/such/file"),
            ("exec ID true", 0, ""),
            ("exec -- ID true", 0, ""),
            ("exec ID false", 1, ""),
            ("exec ID nosuch", 255, "nosuch"),
            ("exec ID /etc", 255, "exec failed: "),
            ("exec -u 5:6 ID id", 0, "uid=5 gid=6"),
            ("exec --user root ID id", 255, "root"),
            ("exec -t=true -t=0 ID true", 0, ""),
            ("exec --tty --tty=false -u 5 -u 6:7 ID id", 0, "uid=6 gid=7"),
            ("exec -e A=b -e A=c ID sh -c env|grep${IFS}^A=", 0, "A=c\n"),
            ("exec --cwd /tmp ID pwd", 0, "/tmp\n"),
            ("exec --cwd rel ID true", 255, "bsolute"),
            ("exec -g 7 -g 8 ID id -G", 0, "0 7 8\n"),
            ("exec ID grep NoNewPrivs /proc/self/status", 0, "NoNewPrivs:\t0\n"),
            ("exec --no-new-privs ID grep NoNewPrivs /proc/self/status", 0, "NoNewPrivs:\t1\n"),
            ("exec --cgroup / ID true", 0, ""),
            ("exec --cgroup nosuch ID true", 255, "nosuch"),
            ("exec --process-label label ID true", 255, "exec failed: "),
            ("exec --console-socket /no/such ID true", 255, "console"),
            ("exec -t -d ID true", 255, "cannot allocate tty"),
        ],
    )?;
    if env.kind == Kind::Bulkhead {
        follow(
            env,
            &container.id,
            &[
                ("exec --apparmor profile ID true", 255, "process.apparmorProfile"),
                ("exec --apparmor unconfined ID true", 0, ""),
                ("exec --process-label label ID true", 255, "process.selinuxLabel"),
                ("exec --cap NO_SUCH ID true", 255, "NO_SUCH"),
                ("exec --preserve-fds 33 ID true", 255, "--preserve-fds 33"),
                ("ps ID aux", 1, "aux"),
                ("ps ID -o rss", 1, "rss"),
            ],
        )?;
    }
    capabilities_that_are_added(&container)?;
    // Its pid is there when `exec` returns, without an end of line.
    let file = env.work.join("exec.pid").display().to_string();
    for option in ["-d", "--detach"] {
        container.must_with(&["exec", option, "--pid-file", &file], &["true"])?;
        let text = std::fs::read_to_string(&file)?;
        let pid = text.parse().context(|| format!("the pid file has {text:?}"))?;
        // Where it is the process itself, its namespace does not end before somebody has taken its status.
        ensure_eq!(waitpid(Pid::from_raw(pid), None)?, WaitStatus::Exited(Pid::from_raw(pid), 0), "its end");
    }
    follow(env, &container.id, &[("kill ID TERM", 0, "")])?;
    ensure_eq!(container.wait()?, 3, "the status of a container that handles TERM");
    Ok(())
}

/// To those of the container, in each set that a program has them from.
fn capabilities_that_are_added(container: &Detached<'_>) -> Result {
    const SYS_ADMIN: u64 = 1 << 21;
    const SYS_TIME: u64 = 1 << 25;
    let sets = |options: &[&str]| -> Result<Vec<u64>> {
        let words = [&["exec"], options].concat();
        let output =
            container.verb_with(&words, &["sed", "-n", "s/^Cap[PEB][a-z]*:\t//p", "/proc/self/status"]).output()?;
        output.expect_code(0)?;
        let sets = output
            .stdout()
            .lines()
            .map(|line| u64::from_str_radix(line, 16))
            .collect::<std::result::Result<Vec<_>, _>>()?;
        ensure_eq!(sets.len(), 3, "permitted, effective and bounding set: {}", output.describe());
        Ok(sets)
    };

    let own = sets(&[])?;
    ensure!(own.iter().all(|set| set & (SYS_ADMIN | SYS_TIME) == 0), "what the container has: {own:x?}");
    let added = sets(&["--cap", "CAP_SYS_ADMIN", "--cap", "CAP_SYS_TIME"])?;
    let expected: Vec<u64> = own.iter().map(|set| set | SYS_ADMIN | SYS_TIME).collect();
    ensure_eq!(added, expected, "the sets with two more capabilities");
    Ok(())
}

fn options_of_update(env: &Env) -> Result {
    let mut bundle = lasting(env)?;
    bundle.set("/linux/resources", json!({ "memory": { "limit": 200 << 20 } }));
    let container = Detached::run(env, &bundle)?;
    container.wait_for("up")?;
    let read = "cd /sys/fs/cgroup; cat cpu.max cpu.weight pids.max memory.max memory.low";
    follow(
        env,
        &container.id,
        &[(
            "update --memory 100m --memory-swap 200m --memory-reservation 50m --cpu-quota 50000 --cpu-period 100000 \
             --cpu-share 512 --pids-limit 20 --cpuset-cpus 0 --cpuset-mems 0 ID",
            0,
            "",
        )],
    )?;
    container.exec(read).output()?.expect_stdout("50000 100000\n20\n20\n104857600\n52428800\n")?;
    // Of a quota and its period, what is not given stays.
    let quota = || container.exec("cat /sys/fs/cgroup/cpu.max").output();
    follow(env, &container.id, &[("update --cpu-period 50000 ID", 0, "")])?;
    quota()?.expect_stdout("50000 50000\n")?;
    follow(env, &container.id, &[("update --cpu-quota 20000 --pids-limit 20 ID", 0, "")])?;
    quota()?.expect_stdout("20000 50000\n")?;
    follow(
        env,
        &container.id,
        &[
            ("update --blkio-weight 100 ID", 0, ""),
            ("update --kernel-memory 5m --kernel-memory-tcp 5m ID", 0, ""),
            ("update --memory foo ID", 1, "memory"),
            ("update --pids-limit foo ID", 1, "foo"),
            ("update --resources /no/such/file ID", 1, "/no/such/file"),
            ("update --l3-cache-schema L3:0=1 ID", 1, ""),
            ("update --cpuset-cpus 99 ID", 1, "99"),
            ("update --memory -1 --memory-swap -1 ID", 0, ""),
            ("update --cpu-quota -1 ID", 0, ""),
            ("update --pids-limit -1 ID", 0, ""),
        ],
    )?;
    container.exec("cat /sys/fs/cgroup/pids.max /sys/fs/cgroup/memory.max").output()?.expect_stdout("max\nmax\n")?;
    if env.kind == Kind::Bulkhead {
        follow(
            env,
            &container.id,
            &[
                ("update --cpu-burst 1000 --cpu-quota 50000 ID", 0, ""),
                ("update --cpu-idle 1 ID", 0, ""),
                ("update --cpu-rt-period 1000 ID", 1, "realtimePeriod"),
                ("update --memory 100000g ID", 1, "that the machine can have"),
                ("update --cpu-idle 7 ID", 1, "idle"),
            ],
        )?;
    }
    container.expect_status("running")
}

fn shapes_of_what_is_printed(env: &Env) -> Result {
    let container = Detached::run(env, &lasting(env)?)?;
    container.wait_for("up")?;

    let state = container.state()?;
    let keys: Vec<&String> = state.as_object().map(|state| state.keys().collect()).unwrap_or_default();
    for key in ["ociVersion", "id", "pid", "status", "bundle", "rootfs", "created", "owner"] {
        ensure!(keys.iter().any(|name| *name == key), "state has no {key}: {state}");
    }
    ensure_eq!(state["pid"], container.pid, "the pid of state, and of the pid file");

    let listed = json_of(&env.call(["list", "-f", "json"]).output()?.stdout)?;
    ensure!(listed[1].is_null() && listed[0]["pid"] == container.pid && listed[0]["owner"] == "root", "{listed}");
    let table = env.call(["list"]).output()?.stdout();
    let row: Vec<&str> = table.lines().last().unwrap_or_default().split_whitespace().collect();
    ensure_eq!(row.len(), 6, "the columns of {table:?}");
    ensure_eq!((row[0], row[2], row[5]), (container.id.as_str(), "running", "root"), "a row of list");

    let event = json_of(&container.must(&["events", "--stats"])?.stdout)?;
    for path in [
        "/data/cpu/usage/total",
        "/data/cpu/usage/user",
        "/data/cpu/usage/kernel",
        "/data/memory/usage/limit",
        "/data/memory/usage/usage",
        "/data/memory/usage/failcnt",
        "/data/memory/raw/anon",
        "/data/pids/current",
        "/data/hugetlb/2MB/failcnt",
    ] {
        ensure!(event.pointer(path).is_some_and(Value::is_u64), "no number {path} in {event}");
    }
    for name in ["blkio", "cpuset", "intel_rdt"] {
        ensure!(event["data"][name].is_object(), "no object {name} in {event}");
    }
    ensure!(event["data"].get("network_interfaces").is_some(), "no network_interfaces in {event}");
    if env.kind == Kind::Bulkhead {
        // What newer ones of runc tell.
        for path in ["/data/cpu/psi/some/total", "/data/memory/psi/full/total", "/data/memory/event_count/oom_kill"] {
            ensure!(event.pointer(path).is_some_and(Value::is_u64), "no number {path} in {event}");
        }
    }

    let features = json_of(&env.call(["features"]).output()?.stdout)?;
    for path in [
        "/hooks/0",
        "/mountOptions/0",
        "/linux/namespaces/0",
        "/linux/capabilities/0",
        "/linux/seccomp/actions/0",
        "/linux/seccomp/operators/0",
        "/linux/seccomp/archs/0",
    ] {
        ensure!(features.pointer(path).is_some_and(Value::is_string), "no word {path} in {features}");
    }
    ensure!(features["linux"]["seccomp"]["enabled"] == true && features["linux"]["cgroup"]["v2"] == true, "{features}");
    Ok(())
}

fn json_of(bytes: &[u8]) -> Result<Value> {
    serde_json::from_slice(bytes).context(|| format!("parsing {:?}", String::from_utf8_lossy(bytes)))
}

/// What systemd does in a container: with its controllers handed on, the container's own cgroup takes no process.
fn process_in_a_cgroup_of_the_container(env: &Env) -> Result {
    let mut bundle = Bundle::busybox(env)?;
    bundle.mount("cgroup", "cgroup", "/sys/fs/cgroup", &["rw"]);
    bundle.sh("mkdir /sys/fs/cgroup/init /sys/fs/cgroup/work && echo 1 > /sys/fs/cgroup/init/cgroup.procs && \
         echo +pids > /sys/fs/cgroup/cgroup.subtree_control && echo up; while :; do sleep 0.1; done");
    let container = Detached::run(env, &bundle)?;
    container.wait_for("up")?;

    container.exec("cat /proc/self/cgroup").output()?.expect_stdout("0::/init\n")?;
    let chosen = container.verb_with(&["exec", "--cgroup", "work"], &["cat", "/proc/self/cgroup"]).output()?;
    chosen.expect_stdout("0::/work\n")?;
    let absolute = container.verb_with(&["exec", "--cgroup", "/work"], &["cat", "/proc/self/cgroup"]).output()?;
    absolute.expect_stdout("0::/work\n")?;
    let outside = container.verb_with(&["exec", "--cgroup", "../.."], &["cat", "/proc/self/cgroup"]).output()?;
    ensure!(!outside.stdout().contains(".."), "a cgroup beyond the container's: {}", outside.describe());
    Ok(())
}

/// A container that nests cgroups leaves none, and what it has written is there.
fn cgroups_in_cgroups(env: &Env) -> Result {
    let mut bundle = Bundle::busybox(env)?;
    bundle.mount("cgroup", "cgroup", "/sys/fs/cgroup", &["rw"]);
    bundle.sh("cd /sys/fs/cgroup; depth=0; while [ $depth -lt 40 ] && mkdir nested 2>/dev/null && cd nested; do \
               depth=$((depth + 1)); done; echo $depth >/depth; exit 7");

    env.run(&bundle)?.output()?.expect_code(7)?;

    let depth = if env.kind == Kind::Bulkhead { "32\n" } else { "40\n" };
    ensure_eq!(fs::read_to_string(bundle.path("depth"))?, depth, "how deep cgroups could be nested");
    Ok(())
}

/// They do what they are asked, or say what there is too little of: not that the container has ended.
fn verbs_with_few_descriptors(env: &Env) -> Result {
    env.only_bulkhead()?; // runc needs some to begin with.
    let container = Detached::run(env, &lasting(env)?)?;
    container.wait_for("up\n")?;

    let verbs: [(&[&str], &[&str]); 5] =
        [(&["state"], &[]), (&["ps"], &[]), (&["events", "--stats"], &[]), (&["exec"], &["true"]), (&["list"], &[])];
    for (before, after) in verbs {
        let mut successes = 0;
        for files in 4..=14 {
            let run = match before {
                ["list"] => env.call(["list"]),
                _ => container.verb_with(before, after),
            };
            let output = run.wrapper(FEW_FILES).variable("FILES", files.to_string()).output()?;
            if output.status.success() {
                successes += 1;
            } else {
                output.expect_error(&["Too many open files"])?;
            }
            // What cannot be read is left out of a list, and warned of.
            let is_told = before == ["state"] || before == ["list"] && output.stderr().is_empty();
            if output.status.success() && is_told {
                output.expect_in_stdout(&["running"])?;
            }
        }
        ensure!(successes > 0, "{before:?} needs more descriptors than are tried");
    }
    container.expect_status("running")
}
