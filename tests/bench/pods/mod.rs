// SPDX-License-Identifier: Apache-2.0
//! Pods under containerd beside each other: what each step of a pod's life takes, and what a pod holds in memory.
//!
//! One containerd has two runtimes, Bulkhead and runc, which take turns, so that whatever changes on the machine concerns
//! both. One pod is there at a time. This is a part of `bulkhead-e2e`, which has the engines.

mod memory;
#[allow(dead_code, reason = "durations are summed up by the benchmark of starts")]
#[path = "../stats.rs"]
mod stats;
mod table;

use std::fs;
use std::thread;
use std::time::{Duration, Instant};

use crate::engines::{Kubelet, RUNTIMES};
use crate::env::Env;
use crate::failure::{Context as _, Result};
use crate::options::PodBench;
use memory::PodMemory;
use table::RuntimeResult;

/// How long a container may be at rest before its memory is looked at, and the host after a pod's end.
const SETTLE: Duration = Duration::from_secs(1);

/// What one pod was measured to take.
#[derive(Clone, Copy, Debug)]
struct Sample {
    /// `RunPodSandbox`.
    sandbox: Duration,
    /// From the call of `CreateContainer` to the answer of `StartContainer`.
    container: Duration,
    /// `StopPodSandbox`, which kills the container, and `RemovePodSandbox`.
    removal: Duration,
    memory: PodMemory,
}

/// Measures one pod of each runtime for nothing, then one of each a round, and prints the table.
pub(crate) fn run(env: &Env, bench: &PodBench) -> Result {
    env.only_bulkhead()?;
    let kubelet = Kubelet::new(env)?;
    let mut results = RUNTIMES.map(RuntimeResult::new);
    for round in 0..=bench.rounds {
        for result in &mut results {
            eprintln!("bench: round {round} of {}: {}", bench.rounds, result.name);
            let sample = measure(&kubelet, result.name)?;
            if round > 0 {
                result.add(&sample);
            }
        }
    }
    kubelet.end()?;
    print!("{}", table::table(&bench.machine, &results, bench.rounds));
    match &bench.json {
        Some(path) => fs::write(path, format!("{:#}\n", table::json(&bench.machine, &results)))
            .context(|| format!("writing {}", path.display())),
        None => Ok(()),
    }
}

/// A pod with one container that sleeps, from its begin to its end.
fn measure(kubelet: &Kubelet<'_>, runtime: &str) -> Result<Sample> {
    let config = kubelet.pod_config(runtime)?;
    let (sandbox, pod) = timed(|| kubelet.run_by(runtime, config))?;
    let (container, _) = timed(|| pod.script("sleeps", "exec sleep 1000000"))?;
    thread::sleep(SETTLE);
    let memory = memory::of_pod()?;
    let (removal, ()) = timed(|| pod.remove())?;
    thread::sleep(SETTLE);
    Ok(Sample { sandbox, container, removal, memory })
}

fn timed<T>(action: impl FnOnce() -> Result<T>) -> Result<(Duration, T)> {
    let begin = Instant::now();
    let done = action()?;
    Ok((begin.elapsed(), done))
}
