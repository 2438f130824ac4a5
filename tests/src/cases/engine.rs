// SPDX-License-Identifier: Apache-2.0
//! What container engines write into a bundle: filters of system calls, a cgroup, hooks, namespaces by path.

use std::fs;
use std::path::PathBuf;

use nix::sys::signal::Signal;
use serde_json::json;

use super::{Case, case};
use crate::bundle::Bundle;
use crate::env::{Env, Kind};
use crate::failure::{Result, ensure, ensure_eq, fail, skip};

pub(super) const CASES: &[Case] = &[
    case!(seccomp_filter),
    case!(seccomp_filter_without_new_privileges),
    case!(seccomp_filter_of_an_engine),
    case!(cgroup_of_the_host),
    case!(limits_are_those_of_the_containers_cgroup),
    case!(propagation_of_the_root),
    case!(block_devices_of_the_host),
    case!(killed_runtime_leaves_no_cgroup),
    case!(cgroup_that_cannot_be),
    case!(hooks_in_their_order),
    case!(failing_hooks),
    case!(the_hosts_own_network_namespace),
    case!(time_namespace),
    case!(scheduling),
    case!(scheduling_that_ends_at_a_fork),
    case!(bundle_as_podman_writes_it),
    case!(scheduling_in_real_time),
    case!(nodes_offsets_and_queues),
];

fn seccomp_filter(env: &Env) -> Result {
    let mut bundle = Bundle::busybox(env)?;
    bundle.sh("mkdir /tmp/a; chmod 700 /tmp; chmod 755 /tmp; grep ^Seccomp: /proc/self/status");
    let argument = json!([{ "index": 1, "value": 0o700, "op": "SCMP_CMP_EQ" }]);
    bundle.set(
        "/linux/seccomp",
        json!({
            "defaultAction": "SCMP_ACT_ALLOW",
            "architectures": ["SCMP_ARCH_X86_64", "SCMP_ARCH_X86", "SCMP_ARCH_X32"],
            "syscalls": [
                { "names": ["mkdir", "mkdirat"], "action": "SCMP_ACT_ERRNO", "errnoRet": 18 },
                { "names": ["chmod"], "action": "SCMP_ACT_ERRNO", "args": argument },
            ],
        }),
    );

    let output = env.run(&bundle)?.output()?;

    ensure_eq!(output.stdout(), "Seccomp:\t2\n", "what is told");
    ensure_eq!(
        output.stderr(),
        "mkdir: can't create directory '/tmp/a': Invalid cross-device link\nchmod: /tmp: Operation not permitted\n",
        "what is refused"
    );
    Ok(())
}

/// By a user without capabilities, and with less allowed than it takes to become one.
fn seccomp_filter_without_new_privileges(env: &Env) -> Result {
    env.only_bulkhead()?;
    let mut bundle = Bundle::busybox(env)?;
    bundle.sh("grep -E '^(CapEff|NoNewPrivs|Seccomp):' /proc/self/status").user(1000, 1000);
    bundle.set("/process/noNewPrivileges", json!(false)).set("/process/capabilities", json!({}));
    bundle.set(
        "/linux/seccomp",
        json!({
            "defaultAction": "SCMP_ACT_ALLOW",
            "syscalls": [{
                "names": ["setuid", "setresuid", "setgroups", "prctl", "close_range", "sendmsg", "setsid", "umask"],
                "action": "SCMP_ACT_ERRNO",
            }],
        }),
    );

    let output = env.run(&bundle)?.output()?;

    ensure_eq!(output.stdout(), "CapEff:\t0000000000000000\nNoNewPrivs:\t0\nSeccomp:\t2\n", "what it is");
    Ok(())
}

/// The list of what a shell needs, as engines write lists: what is not in it is not permitted, what is newer is not there.
fn seccomp_filter_of_an_engine(env: &Env) -> Result {
    let Ok(text) = fs::read_to_string("/usr/share/containers/seccomp.json") else {
        skip!("no /usr/share/containers/seccomp.json");
    };
    let mut profile: serde_json::Value = serde_json::from_str(&text)?;
    if let Some(rules) = profile["syscalls"].as_array_mut() {
        // An engine leaves out what is for other processors or for capabilities that are not given.
        rules.retain(|rule| {
            let architectures = rule["includes"]["arches"].as_array();
            architectures.is_none_or(|list| list.contains(&json!("amd64"))) && rule["includes"]["caps"].is_null()
        });
        for rule in rules.iter_mut().filter_map(serde_json::Value::as_object_mut) {
            rule.retain(|key, value| {
                ["names", "action", "args", "errnoRet"].contains(&key.as_str()) && !value.is_null()
            });
        }
    }
    if let Some(profile) = profile.as_object_mut() {
        profile.remove("archMap");
        profile.insert("architectures".to_owned(), json!(["SCMP_ARCH_X86_64", "SCMP_ARCH_X86", "SCMP_ARCH_X32"]));
    }
    let mut bundle = Bundle::busybox(env)?;
    bundle.sh("ls / >/dev/null && echo fine; mount -t tmpfs x /tmp").set("/linux/seccomp", profile);

    let output = env.run(&bundle)?.output()?;

    ensure_eq!(output.stdout(), "fine\n", "what is told");
    ensure!(output.stderr().contains("mount"), "{}", output.describe());
    Ok(())
}

/// Where this host has version 2, it is known where it is.
/// The root of the host's cgroups, where they are of version 2.
pub(super) fn unified() -> Result<PathBuf> {
    let root = PathBuf::from("/sys/fs/cgroup");
    if root.join("cgroup.controllers").exists() {
        return Ok(root);
    }
    skip!("this host's cgroups are not of version 2");
}

fn cgroup_of_the_host(env: &Env) -> Result {
    env.only_bulkhead()?;
    let root = unified()?;
    let id = env.id();
    for (path, place) in [
        (format!("/bulkhead-e2e/{id}"), format!("bulkhead-e2e/{id}")),
        (format!("bulkheade2e-a.slice:x:{id}"), format!("bulkheade2e.slice/bulkheade2e-a.slice/x-{id}.scope")),
    ] {
        let mut bundle = Bundle::busybox(env)?;
        bundle.sh("echo ready; read line").set("/linux/cgroupsPath", json!(path));
        let cpu = json!({"quota": 50_000, "period": 100_000, "burst": 20_000, "shares": 512});
        bundle.set("/linux/resources", json!({"memory": {"limit": 64 << 20, "reservation": 32 << 20}, "cpu": cpu}));

        let mut running = env.run_as(&bundle, &id)?.open_stdin().spawn()?;
        running.wait_for("ready\n")?;
        let cgroup = root.join(&place);
        let read = |file: &str| fs::read_to_string(cgroup.join(file)).unwrap_or_default();
        let (processes, cpu, memory) = (read("cgroup.procs"), read("cpu.max"), read("memory.max"));
        let (burst, low) = (read("cpu.max.burst"), read("memory.low"));
        let (runtime, vmm) = (running.pid(), running.wait_for_vmm()?);
        running.write(b"\n")?;
        running.finish()?.expect_code(0)?;

        // A thread that the kernel starts for a virtual machine is there as well.
        let both = [runtime, vmm].map(|pid| processes.lines().any(|line| line == pid.to_string()));
        ensure!(
            both == [true, true],
            "the processes of {place}: {processes:?}, those expected are {runtime} and {vmm}"
        );
        ensure_eq!(cpu, "50000 100000\n", "cpu.max of {place}");
        ensure_eq!(memory, format!("{}\n", (64_u64 + 96 + 64) << 20), "memory.max of {place}");
        ensure_eq!(
            (burst.as_str(), low.as_str()),
            ("20000\n", "33554432\n"),
            "cpu.max.burst and memory.low of {place}"
        );
        ensure!(!cgroup.exists(), "{} is still there", cgroup.display());
    }
    for folder in ["bulkhead-e2e", "bulkheade2e.slice/bulkheade2e-a.slice", "bulkheade2e.slice"] {
        fs::remove_dir(root.join(folder))?;
    }
    Ok(())
}

fn limits_are_those_of_the_containers_cgroup(env: &Env) -> Result {
    unified()?;
    let mut bundle = Bundle::busybox(env)?;
    let files = [
        ("memory.max", "104857600"),
        ("memory.low", "52428800"),
        ("memory.high", "94371840"),
        ("cpu.weight", "20"),
        ("cpu.max", "150000 200000"),
        ("pids.max", "77"),
        ("hugetlb.2MB.max", "4194304"),
    ];
    bundle.sh(&format!(
        "cd /sys/fs/cgroup; for file in {}; do echo $file $(cat $file); done",
        files.map(|(file, _)| file).join(" ")
    ));
    bundle.set("/linux/cgroupsPath", json!(format!("/{}", env.id())));
    bundle.set(
        "/linux/resources",
        json!({
            "memory": { "limit": 100 << 20, "reservation": 50 << 20, "swap": 100 << 20 },
            "cpu": { "shares": 512, "quota": 150_000, "period": 200_000 },
            "pids": { "limit": 77 },
            "hugepageLimits": [{ "pageSize": "2MB", "limit": 4 << 20 }],
            "unified": { "memory.high": (90 << 20).to_string() },
        }),
    );

    let expected: String = files.iter().map(|(file, value)| format!("{file} {value}\n")).collect();
    env.run(&bundle)?.output()?.expect_stdout(&expected)
}

fn propagation_of_the_root(env: &Env) -> Result {
    // runc 1.1 gives the mounts of its host that propagation, and the container a private root.
    env.only_bulkhead()?;
    let mut bundle = Bundle::busybox(env)?;
    // The optional fields of the root's line in mountinfo (proc_pid_mountinfo(5)), without the groups' numbers.
    bundle.sh("sed -n 's/^[^ ]* [^ ]* [^ ]* [^ ]* \\/ [^ ]* \\(.*\\)- .*/<\\1>/p' /proc/self/mountinfo | tr -d '0-9'");
    for (propagation, fields) in [("rshared", "<shared: >\n"), ("rprivate", "<>\n"), ("unbindable", "<unbindable >\n")]
    {
        bundle.set("/linux/rootfsPropagation", json!(propagation));
        env.run(&bundle)?.output()?.expect_stdout(fields)?;
    }
    Ok(())
}

/// The host's block devices are limited where a container's files are read and written.
fn block_devices_of_the_host(env: &Env) -> Result {
    let root = unified()?;
    let id = env.id();
    // Where there is no other, the kernel's loop devices are some.
    let _ = std::process::Command::new("modprobe").arg("loop").status();
    let device =
        fs::read_dir("/sys/block")?.flatten().find_map(|entry| fs::read_to_string(entry.path().join("dev")).ok());
    let Some(device) = device.as_deref().map(str::trim) else { skip!("this host has no block device") };
    let numbers: Vec<u32> = device.split(':').filter_map(|number| number.parse().ok()).collect();
    let &[major, minor] = numbers.as_slice() else { fail!("{device:?} are not the numbers of a device") };
    let throttle = |rate: u64| json!([{ "major": major, "minor": minor, "rate": rate }]);
    let mut bundle = Bundle::busybox(env)?;
    bundle.sh("echo ready; read line").set("/linux/cgroupsPath", json!(format!("/{id}")));
    let limits = json!({
        "throttleReadBpsDevice": throttle(1 << 20), "throttleWriteBpsDevice": throttle(2 << 20),
        "throttleReadIOPSDevice": throttle(40), "throttleWriteIOPSDevice": throttle(50),
    });
    bundle.set("/linux/resources", json!({ "blockIO": limits }));

    let mut running = env.run_as(&bundle, &id)?.open_stdin().spawn()?;
    running.wait_for("ready\n")?;
    let found = fs::read_to_string(root.join(&id).join("io.max"))?;
    running.write(b"\n")?;
    running.finish()?.expect_code(0)?;

    ensure_eq!(found, format!("{device} rbps=1048576 wbps=2097152 riops=40 wiops=50\n"), "io.max");
    Ok(())
}

fn killed_runtime_leaves_no_cgroup(env: &Env) -> Result {
    env.only_bulkhead()?;
    let root = unified()?;
    let mut bundle = Bundle::busybox(env)?;
    let id = env.id();
    bundle.sh("echo ready; exec sleep 1000").set("/linux/cgroupsPath", json!(format!("/{id}")));

    let mut running = env.run_as(&bundle, &id)?.spawn()?;
    running.wait_for("ready\n")?;
    running.signal(Signal::SIGKILL)?;
    running.finish()?;
    ensure!(root.join(&id).exists(), "the cgroup was not where it should have been");

    // The next one of that name finds what is left, and takes it away.
    bundle.sh("echo fine");
    env.run_as(&bundle, &id)?.output()?.expect_stdout("fine\n")?;
    ensure!(!root.join(&id).exists(), "the cgroup is still there");
    Ok(())
}

fn cgroup_that_cannot_be(env: &Env) -> Result {
    env.only_bulkhead()?;
    let mut bundle = Bundle::busybox(env)?;
    for path in ["/a/../../b", "/", "a.slice:b:", "/a\tb"] {
        bundle.set("/linux/cgroupsPath", json!(path));
        env.run(&bundle)?.output()?.expect_error(&["linux.cgroupsPath"])?;
    }
    bundle.set("/linux/cgroupsPath", json!("/x".repeat(3000)));
    env.run(&bundle)?.output()?.expect_error(&["cgroup"])
}

fn hooks_in_their_order(env: &Env) -> Result {
    let mut bundle = Bundle::busybox(env)?;
    let order = bundle.folder.join("order");
    let hook = |name: &str| {
        let script = format!("echo {name} $(grep -o '\"status\": *\"[a-z]*\"' | tr -d ' ') >> {}", order.display());
        json!([{ "path": "/bin/sh", "args": ["sh", "-c", script], "env": ["PATH=/usr/bin:/bin"], "timeout": 20 }])
    };
    let mut hooks = json!({});
    for kind in ["prestart", "createRuntime", "createContainer", "poststart", "poststop"] {
        hooks[kind] = hook(kind);
    }
    let script = "cat > /tmp/told; echo >> /tmp/told; echo \"$A\" >> /tmp/told; hostname >> /tmp/told";
    hooks["startContainer"] = json!([{ "path": "/bin/sh", "args": ["sh", "-c", script], "env": ["A=b", "PATH=/bin"] }]);
    bundle.set("/hooks", hooks).set("/hostname", json!("inside"));
    bundle.sh("grep -o created /tmp/told; tail -n 2 /tmp/told; sleep 1");

    env.run(&bundle)?.output()?.expect_stdout("created\nb\ninside\n")?;

    let lines = fs::read_to_string(&order)?;
    let names: Vec<&str> = lines.lines().filter_map(|line| line.split(' ').next()).collect();
    ensure_eq!(names, ["prestart", "createRuntime", "createContainer", "poststart", "poststop"], "the hooks");
    ensure!(lines.lines().last().is_some_and(|line| line.contains("stopped")), "{lines}");
    Ok(())
}

fn failing_hooks(env: &Env) -> Result {
    env.only_bulkhead()?;
    let hook = |script: &str| json!([{ "path": "/bin/sh", "args": ["sh", "-c", script] }]);
    let mut bundle = Bundle::busybox(env)?;
    bundle.sh("echo ran; sleep 100");
    for kind in ["prestart", "createRuntime", "createContainer", "startContainer"] {
        bundle.set("/hooks", json!({ kind: hook("echo oh dear >&2; exit 3") }));
        env.run(&bundle)?.output()?.expect_error(&["/bin/sh", "exit status: 3", "oh dear"])?;
    }
    bundle.set("/hooks", json!({ "poststart": hook("exit 4") }));
    let output = env.run(&bundle)?.output()?;
    output.expect_code(1)?;
    output.expect_error_line(&["hooks.poststart[0]", "exit status: 4"])?;

    bundle.sh("exit 5").set("/hooks", json!({ "poststop": hook("exit 6") }));
    let output = env.run(&bundle)?.output()?;
    output.expect_code(5)?;
    ensure!(output.stderr().contains("hooks.poststop[0]"), "{}", output.describe());
    bundle.set("/hooks", json!({ "prestart": [{ "path": "/bin/sleep", "args": ["sleep", "100"], "timeout": 1 }] }));
    env.run(&bundle)?.output()?.expect_error(&["hooks.prestart[0]", "within 1 s"])
}

fn the_hosts_own_network_namespace(env: &Env) -> Result {
    env.only_bulkhead()?;
    let mut bundle = Bundle::busybox(env)?;
    bundle.sh("true");
    let place = bundle.spec["linux"]["namespaces"].as_array_mut();
    let network = place.into_iter().flatten().find(|namespace| namespace["type"] == "network");
    if let Some(network) = network {
        network["path"] = json!("/proc/self/ns/net");
    }

    env.run(&bundle)?.output()?.expect_error(&["linux.namespaces", "this host's own network"])
}

fn time_namespace(env: &Env) -> Result {
    env.only_bulkhead()?;
    let mut bundle = Bundle::busybox(env)?;
    bundle.sh("cut -d. -f1 /proc/uptime");
    if let Some(namespaces) = bundle.spec["linux"]["namespaces"].as_array_mut() {
        namespaces.push(json!({ "type": "time" }));
    }
    bundle.set("/linux/timeOffsets", json!({ "boottime": { "secs": 1_000_000 }, "monotonic": { "secs": 5 } }));

    let output = env.run(&bundle)?.output()?;

    let uptime: u64 = output.stdout().trim().parse().unwrap_or_default();
    ensure!((1_000_000..1_001_000).contains(&uptime), "{}", output.describe());
    Ok(())
}

fn scheduling(env: &Env) -> Result {
    env.only_bulkhead()?;
    let mut bundle = Bundle::busybox(env)?;
    bundle.sh("cut -d' ' -f19,41 /proc/self/stat; uname -m; ionice -p $$");
    bundle.set("/process/scheduler", json!({ "policy": "SCHED_BATCH", "nice": 7 }));
    bundle.set("/process/ioPriority", json!({ "class": "IOPRIO_CLASS_BE", "priority": 6 }));
    bundle.set("/linux/personality", json!({ "domain": "LINUX32" }));

    env.run(&bundle)?.output()?.expect_stdout("7 3\ni686\nbest-effort: prio 6\n")
}

/// What podman 4.3 and docker 20.10 put into each bundle, besides what the other cases have.
fn bundle_as_podman_writes_it(env: &Env) -> Result {
    let mut bundle = Bundle::busybox(env)?;
    for name in ["hosts", "resolv.conf", "hostname"] {
        let file = bundle.folder.join(name);
        fs::write(&file, format!("{name}\n"))?;
        bundle.bind(&file, &format!("/etc/{name}"), &["rprivate"]);
    }
    bundle.mount("tmpfs", "tmpfs", "/run", &["nosuid", "nodev", "mode=755", "size=65536k", "tmpcopyup"]);
    bundle.mount("bind", "/dev/null", "/dev/ptmx-like", &["bind"]);
    let devices = json!([
        { "allow": false, "access": "rwm" },
        { "allow": true, "type": "c", "major": 1, "minor": 5, "access": "rwm" },
    ]);
    bundle.set(
        "/linux/resources",
        json!({
            "devices": devices, "memory": { "disableOOMKiller": false }, "cpu": { "shares": 0 },
            "pids": { "limit": 2048 }, "blockIO": { "weight": 0 },
            "hugepageLimits": [{ "pageSize": "2MB", "limit": 0 }],
        }),
    );
    // Of a host with AppArmor.
    let profile = if env.kind == Kind::Bulkhead { "containers-default-0.50.1" } else { "" };
    bundle.set("/process/apparmorProfile", json!(profile)).set("/process/oomScoreAdj", json!(0));
    bundle
        .set("/annotations", json!({ "io.container.manager": "libpod", "org.opencontainers.image.stopSignal": "15" }));
    bundle.sh("cat /etc/hosts /etc/resolv.conf /etc/hostname");

    env.run(&bundle)?.output()?.expect_stdout("hosts\nresolv.conf\nhostname\n")
}

/// A child has what every process has. The shell's last command is no child of it.
fn scheduling_that_ends_at_a_fork(env: &Env) -> Result {
    env.only_bulkhead()?;
    let mut bundle = Bundle::busybox(env)?;
    bundle.sh("cut -d' ' -f40,41 /proc/$$/stat; cut -d' ' -f40,41 /proc/self/stat; true");
    let flags = ["SCHED_FLAG_RESET_ON_FORK"];
    bundle.set("/process/scheduler", json!({ "policy": "SCHED_RR", "priority": 5, "flags": flags }));

    env.run(&bundle)?.output()?.expect_stdout("5 2\n0 0\n")
}

fn scheduling_in_real_time(env: &Env) -> Result {
    env.only_bulkhead()?;
    let mut bundle = Bundle::busybox(env)?;
    // Real-time priority and policy (proc_pid_stat(5)).
    bundle.sh("cut -d' ' -f40,41 /proc/self/stat; ionice -p $$; uname -m");
    bundle.set("/process/scheduler", json!({ "policy": "SCHED_FIFO", "priority": 5 }));
    bundle.set("/process/ioPriority", json!({ "class": "IOPRIO_CLASS_RT", "priority": 3 }));
    bundle.set("/linux/personality", json!({ "domain": "LINUX" }));

    env.run(&bundle)?.output()?.expect_stdout("5 1\nrealtime: prio 3\nx86_64\n")
}

/// Named pipes and unbuffered devices of `linux.devices`, both clocks of `linux.timeOffsets`, a sysctl of message queues.
fn nodes_offsets_and_queues(env: &Env) -> Result {
    let mut bundle = Bundle::busybox(env)?;
    bundle.set(
        "/linux/devices",
        json!([
            { "path": "/dev/pipe", "type": "p", "fileMode": 0o600 },
            { "path": "/dev/sink", "type": "u", "major": 1, "minor": 3, "fileMode": 0o622 },
        ]),
    );
    bundle.set("/linux/sysctl", json!({ "fs.mqueue.msg_max": "20", "kernel/sem": "100 2000 30 40" }));
    let mut script = "cd /dev; stat -c '%F %a' pipe; (echo through >pipe) & cat pipe; stat -c '%F %a %t:%T' sink; \
                      tr '\\t' ' ' </proc/sys/kernel/sem; cat /proc/sys/fs/mqueue/msg_max"
        .to_owned();
    let mut expected = "fifo 600\nthrough\ncharacter special file 622 1:3\n100 2000 30 40\n20\n".to_owned();
    // An older runc knows no time namespaces.
    if env.kind == Kind::Bulkhead {
        if let Some(namespaces) = bundle.spec["linux"]["namespaces"].as_array_mut() {
            namespaces.push(json!({ "type": "time" }));
        }
        let offsets = json!({ "boottime": { "secs": 1_000_000 }, "monotonic": { "secs": 5, "nanosecs": 7 } });
        bundle.set("/linux/timeOffsets", offsets);
        script += "; tr -s ' ' </proc/self/timens_offsets";
        expected += "monotonic 5 7\nboottime 1000000 0\n";
    }
    bundle.sh(&script);

    env.run(&bundle)?.output()?.expect_stdout(&expected)
}
