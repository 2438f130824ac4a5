// SPDX-License-Identifier: Apache-2.0
//! The size of a container's machine: what its configuration allows is what it can use.

use serde_json::json;

use super::{Case, case};
use crate::bundle::Bundle;
use crate::detached::Detached;
use crate::env::Env;
use crate::failure::{Result, ensure};

pub(super) const CASES: &[Case] = &[case!(memory_that_is_allowed_is_there), case!(processors_follow_the_annotation)];

const MIB: u64 = 1 << 20;

/// The kernel and the agent have their own beside it.
fn memory_that_is_allowed_is_there(env: &Env) -> Result {
    env.only_bulkhead()?; // Others show the host's memory.
    let mut bundle = Bundle::busybox(env)?;
    bundle.set("/linux/resources", json!({ "memory": { "limit": 200 * MIB } }));
    bundle.sh("cat /sys/fs/cgroup/memory.max; sed -n 's/MemTotal: *\\(.*\\) kB/\\1/p' /proc/meminfo");

    let output = env.run(&bundle)?.output()?;

    output.expect_code(0)?;
    let text = output.stdout();
    let numbers: Vec<u64> = text.lines().filter_map(|line| line.parse().ok()).collect();
    ensure!(numbers.len() == 2 && numbers[0] == 200 * MIB, "{text:?}");
    let total_mib = numbers[1] / 1024;
    ensure!((210..=296).contains(&total_mib), "the guest has {total_mib} MiB");
    Ok(())
}

fn processors_follow_the_annotation(env: &Env) -> Result {
    env.only_bulkhead()?;
    let mut bundle = Bundle::busybox(env)?;
    bundle.annotation("io.bulkhead.vcpus", "2").sh("nproc; echo started; sleep 1000");
    let container = Detached::run(env, &bundle)?;
    container.wait_for("2\nstarted\n")?;

    let process = |affinity: serde_json::Value| {
        let process = json!({
            "args": ["sh", "-c", "grep Cpus_allowed_list /proc/self/status"], "cwd": "/", "user": { "uid": 0, "gid": 0 },
            "env": ["PATH=/bin"], "execCPUAffinity": affinity,
        });
        container.verb_with(&["exec", "--process", "/dev/stdin"], &[]).input(process.to_string()).output()
    };
    process(json!({}))?.expect_stdout("Cpus_allowed_list:\t0-1\n")?;
    process(json!({ "initial": "0", "final": "1" }))?.expect_stdout("Cpus_allowed_list:\t1\n")?;
    process(json!({ "initial": "0" }))?.expect_stdout("Cpus_allowed_list:\t0\n")?;
    process(json!({ "final": "7" }))?.expect_error_line(&["CPUs 7"])
}
