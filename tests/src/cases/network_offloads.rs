// SPDX-License-Identifier: Apache-2.0
//! What is left to the receiver of a frame: its checksum, and its segmentation. Seen in what the driver has accepted, and in how
//! long the frames are at the tap.

use std::io::{Read, Write};
use std::net::Shutdown;
use std::time::Duration;

use serde_json::Value;

use super::net_device::VHOST;
use super::network::{Namespace, connect, container};
use super::{Case, case};
use crate::env::Env;
use crate::failure::{Context as _, Result, ensure, ensure_eq, fail};

pub(super) const CASES: &[Case] = &[case!(by_the_hosts_kernel), case!(by_the_vmm)];

/// Features of the device and of its queues (virtio 1.2, sections 5.1.3 and 6) that the driver is to accept, by their bits.
const FEATURES: [(usize, &str); 13] = [
    (0, "CSUM"),
    (1, "GUEST_CSUM"),
    (7, "GUEST_TSO4"),
    (8, "GUEST_TSO6"),
    (11, "HOST_TSO4"),
    (12, "HOST_TSO6"),
    (15, "MRG_RXBUF"),
    (16, "STATUS"),
    (17, "CTRL_VQ"),
    (18, "CTRL_RX"),
    (23, "CTRL_MAC_ADDR"),
    (28, "INDIRECT_DESC"),
    (29, "EVENT_IDX"),
];

/// What is sent each way.
const LEN: usize = 4 << 20;

/// The longest frame that goes over the wire: the MTU, and a header of Ethernet.
const LONGEST: u64 = 1500 + 14;

/// Frames and their bytes.
#[derive(Debug, Clone, Copy)]
struct Count {
    bytes: u64,
    frames: u64,
}

impl Count {
    /// What has gone through the one tap of a namespace: to the container, and from it.
    fn of(namespace: &Namespace) -> Result<[Self; 2]> {
        let links: Value = serde_json::from_str(&namespace.inside("ip -j -s link show")?)?;
        let is_tap = |link: &&Value| link["ifname"].as_str().is_some_and(|name| name.starts_with("bh-"));
        let Some(tap) = links.as_array().into_iter().flatten().find(is_tap) else { fail!("no tap in {links}") };
        let number = |way: &str, what: &str| match tap["stats64"][way][what].as_u64() {
            Some(number) => Ok(number),
            None => fail!("no {way} {what} in {tap}"),
        };
        let count =
            |way: &str| -> Result<Self> { Ok(Self { bytes: number(way, "bytes")?, frames: number(way, "packets")? }) };
        Ok([count("tx")?, count("rx")?])
    }

    /// The mean length of what has come since.
    fn mean_since(self, begin: Self) -> u64 {
        (self.bytes - begin.bytes) / (self.frames - begin.frames).max(1)
    }
}

fn by_the_hosts_kernel(env: &Env) -> Result {
    left_to_the_receiver(env, true)
}

fn by_the_vmm(env: &Env) -> Result {
    left_to_the_receiver(env, false)
}

fn left_to_the_receiver(env: &Env, vhost: bool) -> Result {
    let namespace = Namespace::new(env, "offload")?.with_addresses(66)?;
    let script = format!(
        "cat /sys/class/net/eth0/device/features; nc -ll -p 4000 -e wc -c & \
         nc -ll -p 4001 -e dd if=/dev/zero bs=64k count={} 2>/dev/null & echo ready; read line",
        LEN >> 16
    );
    let mut bundle = container(env, &namespace, &script)?;
    bundle.annotation(VHOST, &vhost.to_string());

    let mut running = env.run(&bundle)?.open_stdin().spawn()?;
    running.wait_for("ready\n")?;
    for address in ["10.9.66.2", "[fd09:66::2]"] {
        let begin = Count::of(&namespace)?;
        give(&format!("{address}:4000"))?;
        let middle = Count::of(&namespace)?;
        take(&format!("{address}:4001"))?;
        let end = Count::of(&namespace)?;
        let (to, from) = (middle[0].mean_since(begin[0]), end[1].mean_since(middle[1]));
        ensure!(to > LONGEST, "frames to {address} are {to} bytes long in the mean: the host segments them");
        ensure!(from > LONGEST, "frames from {address} are {from} bytes long in the mean: the guest segments them");
    }
    running.write(b"\n")?;

    let output = running.finish()?;
    output.expect_code(0)?;
    let stdout = output.stdout();
    let accepted = |bit: usize| stdout.as_bytes().get(bit) == Some(&b'1');
    let missing: Vec<_> = FEATURES.iter().filter(|(bit, _)| !accepted(*bit)).map(|(_, name)| name).collect();
    ensure!(missing.is_empty(), "the driver has not accepted {missing:?}: {}", output.describe());
    Ok(())
}

/// Sends bytes to a server that counts them.
fn give(address: &str) -> Result {
    let mut stream = connect(address)?;
    stream.set_read_timeout(Some(Duration::from_secs(100)))?;
    stream.write_all(&vec![7; LEN])?;
    stream.shutdown(Shutdown::Write)?;
    let mut count = String::new();
    stream.read_to_string(&mut count).context(|| format!("waiting for what {address} has counted"))?;
    ensure_eq!(count.trim(), LEN.to_string(), "bytes that have come to {address}");
    Ok(())
}

/// Takes the bytes that a server sends.
fn take(address: &str) -> Result {
    let mut stream = connect(address)?;
    stream.set_read_timeout(Some(Duration::from_secs(100)))?;
    let mut bytes = Vec::new();
    stream.read_to_end(&mut bytes).context(|| format!("reading what {address} sends"))?;
    ensure_eq!(bytes.len(), LEN, "bytes that have come from {address}");
    Ok(())
}
