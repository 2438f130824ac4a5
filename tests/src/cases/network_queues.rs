// SPDX-License-Identifier: Apache-2.0
//! A network device's pairs of queues: that there is one for each vCPU, and that all of them are used.

use std::fs;
use std::io::{Read, Write};
use std::path::PathBuf;
use std::thread;
use std::time::Duration;

use serde_json::json;

use super::net_device::{VHOST, vhost_threads};
use super::network::{Namespace, any_container, connect, scrambled};
use super::network_load::echo;
use super::{Case, case};
use crate::env::Env;
use crate::failure::{Context as _, Result, ensure, ensure_eq, fail};

pub(super) const CASES: &[Case] = &[case!(each_vcpu_has_a_pair)];

/// The threads that move the frames of a container's pairs of queues: of the host's kernel, or of the VMM.
fn movers(vmm: i32, vhost: bool) -> Result<Vec<PathBuf>> {
    if vhost {
        return vhost_threads(vmm);
    }
    let mut threads = Vec::new();
    for task in fs::read_dir(format!("/proc/{vmm}/task"))? {
        let place = task?.path();
        if fs::read_to_string(place.join("comm"))?.starts_with("net-") {
            threads.push(place);
        }
    }
    Ok(threads)
}

/// How often each of the threads has waited.
fn waits(threads: &[PathBuf]) -> Result<Vec<u64>> {
    let of_one = |thread: &PathBuf| -> Result<u64> {
        let status = fs::read_to_string(thread.join("status"))?;
        let count = status.lines().find_map(|line| line.strip_prefix("voluntary_ctxt_switches:"));
        match count.and_then(|count| count.trim().parse().ok()) {
            Some(count) => Ok(count),
            None => fail!("{} does not say how often it has waited", thread.display()),
        }
    };
    threads.iter().map(of_one).collect()
}

/// Sends so many numbers to a server that sends back what it gets, each when the one before is back.
fn back_and_forth(address: &str, count: u64) -> Result {
    let mut stream = connect(address)?;
    stream.set_read_timeout(Some(Duration::from_secs(60)))?;
    for number in 0..count {
        stream.write_all(&scrambled(number))?;
        let mut got = [0; 8];
        stream.read_exact(&mut got).context(|| format!("reading back number {number} from {address}"))?;
        ensure_eq!(got, scrambled(number), "what came back from {address}");
    }
    Ok(())
}

/// What a vCPU sends goes by its own pair, and the answers come by it.
fn each_vcpu_has_a_pair(env: &Env) -> Result {
    const COUNT: u64 = 100;
    env.only_bulkhead()?;
    let namespace = Namespace::new(env, "queues")?.with_addresses(60)?;
    let before = namespace.leftovers()?;
    for (vhost, vcpus) in [(true, 2_u16), (false, 3)] {
        let ports = 4000..4000 + vcpus;
        let servers = (0..vcpus).zip(ports.clone());
        let servers = servers.map(|(vcpu, port)| format!("taskset {:x} nc -ll -p {port} -e cat & ", 1 << vcpu));
        let servers = servers.collect::<String>();
        let script = format!("cd /sys/class/net/eth0/queues; echo rx-* tx-*; {servers} echo ready; read line");
        let mut bundle = any_container(env, &namespace, &script)?;
        bundle.set("/annotations", json!({ "io.bulkhead.vcpus": vcpus.to_string(), VHOST: vhost.to_string() }));

        let mut running = env.run(&bundle)?.open_stdin().spawn()?;
        running.wait_for("ready\n")?;
        let movers = movers(running.wait_for_vmm()?, vhost)?;
        ensure_eq!(movers.len(), usize::from(vcpus), "threads that move frames");
        let mut busiest = Vec::new();
        for port in ports.clone() {
            let begin = waits(&movers)?;
            back_and_forth(&format!("10.9.60.2:{port}"), COUNT)?;
            let waited: Vec<_> = waits(&movers)?.iter().zip(&begin).map(|(end, begin)| end - begin).collect();
            let most = waited.iter().max().copied().unwrap_or_default();
            ensure!(most >= COUNT / 2, "by no queue went what was exchanged on port {port}: {waited:?}");
            busiest.push(waited.iter().position(|waited| *waited == most));
        }
        busiest.sort_unstable();
        busiest.dedup();
        ensure_eq!(busiest.len(), usize::from(vcpus), "pairs of queues that are used (vhost-net: {vhost})");
        thread::scope(|scope| {
            let echos: Vec<_> = ports.map(|port| scope.spawn(move || echo(&format!("10.9.60.2:{port}"), 8))).collect();
            echos.into_iter().try_for_each(|echo| match echo.join() {
                Ok(result) => result,
                Err(_) => fail!("a thread that sends and compares failed"),
            })
        })?;
        running.write(b"\n")?;

        let names = |direction: &str| (0..vcpus).map(|number| format!("{direction}-{number} ")).collect::<String>();
        let queues = names("rx") + names("tx").trim_end();
        running.finish()?.expect_stdout(&format!("{queues}\nready\n"))?;
    }
    ensure_eq!(namespace.leftovers()?, before, "what is in the namespace");
    Ok(())
}
