// SPDX-License-Identifier: Apache-2.0
//! A machine that is given more memory while it runs: by `update`, and for a container that comes into its pod.

use std::fs;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use protobuf::MessageField;
use serde_json::json;

use super::engine::unified;
use super::{Case, case};
use crate::bundle::Bundle;
use crate::cri::api::{Empty, LinuxContainerResources, UpdateContainerResourcesRequest};
use crate::detached::Detached;
use crate::engines::{Kubelet, Pod};
use crate::env::{Env, Kind};
use crate::failure::{Context as _, Result, ensure, ensure_eq};

pub(super) const CASES: &[Case] = &[
    case!(update),
    case!(update_beyond_the_host),
    case!(update_of_a_machine_of_a_fixed_size),
    case!(killed_after_growing),
    case!(containers_of_a_pod),
    case!(container_of_a_pod_is_updated),
    case!(pod_whose_sum_is_told),
];

const MIB: u64 = 1 << 20;

/// Prints the memory of the machine in KiB.
const TOTAL: &str = "while read name size unit; do test $name != MemTotal: || echo $size; done < /proc/meminfo";

/// What a container does that waits to be ended.
const WAIT: &str = "trap 'exit 3' TERM; echo up; while :; do sleep 0.1; done";

/// What [`TOTAL`] has printed, in MiB, since a kernel keeps some of what it has at its boot and nothing of what comes later.
fn total_mib(printed: &str) -> Result<u64> {
    Ok(printed.trim().parse::<u64>().context(|| format!("reading the memory from {printed:?}"))? / 1024)
}

fn total(container: &Detached<'_>) -> Result<u64> {
    total_mib(&container.exec(TOTAL).output()?.stdout())
}

/// A container with that limit and a tmpfs on which it may have 400 MiB.
fn limited(env: &Env, limit_mib: u64) -> Result<Bundle> {
    let mut bundle = Bundle::busybox(env)?;
    bundle.sh(WAIT).set("/linux/resources", json!({ "memory": { "limit": limit_mib * MIB } }));
    bundle.mount("tmpfs", "tmpfs", "/mem", &["size=400m"]);
    Ok(bundle)
}

/// Has a container hold that much memory and give it back.
fn fill(mib: u64) -> String {
    format!("dd if=/dev/zero of=/mem/file bs=1M count={mib} 2> /dev/null && wc -c < /mem/file; rm /mem/file")
}

fn update(env: &Env) -> Result {
    let root = unified()?;
    let place = env.id();
    let mut bundle = limited(env, 128)?;
    bundle.set("/linux/cgroupsPath", json!(format!("/{place}")));
    let container = Detached::run(env, &bundle)?;
    container.wait_for("up\n")?;
    let before = total(&container)?;

    container.must(&["update", "--memory", "700m", "--memory-swap", "700m"])?;

    // More than the machine had when it was made: 128 and 96.
    container.exec(&fill(240)).output()?.expect_stdout(&format!("{}\n", 240 * MIB))?;
    container.exec("cat /sys/fs/cgroup/memory.max").output()?.expect_stdout(&format!("{}\n", 700 * MIB))?;
    let on_host = || fs::read_to_string(root.join(&place).join("memory.max"));
    if env.kind == Kind::Bulkhead {
        // 700 and 96 are 572 more than there were, and the kernel needs some for them: five blocks of 128.
        ensure_eq!(total(&container)? - before, 640, "MiB that the machine has grown by");
        ensure_eq!(on_host()?, format!("{}\n", (128 + 96 + 640 + 64) * MIB), "the limit on the host");
    }

    // Less is a matter of the container's cgroup alone.
    container.must(&["update", "--memory", "100m", "--memory-swap", "100m"])?;
    container.exec("cat /sys/fs/cgroup/memory.max").output()?.expect_stdout(&format!("{}\n", 100 * MIB))?;
    if env.kind == Kind::Bulkhead {
        ensure_eq!(total(&container)? - before, 640, "MiB that the machine has grown by");
        // What it has already it is not given a second time.
        container.must(&["update", "--memory", "740m"])?;
        ensure_eq!(total(&container)? - before, 640, "MiB that the machine has grown by");
        ensure_eq!(on_host()?, format!("{}\n", (128 + 96 + 640 + 64) * MIB), "the limit on the host");
        container.must(&["update", "--memory", "800m"])?;
        ensure_eq!(total(&container)? - before, 768, "MiB that the machine has grown by");
    }
    container.must_with(&["kill"], &["TERM"])?;
    ensure_eq!(container.wait()?, 3, "the status");
    Ok(())
}

fn update_beyond_the_host(env: &Env) -> Result {
    env.only_bulkhead()?; // Others take any number.
    let container = Detached::run(env, &limited(env, 64)?)?;
    container.wait_for("up\n")?;
    let before = total(&container)?;

    let refused = container.verb(&["update", "--pids-limit", "7", "--memory", "100000g"]).output()?;

    refused.expect_error(&["linux.resources.memory.limit", "107374182400000", "the machine can have"])?;
    let unchanged = format!("max\n{}\n", 64 * MIB);
    container.exec("cat /sys/fs/cgroup/pids.max /sys/fs/cgroup/memory.max").output()?.expect_stdout(&unchanged)?;
    ensure_eq!(total(&container)?, before, "the machine's memory");
    Ok(())
}

fn update_of_a_machine_of_a_fixed_size(env: &Env) -> Result {
    env.only_bulkhead()?;
    let mut bundle = limited(env, 64)?;
    bundle.annotation("io.bulkhead.memory_mib", "200");
    let container = Detached::run(env, &bundle)?;
    container.wait_for("up\n")?;

    let refused = container.verb(&["update", "--memory", "201m"]).output()?;

    refused.expect_error(&["linux.resources.memory.limit", "200 MiB that the machine can have"])?;
    container.must(&["update", "--memory", "200m"])?;
    container.exec("cat /sys/fs/cgroup/memory.max").output()?.expect_stdout(&format!("{}\n", 200 * MIB))
}

fn killed_after_growing(env: &Env) -> Result {
    env.only_bulkhead()?;
    let place = env.id();
    let mut bundle = limited(env, 64)?;
    bundle.set("/linux/cgroupsPath", json!(format!("/{place}")));
    let container = Detached::run(env, &bundle)?;
    container.wait_for("up\n")?;
    container.must(&["update", "--memory", "300m"])?;
    container.exec(&fill(200)).output()?.expect_stdout(&format!("{}\n", 200 * MIB))?;

    kill(Pid::from_raw(container.pid), Signal::SIGKILL)?;

    container.wait_for_status("stopped")?;
    container.expect_exit_status(137)?;
    container.must(&["delete"])?;
    let cgroup = unified()?.join(&place);
    ensure!(!cgroup.exists(), "{} is still there", cgroup.display());
    Ok(())
}

/// Starts a container that waits, with that limit of memory.
fn start(pod: &Pod<'_>, name: &str, limit_mib: Option<i64>) -> Result<String> {
    let mut config = pod.config(name, WAIT);
    if let Some(limit) = limit_mib {
        let resources = LinuxContainerResources { memory_limit_in_bytes: limit << 20, ..Default::default() };
        config.linux.mut_or_insert_default().resources = MessageField::some(resources);
    }
    pod.start(config)
}

/// Has a container touch so many MiB at once.
fn touch(pod: &Pod<'_>, id: &str, mib: u64) -> Result {
    pod.output(id, &format!("dd if=/dev/zero of=/dev/null bs={mib}M count=1 2> /dev/null")).map(drop)
}

/// By how much the machine has more memory than before, as a container sees it; a machine alone has some to have more of.
fn ensure_grown(env: &Env, pod: &Pod<'_>, id: &str, before: u64, expected: u64) -> Result {
    if env.kind == Kind::Bulkhead {
        ensure_eq!(total_mib(&pod.output(id, TOTAL)?)? - before, expected, "MiB that the pod's machine has grown by");
    }
    Ok(())
}

fn containers_of_a_pod(env: &Env) -> Result {
    let kubelet = Kubelet::new(env)?;
    let pod = kubelet.pod("growing")?;
    let first = start(&pod, "first", None)?;
    let before = total_mib(&pod.output(&first, TOTAL)?)?;

    // The machine has 512 MiB, and needs 1024 and 96.
    let large = start(&pod, "large", Some(1024))?;
    touch(&pod, &large, 700)?;
    ensure_grown(env, &pod, &first, before, 640)?;

    // One that comes in the place of another needs nothing, and one that comes beside it does.
    pod.stop(&large, 0)?;
    pod.remove_container(&large)?;
    start(&pod, "again", Some(1024))?;
    ensure_grown(env, &pod, &first, before, 640)?;
    start(&pod, "beside", Some(128))?;
    ensure_grown(env, &pod, &first, before, 768)?;
    pod.remove()?;
    kubelet.end()
}

fn raise(kubelet: &Kubelet<'_>, id: &str, limit_mib: i64) -> Result {
    let limits = LinuxContainerResources { memory_limit_in_bytes: limit_mib << 20, ..Default::default() };
    let (container_id, linux) = (id.to_owned(), MessageField::some(limits));
    let request = UpdateContainerResourcesRequest { container_id, linux, ..Default::default() };
    kubelet.call::<Empty>("UpdateContainerResources", &request).map(drop)
}

fn container_of_a_pod_is_updated(env: &Env) -> Result {
    let kubelet = Kubelet::new(env)?;
    let pod = kubelet.pod("updated")?;
    let (first, second) = (start(&pod, "first", Some(200))?, start(&pod, "second", Some(200))?);
    let before = total_mib(&pod.output(&first, TOTAL)?)?;

    raise(&kubelet, &first, 700)?;

    // 700, 200 and 96 are 484 more than 512.
    ensure_grown(env, &pod, &second, before, 512)?;
    touch(&pod, &first, 600)?;
    if env.kind == Kind::Bulkhead {
        let refused = raise(&kubelet, &second, 100_000_000).map_err(|failure| format!("{failure:?}"));
        ensure!(refused.as_ref().is_err_and(|why| why.contains("the machine can have")), "not refused: {refused:?}");
        ensure_grown(env, &pod, &second, before, 512)?;
    }
    pod.remove()?;
    kubelet.end()
}

fn pod_whose_sum_is_told(env: &Env) -> Result {
    let kubelet = Kubelet::new(env)?;
    let mut config = kubelet.pod_config("told")?;
    let sum = LinuxContainerResources { memory_limit_in_bytes: 128 << 20, ..Default::default() };
    config.linux.mut_or_insert_default().resources = MessageField::some(sum);
    let pod = kubelet.run(config)?;

    // The machine has what was told; only a container whose limit is changed says that the sum no longer holds.
    let id = start(&pod, "one", Some(128))?;
    let before = total_mib(&pod.output(&id, TOTAL)?)?;
    let other = start(&pod, "other", Some(128))?;
    ensure_grown(env, &pod, &id, before, 0)?;
    raise(&kubelet, &id, 400)?;
    // 400, 128 and 96 are 400 more than 128 and 96.
    ensure_grown(env, &pod, &other, before, 512)?;
    touch(&pod, &id, 300)?;
    pod.remove()?;
    kubelet.end()
}
