// SPDX-License-Identifier: Apache-2.0
//! Two containers, each in a machine of its own, on one bridge of the host.

use std::time::Duration;

use serde_json::json;

use super::net_device::VHOST;
use super::network::{Namespace, host};
use super::network_guest::debian;
use super::{Case, case};
use crate::bundle::Bundle;
use crate::env::Env;
use crate::failure::Result;

pub(super) const CASES: &[Case] = &[case!(by_the_hosts_kernel).limit(900), case!(by_the_vmm).limit(900)];

/// How long a container may take.
const LIMIT: Duration = Duration::from_secs(800);

/// Sends back each datagram that comes to port 4000, what comes on each connection to that port when it has ended, and what
/// comes on those to port 4001 at once, until that is the word to end; then it says how many of the last there are.
const SERVER: &str = r#"
import select, socket
datagrams = socket.socket(socket.AF_INET6, socket.SOCK_DGRAM)
datagrams.bind(("::", 4000))
whole, each = [socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True, backlog=1024)
               for port in (4000, 4001)]
poll = select.epoll()
for listener in datagrams, whole, each:
    poll.register(listener, select.EPOLLIN)
peers = {}
print("ready", flush=True)
while True:
    for number, _ in poll.poll():
        if number == datagrams.fileno():
            datagrams.sendto(*datagrams.recvfrom(65536))
        elif number == whole.fileno():
            with whole.accept()[0] as peer:
                peer.sendall(peer.makefile("rb").read())
        elif number == each.fileno():
            peer = each.accept()[0]
            peers[peer.fileno()] = peer
            poll.register(peer, select.EPOLLIN)
        else:
            data = peers[number].recv(4096)
            if data == b"end":
                raise SystemExit(print(len(peers)))
            peers[number].sendall(data)
"#;

/// Says what of it holds. A datagram may be lost, though not all of several.
const CLIENT: &str = r#"
import os, socket
ADDRESSES = "10.9.5.1", "fd09:5::1"
PATIENCE = 300
def much(address):
    data = os.urandom(2 << 20)
    with socket.create_connection((address, 4000), PATIENCE) as stream:
        stream.sendall(data)
        stream.shutdown(socket.SHUT_WR)
        return stream.makefile("rb").read() == data
def datagrams(address):
    family = socket.getaddrinfo(address, 4000)[0][0]
    with socket.socket(family, socket.SOCK_DGRAM) as s:
        s.settimeout(10)
        s.connect((address, 4000))
        return all(comes_back(s, os.urandom(size)) for size in [8, 1452, 1473, 8972, 60000] * 5)
def comes_back(s, data):
    for _ in range(5):
        s.send(data)
        try:
            while s.recv(65536) != data:
                pass
            return True
        except TimeoutError:
            pass
def connections():
    streams = [socket.create_connection((ADDRESSES[number % 2], 4001), PATIENCE) for number in range(1000)]
    for turn in range(2):
        for number, stream in enumerate(streams):
            stream.sendall(b"%8d" % (number + turn))
        if any(stream.recv(9) != b"%8d" % (number + turn) for number, stream in enumerate(streams)):
            return False
    streams[0].sendall(b"end")
    return True
for address in ADDRESSES:
    print(address, much(address), datagrams(address), flush=True)
print(connections())
"#;

/// A bridge; it is gone at the end.
struct Bridge(&'static str);

impl Bridge {
    fn new() -> Result<Self> {
        let bridge = Self("bht-bridge");
        // One that a killed case has left.
        drop(Self(bridge.0));
        host(&format!("ip link add {} type bridge", bridge.0))?;
        host(&format!("ip link set {} up", bridge.0))?;
        Ok(bridge)
    }

    /// A namespace on it, with the addresses of that number.
    fn namespace(&self, env: &Env, number: u8) -> Result<Namespace> {
        let namespace = Namespace::new(env, &format!("br{number}"))?;
        host(&format!("ip link set {} master {}", namespace.host_end, self.0))?;
        namespace.inside(&format!("ip addr add 10.9.5.{number}/24 dev eth0"))?;
        namespace.inside(&format!("ip addr add fd09:5::{number}/64 dev eth0 nodad"))?;
        Ok(namespace)
    }
}

impl Drop for Bridge {
    fn drop(&mut self) {
        let _ = host(&format!("ip link del {}", self.0));
    }
}

fn by_the_hosts_kernel(env: &Env) -> Result {
    exchange(env, true)
}

fn by_the_vmm(env: &Env) -> Result {
    exchange(env, false)
}

fn exchange(env: &Env, vhost: bool) -> Result {
    let bridge = Bridge::new()?;
    let (first, second) = (bridge.namespace(env, 1)?, bridge.namespace(env, 2)?);
    let container = |namespace: &Namespace, script: &str| -> Result<Bundle> {
        let mut bundle = debian(env, namespace, &["python3", "-c", script])?;
        bundle.annotation(VHOST, &vhost.to_string());
        bundle.set("/process/rlimits", json!([{ "type": "RLIMIT_NOFILE", "soft": 4096, "hard": 4096 }]));
        Ok(bundle)
    };
    let (server, client) = (container(&first, SERVER)?, container(&second, CLIENT)?);

    let mut serving = env.run(&server)?.limit(LIMIT).spawn()?;
    serving.wait_for("ready\n")?;
    let asked = env.run(&client)?.limit(LIMIT).output()?;

    asked.expect_stdout("10.9.5.1 True True\nfd09:5::1 True True\nTrue\n")?;
    serving.finish()?.expect_stdout("ready\n1000\n")
}
