// SPDX-License-Identifier: Apache-2.0
//! Pods as CRI-O describes them, by calls that are made here: it has namespaces of its own making for each pod, and tells the pod's
//! size in JSON.

use std::fs;

use containerd_shim_protos::sandbox_api::SandboxMetricsRequest;
use containerd_shim_protos::sandbox_sync::SandboxClient;
use serde_json::json;

use super::task::{KILL, Tasks, creation, limit, wait_for_line};
use super::{Case, case};
use crate::bundle::Bundle;
use crate::env::Env;
use crate::failure::{Result, ensure, ensure_eq};

pub(super) const CASES: &[Case] = &[case!(pod)];

/// Prints the machine's memory in MiB, and the host's name.
const SCRIPT: &str = "\
    while read name size unit; do test $name != MemTotal: || echo $((size / 1024)); done < /proc/meminfo; hostname; sleep 1000";

fn pod(env: &Env) -> Result {
    let tasks = Tasks::new(env)?;
    let sandbox = tasks.shim.id.clone();
    let pin = |kind: &str| -> Result<String> {
        let path = env.folder(&format!("{kind}ns"))?.join("7e57");
        fs::write(&path, "")?;
        Ok(path.display().to_string())
    };
    let (ipc, uts) = (pin("ipc")?, pin("uts")?);
    let own = json!([{ "type": "pid" }, { "type": "mount" }, { "type": "network" },
        { "type": "ipc", "path": ipc }, { "type": "uts", "path": uts }]);
    let mut bundle = Bundle::busybox(env)?;
    bundle.set("/linux/namespaces", own).set("/hostname", json!("of-the-pod")).set(
        "/annotations",
        json!({
            "io.kubernetes.cri-o.ContainerType": "sandbox",
            "io.kubernetes.cri-o.SandboxID": sandbox,
            "io.kubernetes.cri-o.PodLinuxResources":
                r#"{"cpu_period":100000,"cpu_quota":50000,"memory_limit_in_bytes":134217728}"#,
            "io.kubernetes.cri-o.PodLinuxOverhead": r#"{"memory_limit_in_bytes":276824064}"#,
        }),
    );
    tasks.create(&sandbox, &bundle, "")?;
    tasks.start(&sandbox, "")?;
    let member = |ipc: &str| -> Result<Bundle> {
        let of_pod = json!([{ "type": "pid" }, { "type": "mount" },
            { "type": "ipc", "path": ipc }, { "type": "uts", "path": uts }]);
        let names =
            json!({ "io.kubernetes.cri-o.ContainerType": "container", "io.kubernetes.cri-o.SandboxID": sandbox });
        let mut bundle = Bundle::busybox(env)?;
        bundle
            .sh(SCRIPT)
            .set("/annotations", names)
            .set("/linux/namespaces", of_pod)
            .set("/hostname", json!(""))
            .write()?;
        Ok(bundle)
    };

    let (id, output) = (env.id(), env.work.join("output"));
    tasks.create(&id, &member(&ipc)?, &format!("file://{}", output.display()))?;
    tasks.start(&id, "")?;
    wait_for_line(&output, "of-the-pod")?;
    // 128 for the containers, and of the overhead of 264 what the host does not need: 200. The kernel has some to itself.
    let printed = fs::read_to_string(&output)?;
    let memory = printed.lines().next().unwrap_or_default();
    ensure!((288..=328).contains(&memory.parse::<u64>()?), "MiB of the machine: {memory}");
    let foreign = tasks.calls.create(limit(), &creation(&env.id(), &member("/proc/1/ns/ipc")?, ""));
    ensure!(format!("{foreign:?}").contains("linux.namespaces[2].path"), "another namespace: {foreign:?}");

    // What the machine costs the host is the pod's.
    let costs = SandboxClient::new(tasks.shim.connect()?);
    let request = SandboxMetricsRequest { sandbox_id: id.clone(), ..SandboxMetricsRequest::default() };
    let of_one = costs.sandbox_metrics(limit(), &request).map(drop);
    ensure!(format!("{of_one:?}").contains("the machine is the pod's"), "what one container costs: {of_one:?}");
    tasks.kill(&id, "", KILL, false)?;
    ensure_eq!(tasks.wait(&id, "")?.exit_status, 137, "the exit status");
    tasks.delete(&id)?;
    tasks.shut_down(&sandbox)
}
