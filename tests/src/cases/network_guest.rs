// SPDX-License-Identifier: Apache-2.0
//! What a container does with its network itself: filters, sockets of all kinds, groups, addresses.

use std::io::{ErrorKind, Read};
use std::net::{Ipv4Addr, TcpStream, UdpSocket};
use std::process::Command;
use std::time::Duration;

use serde_json::json;

use super::network::{Namespace, any_container, connect, host};
use super::{Case, case};
use crate::bundle::Bundle;
use crate::env::{Env, Kind};
use crate::failure::{Context as _, Result, ensure, ensure_eq};

pub(super) const CASES: &[Case] = &[
    case!(filters_of_nftables_and_iptables),
    case!(raw_and_ping_sockets),
    case!(multicast_both_ways),
    case!(duplicate_addresses_are_found),
    case!(mtu_that_grows_and_address_that_changes),
];

/// A Debian container in a namespace.
pub(super) fn debian(env: &Env, namespace: &Namespace, args: &[&str]) -> Result<Bundle> {
    let mut bundle = Bundle::debian(env)?;
    bundle.args(args);
    namespace.give_to(&mut bundle);
    Ok(bundle)
}

/// Greets whoever connects to port 4003, of IPv4 and IPv6, beside a shell script.
const GREETER: &str = "python3 -c '\nimport socket\nserver = socket.create_server((\"\", 4003), family=socket.AF_INET6, dualstack_ipv6=True)\n\
    print(\"ready\", flush=True)\nwhile True:\n    server.accept()[0].sendall(b\"hello\")\n' &\n";

/// What a server says until it closes the connection.
fn said(mut stream: TcpStream) -> Result<String> {
    stream.set_read_timeout(Some(Duration::from_secs(60)))?;
    let mut text = String::new();
    stream.read_to_string(&mut text)?;
    Ok(text)
}

/// Whether a server's machine refuses a connection.
fn is_refused(address: &str) -> Result<bool> {
    match TcpStream::connect(address) {
        Err(error) if error.kind() == ErrorKind::ConnectionRefused => Ok(true),
        result => result.map(|_| false).context(|| format!("connecting to {address}")),
    }
}

fn filters_of_nftables_and_iptables(env: &Env) -> Result {
    let namespace = Namespace::new(env, "nft")?.with_addresses(50)?;
    let script = format!(
        "set -e; nft add table inet t; nft add chain inet t in '{{ type filter hook input priority 0; }}'\n\
         nft add rule inet t in udp dport 4000 counter drop\n\
         iptables -A INPUT -p tcp --dport 4001 -j REJECT --reject-with tcp-reset\n\
         iptables -t nat -A PREROUTING -p tcp --dport 4002 -j REDIRECT --to-ports 4003\n\
         ip6tables -A INPUT -p tcp --dport 4003 -j REJECT --reject-with tcp-reset\n\
         iptables-legacy -t mangle -A PREROUTING -p udp --dport 4000 -j MARK --set-mark 7\n\
         {GREETER} read line; nft list chain inet t in | grep -o 'packets [0-9]*'\n\
         iptables-legacy -t mangle -vnxL PREROUTING | grep -c '^ *3 .*MARK set 0x7'; kill $!"
    );
    if env.kind == Kind::Other {
        // A table that no rule of nftables' asks the kernel for; a guest has it.
        ensure!(Command::new("modprobe").arg("iptable_mangle").status()?.success(), "modprobe iptable_mangle failed");
    }
    let bundle = debian(env, &namespace, &["bash", "-c", &script])?;

    let mut running = env.run(&bundle)?.open_stdin().spawn()?;
    running.wait_for("ready\n")?;
    ensure_eq!(said(connect("10.9.50.2:4002")?)?, "hello", "what the port says that leads to another");
    ensure!(is_refused("10.9.50.2:4001")?, "the port that iptables rejects");
    ensure!(is_refused("[fd09:50::2]:4003")?, "the port that ip6tables rejects");
    let socket = UdpSocket::bind("0.0.0.0:0")?;
    for _ in 0..3 {
        socket.send_to(b"dropped", "10.9.50.2:4000")?;
    }
    // What was sent before this has arrived when this is answered.
    ensure_eq!(said(connect("10.9.50.2:4003")?)?, "hello", "what the greeter says");
    running.write(b"\n")?;

    running.finish()?.expect_stdout("ready\npackets 3\n1\n")
}

/// Sends an echo request by a socket of that kind to the host, and tells of the answer; asks for the host's hardware address by a
/// packet socket; gives up its rights, and tries again.
const SOCKETS: &str = r#"
import os, socket, struct
def sum16(data):
    total = sum(struct.unpack("!%dH" % (len(data) // 2), data))
    total = (total >> 16) + (total & 0xffff)
    return ~(total + (total >> 16)) & 0xffff
def ping(kind):
    with socket.socket(socket.AF_INET, kind, socket.IPPROTO_ICMP) as s:
        s.settimeout(60)
        packet = struct.pack("!BBHHH", 8, 0, 0, 77, 1) + b"bulkhead"
        s.sendto(packet[:2] + struct.pack("!H", sum16(packet)) + packet[4:], ("10.9.51.1", 0))
        while True:
            answer = s.recv(2000)
            answer = answer[20:] if kind == socket.SOCK_RAW else answer
            if answer[0] == 0 and answer.endswith(b"bulkhead"):
                return "answered"
def arp():
    with socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(0x806)) as s:
        s.settimeout(60)
        s.bind(("eth0", 0x806))
        own = s.getsockname()[4]
        addresses = [bytes([10, 9, 51, last]) for last in (2, 1)]
        s.send(b"\xff" * 6 + own + b"\x08\x06" + struct.pack("!HHBBH", 1, 0x800, 6, 4, 1) + own + addresses[0] + bytes(6) + addresses[1])
        while True:
            frame = s.recv(2000)
            if frame[20:22] == b"\0\x02" and frame[28:32] == addresses[1]:
                return frame[22:28].hex(":")
print(arp(), ping(socket.SOCK_RAW), ping(socket.SOCK_DGRAM))
os.setuid(1000)
for kind in (socket.SOCK_RAW, socket.SOCK_DGRAM):
    try:
        print(ping(kind))
    except PermissionError:
        print("refused")
"#;

fn raw_and_ping_sockets(env: &Env) -> Result {
    let namespace = Namespace::new(env, "raw")?.with_addresses(51)?;
    let mac = host(&format!("cat /sys/class/net/{}/address", namespace.host_end))?;
    let mut bundle = debian(env, &namespace, &["python3", "-c", SOCKETS])?;
    // As engines have it.
    bundle.set("/linux/sysctl", json!({ "net.ipv4.ping_group_range": "0 2147483647" }));

    let output = env.run(&bundle)?.output()?;

    output.expect_stdout(&format!("{} answered answered\nrefused\nanswered\n", mac.trim()))
}

/// Joins a group, says what comes to it, and sends to another.
const GROUPS: &str = r#"
import socket
s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
s.bind(("", 4000))
s.setsockopt(socket.IPPROTO_IP, socket.IP_ADD_MEMBERSHIP, socket.inet_aton("239.9.9.9") + socket.inet_aton("10.9.52.2"))
s.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_IF, socket.inet_aton("10.9.52.2"))
print("ready", flush=True)
print(s.recv(100).decode(), flush=True)
s.sendto(b"from the container", ("239.9.9.8", 4001))
"#;

fn multicast_both_ways(env: &Env) -> Result {
    let namespace = Namespace::new(env, "group")?.with_addresses(52)?;
    let listener = UdpSocket::bind("0.0.0.0:4001")?;
    listener.join_multicast_v4(&Ipv4Addr::new(239, 9, 9, 8), &Ipv4Addr::new(10, 9, 52, 1))?;
    listener.set_read_timeout(Some(Duration::from_secs(60)))?;
    host(&format!("ip route add 239.9.9.9 dev {}", namespace.host_end))?;
    let bundle = debian(env, &namespace, &["python3", "-c", GROUPS])?;

    let mut running = env.run(&bundle)?.spawn()?;
    running.wait_for("ready\n")?;
    UdpSocket::bind("10.9.52.1:0")?.send_to(b"from the host", "239.9.9.9:4000")?;
    let mut message = [0; 100];
    let len = listener.recv(&mut message).context(|| "waiting for what the container sends".to_owned())?;

    ensure_eq!(String::from_utf8_lossy(&message[..len]), "from the container", "what came to the group");
    running.finish()?.expect_stdout("ready\nfrom the host\n")
}

fn duplicate_addresses_are_found(env: &Env) -> Result {
    let namespace = Namespace::new(env, "dad")?.with_addresses(53)?;
    let bundle = any_container(
        env,
        &namespace,
        // The first is the host's, the second nobody's.
        "for last in 1 77; do ip addr add fd09:53::$last/64 dev eth0; done; \
         is() { ip -o addr show dev eth0 | grep fd09:53::$1/64 | grep -q $2; }; \
         until is 1 dadfailed; do sleep 0.1; done; while is 77 tentative; do sleep 0.1; done; \
         mkdir /www; echo from the container >/www/index.html; httpd -p 80 -h /www; echo ready; read line",
    )?;

    let mut running = env.run(&bundle)?.open_stdin().spawn()?;
    running.wait_for("ready\n")?;
    ensure_eq!(host("busybox wget -q -O - http://[fd09:53::77]/")?, "from the container\n", "the page");
    running.write(b"\n")?;

    running.finish()?.expect_stdout("ready\n")
}

fn mtu_that_grows_and_address_that_changes(env: &Env) -> Result {
    let namespace = Namespace::new(env, "grow")?.with_addresses(54)?;
    let bundle = any_container(
        env,
        &namespace,
        "echo ready; until grep -q 9000 /sys/class/net/eth0/mtu; do sleep 0.1; done; \
         ping -c 3 -w 20 -s 8972 10.9.54.1 >/dev/null && echo large; read line; \
         until grep -q 02:09:54:00:00:99 /sys/class/net/eth0/address; do sleep 0.1; done; \
         ping -c 3 -w 20 10.9.54.1 >/dev/null && echo reached",
    )?;

    let mut running = env.run(&bundle)?.open_stdin().spawn()?;
    running.wait_for("ready\n")?;
    host(&format!("ip link set {} mtu 9000", namespace.host_end))?;
    namespace.inside("ip link set eth0 mtu 9000")?;
    running.wait_for("large\n")?;
    namespace.inside("ip link set eth0 address 02:09:54:00:00:99")?;
    running.write(b"\n")?;

    running.finish()?.expect_stdout("ready\nlarge\nreached\n")?;
    let neighbour = host(&format!("ip neigh show 10.9.54.2 dev {}", namespace.host_end))?;
    ensure!(neighbour.contains("02:09:54:00:00:99"), "the host knows the guest as {neighbour}");
    Ok(())
}
