// SPDX-License-Identifier: Apache-2.0
//! A host whose cgroups are of version 1 (`tests/kvm-host/run --cgroup-v1`): a sandbox is in each of their hierarchies, and its
//! limits are in their files.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::{Value, json};

use super::{Case, case};
use crate::bundle::Bundle;
use crate::detached::Detached;
use crate::engines::{Docker, Podman};
use crate::env::{Env, Kind};
use crate::failure::{Context as _, Result, ensure, ensure_eq, fail, skip};
use crate::processes;

pub(super) const CASES: &[Case] = &[
    case!(limits),
    case!(changed_limits),
    case!(places),
    case!(killed_supervisor_leaves_none),
    case!(podman).limit(600),
    case!(docker).limit(600),
];

/// Where the hierarchies are.
const TOP: &str = "/sys/fs/cgroup";

/// What a limit of memory is that is none.
const NO_LIMIT: &str = "9223372036854771712";

const MIB: u64 = 1 << 20;

/// What an engine is asked for.
const LIMITED: [&str; 4] = ["--memory", "128m", "--pids-limit", "40"];

/// How a container sees the latter. Bulkhead's have cgroups of version 2 whatever the host has.
const PIDS_LIMIT: &str = "cat /sys/fs/cgroup/pids.max 2>/dev/null || cat /sys/fs/cgroup/pids/pids.max";

/// The hierarchies that have controllers, and systemd's own.
fn hierarchies() -> Result<Vec<PathBuf>> {
    if !Path::new(TOP).join("memory/memory.limit_in_bytes").exists() {
        skip!("this host's cgroups are not of version 1");
    }
    let mut found = Vec::new();
    for entry in fs::read_dir(TOP)? {
        let entry = entry?;
        // Links name the controllers of those that have several; in the unified one there are none.
        if entry.file_type()?.is_dir() && entry.file_name() != "unified" {
            found.push(entry.path());
        }
    }
    Ok(found)
}

fn read(place: &str, controller: &str, file: &str) -> Result<String> {
    let path = Path::new(TOP).join(controller).join(place).join(file);
    let text = fs::read_to_string(&path).context(|| format!("reading {}", path.display()))?;
    Ok(text.trim_end().to_owned())
}

fn ensure_files(place: &str, expected: &[(&str, &str, &str)]) -> Result {
    for (controller, file, value) in expected {
        ensure_eq!(read(place, controller, file)?, *value, "{file}");
    }
    Ok(())
}

/// All processes that are a container's on the host are at that place in all hierarchies.
fn ensure_inside(env: &Env, container: &Detached<'_>, place: &str) -> Result {
    let mut pids = vec![container.pid];
    if env.kind == Kind::Bulkhead {
        let Some(vmm) = processes::wait_for_descendant(container.pid, "bulkhead-vmm", Duration::from_secs(10)) else {
            fail!("there is no VMM");
        };
        pids.push(vmm.pid);
    }
    for pid in pids {
        let table = fs::read_to_string(format!("/proc/{pid}/cgroup"))?;
        let elsewhere: Vec<&str> = table
            .lines()
            .filter(|line| !line.starts_with("0::") && line.splitn(3, ':').nth(2) != Some(&format!("/{place}")))
            .collect();
        ensure!(elsewhere.is_empty(), "process {pid} is not in /{place}, but: {elsewhere:?}");
    }
    Ok(())
}

fn ensure_gone(hierarchies: &[PathBuf], place: &str) -> Result {
    let left: Vec<_> = hierarchies.iter().map(|top| top.join(place)).filter(|path| path.exists()).collect();
    ensure!(left.is_empty(), "still there: {left:?}");
    Ok(())
}

/// A container with limits.
fn limited(env: &Env, place: &str) -> Result<Bundle> {
    let mut bundle = Bundle::busybox(env)?;
    bundle.sh("echo up; while :; do sleep 0.1; done").set("/linux/cgroupsPath", json!(format!("/{place}")));
    bundle.set(
        "/linux/resources",
        json!({
            "cpu": { "cpus": "0", "mems": "0", "shares": 512, "quota": 50_000, "period": 100_000 },
            "memory": { "limit": 64 * MIB, "swap": 96 * MIB, "reservation": 32 * MIB },
            "pids": { "limit": 40 },
        }),
    );
    Ok(bundle)
}

fn limits(env: &Env) -> Result {
    let hierarchies = hierarchies()?;
    let place = env.id();
    let container = Detached::run(env, &limited(env, &place)?)?;
    container.wait_for("up\n")?;

    ensure_inside(env, &container, &place)?;
    // The host's limit is that of the whole machine; its processes are not the container's.
    let (memory, pids) = if env.kind == Kind::Bulkhead { (64 + 96 + 64, "max") } else { (64, "40") };
    ensure_files(
        &place,
        &[
            ("memory", "memory.limit_in_bytes", &(memory * MIB).to_string()),
            ("memory", "memory.memsw.limit_in_bytes", &((memory + 32) * MIB).to_string()),
            ("memory", "memory.soft_limit_in_bytes", &(32 * MIB).to_string()),
            ("cpu", "cpu.shares", "512"),
            ("cpu", "cpu.cfs_quota_us", "50000"),
            ("cpu", "cpu.cfs_period_us", "100000"),
            ("cpuset", "cpuset.cpus", "0"),
            ("cpuset", "cpuset.mems", "0"),
            ("pids", "pids.max", pids),
        ],
    )?;
    container.exec(PIDS_LIMIT).output()?.expect_stdout("40\n")?;

    container.must(&["delete", "--force"])?;
    ensure_gone(&hierarchies, &place)
}

fn changed_limits(env: &Env) -> Result {
    hierarchies()?;
    let place = env.id();
    let container = Detached::run(env, &limited(env, &place)?)?;
    container.wait_for("up\n")?;

    container.must(&["update", "--cpu-quota", "30000", "--cpu-share", "2048", "--cpuset-cpus", "0"])?;
    let changed =
        [("cpu", "cpu.cfs_quota_us", "30000"), ("cpu", "cpu.cfs_period_us", "100000"), ("cpu", "cpu.shares", "2048")];
    ensure_files(&place, &changed)?;
    if env.kind == Kind::Bulkhead {
        // Of runc's limits those before the one that is refused stay.
        let refused = json!({ "cpu": { "quota": 20_000, "cpus": "99" } }).to_string();
        container
            .verb(&["update", "--resources", "-"])
            .input(refused)
            .output()?
            .expect_error(&["cpuset.cpus", "99"])?;
        ensure_files(&place, &changed)?;
    }

    // Both limits grow, the machine with them: neither may be in the way of the other.
    container.must(&["update", "--memory", "300m", "--memory-swap", "332m"])?;
    let number = |file: &str| -> Result<u64> { Ok(read(&place, "memory", file)?.parse()?) };
    let (memory, both) = (number("memory.limit_in_bytes")?, number("memory.memsw.limit_in_bytes")?);
    let least = if env.kind == Kind::Bulkhead { 300 + 96 + 64 } else { 300 } * MIB;
    ensure!(memory >= least && both == memory + 32 * MIB, "the limits are {memory} and {both}");
    container.must(&["update", "--memory", "-1", "--memory-swap", "-1"])?;
    let none = [("memory", "memory.limit_in_bytes", NO_LIMIT), ("memory", "memory.memsw.limit_in_bytes", NO_LIMIT)];
    ensure_files(&place, &none)?;

    let event: Value = serde_json::from_slice(&container.must(&["events", "--stats"])?.stdout)?;
    for path in ["/data/cpu/usage/total", "/data/memory/usage/usage", "/data/pids/current"] {
        ensure!(event.pointer(path).and_then(Value::as_u64).is_some_and(|value| value > 0), "{path} in {event}");
    }
    Ok(())
}

/// A path in systemd's form, and one that counts from the caller's cgroup.
fn places(env: &Env) -> Result {
    env.only_bulkhead()?; // runc takes the former for a path, unless it is told otherwise.
    let hierarchies = hierarchies()?;
    for relative in [false, true] {
        let id = env.id();
        let text = if relative { format!("parent-of-{id}/{id}") } else { format!("bulkhead_e2e.slice:case:{id}") };
        let place = if relative { text.clone() } else { format!("bulkhead_e2e.slice/case-{id}.scope") };
        let mut bundle = Bundle::busybox(env)?;
        bundle.args(&["sleep", "1000"]).set("/linux/cgroupsPath", json!(text));
        let container = Detached::run(env, &bundle)?;
        // The caller of this case is at the top of each hierarchy, as `kvm-host` starts it.
        ensure_inside(env, &container, &place)?;

        container.must(&["delete", "--force"])?;
        ensure_gone(&hierarchies, &place)?;
        // Folders above it stay.
        for parent in
            hierarchies.iter().map(|top| top.join(&place)).filter_map(|path| path.parent().map(Path::to_owned))
        {
            fs::remove_dir(&parent).context(|| format!("removing {}", parent.display()))?;
        }
    }
    Ok(())
}

fn killed_supervisor_leaves_none(env: &Env) -> Result {
    env.only_bulkhead()?; // Another runtime's processes go on.
    let hierarchies = hierarchies()?;
    let place = env.id();
    let container = Detached::run(env, &limited(env, &place)?)?;
    container.wait_for("up\n")?;

    kill(Pid::from_raw(container.pid), Signal::SIGKILL)?;
    container.wait_for_status("stopped")?;
    container.must(&["delete"])?;

    ensure_gone(&hierarchies, &place)
}

fn podman(env: &Env) -> Result {
    let hierarchies = hierarchies()?;
    let podman = Podman::new(env)?;
    podman.run_detached_with("box", &LIMITED, &["sleep", "1000"])?;

    let pid = podman.succeed(["inspect", "--format", "{{.State.Pid}}", "box"])?.stdout();
    let place = limited_place(env, pid.trim())?;
    podman.succeed(["exec", "box", "sh", "-c", PIDS_LIMIT])?.expect_stdout("40\n")?;
    podman.succeed(["pause", "box"])?;
    podman.succeed(["unpause", "box"])?;

    podman.succeed(["rm", "--force", "--time", "0", "box"])?;
    ensure_gone(&hierarchies, &place)
}

fn docker(env: &Env) -> Result {
    let hierarchies = hierarchies()?;
    let docker = Docker::new(env)?;
    docker.run(&[&["-d", "--name", "box"], &LIMITED[..]].concat(), &["sleep", "1000"]).output()?.expect_code(0)?;

    let pid = docker.succeed(["inspect", "--format", "{{.State.Pid}}", "box"])?.stdout();
    let place = limited_place(env, pid.trim())?;
    docker.succeed(["exec", "box", "sh", "-c", PIDS_LIMIT])?.expect_stdout("40\n")?;

    docker.succeed(["rm", "--force", "box"])?;
    ensure_gone(&hierarchies, &place)?;
    docker.end()
}

/// Where an engine's container is, whose limit there is that of its machine.
fn limited_place(env: &Env, pid: &str) -> Result<String> {
    let table = fs::read_to_string(format!("/proc/{pid}/cgroup"))?;
    let Some((_, place)) = table.lines().find_map(|line| line.split_once(":memory:/")) else {
        fail!("process {pid} is in no cgroup of memory: {table}");
    };
    let expected = if env.kind == Kind::Bulkhead { 128 + 96 + 64 } else { 128 } * MIB;
    ensure_eq!(read(place, "memory", "memory.limit_in_bytes")?, expected.to_string(), "the limit of memory");
    Ok(place.to_owned())
}
