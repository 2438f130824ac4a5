// SPDX-License-Identifier: Apache-2.0
//! A network that is made when the container is there already: between `create` and `start`, as docker does it from version
//! 26 on, and `ctr run --cni`; and when its program runs.

use std::io::Write;
use std::net::TcpListener;
use std::time::{Duration, Instant};
use std::{io, thread};

use super::network::{Namespace, any_container, host};
use super::{Case, case};
use crate::bundle::Bundle;
use crate::detached::Detached;
use crate::env::{Env, Kind};
use crate::failure::{Context as _, Result, ensure, ensure_eq, fail};

pub(super) const CASES: &[Case] = &[
    case!(between_create_and_start_and_after),
    case!(gone_and_back),
    case!(away_and_back),
    case!(a_carrier_is_followed),
];

/// How long the guest may take.
const LIMIT: Duration = Duration::from_secs(100);

/// Gives the network namespace of a process an interface, with number 2 in 10.9.`net`.0/24; the host is number 1.
pub(super) fn give(pid: i32, name: &str, net: u8) -> Result {
    give_with(pid, name, net, "")
}

/// The same, with more words about it.
fn give_with(pid: i32, name: &str, net: u8, words: &str) -> Result {
    let (end, inside) = (format!("bhl-{net}"), format!("nsenter --net=/proc/{pid}/ns/net"));
    host(&format!("ip link add {end} type veth peer name {name} netns {pid} mtu 1400 {words}"))?;
    host(&format!("ip addr add 10.9.{net}.1/24 dev {end}"))?;
    host(&format!("ip link set {end} up"))?;
    host(&format!("{inside} ip addr add 10.9.{net}.2/24 dev {name}"))?;
    host(&format!("{inside} ip link set {name} up")).map(drop)
}

/// Waits for somebody who connects, and says where.
fn greet(container: &Detached<'_>, listener: &TcpListener) -> Result {
    listener.set_nonblocking(true)?;
    let end = Instant::now() + LIMIT;
    loop {
        match listener.accept() {
            Ok((mut stream, _)) => {
                return stream.write_all(b"from the host\n").context(|| "greeting the container".to_owned());
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock && Instant::now() < end => {
                thread::sleep(Duration::from_millis(50));
            }
            Err(error) => fail!("nobody connects: {error}; the container says {:?}", container.output()?),
        }
    }
}

fn between_create_and_start_and_after(env: &Env) -> Result {
    let mut bundle = Bundle::busybox(env)?;
    bundle.sh(
        "ls /sys/class/net; ip -o -4 addr show dev eth0; ip route; cat /sys/class/net/eth0/mtu; \
         nc 10.9.30.1 4000 </dev/null; until ip -o -4 addr show dev net1 2>/dev/null | grep 10.9.31.2; do sleep 0.1; done; \
         nc 10.9.31.1 4001 </dev/null",
    );
    // The container does not wait for them.
    let (first, second) = (TcpListener::bind("0.0.0.0:4000")?, TcpListener::bind("0.0.0.0:4001")?);
    let container = Detached::create(env, &bundle)?;
    let own = std::fs::read_link("/proc/self/ns/net")?;
    let its = std::fs::read_link(format!("/proc/{}/ns/net", container.pid))?;
    ensure!(its != own, "the container's process is in the host's network");

    give(container.pid, "eth0", 30)?;
    host(&format!("nsenter --net=/proc/{}/ns/net ip route add default via 10.9.30.1", container.pid))?;
    container.must(&["start"])?;
    greet(&container, &first)?;
    if env.kind == Kind::Bulkhead {
        let state = container.state()?;
        ensure!(state["annotations"]["io.bulkhead.net.backend"].is_string(), "nobody moves its frames: {state}");
    }
    give(container.pid, "net1", 31)?;
    greet(&container, &second)?;

    let status = container.wait()?;
    let output = container.output()?;
    ensure!(status == 0, "the status is {status}: {output:?}");
    for part in ["eth0\nlo\n", "inet 10.9.30.2/24", "default via 10.9.30.1 dev eth0", "\n1400\n", "inet 10.9.31.2/24"] {
        ensure!(output.contains(part), "no {part:?} in {output:?}");
    }
    ensure!(output.matches("from the host\n").count() == 2, "what came from the host: {output:?}");
    Ok(())
}

/// An engine that disconnects a container and connects it again makes the interface anew: with its name, and maybe its address.
fn gone_and_back(env: &Env) -> Result {
    let mut bundle = Bundle::busybox(env)?;
    bundle.sh(
        "for port in 4002 4003 4004; do until nc 10.9.32.1 $port </dev/null 2>/dev/null; do sleep 0.1; done; done; \
         ip -o -4 addr show | grep -c 10.9.32.2/; ls /sys/class/net | grep -c eth",
    );
    let container = Detached::create(env, &bundle)?;
    let rounds = [(4002, "02:09:09:09:09:01"), (4003, "02:09:09:09:09:02"), (4004, "02:09:09:09:09:02")];
    for (port, address) in rounds {
        if port == 4002 {
            give_with(container.pid, "eth0", 32, &format!("address {address}"))?;
            container.must(&["start"])?;
        } else {
            // So fast that both may be one change.
            host(&format!("nsenter --net=/proc/{}/ns/net ip link delete eth0", container.pid))?;
            give_with(container.pid, "eth0", 32, &format!("address {address}"))?;
        }
        greet(&container, &TcpListener::bind(("0.0.0.0", port))?)?;
    }

    let status = container.wait()?;
    let output = container.output()?;
    ensure!(status == 0, "the status is {status}: {output:?}");
    ensure!(output == format!("{}1\n1\n", "from the host\n".repeat(3)), "the output is {output:?}");
    Ok(())
}

/// An interface that leaves for another namespace and comes back has its number as before.
fn away_and_back(env: &Env) -> Result {
    let elsewhere = Namespace::empty(env, "elsewhere")?;
    let mut bundle = Bundle::busybox(env)?;
    bundle.sh("reach() { until nc 10.9.35.1 $1 </dev/null 2>/dev/null; do sleep 0.1; done; }; reach 4005; \
         while ip -o -4 addr show | grep -q 10.9.35.2/; do sleep 0.1; done; echo gone; reach 4006; \
         ls /sys/class/net | grep -c eth");
    let container = Detached::create(env, &bundle)?;
    give(container.pid, "eth0", 35)?;
    container.must(&["start"])?;
    greet(&container, &TcpListener::bind("0.0.0.0:4005")?)?;

    move_away(&container, &elsewhere)?;
    container.wait_for("gone\n")?;
    move_back(&container, &elsewhere, "10.9.35.2/24")?;
    greet(&container, &TcpListener::bind("0.0.0.0:4006")?)?;

    let status = container.wait()?;
    let (greeting, output) = ("from the host\n", container.output()?);
    ensure!(status == 0, "the status is {status}: {output:?}");
    ensure!(output == format!("{greeting}gone\n{greeting}1\n"), "the output is {output:?}");
    Ok(())
}

fn inside(container: &Detached<'_>, command: &str) -> Result<String> {
    host(&format!("nsenter --net=/proc/{}/ns/net {command}", container.pid))
}

/// The number of `eth0`, as text.
fn number(link: &str) -> &str {
    link.split(':').next().unwrap_or_default()
}

/// Moves `eth0` from a container's network namespace to another one. It has the same number there.
pub(super) fn move_away(container: &Detached<'_>, elsewhere: &Namespace) -> Result {
    let before = inside(container, "ip -o link show dev eth0")?;
    inside(container, &format!("ip link set eth0 netns {}", elsewhere.path.display()))?;
    ensure_eq!(number(&elsewhere.inside("ip -o link show dev eth0")?), number(&before), "the interface's number there");
    Ok(())
}

/// Moves it back, where it has the same number again, and gives it an address.
pub(super) fn move_back(container: &Detached<'_>, elsewhere: &Namespace, address: &str) -> Result {
    let before = elsewhere.inside("ip -o link show dev eth0")?;
    elsewhere.inside(&format!("ip link set eth0 netns {}", container.pid))?;
    let after = inside(container, "ip -o link show dev eth0")?;
    ensure_eq!(number(&after), number(&before), "the interface's number when it is back");
    inside(container, &format!("ip addr add {address} dev eth0"))?;
    inside(container, "ip link set eth0 up").map(drop)
}

/// Where the other end of an interface is off, the container's has no carrier: from the beginning, and later.
fn a_carrier_is_followed(env: &Env) -> Result {
    let namespace = Namespace::new(env, "carrier")?.with_addresses(33)?;
    let until = |carrier: u8, what: &str| {
        format!(
            "until [ $(cat /sys/class/net/eth0/carrier) = {carrier} ]; do sleep 0.1; done; \
             [ {carrier} = 0 ] || ping -c 1 -w 20 10.9.33.1 >/dev/null || exit 1; echo {what}; read line; "
        )
    };
    let script = ["cat /sys/class/net/eth0/carrier; echo begin; read line; ", &until(1, "there"), &until(0, "lost")];
    let bundle = any_container(env, &namespace, &(script.concat() + &until(1, "back")))?;
    host(&format!("ip link set {} down", namespace.host_end))?;

    let mut running = env.run(&bundle)?.open_stdin().spawn()?;
    running.wait_for("begin\n")?;
    for (way, seen) in [("up", "there"), ("down", "lost"), ("up", "back")] {
        host(&format!("ip link set {} {way}", namespace.host_end))?;
        running.write(b"\n")?;
        running.wait_for(&format!("{seen}\n"))?;
    }
    running.write(b"\n")?;

    running.finish()?.expect_stdout("0\nbegin\nthere\nlost\nback\n")
}
