// SPDX-License-Identifier: Apache-2.0
//! What containerd hears of a pod: the events of the sandbox and its containers, and of memory that runs out.

use std::thread;
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;
use protobuf::MessageField;

use super::pods::WAIT;
use super::{Case, case};
use crate::cri::api::LinuxContainerResources;
use crate::engines::Kubelet;
use crate::env::{Env, Kind};
use crate::failure::{Result, ensure, ensure_eq};

pub(super) const CASES: &[Case] = &[case!(in_order), case!(out_of_memory)];

/// The names of a container's events, in their order.
fn of<'a>(events: &'a str, id: &str) -> Vec<&'a str> {
    let lines = events.lines().filter(|line| line.contains(&format!("\"container_id\":\"{id}\"")));
    lines.filter_map(|line| line.split_once("/tasks/")?.1.split(' ').next()).collect()
}

fn in_order(env: &Env) -> Result {
    let kubelet = Kubelet::new(env)?;
    let mut events = kubelet.containerd.events()?;
    let pod = kubelet.pod("told")?;
    let (sandbox, first, second) = (pod.id.clone(), pod.script("first", WAIT)?, pod.script("second", WAIT)?);
    pod.output(&first, "true")?;
    pod.stop(&first, 30)?;
    pod.remove_container(&first)?;
    pod.remove()?;

    events.wait_for(&format!("/containers/delete {{\"id\":\"{sandbox}\"}}"))?;
    events.signal(Signal::SIGTERM)?;
    let told = events.finish()?.stdout();
    ensure_eq!(of(&told, &sandbox), ["create", "start", "exit", "delete"], "the sandbox' events");
    let with_exec = ["create", "start", "exec-added", "exec-started", "exit", "exit", "delete"];
    ensure_eq!(of(&told, &first), with_exec, "the first container's events");
    ensure_eq!(of(&told, &second), ["create", "start", "exit", "delete"], "the second's");
    kubelet.end()
}

/// Of memory that runs out twice at once, the second time for init itself.
fn out_of_memory(env: &Env) -> Result {
    let kubelet = Kubelet::new(env)?;
    let mut events = kubelet.containerd.events()?;
    let pod = kubelet.pod("greedy")?;
    let mut config = pod.config("greedy", "tail /dev/zero; exec tail /dev/zero");
    let limits = LinuxContainerResources { memory_limit_in_bytes: 32 << 20, ..Default::default() };
    config.linux.mut_or_insert_default().resources = MessageField::some(limits);
    let id = pod.start(config)?;

    ensure_eq!(pod.wait(&id)?, 137, "the exit code");
    let end = Instant::now() + Duration::from_secs(60);
    while pod.container(&id)?.reason != "OOMKilled" {
        ensure!(Instant::now() < end, "the reason of the end: {:?}", pod.container(&id)?);
        thread::sleep(Duration::from_millis(100));
    }
    pod.remove()?;
    events.wait_for("/tasks/delete")?;
    events.signal(Signal::SIGTERM)?;
    let told = events.finish()?.stdout();
    // runc's shim tells of memory when it comes to it.
    if env.kind == Kind::Bulkhead {
        ensure_eq!(of(&told, &id), ["create", "start", "oom", "oom", "exit", "delete"], "the events");
    }
    kubelet.end()
}
