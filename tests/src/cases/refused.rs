// SPDX-License-Identifier: Apache-2.0
//! What is not honoured is refused by its name before anything is made; what says nothing is not.

use std::fs;
use std::path::Path;

use serde_json::{Value, json};

use super::{Case, case};
use crate::bundle::Bundle;
use crate::env::Env;
use crate::failure::{Failure, Result, ensure, skip};

pub(super) const CASES: &[Case] = &[
    case!(fields_of_other_systems),
    case!(fields_of_the_process),
    case!(fields_of_namespaces_and_mounts),
    case!(fields_of_the_rest),
    case!(fields_of_resources),
    case!(fields_of_seccomp),
    case!(cache_allocation_without_resctrl),
    case!(what_says_nothing_is_not_refused),
];

/// Each changes a good configuration at JSON pointers, and names what the refusal has to name.
fn each_refused(env: &Env, changes: &[(Value, &str)]) -> Result {
    env.only_bulkhead()?;
    let mut bundle = Bundle::busybox(env)?;
    let good = bundle.spec.clone();
    for (change, name) in changes {
        bundle.spec = good.clone();
        for (pointer, value) in change.as_object().into_iter().flatten() {
            bundle.set(pointer, value.clone());
        }
        let output = env.run(&bundle)?.output()?;
        output.expect_error(&["config.json", name]).map_err(|failure| match failure {
            Failure::Failed(reason) => Failure::Failed(format!("{change}: {reason}")),
            skipped @ Failure::Skipped(_) => skipped,
        })?;
    }
    Ok(())
}

fn fields_of_other_systems(env: &Env) -> Result {
    each_refused(
        env,
        &[
            (json!({ "/vm": { "kernel": { "path": "/k" } } }), "vm: not supported"),
            (json!({ "/solaris": { "milestone": "x" } }), "solaris: not supported"),
            (json!({ "/windows": { "layerFolders": ["C:"] } }), "windows: not supported"),
            (json!({ "/zos": {} }), "zos: not supported"),
            (json!({ "/process/user/username": "x" }), "process.user.username"),
            (json!({ "/process/commandLine": "x" }), "process.commandLine"),
            (json!({ "/linux/mountLabel": "a:b:c:d" }), "linux.mountLabel: not supported: SELinux"),
            (json!({ "/process/selinuxLabel": "a:b:c:d" }), "the guest's kernel has no SELinux"),
            (json!({ "/linux/netDevices": { "eth0": {} } }), "linux.netDevices"),
            (json!({ "/linux/memoryPolicy": { "mode": "MPOL_BIND", "nodes": "0" } }), "linux.memoryPolicy"),
            (json!({ "/annotations": { "io.bulkhead.kernel_args": "a\nb" } }), "io.bulkhead.kernel_args"),
            (json!({ "/annotations": { "io.bulkhead.net.rx_bytes_per_second": "5" } }), "rx_bytes_per_second"),
            (json!({ "/annotations": { "io.bulkhead.net.tx_packets_per_second": "0" } }), "tx_packets_per_second"),
        ],
    )
}

fn cache_allocation_without_resctrl(env: &Env) -> Result {
    if Path::new("/sys/fs/resctrl/schemata").exists() {
        skip!("this host has resctrl");
    }
    each_refused(
        env,
        &[
            (json!({ "/linux/intelRdt": { "closID": "x" } }), "linux.intelRdt: not supported: cache and bandwidth"),
            (json!({ "/linux/intelRdt": { "l3CacheSchema": "L3:0=f" } }), "this host has no resctrl file system"),
            (json!({ "/linux/intelRdt": { "closID": "a/b" } }), "linux.intelRdt.closID"),
        ],
    )
}

fn fields_of_the_process(env: &Env) -> Result {
    let limit = |soft: u64, hard: u64| json!({ "type": "RLIMIT_CORE", "soft": soft, "hard": hard });
    each_refused(
        env,
        &[
            (json!({ "/process/user/umask": 0o1000 }), "process.user.umask"),
            (json!({ "/process/oomScoreAdj": 1001 }), "process.oomScoreAdj"),
            (json!({ "/process/rlimits": [limit(2, 1)] }), "process.rlimits[0].soft"),
            (json!({ "/process/rlimits": [limit(1, 1), limit(1, 1)] }), "process.rlimits[1].type"),
            (json!({ "/process/env": ["PATH=/bin", "NOTHING"] }), "process.env[1]"),
            (json!({ "/process/scheduler": { "policy": "SCHED_ISO" } }), "process.scheduler.policy"),
            (json!({ "/process/scheduler": { "policy": "SCHED_OTHER", "priority": 1 } }), "process.scheduler.priority"),
            (json!({ "/process/scheduler": { "policy": "SCHED_OTHER", "nice": 20 } }), "process.scheduler.nice"),
            (json!({ "/process/scheduler": { "policy": "SCHED_BATCH", "period": 1 } }), "process.scheduler.period"),
            (
                json!({ "/process/scheduler": { "policy": "SCHED_OTHER", "flags": ["SCHED_FLAG_UTIL_CLAMP_MIN"] } }),
                "process.scheduler.flags[0]: not supported",
            ),
            (
                json!({ "/process/scheduler": { "policy": "SCHED_OTHER", "flags": ["SCHED_FLAG_OTHER"] } }),
                "process.scheduler.flags[0]: unknown variant",
            ),
            (
                json!({ "/process/ioPriority": { "class": "IOPRIO_CLASS_BE", "priority": 8 } }),
                "process.ioPriority.priority",
            ),
            (json!({ "/process/execCPUAffinity": { "initial": "x" } }), "process.execCPUAffinity"),
        ],
    )
}

fn fields_of_namespaces_and_mounts(env: &Env) -> Result {
    let network = json!({ "type": "network" });
    let ids = json!([{ "containerID": 0, "hostID": 1000, "size": 1 }]);
    let mapped = |namespace: &str, user: u32| {
        json!({
            "/linux/namespaces": [network, { "type": namespace }, { "type": "uts" }], "/linux/uidMappings": ids,
            "/linux/gidMappings": ids, "/process/user/uid": user,
        })
    };
    each_refused(
        env,
        &[
            (json!({ "/linux/namespaces": [{ "type": "ipc", "path": "/proc/1/ns/ipc" }] }), "linux.namespaces[0].path"),
            (json!({ "/linux/namespaces": [{ "type": "pid" }, { "type": "uts" }] }), "linux.namespaces: not supported"),
            (json!({ "/linux/namespaces": [network, network] }), "linux.namespaces[1].type"),
            (json!({ "/linux/namespaces": [network, { "type": "user" }, { "type": "uts" }] }), "linux.uidMappings"),
            (mapped("ipc", 0), "linux.uidMappings"),
            (mapped("user", 7), "process.user.uid"),
            (json!({ "/linux/timeOffsets": { "boottime": { "secs": 1 } } }), "linux.timeOffsets"),
            (json!({ "/linux/namespaces": [network], "/hostname": "x" }), "hostname"),
            (json!({ "/hostname": "x".repeat(65) }), "hostname"),
            (json!({ "/domainname": "x".repeat(65) }), "domainname"),
            (json!({ "/linux/rootfsPropagation": "sideways" }), "linux.rootfsPropagation"),
            (
                json!({ "/mounts": [{ "destination": "/a", "type": "bind", "source": "/tmp", "options": ["idmap"] }] }),
                "mounts[0].uidMappings",
            ),
            (
                json!({ "/mounts": [{ "destination": "/a", "type": "bind", "source": "/tmp", "options": ["size=1"] }] }),
                "mounts[0].options",
            ),
            (
                json!({ "/mounts": [{ "destination": "/a", "type": "tmpfs", "uidMappings": ids, "gidMappings": ids }] }),
                "mounts[0].options",
            ),
        ],
    )
}

fn fields_of_the_rest(env: &Env) -> Result {
    let hook = |hook: Value| json!({ "/hooks": { "poststop": [hook] } });
    each_refused(
        env,
        &[
            (
                json!({ "/linux/devices": [{ "path": "/dev/x", "type": "b", "major": 4095, "minor": 0 }] }),
                "linux.devices[0]: cannot use /dev/x: this host has no block device 4095:0",
            ),
            (
                // A character device, taken for a block device.
                json!({ "/linux/devices": [{ "path": "/dev/tty", "type": "b", "major": 5, "minor": 0 }] }),
                "linux.devices[0]: cannot use /dev/tty: this host has no block device 5:0",
            ),
            (
                json!({ "/linux/devices": [{ "path": "dev/x", "type": "c", "major": 1, "minor": 3 }] }),
                "linux.devices[0].path",
            ),
            (json!({ "/linux/sysctl": { "vm.swappiness": "1" } }), "linux.sysctl"),
            (json!({ "/linux/sysctl": { "kernel.hostname": "x" } }), "linux.sysctl"),
            (json!({ "/linux/maskedPaths": ["proc"] }), "linux.maskedPaths[0]"),
            (json!({ "/linux/readonlyPaths": ["proc"] }), "linux.readonlyPaths[0]"),
            (json!({ "/linux/personality": { "domain": "LINUX", "flags": ["x"] } }), "linux.personality.flags"),
            (json!({ "/linux/intelRdt": { "l3CacheSchema": "L3:0=f" } }), "linux.intelRdt"),
            (hook(json!({ "path": "/x", "timeout": 0 })), "hooks.poststop[0].timeout"),
            (hook(json!({ "path": "/x", "env": ["A"] })), "hooks.poststop[0].env[0]"),
        ],
    )
}

fn fields_of_resources(env: &Env) -> Result {
    let resources = |resources: Value| json!({ "/linux/resources": resources });
    each_refused(
        env,
        &[
            (resources(json!({ "rdma": { "mlx5_1": { "hcaHandles": 1 } } })), "linux.resources.rdma"),
            (resources(json!({ "network": { "classID": 1 } })), "linux.resources.network"),
            (resources(json!({ "memory": { "kernel": 1 } })), "linux.resources.memory.kernel"),
            (resources(json!({ "memory": { "kernelTCP": 1 } })), "linux.resources.memory.kernelTCP"),
            (resources(json!({ "memory": { "swappiness": 60 } })), "linux.resources.memory.swappiness"),
            (resources(json!({ "memory": { "disableOOMKiller": true } })), "linux.resources.memory.disableOOMKiller"),
            (resources(json!({ "memory": { "limit": 100 << 20, "swap": 5 } })), "linux.resources.memory.swap"),
            (resources(json!({ "cpu": { "realtimeRuntime": 1 } })), "linux.resources.cpu.realtimeRuntime"),
            (resources(json!({ "cpu": { "realtimePeriod": 1 } })), "linux.resources.cpu.realtimePeriod"),
            (resources(json!({ "cpu": { "idle": 2 } })), "linux.resources.cpu.idle"),
            (resources(json!({ "cpu": { "cpus": "3-1" } })), "linux.resources.cpu.cpus"),
            (resources(json!({ "blockIO": { "leafWeight": 10 } })), "linux.resources.blockIO.leafWeight"),
            (resources(json!({ "blockIO": { "weight": 9 } })), "linux.resources.blockIO.weight"),
            (
                resources(json!({ "hugepageLimits": [{ "pageSize": "64KB", "limit": 1 }] })),
                "hugepageLimits[0].pageSize",
            ),
            (resources(json!({ "unified": { "cgroup.procs": "1" } })), "linux.resources.unified"),
            (resources(json!({ "unified": { "cpu.idle": "max" } })), "linux.resources.unified[\"cpu.idle\"]"),
            (resources(json!({ "devices": [{ "allow": true, "access": "x" }] })), "linux.resources.devices[0].access"),
        ],
    )
}

fn fields_of_seccomp(env: &Env) -> Result {
    let rule = |rule: Value| json!({ "/linux/seccomp": { "defaultAction": "SCMP_ACT_ALLOW", "syscalls": [rule] } });
    let whole =
        |name: &str, value: Value| json!({ "/linux/seccomp": { "defaultAction": "SCMP_ACT_ALLOW", name: value } });
    let argument = json!([{ "index": 6, "value": 1, "op": "SCMP_CMP_EQ" }]);
    each_refused(
        env,
        &[
            (rule(json!({ "names": ["kill"], "action": "SCMP_ACT_NOTIFY" })), "linux.seccomp.syscalls[0].action"),
            (rule(json!({ "names": ["kill"], "action": "SCMP_ACT_ALLOW", "errnoRet": 1 })), "syscalls[0].errnoRet"),
            (rule(json!({ "names": ["kill"], "action": "SCMP_ACT_ERRNO", "errnoRet": 4096 })), "syscalls[0].errnoRet"),
            (rule(json!({ "names": ["kill"], "action": "SCMP_ACT_ERRNO", "args": argument })), "args[0].index"),
            (rule(json!({ "names": [], "action": "SCMP_ACT_ERRNO" })), "linux.seccomp.syscalls[0].names"),
            (whole("listenerPath", json!("/run/s")), "linux.seccomp.listenerPath"),
            (whole("listenerMetadata", json!("x")), "linux.seccomp.listenerMetadata"),
            (whole("flags", json!(["SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV"])), "linux.seccomp.flags[0]"),
        ],
    )
}

/// Nulls, zeros and what is empty; and a property that the specification does not know, which `--debug` names.
fn what_says_nothing_is_not_refused(env: &Env) -> Result {
    env.only_bulkhead()?;
    let mut bundle = Bundle::busybox(env)?;
    bundle.set("/process/apparmorProfile", json!("")).set("/process/selinuxLabel", json!(""));
    bundle.set("/hooks", json!({ "prestart": [], "poststop": null }));
    for (name, value) in [("mountLabel", json!("")), ("cgroupsPath", json!("")), ("rootfsPropagation", json!(""))] {
        bundle.set(&format!("/linux/{name}"), value);
    }
    for name in ["uidMappings", "gidMappings", "devices"] {
        bundle.set(&format!("/linux/{name}"), json!([]));
    }
    for name in ["timeOffsets", "netDevices", "sysctl"] {
        bundle.set(&format!("/linux/{name}"), json!({}));
    }
    bundle.set(
        "/linux/resources",
        json!({
            "memory": { "limit": 0, "swap": 0, "reservation": 0, "kernel": 0, "kernelTCP": 0, "disableOOMKiller": false },
            "cpu": { "shares": 0, "quota": 0, "period": 0, "realtimeRuntime": 0, "realtimePeriod": 0, "cpus": "", "mems": "" },
            "pids": { "limit": 0 }, "hugepageLimits": [], "rdma": {}, "network": {}, "unified": {},
            "blockIO": { "weight": 0, "leafWeight": 0, "weightDevice": [], "throttleReadBpsDevice": [] },
        }),
    );
    bundle.set("/process/ofTomorrow", json!({ "x": 1 })).sh("echo fine");
    let log = env.work.join("log-of-the-run");

    let run = env.run(&bundle)?.globals(["--debug".into(), "--log".into(), log.clone().into_os_string()]);
    run.output()?.expect_stdout("fine\n")?;

    let told = fs::read_to_string(&log)?;
    ensure!(told.contains("the unknown property process.ofTomorrow is ignored"), "{told}");
    Ok(())
}
