// SPDX-License-Identifier: Apache-2.0
//! The network of a peer: a namespace with one end of a veth pair, whose other end is the host's.
//!
//! Namespaces are mounted on files of the stage, and go with it; the pair goes with its namespace.

use std::fs;
use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::error::{BenchError, file};

/// The programs that make it.
pub(super) const PROGRAMS: [&str; 4] = ["ip", "tc", "nsenter", "unshare"];

/// The tap in a namespace of [`Link::join_tap`].
pub(super) const TAP: &str = "tap0";

/// A peer's network.
#[derive(Debug)]
pub(super) struct Link {
    number: u8,
    namespace: PathBuf,
}

impl Link {
    /// Makes the network of that number: 198.18.NUMBER.0/24, of the range that is set apart for benchmarks (RFC 2544). The
    /// host is 1 in it, and the peer 2.
    ///
    /// # Errors
    ///
    /// What `ip` says.
    pub(super) fn new(number: u8) -> Result<Self, BenchError> {
        let link = Self { number, namespace: format!("/run/netns-{number}").into() };
        let (path, host_end) = (&link.namespace, format!("bhbench{number}"));
        fs::write(path, "").map_err(file("create", path))?;
        run(&format!("unshare --net={} ip link set lo up", path.display()))?;
        run(&format!(
            "ip link add {host_end} type veth peer name eth0 address {} netns {}",
            link.mac(),
            path.display()
        ))?;
        run(&format!("ip addr add {}/24 dev {host_end}", link.host_address()))?;
        run(&format!("ip link set {host_end} up"))?;
        link.inside("ip link set eth0 up")?;
        Ok(link)
    }

    pub(super) fn namespace(&self) -> &Path {
        &self.namespace
    }

    pub(super) fn host_address(&self) -> Ipv4Addr {
        Ipv4Addr::new(198, 18, self.number, 1)
    }

    pub(super) fn peer_address(&self) -> Ipv4Addr {
        Ipv4Addr::new(198, 18, self.number, 2)
    }

    /// The hardware address of the namespace's end.
    pub(super) fn mac(&self) -> String {
        format!("02:00:c6:12:{:02x}:02", self.number)
    }

    /// Gives the namespace's end its address, for a container.
    ///
    /// # Errors
    ///
    /// What `ip` says.
    pub(super) fn set_address(&self) -> Result<(), BenchError> {
        self.inside(&format!("ip addr add {}/24 dev eth0", self.peer_address()))
    }

    /// Makes a tap in the namespace to which and from which all frames of its end go, in the way of Bulkhead's own taps.
    ///
    /// # Errors
    ///
    /// What `ip` or `tc` says.
    pub(super) fn join_tap(&self) -> Result<(), BenchError> {
        self.inside(&format!("ip tuntap add dev {TAP} mode tap vnet_hdr"))?;
        self.inside(&format!("ip link set {TAP} up"))?;
        for (from, to) in [("eth0", TAP), (TAP, "eth0")] {
            self.inside(&format!("tc qdisc add dev {from} ingress"))?;
            self.inside(&format!("tc filter add dev {from} ingress matchall action mirred egress redirect dev {to}"))?;
        }
        Ok(())
    }

    fn inside(&self, command: &str) -> Result<(), BenchError> {
        run(&format!("nsenter --net={} {command}", self.namespace.display()))
    }
}

/// Runs a tool of the host's network.
fn run(command: &str) -> Result<(), BenchError> {
    let mut words = command.split_whitespace();
    let program = words.next().unwrap_or_default();
    let output = Command::new(program).args(words).output().map_err(file("start", program))?;
    if output.status.success() {
        return Ok(());
    }
    let why = String::from_utf8_lossy(&output.stderr).trim().to_owned();
    Err(BenchError::Case { case: command.to_owned(), why })
}
