// SPDX-License-Identifier: Apache-2.0
//! A container's network under load: many connections, much data, frames that are lost, links that fail, many starts.

use std::fs;
use std::io::{Read, Write};
use std::net::{Shutdown, TcpStream};
use std::thread;
use std::time::Duration;

use nix::sys::resource::{Resource, setrlimit};
use serde_json::json;

use super::net_device::VHOST;
use super::network::{Namespace, any_container, connect, host, scrambled};
use super::{Case, case};
use crate::bundle::Bundle;
use crate::detached::Detached;
use crate::env::Env;
use crate::failure::{Context as _, Failure, Result, ensure, ensure_eq};

pub(super) const CASES: &[Case] = &[
    case!(a_thousand_connections).limit(600),
    case!(a_thousand_connections_by_the_vmm).limit(600),
    case!(frames_that_are_lost).limit(600),
    case!(frames_that_are_lost_by_the_vmm).limit(600),
    case!(a_link_that_fails),
    case!(two_gibibytes_unchanged).slow(2400),
    case!(two_gibibytes_unchanged_by_the_vmm).slow(2400),
    case!(two_hundred_starts_leave_nothing).slow(3600),
];

/// Sends back what comes, and says when it listens.
const ECHO: &str = "nc -ll -p 4000 -e cat & echo ready; read line";

/// Numbers that are none of a block's filling.
const STAMPS: u64 = 1 << 32;

/// Sends so many blocks of 64 KiB, of which none is like another, to a server that sends back what it gets, and compares.
pub(super) fn echo(address: &str, blocks: u64) -> Result {
    let mut stream = connect(address)?;
    stream.set_read_timeout(Some(Duration::from_secs(120)))?;
    let mut sender = stream.try_clone()?;
    let filling: Vec<u8> = (0..8191).flat_map(scrambled).collect();
    let filled = filling.clone();
    let sending = thread::spawn(move || {
        for number in 0..blocks {
            sender.write_all(&scrambled(STAMPS + number))?;
            sender.write_all(&filled)?;
        }
        sender.shutdown(Shutdown::Write)
    });
    let mut block = vec![0; 8 + filling.len()];
    for number in 0..blocks {
        stream.read_exact(&mut block).context(|| {
            // Whether it waits for a retransmission, say.
            let told = host("ss -H -t -i -n -o state established").unwrap_or_default();
            format!("reading back block {number} of {blocks}, on one of the connections {told:?}")
        })?;
        let (stamp, rest) = block.split_at(8);
        ensure!(stamp == scrambled(STAMPS + number) && rest == filling, "block {number} came back changed");
    }
    ensure!(matches!(sending.join(), Ok(Ok(()))), "not everything was sent");
    ensure_eq!(stream.read(&mut block)?, 0, "bytes behind all blocks");
    Ok(())
}

/// Sends back what comes on all connections, however many there are.
const ECHO_TO_ALL: &str = r#"
import select, socket
server = socket.create_server(("", 4000), backlog=1024)
poll = select.epoll()
poll.register(server, select.EPOLLIN)
peers = {}
print("ready", flush=True)
while True:
    for number, _ in poll.poll():
        if number == server.fileno():
            peer = server.accept()[0]
            peers[peer.fileno()] = peer
            poll.register(peer, select.EPOLLIN)
            continue
        data = peers[number].recv(4096)
        if data == b"end":
            raise SystemExit(print(len(peers)))
        peers[number].sendall(data)
"#;

fn a_thousand_connections(env: &Env) -> Result {
    thousand_connections(env, true)
}

fn a_thousand_connections_by_the_vmm(env: &Env) -> Result {
    thousand_connections(env, false)
}

/// By the host's kernel, or by the VMM.
fn thousand_connections(env: &Env, vhost: bool) -> Result {
    const COUNT: u64 = 1000;
    setrlimit(Resource::RLIMIT_NOFILE, 4096, 4096)?;
    let namespace = Namespace::new(env, "many")?.with_addresses(61)?;
    let mut bundle = Bundle::debian(env)?;
    bundle.args(&["python3", "-c", ECHO_TO_ALL]).annotation(VHOST, &vhost.to_string());
    bundle.set("/process/rlimits", json!([{ "type": "RLIMIT_NOFILE", "soft": 4096, "hard": 4096 }]));
    namespace.give_to(&mut bundle);

    let mut running = env.run(&bundle)?.spawn()?;
    running.wait_for("ready\n")?;
    let mut streams = Vec::new();
    for number in 0..COUNT {
        let mut stream = connect("10.9.61.2:4000")?;
        stream.set_read_timeout(Some(Duration::from_secs(60)))?;
        stream.write_all(&scrambled(number))?;
        streams.push(stream);
    }
    let expect = |stream: &mut TcpStream, number: u64| -> Result {
        let mut got = [0; 8];
        stream.read_exact(&mut got).context(|| format!("reading from connection {number}"))?;
        ensure_eq!(got, scrambled(number), "what came back on a connection");
        Ok(())
    };
    for (number, stream) in (0..).zip(&mut streams) {
        expect(stream, number)?;
        stream.write_all(&scrambled(number + COUNT))?;
    }
    for (number, stream) in (0..).zip(&mut streams) {
        expect(stream, number + COUNT)?;
    }
    streams[0].write_all(b"end")?;

    running.finish()?.expect_stdout(&format!("ready\n{COUNT}\n"))
}

fn frames_that_are_lost(env: &Env) -> Result {
    lost_frames(env, true)
}

fn frames_that_are_lost_by_the_vmm(env: &Env) -> Result {
    lost_frames(env, false)
}

fn lost_frames(env: &Env, vhost: bool) -> Result {
    let namespace = Namespace::new(env, "lossy")?.with_addresses(62)?;
    host(&format!("tc qdisc add dev {} root netem loss 10% duplicate 2% reorder 5% delay 1ms", namespace.host_end))?;
    namespace.inside("tc qdisc add dev eth0 root netem loss 10%")?;
    let mut bundle = any_container(env, &namespace, ECHO)?;
    bundle.annotation(VHOST, &vhost.to_string());

    // Each connection waits for what is lost, longer each time.
    let mut running = env.run(&bundle)?.limit(Duration::from_secs(500)).open_stdin().spawn()?;
    running.wait_for("ready\n")?;
    echo("10.9.62.2:4000", 32)?;
    for (end, statistics) in [
        ("the host's end", host(&format!("tc -s qdisc show dev {} root", namespace.host_end))?),
        ("the namespace's", namespace.inside("tc -s qdisc show dev eth0 root")?),
    ] {
        ensure!(!statistics.contains("dropped 0,"), "no frame was lost at {end}: {statistics}");
    }
    running.write(b"\n")?;

    running.finish()?.expect_stdout("ready\n")
}

/// A connection outlives an interface that is down for a while, on either side of the veth pair.
fn a_link_that_fails(env: &Env) -> Result {
    let namespace = Namespace::new(env, "flap")?.with_addresses(63)?;
    let bundle = any_container(env, &namespace, ECHO)?;

    let mut running = env.run(&bundle)?.open_stdin().spawn()?;
    running.wait_for("ready\n")?;
    let mut stream = connect("10.9.63.2:4000")?;
    stream.set_read_timeout(Some(Duration::from_secs(120)))?;
    let mut exchange = |number: u64| -> Result {
        stream.write_all(&scrambled(number))?;
        let mut got = [0; 8];
        stream.read_exact(&mut got).context(|| format!("reading back number {number}"))?;
        ensure_eq!(got, scrambled(number), "what came back");
        Ok(())
    };
    exchange(0)?;
    host(&format!("ip link set {} down", namespace.host_end))?;
    host(&format!("ip link set {} up", namespace.host_end))?;
    exchange(1)?;
    namespace.inside("ip link set eth0 down")?;
    namespace.inside("ip link set eth0 up")?;
    exchange(2)?;
    running.write(b"\n")?;

    running.finish()?.expect_stdout("ready\n")
}

fn two_gibibytes_unchanged(env: &Env) -> Result {
    two_gibibytes(env, true)
}

fn two_gibibytes_unchanged_by_the_vmm(env: &Env) -> Result {
    two_gibibytes(env, false)
}

fn two_gibibytes(env: &Env, vhost: bool) -> Result {
    let namespace = Namespace::new(env, "gib")?.with_addresses(64)?;
    let mut bundle = any_container(env, &namespace, ECHO)?;
    bundle.annotation(VHOST, &vhost.to_string());

    let mut running = env.run(&bundle)?.limit(Duration::from_secs(2300)).open_stdin().spawn()?;
    running.wait_for("ready\n")?;
    echo("10.9.64.2:4000", (2 << 30) / (64 << 10))?;
    running.write(b"\n")?;

    running.finish()?.expect_stdout("ready\n")
}

/// How many network namespaces there may be at once while the case runs: those that are left keep later ones from being made.
const NAMESPACES: &str = "40";
const MOST_NAMESPACES: &str = "/proc/sys/user/max_net_namespaces";

/// Forgives what an emulated processor does to a guest.
fn forgiving(env: &Env, result: Result) -> Result {
    match result {
        Err(Failure::Failed(text)) if env.forgives(&text) => Ok(()),
        result => result,
    }
}

fn two_hundred_starts_leave_nothing(env: &Env) -> Result {
    let namespace = Namespace::new(env, "often")?.with_addresses(65)?;
    let before = namespace.leftovers()?;
    let joined = any_container(env, &namespace, "ping -c 1 -w 20 10.9.65.1 >/dev/null && echo reached")?;
    let mut alone = Bundle::busybox(env)?;
    alone.sh("ls /sys/class/net");
    let most = fs::read_to_string(MOST_NAMESPACES)?;
    fs::write(MOST_NAMESPACES, NAMESPACES)?;
    let rounds = (0..100).try_for_each(|_| {
        forgiving(env, env.run(&joined)?.output()?.expect_stdout("reached\n"))?;
        // One for whom a namespace is made.
        let made = Detached::create(env, &alone).and_then(|container| {
            container.must(&["start"])?;
            let (status, output) = (container.wait()?, container.output()?);
            ensure!(status == 0 && output == "lo\n", "the status is {status}, and the output {output:?}");
            Ok(())
        });
        forgiving(env, made)
    });
    fs::write(MOST_NAMESPACES, most)?;
    rounds?;
    ensure_eq!(namespace.leftovers()?, before, "what is in the namespace");
    Ok(())
}
