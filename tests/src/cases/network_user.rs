// SPDX-License-Identifier: Apache-2.0
//! Containers whose network is made by passt: no network namespace, no interface, and no address of the host's is theirs.

use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream, UdpSocket};
use std::path::Path;
use std::time::{Duration, Instant};
use std::{fs, thread};

use serde_json::json;

use super::network::{answer_name, echo_unchanged, host};
use super::{Case, case};
use crate::bundle::Bundle;
use crate::detached::Detached;
use crate::env::Env;
use crate::failure::{Context as _, Failure, Result, ensure, ensure_eq, skip};

pub(super) const CASES: &[Case] = &[
    case!(the_guest_has_its_addresses),
    case!(the_guest_has_the_families_of_the_host),
    case!(out_by_tcp_and_udp),
    case!(in_by_published_ports),
    case!(in_by_published_ports_for_datagrams),
    case!(the_hosts_loopback_is_shut_unless_asked_for),
    case!(names_are_asked_of_the_hosts_server),
    case!(much_data_unchanged),
    case!(two_at_once),
];

/// How long what comes over the network is waited for.
pub(super) const PATIENCE: Duration = Duration::from_secs(60);

/// Gives the case a host's network of its own, which leads out by both families: the host is 198.51.100.1 and fd98::1.
pub(super) fn host_network(env: &Env) -> Result {
    host_network_of(env, &["198.51.100.1/24", "fd98::1/64"])
}

/// The same with these addresses, and a default route for the family of each.
fn host_network_of(env: &Env, addresses: &[&str]) -> Result {
    env.only_bulkhead()?;
    if !Path::new("/usr/bin/passt").exists() {
        skip!("there is no /usr/bin/passt (package passt)");
    }
    env.own_network()?;
    host("ip link add uplink type veth peer name outside")?;
    host("ip link set outside up")?;
    host("ip link set uplink up")?;
    for address in addresses {
        let (family, nodad, gateway) =
            if address.contains(':') { ("-6", "nodad", "fd98::fe") } else { ("-4", "", "198.51.100.254") };
        host(&format!("ip addr add {address} dev uplink {nodad}"))?;
        host(&format!("ip {family} route add default via {gateway} dev uplink"))?;
    }
    Ok(())
}

/// A container with such a network, and further annotations.
pub(super) fn container(env: &Env, script: &str, annotations: &[(&str, &str)]) -> Result<Bundle> {
    let mut bundle = Bundle::busybox(env)?;
    bundle.sh(script);
    Ok(with_annotations(bundle, annotations))
}

fn with_annotations(mut bundle: Bundle, annotations: &[(&str, &str)]) -> Bundle {
    let mut all = json!({ "io.bulkhead.net.user": "true" });
    for (key, value) in annotations {
        all[*key] = json!(value);
    }
    bundle.set("/annotations", all);
    bundle
}

/// What a server in a container answers to a line. passt takes a connection also while nobody listens there yet, and ends it.
pub(super) fn ask(address: &str, line: &str) -> Result<String> {
    let once = || -> io::Result<String> {
        let mut stream = TcpStream::connect(address)?;
        stream.set_read_timeout(Some(PATIENCE))?;
        stream.write_all(line.as_bytes())?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer)?;
        Ok(answer)
    };
    let end = Instant::now() + PATIENCE;
    loop {
        match once() {
            Ok(answer) if !answer.is_empty() => return Ok(answer),
            _ if Instant::now() < end => thread::sleep(Duration::from_millis(100)),
            result => return result.context(|| format!("asking {address}")),
        }
    }
}

/// Waits for a connection, and not for ever.
fn accept(listener: &TcpListener) -> Result<TcpStream> {
    listener.set_nonblocking(true)?;
    let end = Instant::now() + PATIENCE;
    loop {
        match listener.accept() {
            Ok((stream, _)) => {
                stream.set_nonblocking(false)?;
                return Ok(stream);
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock && Instant::now() < end => {
                thread::sleep(Duration::from_millis(20));
            }
            Err(error) => return Err(error).context(|| "waiting for a connection of the container's".to_owned()),
        }
    }
}

/// Takes one connection, and answers one request for a page; which page that is.
pub(super) fn serve_page(listener: &TcpListener, content: &str) -> Result<String> {
    let mut stream = accept(listener)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    let mut lines = BufReader::new(&stream).lines();
    let asked = lines.next().transpose()?.unwrap_or_default();
    while lines.next().transpose()?.is_some_and(|line| !line.is_empty()) {}
    drop(lines);
    write!(stream, "HTTP/1.0 200 OK\r\nContent-Length: {}\r\n\r\n{content}", content.len())?;
    Ok(asked.split(' ').nth(1).unwrap_or_default().to_owned())
}

fn the_guest_has_its_addresses(env: &Env) -> Result {
    host_network(env)?;
    let bundle = container(
        env,
        "ip -o addr; ip route; ip -6 route; cat /sys/class/net/eth0/mtu; ls /sys/class/net; read line",
        &[],
    )?;
    let id = env.id();

    let mut running = env.run_as(&bundle, &id)?.open_stdin().spawn()?;
    running.wait_for("\nlo\n")?;
    let state = env.call(["state", &id]).output()?;
    running.write(b"\n")?;
    let output = running.finish()?;

    output.expect_in_stdout(&[
        "inet 10.0.2.15/24 brd 10.0.2.255",
        "inet6 fd62:756c:6b68::15/64",
        "default via 10.0.2.2 dev eth0",
        "default via fd62:756c:6b68::2 dev eth0",
        "65520\n",
        "eth0\nlo\n",
    ])?;
    state.expect_in_stdout(&["\"io.bulkhead.net.backend\": \"passt\""])
}

fn the_guest_has_the_families_of_the_host(env: &Env) -> Result {
    host_network_of(env, &["198.51.100.1/24"])?;
    let bundle = container(env, "ip -o addr show dev eth0 scope global; ip -6 route", &[])?;

    let output = env.run(&bundle)?.output()?;

    output.expect_in_stdout(&["inet 10.0.2.15/24"])?;
    ensure!(!output.stdout().contains("fd62:") && !output.stdout().contains("default"), "{}", output.describe());
    Ok(())
}

fn out_by_tcp_and_udp(env: &Env) -> Result {
    host_network(env)?;
    let listeners = [TcpListener::bind("198.51.100.1:4000")?, TcpListener::bind("[fd98::1]:4000")?];
    let names = UdpSocket::bind("198.51.100.1:53")?;
    names.set_read_timeout(Some(PATIENCE))?;
    let bundle = container(
        env,
        "wget -q -O - http://198.51.100.1:4000/four; wget -q -O - http://[fd98::1]:4000/six; nslookup -type=a example.test 198.51.100.1",
        &[],
    )?;

    let running = env.run(&bundle)?.spawn()?;
    for (listener, page) in listeners.iter().zip(["/four", "/six"]) {
        ensure_eq!(serve_page(listener, "heard\n")?, page, "what the container asked for");
    }
    answer_name(&names)?;

    running.finish()?.expect_in_stdout(&["heard\nheard\n", "Address: 1.2.3.4\n"])
}

fn in_by_published_ports(env: &Env) -> Result {
    host_network(env)?;
    let ports = "8080:80, 127.0.0.1:8081:80/tcp";
    let script = "nc -ll -p 80 -e sh -c 'read line; echo tcp $line' & wait";
    let bundle = container(env, script, &[("io.bulkhead.net.publish", ports)])?;

    let container = Detached::create(env, &bundle)?;
    container.must(&["start"])?;
    for address in ["127.0.0.1:8080", "198.51.100.1:8080", "[::1]:8080", "[fd98::1]:8080", "127.0.0.1:8081"] {
        ensure_eq!(ask(address, "one\n")?, "tcp one\n", "the answer from {address}");
    }
    let refused = TcpStream::connect("198.51.100.1:8081").map_err(|error| error.kind());
    ensure!(matches!(refused, Err(io::ErrorKind::ConnectionRefused)), "a port of another address: {refused:?}");
    container.must_with(&["kill"], &["KILL"])?;
    container.wait()?;
    // What was the container's is anybody's again.
    TcpListener::bind("0.0.0.0:8080").context(|| "taking the port of a container that has ended".to_owned())?;
    container.must(&["delete"]).map(drop)
}

/// Sends datagrams from one address of the host's to another, until one is answered.
fn ask_by_datagrams(from: &str, to: &str) -> Result<String> {
    let socket = UdpSocket::bind((from, 0)).context(|| format!("making a socket at {from}"))?;
    socket.set_read_timeout(Some(Duration::from_secs(1)))?;
    let end = Instant::now() + PATIENCE;
    let mut answer = [0; 100];
    loop {
        // The server may not be there yet, which is told as an error of the next call.
        match socket.send_to(b"one\n", to).and_then(|_| socket.recv_from(&mut answer)) {
            Ok((len, peer)) if peer.to_string() == to => {
                return Ok(String::from_utf8_lossy(&answer[..len]).into_owned());
            }
            other => ensure!(Instant::now() < end, "no answer from {to} to {from}: {other:?}"),
        }
    }
}

/// Answers datagrams of both families.
const ANSWER: &str = r#"
import socket
server = socket.socket(socket.AF_INET6, socket.SOCK_DGRAM)
server.bind(("::", 53))
while True:
    question, asker = server.recvfrom(100)
    server.sendto(b"udp " + question, asker)
"#;

fn in_by_published_ports_for_datagrams(env: &Env) -> Result {
    host_network(env)?;
    let mut server = Bundle::debian(env)?;
    server.args(&["python3", "-c", ANSWER]);
    let published = [("io.bulkhead.net.publish", "5353:53/udp"), ("io.bulkhead.net.host_loopback", "true")];
    let bundle = with_annotations(server, &published);

    let container = Detached::create(env, &bundle)?;
    container.must(&["start"])?;
    for (from, to) in
        [("198.51.100.1", "198.51.100.1:5353"), ("fd98::1", "[fd98::1]:5353"), ("127.0.0.1", "127.0.0.1:5353")]
    {
        ensure_eq!(ask_by_datagrams(from, to)?, "udp one\n", "the answer from {to}");
    }
    container.must_with(&["kill"], &["KILL"])?;
    container.wait()?;
    UdpSocket::bind("0.0.0.0:5353").context(|| "taking the port of a container that has ended".to_owned())?;
    container.must(&["delete"]).map(drop)
}

fn the_hosts_loopback_is_shut_unless_asked_for(env: &Env) -> Result {
    host_network(env)?;
    let listener = TcpListener::bind("127.0.0.1:4000")?;
    env.run(&container(env, "nc -w 5 10.0.2.2 4000 </dev/null", &[])?)?.output()?;
    listener.set_nonblocking(true)?;
    let early = listener.accept().map_err(|error| error.kind());
    ensure!(
        matches!(early, Err(io::ErrorKind::WouldBlock)),
        "the container has reached the host's loopback: {early:?}"
    );

    let script = "wget -q -O - http://10.0.2.2:4000/page";
    let bundle = container(env, script, &[("io.bulkhead.net.host_loopback", "true")])?;
    let running = env.run(&bundle)?.spawn()?;
    let page = serve_page(&listener, "heard\n");
    running.finish()?.expect_stdout("heard\n")?;
    ensure_eq!(page?, "/page", "what the container asked for");
    Ok(())
}

fn names_are_asked_of_the_hosts_server(env: &Env) -> Result {
    host_network(env)?;
    fs::write(env.work.join("resolv.conf"), "nameserver 127.0.0.53\n")?;
    let names = UdpSocket::bind("127.0.0.53:53")?;
    names.set_read_timeout(Some(PATIENCE))?;
    let bundle = container(env, "nslookup -type=a example.test 10.0.2.3", &[])?;

    // For the runtime and what it starts.
    let own_resolver =
        "exec unshare --mount sh -c 'mount --bind \"$RESOLV_CONF\" /etc/resolv.conf && exec \"$@\"' sh \"$@\"";
    let resolv_conf = env.work.join("resolv.conf");
    let running = env.run(&bundle)?.wrapper(own_resolver).variable("RESOLV_CONF", resolv_conf).spawn()?;
    answer_name(&names)?;

    running.finish()?.expect_in_stdout(&["Address: 1.2.3.4\n"])
}

/// Debian's passt resets a connection when a slow guest has dropped what came, and that a few times: the data is sent again then, but
/// what comes back has to be what was sent.
fn much_data_unchanged(env: &Env) -> Result {
    const LEN: u64 = 16 << 20;
    const TRIES: usize = 4;
    host_network(env)?;
    let annotations = [("io.bulkhead.net.publish", "4000:4000"), ("io.bulkhead.vcpus", "2")];
    let bundle = container(
        env,
        "while :; do nc -l -p 4000 -e cat; done & until grep -q ':0FA0 ' /proc/net/tcp*; do sleep 0.1; done; echo ready; read line",
        &annotations,
    )?;

    let mut running = env.run(&bundle)?.open_stdin().spawn()?;
    running.wait_for("ready\n")?;
    let mut echoed = echo_unchanged("198.51.100.1:4000", LEN);
    for _ in 1..TRIES {
        match &echoed {
            Err(Failure::Failed(why)) if is_reset(why) => echoed = echo_unchanged("198.51.100.1:4000", LEN),
            _ => break,
        }
    }
    echoed?;
    running.write(b"\n")?;
    running.finish()?.expect_stdout("ready\n")
}

/// Whether a connection was over too early, in the words of whichever end of it has found that.
fn is_reset(why: &str) -> bool {
    ["Connection reset by peer", "failed to fill whole buffer", "Broken pipe"].iter().any(|words| why.contains(words))
}

/// Each has its network to itself, though they look alike.
fn two_at_once(env: &Env) -> Result {
    host_network(env)?;
    let script = |name: &str| format!("nc -l -p 80 -e sh -c 'read line; echo {name} $line' & wait");
    let first = container(env, &script("first"), &[("io.bulkhead.net.publish", "8001:80")])?;
    let second = container(env, &script("second"), &[("io.bulkhead.net.publish", "8002:80")])?;

    let running = [env.run(&first)?.spawn()?, env.run(&second)?.spawn()?];
    ensure_eq!(ask("127.0.0.1:8002", "one\n")?, "second one\n", "the answer of the second");
    ensure_eq!(ask("127.0.0.1:8001", "two\n")?, "first two\n", "the answer of the first");

    running.into_iter().try_for_each(|running| running.finish()?.expect_code(0))
}
