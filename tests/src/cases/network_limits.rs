// SPDX-License-Identifier: Apache-2.0
//! Limits on what a container may receive and send. That traffic is limited shows only in the time that it takes.

use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener};
use std::time::{Duration, Instant};

use serde_json::json;

use super::network::{Namespace, connect, container};
use super::{Case, case};
use crate::env::Env;
use crate::failure::{Result, ensure, ensure_eq};

pub(super) const CASES: &[Case] = &[case!(received_and_sent_bytes), case!(received_and_sent_packets)];

/// What is sent each way, and how much of it may go each second: four seconds' worth.
const LEN: usize = 400_000;
const RATE: usize = 100_000;

/// How often a byte goes there and back, and how many packets may go each second.
const ROUNDS: u8 = 40;
const PACKETS: u8 = 10;

/// The least that it takes under the limit. There is a burst at its begin, and clocks differ.
const LEAST: Duration = Duration::from_secs(3);

/// Runs a container with these annotations; tells how long it took to receive, and to send.
fn exchange(env: &Env, namespace: &Namespace, annotations: &serde_json::Value) -> Result<[Duration; 2]> {
    let listener = TcpListener::bind("10.9.77.1:4001")?;
    let script =
        format!("nc -l -p 4000 | wc -c & echo ready; wait; read line; head -c {LEN} /dev/zero | nc 10.9.77.1 4001");
    let mut bundle = container(env, namespace, &script)?;
    bundle.set("/annotations", annotations.clone());
    let mut running = env.run(&bundle)?.open_stdin().spawn()?;
    running.wait_for("ready\n")?;

    let mut stream = connect("10.9.77.2:4000")?;
    let begin = Instant::now();
    stream.write_all(&vec![7; LEN])?;
    stream.shutdown(Shutdown::Write)?;
    running.wait_for(&format!("{LEN}\n"))?;
    let received = begin.elapsed();
    running.write(b"\n")?;
    let (mut stream, _) = listener.accept()?;
    let begin = Instant::now();
    let mut bytes = Vec::new();
    stream.read_to_end(&mut bytes)?;
    let sent = begin.elapsed();
    ensure_eq!(bytes.len(), LEN, "bytes that the container sent");
    drop(stream);
    running.finish()?.expect_code(0)?;
    Ok([received, sent])
}

fn received_and_sent_bytes(env: &Env) -> Result {
    let namespace = Namespace::new(env, "rate")?.with_addresses(77)?;
    let rate = RATE.to_string();
    let limited = exchange(
        env,
        &namespace,
        &json!({ "io.bulkhead.net.rx_bytes_per_second": rate, "io.bulkhead.net.tx_bytes_per_second": rate }),
    )?;
    let free = exchange(env, &namespace, &json!({ "io.bulkhead.net.vhost": "false" }))?;

    for (way, (limited, free)) in ["receive", "send"].into_iter().zip(limited.into_iter().zip(free)) {
        ensure!(limited >= LEAST, "to {way} {LEN} bytes took {limited:?} under the limit");
        ensure!(free < limited, "to {way} {LEN} bytes took {limited:?} under the limit, and {free:?} without");
    }
    Ok(())
}

/// Runs a container with these annotations that sends back each byte; tells how long it took to get all of them, one after the other.
fn rounds(env: &Env, namespace: &Namespace, annotations: &serde_json::Value) -> Result<Duration> {
    let mut bundle = container(env, namespace, "nc -l -p 4000 -e cat & echo ready; wait")?;
    bundle.set("/annotations", annotations.clone());
    let mut running = env.run(&bundle)?.spawn()?;
    running.wait_for("ready\n")?;
    let mut stream = connect("10.9.77.2:4000")?;
    let begin = Instant::now();
    for number in 0..ROUNDS {
        stream.write_all(&[number])?;
        let mut back = [0];
        stream.read_exact(&mut back)?;
        ensure_eq!(back, [number], "the byte that came back");
    }
    let took = begin.elapsed();
    drop(stream);
    running.finish()?.expect_code(0)?;
    Ok(took)
}

fn received_and_sent_packets(env: &Env) -> Result {
    let namespace = Namespace::new(env, "rate")?.with_addresses(77)?;
    let free = rounds(env, &namespace, &json!({ "io.bulkhead.net.vhost": "false" }))?;
    for way in ["rx", "tx"] {
        let name = format!("io.bulkhead.net.{way}_packets_per_second");
        let limited = rounds(env, &namespace, &json!({ name: PACKETS.to_string() }))?;
        ensure!(limited >= LEAST, "{ROUNDS} packets under the limit for {way} took {limited:?}");
        ensure!(free < limited, "{ROUNDS} packets took {limited:?} under the limit for {way}, and {free:?} without");
    }
    Ok(())
}
