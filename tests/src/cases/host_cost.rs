// SPDX-License-Identifier: Apache-2.0
//! What a container is to the host that runs it under containerd: whose memory goes first, and what its machine costs.

use std::fs;

use containerd_shim_protos::api::StatsRequest;
use containerd_shim_protos::cgroups_v2::metrics::Metrics;
use containerd_shim_protos::sandbox_api::SandboxMetricsRequest;
use containerd_shim_protos::sandbox_sync::SandboxClient;
use protobuf::Message;
use serde_json::json;

use super::task::{KILL, Tasks, limit};
use super::{Case, case};
use crate::bundle::Bundle;
use crate::env::Env;
use crate::failure::{Result, ensure, ensure_eq, fail};
use crate::processes;

pub(super) const CASES: &[Case] = &[case!(scores), case!(scores_in_a_pod), case!(statistics)];

/// How readily the kernel ends a process when memory runs out.
fn score(process: i32) -> Result<i32> {
    Ok(fs::read_to_string(format!("/proc/{process}/oom_score_adj"))?.trim().parse()?)
}

/// Those of a shim and its VMM.
fn scores_of(tasks: &Tasks<'_>) -> Result<(i32, i32)> {
    let shim = tasks.shim.pid()?;
    let below = processes::descendants(shim);
    let Some(vmm) = below.iter().find(|process| process.name.starts_with("bulkhead-vmm")) else {
        fail!("no VMM below the shim: {below:?}");
    };
    Ok((score(shim)?, score(vmm.pid)?))
}

/// This process takes the part of containerd, which its unit protects.
fn protected(env: &Env) -> Result<Tasks<'_>> {
    fs::write("/proc/self/oom_score_adj", "-500")?;
    Tasks::new(env)
}

fn scores(env: &Env) -> Result {
    let tasks = protected(env)?;
    let id = tasks.shim.id.clone();
    let mut bundle = Bundle::busybox(env)?;
    bundle.sh("sleep 1000").set("/process/oomScoreAdj", json!(321));
    tasks.create(&id, &bundle, "")?;

    ensure_eq!(scores_of(&tasks)?, (-499, 321), "the scores of shim and VMM");
    tasks.shut_down(&id)
}

fn scores_in_a_pod(env: &Env) -> Result {
    let tasks = protected(env)?;
    let sandbox = tasks.shim.id.clone();
    let mut bundle = Bundle::busybox(env)?;
    bundle.annotation("io.kubernetes.cri.container-type", "sandbox").set("/process/oomScoreAdj", json!(-400));
    tasks.create(&sandbox, &bundle, "")?;
    tasks.start(&sandbox, "")?;
    ensure_eq!(scores_of(&tasks)?, (-499, -400), "the scores of an empty pod");

    let start = |score: i32| -> Result<String> {
        let mut bundle = tasks.member("sleep 1000")?;
        bundle.set("/process/oomScoreAdj", json!(score));
        let id = env.id();
        tasks.create(&id, &bundle, "")?;
        tasks.start(&id, "")?;
        Ok(id)
    };
    let other = start(900)?;
    ensure_eq!(scores_of(&tasks)?, (-499, 900), "the scores with a container");
    let protected = start(-200)?;
    ensure_eq!(scores_of(&tasks)?, (-499, -200), "the scores with one that is to stay");
    let end = |id: &str| -> Result {
        tasks.kill(id, "", KILL, false)?;
        tasks.wait(id, "")?;
        tasks.delete(id).map(drop)
    };
    end(&protected)?;
    ensure_eq!(scores_of(&tasks)?, (-499, 900), "the scores without it");
    end(&other)?;
    ensure_eq!(scores_of(&tasks)?, (-499, -400), "the scores of a pod that is empty again");
    tasks.shut_down(&sandbox)
}

/// A container's statistics are those of its guest; what its machine costs is told apart, so that nobody counts it twice.
fn statistics(env: &Env) -> Result {
    let tasks = Tasks::new(env)?;
    let id = tasks.shim.id.clone();
    let mut bundle = Bundle::busybox(env)?;
    bundle.sh("sleep 1000").set("/linux/cgroupsPath", json!(format!("/{id}")));
    tasks.create(&id, &bundle, "")?;
    tasks.start(&id, "")?;

    let stats = tasks.calls.stats(limit(), &StatsRequest { id: id.clone(), ..StatsRequest::default() })?;
    let of_container = Metrics::parse_from_bytes(&stats.stats.value)?.memory.usage;
    let request = SandboxMetricsRequest { sandbox_id: id.clone(), ..SandboxMetricsRequest::default() };
    let costs =
        SandboxClient::new(tasks.shim.connect()?).sandbox_metrics(limit(), &request)?.metrics.unwrap_or_default();
    ensure_eq!(costs.id, id, "whose costs");
    let of_machine = Metrics::parse_from_bytes(&costs.data.value)?;
    ensure!(of_container > 0 && of_container < 8 << 20, "bytes of a container that sleeps: {of_container}");
    let used = of_machine.memory.usage;
    ensure!(used > 8 << 20 && of_machine.cpu.usage_usec > 0, "what its machine costs: {of_machine:?}");
    tasks.shut_down(&id)
}
