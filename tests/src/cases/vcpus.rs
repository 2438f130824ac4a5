// SPDX-License-Identifier: Apache-2.0
//! A machine whose guest comes to use more processors while it runs: by `update`, and for a container that comes into its pod.

use std::fs;
use std::thread::available_parallelism;
use std::time::Duration;

use protobuf::MessageField;
use serde_json::json;

use super::{Case, case};
use crate::bundle::Bundle;
use crate::cri::api::{Empty, LinuxContainerResources, UpdateContainerResourcesRequest};
use crate::detached::Detached;
use crate::engines::{Kubelet, Pod};
use crate::env::{Env, Kind};
use crate::failure::{Result, ensure_eq, fail};
use crate::processes;

pub(super) const CASES: &[Case] = &[
    case!(update),
    case!(update_of_a_machine_without_others),
    case!(annotations_out_of_range),
    case!(containers_of_a_pod),
    case!(container_of_a_pod_is_updated),
    case!(pods_that_name_no_number),
];

const MOST: &str = "io.bulkhead.max_vcpus";

/// What a container does that waits to be ended.
const WAIT: &str = "trap 'exit 3' TERM; echo up; while :; do sleep 0.1; done";

/// Prints on which processors the processes may run that were there before, the number for new ones, and the machine's own.
const PROCESSORS: &str =
    "grep Cpus_allowed_list /proc/1/status | tr '\\t' ' '; nproc; cat /sys/devices/system/cpu/possible";

/// Has two processes compute until they have been seen on two processors (field 39 of their `stat`); prints these.
const TWO_BUSY: &str = "while :; do :; done & first=$!
while :; do :; done & second=$!
for attempt in $(seq 100); do
    one=$(cut -d ' ' -f 39 /proc/$first/stat) other=$(cut -d ' ' -f 39 /proc/$second/stat)
    test $one = $other || break
    sleep 0.1
done
kill $first $second
test $one != $other && echo $one $other | tr ' ' '\\n' | sort -n | tr '\\n' ' '";

/// What [`PROCESSORS`] prints of a guest that uses so many of so many.
fn processors(used: usize, possible: usize) -> String {
    let list = |count: usize| if count == 1 { "0".to_owned() } else { format!("0-{}", count - 1) };
    format!("Cpus_allowed_list: {}\n{used}\n{}\n", list(used), list(possible))
}

fn expect(container: &Detached<'_>, used: usize, possible: usize) -> Result {
    container.exec(PROCESSORS).output()?.expect_stdout(&processors(used, possible))
}

fn expect_quota(container: &Detached<'_>, cpu_max: &str) -> Result {
    container.exec("cat /sys/fs/cgroup/cpu.max").output()?.expect_stdout(&format!("{cpu_max}\n"))
}

/// The states of the threads that run a container's vCPUs, by their numbers: S of one that sleeps.
fn vcpu_threads(container: &Detached<'_>) -> Result<Vec<char>> {
    let Some(vmm) = processes::wait_for_descendant(container.pid, "bulkhead-vmm", Duration::from_secs(10)) else {
        fail!("there is no VMM");
    };
    let mut threads = Vec::new();
    for task in fs::read_dir(format!("/proc/{}/task", vmm.pid))? {
        let stat = fs::read_to_string(task?.path().join("stat"))?;
        let Some((name, rest)) = stat.split_once('(').and_then(|(_, rest)| rest.split_once(") ")) else { continue };
        if let Some(number) = name.strip_prefix("vcpu-").and_then(|number| number.parse::<u32>().ok()) {
            threads.push((number, rest.chars().next().unwrap_or('?')));
        }
    }
    threads.sort_unstable();
    Ok(threads.into_iter().map(|(_, state)| state).collect())
}

fn limited(env: &Env, quota_us: i64) -> Result<Bundle> {
    let mut bundle = Bundle::busybox(env)?;
    bundle.sh(WAIT).set("/linux/resources", json!({ "cpu": { "quota": quota_us, "period": 100_000 } }));
    Ok(bundle)
}

fn update(env: &Env) -> Result {
    env.only_bulkhead()?;
    let mut bundle = limited(env, 50_000)?;
    bundle.annotation(MOST, "3");
    let container = Detached::run(env, &bundle)?;
    container.wait_for("up\n")?;
    expect(&container, 1, 3)?;
    let threads = vcpu_threads(&container)?;
    ensure_eq!(threads.len(), 3, "vCPUs");
    ensure_eq!(threads[1..], ['S', 'S'], "the states of those that the guest does not use");

    container.must(&["update", "--cpu-quota", "150000"])?;
    expect(&container, 2, 3)?;
    expect_quota(&container, "150000 100000")?;
    container.exec(TWO_BUSY).output()?.expect_stdout("0 1 ")?;

    // What is not said stays: this is three times as much. A paused container is no obstacle.
    container.must(&["pause"])?;
    container.must(&["update", "--cpu-period", "50000"])?;
    container.must(&["resume"])?;
    expect(&container, 3, 3)?;

    // As far as there are some, and once used is used.
    container.must(&["update", "--cpu-quota", "900000", "--cpu-period", "100000"])?;
    expect(&container, 3, 3)?;
    expect_quota(&container, "900000 100000")?;
    container.must(&["update", "--cpu-quota", "20000"])?;
    expect(&container, 3, 3)?;
    expect_quota(&container, "20000 100000")?;
    container.must_with(&["kill"], &["TERM"])?;
    ensure_eq!(container.wait()?, 3, "the status");
    Ok(())
}

/// Most containers are never given more: their machines have nothing for it.
fn update_of_a_machine_without_others(env: &Env) -> Result {
    env.only_bulkhead()?;
    let container = Detached::run(env, &limited(env, 100_000)?)?;
    container.wait_for("up\n")?;
    expect(&container, 1, 1)?;
    ensure_eq!(vcpu_threads(&container)?.len(), 1, "vCPUs");

    container.must(&["update", "--cpu-quota", "300000"])?;

    expect(&container, 1, 1)?;
    expect_quota(&container, "300000 100000")
}

fn annotations_out_of_range(env: &Env) -> Result {
    env.only_bulkhead()?;
    let mut bundle = Bundle::busybox(env)?;
    for (most, vcpus) in [("0", "1"), ("65", "1"), ("1.5", "1"), ("-1", "1"), ("all", "1"), ("", "1"), ("2", "3")] {
        bundle.set("/annotations", json!({ MOST: most, "io.bulkhead.vcpus": vcpus }));
        let range = format!("a number from {vcpus} to 64");
        env.run(&bundle)?.output()?.expect_error(&[MOST, &format!("{most:?}"), &range])?;
    }
    Ok(())
}

/// Starts a container that waits, with that limit.
fn start(pod: &Pod<'_>, name: &str, quota_us: Option<i64>) -> Result<String> {
    let mut config = pod.config(name, WAIT);
    if let Some(quota) = quota_us {
        config.linux.mut_or_insert_default().resources = MessageField::some(limit(quota));
    }
    pod.start(config)
}

fn limit(quota_us: i64) -> LinuxContainerResources {
    LinuxContainerResources { cpu_quota: quota_us, cpu_period: 100_000, ..Default::default() }
}

fn change(kubelet: &Kubelet<'_>, id: &str, quota_us: i64) -> Result {
    let (container_id, linux) = (id.to_owned(), MessageField::some(limit(quota_us)));
    let request = UpdateContainerResourcesRequest { container_id, linux, ..Default::default() };
    kubelet.call::<Empty>("UpdateContainerResources", &request).map(drop)
}

/// A pod whose machine may have so many vCPUs; others' pods have no machine.
fn pod_with_most<'k>(kubelet: &'k Kubelet<'_>, name: &str, most: &str) -> Result<Pod<'k>> {
    let mut config = kubelet.pod_config(name)?;
    config.annotations.insert(MOST.to_owned(), most.to_owned());
    kubelet.run(config)
}

/// What a guest uses, as one of its containers sees it; a container of the host's kernel sees all that there are.
fn ensure_used(env: &Env, pod: &Pod<'_>, id: &str, used: usize, possible: usize) -> Result {
    if env.kind == Kind::Bulkhead {
        ensure_eq!(pod.output(id, PROCESSORS)?, processors(used, possible), "processors");
    }
    Ok(())
}

fn containers_of_a_pod(env: &Env) -> Result {
    let kubelet = Kubelet::new(env)?;
    let pod = pod_with_most(&kubelet, "growing", "3")?;
    let first = start(&pod, "first", None)?;
    ensure_used(env, &pod, &first, 1, 3)?;

    // The second one's are two; so are both's together, and those of all three are more.
    let second = start(&pod, "second", Some(180_000))?;
    ensure_used(env, &pod, &first, 2, 3)?;
    if env.kind == Kind::Bulkhead {
        ensure_eq!(pod.output(&second, TWO_BUSY)?, "0 1 ", "the processors of two that compute");
    }
    let small = start(&pod, "small", Some(20_000))?;
    ensure_used(env, &pod, &small, 2, 3)?;
    pod.stop(&small, 0)?;
    pod.remove_container(&small)?;
    let third = start(&pod, "third", Some(30_000))?;
    ensure_used(env, &pod, &third, 3, 3)?;

    // There are no more, and what has gone leaves them.
    let large = start(&pod, "large", Some(2_000_000))?;
    ensure_used(env, &pod, &large, 3, 3)?;
    for id in [&second, &third, &large] {
        pod.stop(id, 0)?;
        pod.remove_container(id)?;
    }
    ensure_used(env, &pod, &first, 3, 3)?;
    pod.remove()?;
    kubelet.end()
}

fn container_of_a_pod_is_updated(env: &Env) -> Result {
    let kubelet = Kubelet::new(env)?;
    let pod = pod_with_most(&kubelet, "updated", "2")?;
    let (first, second) = (start(&pod, "first", Some(60_000))?, start(&pod, "second", Some(40_000))?);
    ensure_used(env, &pod, &first, 1, 2)?;

    change(&kubelet, &first, 70_000)?;

    ensure_used(env, &pod, &second, 2, 2)?;
    ensure_eq!(pod.output(&first, "cat /sys/fs/cgroup/cpu.max")?, "70000 100000\n", "the limit");
    change(&kubelet, &first, 10_000)?;
    ensure_used(env, &pod, &second, 2, 2)?;
    pod.remove()?;
    kubelet.end()
}

fn pods_that_name_no_number(env: &Env) -> Result {
    let kubelet = Kubelet::new(env)?;
    // Up to four, as far as the host has them.
    let most = available_parallelism()?.get().min(4);
    let silent = kubelet.pod("silent")?;
    let id = start(&silent, "one", Some(900_000))?;
    ensure_used(env, &silent, &id, most, most)?;
    silent.remove()?;

    // Who tells the sum knows all that will come.
    let mut config = kubelet.pod_config("told")?;
    let sum = LinuxContainerResources { cpu_shares: 102, ..limit(100_000) };
    config.linux.mut_or_insert_default().resources = MessageField::some(sum);
    let told = kubelet.run(config)?;
    let id = start(&told, "one", Some(900_000))?;
    ensure_used(env, &told, &id, 1, 1)?;
    told.remove()?;
    kubelet.end()
}
