// SPDX-License-Identifier: Apache-2.0
//! Limits: in the guest's cgroup, on the host, by both versions of cgroups; and what sizes the machine.

use std::fs;
use std::time::Duration;

use serde_json::{Value, json};

use super::engine::unified;
use super::{Case, case};
use crate::bundle::Bundle;
use crate::detached::Detached;
use crate::env::Env;
use crate::failure::{Result, ensure, ensure_eq, fail, skip};
use crate::processes;

pub(super) const CASES: &[Case] = &[
    case!(limits_in_the_guest),
    case!(limits_on_the_host),
    case!(limits_by_the_files_names),
    case!(processors_follow_the_quota),
    case!(cgroups_of_version_1),
    case!(processors_without_a_cgroup),
    case!(quota_below_the_old_burst),
    case!(refused_update_changes_nothing),
];

/// Those that no other case looks at. An older runc does not know some of them.
fn limits_in_the_guest(env: &Env) -> Result {
    env.only_bulkhead()?;
    let mut bundle = Bundle::busybox(env)?;
    bundle.args(&["sleep", "1000"]);
    bundle.set(
        "/linux/resources",
        json!({
            "cpu": { "quota": 50_000, "period": 100_000, "burst": 10_000 },
            "memory": { "reservation": 10 << 20 },
            "pids": { "limit": -1 },
            "blockIO": { "weight": 500 },
            "hugepageLimits": [{ "pageSize": "2MB", "limit": 0 }],
            "unified": { "memory.oom.group": "1" },
        }),
    );
    let files = [
        ("cpu.max", "50000 100000"),
        ("cpu.max.burst", "10000"),
        ("memory.low", "10485760"),
        ("pids.max", "max"),
        ("io.weight", "default 4950"),
        ("hugetlb.2MB.max", "0"),
        ("memory.oom.group", "1"),
    ];
    let container = Detached::run(env, &bundle)?;
    let names = files.map(|(file, _)| file).join(" ");
    let expected: String = files.iter().map(|(file, value)| format!("{file} {value}\n")).collect();
    let script = format!("cd /sys/fs/cgroup; for file in {names}; do echo $file $(cat $file); done");
    container.exec(&script).output()?.expect_stdout(&expected)?;

    let idle = "cd /sys/fs/cgroup; cat cpu.idle cpu.weight";
    container.must(&["update", "--cpu-idle", "1", "--blkio-weight", "10"])?;
    container.exec("cd /sys/fs/cgroup; cat cpu.idle io.weight").output()?.expect_stdout("1\ndefault 1\n")?;
    let resources = json!({ "cpu": { "idle": 0, "shares": 512 } }).to_string();
    container.verb(&["update", "--resources", "-"]).input(resources).output()?.expect_code(0)?;
    container.exec(idle).output()?.expect_stdout("0\n20\n")
}

fn limits_on_the_host(env: &Env) -> Result {
    env.only_bulkhead()?;
    let root = unified()?;
    let place = env.id();
    let mut bundle = Bundle::busybox(env)?;
    bundle.sh("nproc; echo up; while :; do sleep 0.1; done").set("/linux/cgroupsPath", json!(format!("/{place}")));
    bundle.set(
        "/linux/resources",
        json!({
            "cpu": { "cpus": "0", "mems": "0", "shares": 512, "quota": 50_000, "period": 100_000 },
            "memory": { "limit": 64 << 20, "swap": 96 << 20 },
        }),
    );
    let container = Detached::run(env, &bundle)?;
    container.wait_for("1\nup\n")?;
    let cgroup = root.join(&place);
    let read = |file: &str| fs::read_to_string(cgroup.join(file)).unwrap_or_default();
    // The machine's memory, and what the host needs beside it.
    let whole = format!("{}\n", (64_u64 + 96 + 64) << 20);

    let seen = ["cpuset.cpus", "cpuset.mems", "cpu.weight", "cpu.max", "memory.max"].map(read);
    ensure_eq!(seen, ["0\n", "0\n", "20\n", "50000 100000\n", whole.as_str()], "the limits on the host");
    // A kernel without swap has no such file.
    let swap = read("memory.swap.max");
    ensure!(swap.is_empty() || swap == "33554432\n", "memory.swap.max is {swap:?}");
    let Some(vmm) = processes::wait_for_descendant(container.pid, "bulkhead-vmm", Duration::from_secs(10)) else {
        fail!("there is no VMM");
    };
    let status = fs::read_to_string(format!("/proc/{}/status", vmm.pid))?;
    for line in ["Cpus_allowed_list:\t0", "Mems_allowed_list:\t0"] {
        ensure!(status.lines().any(|seen| seen == line), "no {line:?} in {status}");
    }

    // The guest's limit of memory changes; the host's stays that of the whole machine.
    container.must(&["update", "--cpu-quota", "30000", "--cpu-share", "2048", "--memory", "48m"])?;
    container.exec("cat /sys/fs/cgroup/memory.max").output()?.expect_stdout("50331648\n")?;
    let seen = ["cpu.weight", "cpu.max", "memory.max"].map(read);
    ensure_eq!(seen, ["79\n", "30000 100000\n", whole.as_str()], "the new limits on the host");
    container.must(&["update", "--memory", "-1", "--memory-swap", "-1"])?;
    ensure_eq!(read("memory.max"), "max\n", "memory.max without a limit");

    container.must_with(&["kill"], &["KILL"])?;
    ensure_eq!(container.wait()?, 137, "the status");
    ensure!(!cgroup.exists(), "{} is still there", cgroup.display());
    Ok(())
}

/// They mean what the properties mean: in the guest, for the size of the machine, and on the host.
fn limits_by_the_files_names(env: &Env) -> Result {
    env.only_bulkhead()?; // Others have one cgroup, and no machine.
    let root = unified()?;
    let place = env.id();
    let mut bundle = Bundle::busybox(env)?;
    bundle.args(&["sleep", "1000"]).set("/linux/cgroupsPath", json!(format!("/{place}")));
    let files = json!({ "memory.max": "640M", "cpu.max": "40000 80000", "cpu.weight": "77", "cpuset.cpus": "0" });
    bundle.set("/linux/resources", json!({ "memory": { "limit": 64 << 20 }, "unified": files }));
    let container = Detached::run(env, &bundle)?;

    let script =
        "cd /sys/fs/cgroup; cat memory.max cpu.max cpu.weight; awk '/MemTotal/ { print ($2 > 600000) }' /proc/meminfo";
    container.exec(script).output()?.expect_stdout("671088640\n40000 80000\n77\n1\n")?;
    let read = |file: &str| fs::read_to_string(root.join(&place).join(file)).unwrap_or_default();
    let seen = ["cpu.max", "cpu.weight", "cpuset.cpus"].map(read);
    ensure_eq!(seen, ["40000 80000\n", "77\n", "0\n"], "the limits on the host");
    let whole: u64 = read("memory.max").trim().parse()?;
    ensure!(whole > 700 << 20 && whole < 900 << 20, "the host's memory.max is {whole}");

    let limits = json!({ "unified": { "cpu.max": "20000 80000" } }).to_string();
    container.verb(&["update", "--resources", "-"]).input(limits).output()?.expect_code(0)?;
    container.exec("cat /sys/fs/cgroup/cpu.max").output()?.expect_stdout("20000 80000\n")?;
    ensure_eq!(read("cpu.max"), "20000 80000\n", "the new limit on the host");
    bundle.set("/linux/resources", json!({ "unified": { "memory.max": "lots" } }));
    env.run(&bundle)?.output()?.expect_error(&["linux.resources.unified", "memory.max", "lots"])
}

fn processors_follow_the_quota(env: &Env) -> Result {
    env.only_bulkhead()?; // Others show the host's.
    let mut bundle = Bundle::busybox(env)?;
    bundle.args(&["nproc"]);
    bundle.set("/linux/resources", json!({ "cpu": { "quota": 150_000, "period": 100_000 } }));
    let of_host = std::thread::available_parallelism()?.get();
    if of_host == 1 {
        skip!("this host has one processor");
    }

    env.run(&bundle)?.output()?.expect_stdout(&format!("{}\n", of_host.min(2)))
}

/// A hierarchy of version 1 that this mount namespace alone sees: where there is one, the sandbox is in it.
fn cgroups_of_version_1(env: &Env) -> Result {
    env.only_bulkhead()?;
    let freezer = env.folder("freezer")?;
    if env.mount("cgroup", "cgroup", &freezer, "freezer").is_err() {
        skip!("this host has no cgroups of version 1");
    }
    let id = env.id();
    let mut bundle = Bundle::busybox(env)?;
    bundle.sh("echo ready; read line").set("/linux/cgroupsPath", json!(format!("/{id}")));

    let mut running = env.run_as(&bundle, &id)?.open_stdin().spawn()?;
    running.wait_for("ready\n")?;
    let processes = fs::read_to_string(freezer.join(&id).join("cgroup.procs"))?;
    let both = [running.pid(), running.wait_for_vmm()?];
    running.write(b"\n")?;
    running.finish()?.expect_code(0)?;

    let are_in = both.iter().all(|pid| processes.lines().any(|line| line == pid.to_string()));
    ensure!(are_in, "its processes are {processes:?}, those expected {both:?}");
    ensure!(!freezer.join(&id).exists(), "the cgroup is still there");
    Ok(())
}

/// What is asked for is done, or refused.
fn processors_without_a_cgroup(env: &Env) -> Result {
    let mut bundle = Bundle::busybox(env)?;
    bundle.args(&["sleep", "1000"]);
    let container = Detached::run(env, &bundle)?;

    container.verb(&["update", "--cpuset-cpus", "99"]).output()?.expect_error(&["CPUs"])
}

fn quota_below_the_old_burst(env: &Env) -> Result {
    env.only_bulkhead()?; // Since 1.2 of runc.
    let mut bundle = Bundle::busybox(env)?;
    bundle.args(&["sleep", "1000"]);
    bundle.set("/linux/resources", json!({ "cpu": { "quota": 50_000, "period": 100_000, "burst": 40_000 } }));
    let container = Detached::run(env, &bundle)?;

    container.must(&["update", "--cpu-quota", "20000", "--cpu-period", "100000", "--cpu-burst", "10000"])?;
    let read = "cat /sys/fs/cgroup/cpu.max /sys/fs/cgroup/cpu.max.burst";
    container.exec(read).output()?.expect_stdout("20000 100000\n10000\n")
}

/// Whoever refuses: the host, the guest, or the condition that a limit is to be above what is used.
fn refused_update_changes_nothing(env: &Env) -> Result {
    env.only_bulkhead()?; // runc sets back what it has just set.
    let root = unified()?;
    let place = env.id();
    let mut bundle = Bundle::busybox(env)?;
    bundle.sh("dd if=/dev/zero of=/dev/null bs=20M count=1 2>&1; echo up; sleep 1000");
    bundle.set("/linux/cgroupsPath", json!(format!("/{place}")));
    let cpu = json!({ "shares": 512, "quota": 50_000, "period": 100_000 });
    bundle.set("/linux/resources", json!({ "cpu": cpu, "pids": { "limit": 30 }, "memory": { "limit": 64 << 20 } }));
    let container = Detached::run(env, &bundle)?;
    container.wait_for("up\n")?;
    let of_host = |file: &str| fs::read_to_string(root.join(&place).join(file)).unwrap_or_default();
    let unchanged = || -> Result {
        let script = "cd /sys/fs/cgroup; cat pids.max memory.max cpu.max cpu.weight";
        container.exec(script).output()?.expect_stdout("30\n67108864\n50000 100000\n20\n")?;
        ensure_eq!(["cpu.weight", "cpu.max"].map(of_host), ["20\n", "50000 100000\n"], "the limits on the host");
        Ok(())
    };
    unchanged()?;
    let changes = json!({ "pids": { "limit": 40 }, "memory": { "limit": 60 << 20 }, "cpu": { "shares": 2048, "period": 50_000 } });
    let update = |change: Value| container.verb(&["update", "--resources", "-"]).input(change.to_string()).output();

    let mut by_host = changes.clone();
    by_host["cpu"]["cpus"] = json!("99");
    update(by_host)?.expect_error(&["cpuset.cpus", "99"])?;
    unchanged()?;
    let mut by_guest = changes.clone();
    by_guest["unified"] = json!({ "pids.nosuch": "1" });
    update(by_guest)?.expect_error(&["pids.nosuch"])?;
    unchanged()?;
    let mut below = changes.clone();
    below["memory"] = json!({ "limit": 4096, "checkBeforeUpdate": true });
    update(below)?.expect_error(&["rejecting memory limit 4096 <= usage "])?;
    unchanged()?;
    container.expect_status("running")?;

    let mut above = changes;
    above["memory"]["checkBeforeUpdate"] = json!(true);
    update(above)?.expect_stdout("")?;
    container
        .exec("cat /sys/fs/cgroup/memory.max /sys/fs/cgroup/cpu.max")
        .output()?
        .expect_stdout("62914560\n50000 50000\n")?;
    ensure_eq!(["cpu.weight", "cpu.max"].map(of_host), ["79\n", "50000 50000\n"], "the new limits on the host");
    Ok(())
}
