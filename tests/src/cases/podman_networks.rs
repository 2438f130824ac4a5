// SPDX-License-Identifier: Apache-2.0
//! podman's networks: its bridge, published ports, and what containers would share.

use std::io::{ErrorKind, Write};
use std::net::{TcpListener, UdpSocket};
use std::thread;
use std::time::{Duration, Instant};

use super::network::host;
use super::{Case, case};
use crate::engines::{IMAGE, Podman};
use crate::env::Env;
use crate::failure::{Context as _, Result, ensure, ensure_eq, fail};

pub(super) const CASES: &[Case] = &[
    case!(bridge_and_published_ports).limit(600),
    case!(the_network_of_another_container_is_refused).limit(600),
    case!(a_pod_is_refused_and_its_first_container_goes_on).limit(600),
];

/// How long what is waited for may take.
const LIMIT: Duration = Duration::from_secs(120);

fn bridge_and_published_ports(env: &Env) -> Result {
    let podman = Podman::with_networks(env)?;
    let script = "mkdir /www; echo from the container >/www/index.html; httpd -p 80 -h /www; \
                  gateway=$(ip route | sed -n 's/^default via \\([^ ]*\\).*/\\1/p'); nc $gateway 4020; sleep 1000";
    let listener = TcpListener::bind("0.0.0.0:4020")?;
    let options = ["-d", "--name", "box", "-p", "8020:80", "-p", "8021:4021/udp"];
    podman.run_on("podman", &options, &["sh", "-c", script]).output()?.expect_code(0)?;

    let (mut stream, from) = listener.accept().context(|| "waiting for the container".to_owned())?;
    stream.write_all(b"from the host\n")?;
    drop(stream);
    for place in [format!("{}:80", from.ip()), "127.0.0.1:8020".to_owned(), "10.88.0.1:8020".to_owned()] {
        ensure_eq!(page(&place, "")?, "from the container\n", "the page");
    }
    datagrams_reach(&podman, "10.88.0.1:8021")?;
    podman.succeed(["logs", "box"])?.expect_stdout("from the host\n")?;
    // A second one reaches the first.
    let page = format!("http://{}/", from.ip());
    let second = podman.run_on("podman", &[], &["wget", "-q", "-O", "-", &page]).output()?;
    second.expect_stdout("from the container\n")?;
    podman.succeed(["rm", "--force", "--time", "0", "box"]).map(drop)
}

/// What a server of the container's says.
fn page(place: &str, path: &str) -> Result<String> {
    host(&format!("busybox wget -q -O - http://{place}/{path}"))
}

/// Sends datagrams to a port of the container's, by a published one, until the answer comes that nobody listens there; and that is
/// the container's answer.
fn datagrams_reach(podman: &Podman<'_>, address: &str) -> Result {
    let socket = UdpSocket::bind("0.0.0.0:0")?;
    socket.set_read_timeout(Some(Duration::from_secs(1)))?;
    socket.connect(address)?;
    let end = Instant::now() + LIMIT;
    loop {
        // It tells of what was answered to the one before, too.
        let answer = socket.send(b"to the container").and_then(|_| socket.recv(&mut [0; 1]));
        match answer.map_err(|error| error.kind()) {
            Err(ErrorKind::ConnectionRefused) => break,
            answer => ensure!(Instant::now() < end, "no answer to datagrams to {address}: {answer:?}"),
        }
    }
    let counts = podman.succeed(["exec", "box", "grep", "^Udp:", "/proc/net/snmp"])?.stdout();
    let mut lines = counts.lines().map(|line| line.split_whitespace());
    let (names, numbers) = (lines.next().into_iter().flatten(), lines.next().into_iter().flatten());
    let unheard = names.zip(numbers).find(|(name, _)| *name == "NoPorts");
    ensure!(unheard.is_some_and(|(_, number)| number != "0"), "no datagram has come to the container: {counts:?}");
    Ok(())
}

/// Serves `/etc` at port 80.
const SERVER: &str = "httpd -f -p 80 -h /etc";

/// Waits until a server is there, and says whether it is the container's.
fn serves(place: &str) -> Result {
    let end = Instant::now() + LIMIT;
    loop {
        match page(place, "passwd") {
            Ok(text) => {
                ensure!(text.starts_with("root:"), "what {place} says: {text:?}");
                return Ok(());
            }
            Err(_) if Instant::now() < end => thread::sleep(Duration::from_millis(200)),
            Err(error) => return Err(error),
        }
    }
}

fn the_network_of_another_container_is_refused(env: &Env) -> Result {
    env.only_bulkhead()?;
    let podman = Podman::with_networks(env)?;
    let server: Vec<_> = SERVER.split(' ').collect();
    podman.run_on("podman", &["-d", "--name", "box", "-p", "8022:80"], &server).output()?.expect_code(0)?;
    serves("127.0.0.1:8022")?;

    let second = podman.run_on("container:box", &[], &["true"]).output()?;

    refused(&second.stderr(), "network namespace")?;
    ensure!(second.status.code() != Some(0), "a second container has the network: {}", second.describe());
    serves("127.0.0.1:8022")?;
    podman.succeed(["rm", "--force", "--time", "0", "box"]).map(drop)
}

/// The containers of podman's pods share namespaces of their first one, whose machine nobody else can enter.
fn a_pod_is_refused_and_its_first_container_goes_on(env: &Env) -> Result {
    env.only_bulkhead()?;
    let podman = Podman::with_networks(env)?;
    let create =
        ["pod", "create", "--network", "podman", "--infra-image", IMAGE, "--infra-command", SERVER, "--name", "pod"];
    // This podman denies all devices to the cgroup that it makes for a pod, where it does so itself: no runtime can start there.
    let options = ["--share-parent=false", "-p", "8023:80", "--share"];
    for (share, word) in [("net", "network namespace"), ("ipc,net,uts", "linux.namespaces")] {
        podman.call(create.iter().chain(&options).chain(&[share])).output()?.expect_code(0)?;
        podman.succeed(["pod", "start", "pod"])?;
        serves("127.0.0.1:8023")?;

        let second = podman.call(["run", "--rm", "--pod", "pod", IMAGE, "true"]).output()?;

        ensure!(second.status.code() != Some(0), "a second container runs in the pod: {}", second.describe());
        refused(&second.stderr(), word)?;
        serves("127.0.0.1:8023")?;
        podman.succeed(["pod", "rm", "--force", "--time", "0", "pod"])?;
    }
    Ok(())
}

/// The engine says why.
fn refused(text: &str, word: &str) -> Result {
    if !text.contains(word) {
        fail!("no {word:?} in what podman says: {text:?}");
    }
    Ok(())
}
