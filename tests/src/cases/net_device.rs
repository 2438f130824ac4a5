// SPDX-License-Identifier: Apache-2.0
//! The network device itself: its queues, what the guest sets by them, and who moves its frames.

use std::fs;
use std::io::{Read, Write};
use std::net::Shutdown;
use std::path::PathBuf;
use std::thread;
use std::time::{Duration, Instant};

use super::network::{Namespace, connect, container, host, scrambled};
use super::{Case, case};
use crate::bundle::Bundle;
use crate::env::Env;
use crate::failure::{Context as _, Result, ensure, ensure_eq};

pub(super) const CASES: &[Case] =
    &[case!(by_the_hosts_kernel_or_the_vmm), case!(address_and_filters_of_the_guest), case!(settings_that_are_none)];

/// The annotation that says whether the host's kernel moves the frames.
pub(super) const VHOST: &str = "io.bulkhead.net.vhost";

/// The threads of the host's kernel that serve a process' network devices: each is named after the thread that asked for it,
/// and is a process, or from Linux 6.4 on a thread, of its own.
pub(super) fn vhost_threads(vmm: i32) -> Result<Vec<PathBuf>> {
    let mut places: Vec<PathBuf> = Vec::new();
    let mut names = Vec::new();
    for task in fs::read_dir(format!("/proc/{vmm}/task"))? {
        let task = task?;
        names.push(format!("vhost-{}", task.file_name().to_string_lossy()));
        places.push(task.path());
    }
    for process in fs::read_dir("/proc")? {
        places.push(process?.path());
    }
    places.retain(|place| {
        // What ends meanwhile is not looked for.
        let comm = fs::read_to_string(place.join("comm")).unwrap_or_default();
        names.iter().any(|name| *name == comm.trim_end())
    });
    Ok(places)
}

/// Waits until these threads have ended: with the machine, which is not waited for.
fn gone(threads: &[PathBuf]) -> Result {
    let end = Instant::now() + Duration::from_secs(20);
    while threads.iter().any(|thread| thread.exists()) {
        ensure!(Instant::now() < end, "threads of vhost-net are left: {threads:?}");
        thread::sleep(Duration::from_millis(50));
    }
    Ok(())
}

/// Sends bytes to the guest's echo server and compares what comes back.
fn echo(address: &str, len: u64) -> Result {
    let mut stream = connect(address)?;
    stream.set_read_timeout(Some(Duration::from_secs(60)))?;
    let mut sender = stream.try_clone()?;
    let sent: Vec<u8> = (0..len / 8).flat_map(scrambled).collect();
    let expected = sent.clone();
    let sending = thread::spawn(move || sender.write_all(&sent).and_then(|()| sender.shutdown(Shutdown::Write)));
    let mut got = Vec::new();
    stream.read_to_end(&mut got).context(|| format!("reading back from {address}"))?;
    ensure!(got == expected, "{} bytes came back, not the {len} that were sent", got.len());
    ensure!(matches!(sending.join(), Ok(Ok(()))), "not everything was sent");
    Ok(())
}

const ECHO: &str = "nc -ll -p 4000 -e cat & echo ready; read line";

fn by_the_hosts_kernel_or_the_vmm(env: &Env) -> Result {
    let namespace = Namespace::new(env, "vhost")?.with_addresses(20)?;
    let before = namespace.leftovers()?;
    for (setting, backend, vhosts) in [(None, "vhost-net", 1), (Some("false"), "tap", 0)] {
        let mut bundle = container(env, &namespace, ECHO)?;
        if let Some(setting) = setting {
            bundle.annotation(VHOST, setting);
        }
        let id = env.id();
        let mut running = env.run_as(&bundle, &id)?.open_stdin().spawn()?;
        running.wait_for("ready\n")?;

        let vmm = running.wait_for_vmm()?;
        let serving = vhost_threads(vmm)?;
        ensure_eq!(serving.len(), vhosts, "threads of vhost-net");
        let state = env.call(["state", &id]).output()?;
        state.expect_in_stdout(&[&format!("\"io.bulkhead.net.backend\": \"{backend}\"")])?;
        echo("10.9.20.2:4000", 8 << 20)?;

        running.write(b"\n")?;
        running.finish()?.expect_stdout("ready\n")?;
        gone(&serving)?;
    }
    ensure_eq!(namespace.leftovers()?, before, "what is in the namespace");
    Ok(())
}

fn address_and_filters_of_the_guest(env: &Env) -> Result {
    let namespace = Namespace::new(env, "filter")?.with_addresses(22)?;
    let own = "02:00:00:00:22:02";
    // Nobody has this address: what goes there reaches the guest only if it wants everything.
    host(&format!("ip neigh replace 10.9.22.77 lladdr 02:00:00:00:22:77 nud permanent dev {}", namespace.host_end))?;
    let bundle = container(
        env,
        &namespace,
        &format!(
            "count() {{ cat /sys/class/net/eth0/statistics/rx_packets; }}; ip link set eth0 down; \
             ip link set eth0 address {own}; ip link set eth0 up; cat /sys/class/net/eth0/address; \
             ping -c 1 -w 9 10.9.22.1 >/dev/null && echo answer; \
             before=$(count); echo quiet; read line; \
             ping -c 1 -w 9 10.9.22.1 >/dev/null; echo $(($(count) - before < 20)); \
             ip link set eth0 promisc on; before=$(count); echo promiscuous; read line; \
             ping -c 1 -w 9 10.9.22.1 >/dev/null; echo $(($(count) - before >= 20))"
        ),
    )?;

    let mut running = env.run(&bundle)?.open_stdin().spawn()?;
    for marker in ["quiet\n", "promiscuous\n"] {
        running.wait_for(marker)?;
        flood("10.9.22.77:9", 40)?;
        running.write(b"\n")?;
    }
    let output = running.finish()?;

    output.expect_stdout(&format!("{own}\nanswer\nquiet\n1\npromiscuous\n1\n"))?;
    let neighbour = host(&format!("ip neigh show 10.9.22.2 dev {}", namespace.host_end))?;
    ensure!(neighbour.contains(own), "the host knows the guest as {neighbour}");
    Ok(())
}

/// Sends datagrams.
fn flood(address: &str, count: usize) -> Result {
    let socket = std::net::UdpSocket::bind("0.0.0.0:0")?;
    for _ in 0..count {
        socket.send_to(&[0; 64], address)?;
    }
    Ok(())
}

fn settings_that_are_none(env: &Env) -> Result {
    env.only_bulkhead()?;
    let mut bundle = Bundle::busybox(env)?;
    for (name, value) in [(VHOST, "maybe"), ("io.bulkhead.net.backend", "tap")] {
        bundle.annotation(name, value);
        env.run(&bundle)?.output()?.expect_error(&[name])?;
    }
    Ok(())
}
