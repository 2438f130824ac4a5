// SPDX-License-Identifier: Apache-2.0
//! Limits in the sandbox's cgroup on the host that few configurations have: idle time, bursts, memory that is kept, weights of
//! block devices.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::json;

use super::engine::unified;
use super::{Case, case};
use crate::bundle::Bundle;
use crate::detached::Detached;
use crate::env::{Env, Kind};
use crate::failure::{Context as _, Result, ensure_eq, skip};

pub(super) const CASES: &[Case] = &[case!(processors_and_memory), case!(weights_of_block_devices)];

/// A container that waits, in a cgroup of the host's.
fn waiting(env: &Env) -> Result<(Bundle, PathBuf)> {
    let (root, place) = (unified()?, env.id());
    let mut bundle = Bundle::busybox(env)?;
    bundle.args(&["sleep", "1000"]).set("/linux/cgroupsPath", json!(format!("/{place}")));
    Ok((bundle, root.join(place)))
}

fn processors_and_memory(env: &Env) -> Result {
    env.only_bulkhead()?; // An older runc does not know some of them.
    let (mut bundle, cgroup) = waiting(env)?;
    let cpu = json!({ "quota": 50_000, "period": 100_000, "burst": 10_000 });
    let memory = json!({ "limit": 64 << 20, "reservation": 32 << 20 });
    bundle.set("/linux/resources", json!({ "cpu": cpu, "memory": memory }));
    let container = Detached::run(env, &bundle)?;
    let files = ["cpu.max", "cpu.max.burst", "cpu.idle", "memory.low"];
    let seen = || -> Result<Vec<String>> {
        let read = |file: &str| fs::read_to_string(cgroup.join(file)).context(|| format!("reading {file}"));
        files.iter().map(|file| Ok(read(file)?.trim_end().to_owned())).collect()
    };
    ensure_eq!(seen()?, ["50000 100000", "10000", "0", "33554432"], "{files:?}");

    container.must(&["update", "--cpu-burst", "20000", "--memory-reservation", "16m"])?;
    ensure_eq!(seen()?, ["50000 100000", "20000", "0", "16777216"], "{files:?} with another burst and reservation");
    container.must(&["update", "--cpu-idle", "1"])?;
    ensure_eq!(seen()?[2], "1", "cpu.idle");
    let resources = json!({ "cpu": { "idle": 0, "shares": 512 } }).to_string();
    container.verb(&["update", "--resources", "-"]).input(resources).output()?.expect_code(0)?;
    ensure_eq!(seen()?[2], "0", "cpu.idle of what is idle no more");
    ensure_eq!(fs::read_to_string(cgroup.join("cpu.weight"))?, "20\n", "cpu.weight then");
    Ok(())
}

/// A block device of the host under the scheduler that has weights; it gets its own back.
struct Scheduled {
    file: PathBuf,
    before: String,
    numbers: String,
}

impl Scheduled {
    /// A loop device that is no file's.
    fn new() -> Result<Self> {
        for module in ["loop", "bfq"] {
            // What the kernel has built in is no module.
            let _ = Command::new("modprobe").arg(module).output();
        }
        let mut devices = fs::read_dir("/sys/block")?.flatten().map(|entry| entry.path());
        let is_free = |device: &PathBuf| {
            device.file_name().is_some_and(|name| name.as_encoded_bytes().starts_with(b"loop"))
                && !device.join("loop").exists()
        };
        let Some(device) = devices.find(is_free) else { skip!("this host has no free loop device") };
        let file = device.join("queue/scheduler");
        // `none [bfq] mq-deadline`.
        let schedulers = fs::read_to_string(&file)?;
        let before = schedulers.split(['[', ']']).nth(1).unwrap_or_default().to_owned();
        let numbers = fs::read_to_string(device.join("dev"))?.trim_end().to_owned();
        if !schedulers.split(|letter: char| letter.is_whitespace() || "[]".contains(letter)).any(|name| name == "bfq") {
            skip!("this host has no scheduler with weights (bfq)");
        }
        fs::write(&file, "bfq")?;
        Ok(Self { file, before, numbers })
    }

    fn device(&self) -> Result<(u64, u64)> {
        let (major, minor) = self.numbers.split_once(':').unwrap_or_default();
        Ok((major.parse()?, minor.parse()?))
    }
}

impl Drop for Scheduled {
    fn drop(&mut self) {
        let _ = fs::write(&self.file, &self.before);
    }
}

fn weights_of_block_devices(env: &Env) -> Result {
    let (mut bundle, cgroup) = waiting(env)?;
    let scheduled = Scheduled::new()?;
    let (major, minor) = scheduled.device()?;
    let of_device = json!([{ "major": major, "minor": minor, "weight": 200 }]);
    bundle.set("/linux/resources", json!({ "blockIO": { "weight": 300, "weightDevice": of_device } }));
    let seen =
        |cgroup: &Path| fs::read_to_string(cgroup.join("io.bfq.weight")).context(|| "reading io.bfq.weight".to_owned());

    let container = Detached::run(env, &bundle)?;

    ensure_eq!(seen(&cgroup)?, format!("default 300\n{} 200\n", scheduled.numbers), "the weights");
    if env.kind == Kind::Bulkhead {
        // The scheduler takes a weight for all devices for that of each, too, and others update nothing else.
        let of_device = json!([{ "major": major, "minor": minor, "weight": 100 }]);
        let resources = json!({ "blockIO": { "weight": 150, "weightDevice": of_device } }).to_string();
        container.verb(&["update", "--resources", "-"]).input(resources).output()?.expect_code(0)?;
        ensure_eq!(seen(&cgroup)?, format!("default 150\n{} 100\n", scheduled.numbers), "the weights after an update");
    }
    Ok(())
}
