// SPDX-License-Identifier: Apache-2.0
//! Connections on the host to the loopback addresses of a container's, or a pod's, network namespace: they reach what listens
//! in there, as with processes of the host.

use std::fs::File;
use std::io::{self, ErrorKind, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::path::Path;
use std::thread;
use std::time::Duration;

use nix::sched::{CloneFlags, setns};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::network::{Namespace, any_container, host};
use super::{Case, case};
use crate::bundle::Bundle;
use crate::cri::api::{PortForwardRequest, UrlResponse};
use crate::cri::{PORT_DATA, PORT_ERROR, WebSocket};
use crate::detached::Detached;
use crate::engines::Kubelet;
use crate::env::{Env, Kind};
use crate::failure::{Context as _, Result, ensure, ensure_eq, fail};

pub(super) const CASES: &[Case] = &[case!(by_cri), case!(into_a_namespace), case!(by_the_process)];

/// A server on 127.0.0.1:8080 alone, which sends back what was sent to it, once it has all of that.
const WEB_SERVER: &str = "mkdir -p /www/cgi-bin; cd /www/cgi-bin; \
     printf '#!/bin/sh\\nprintf \"Content-Type: x\\\\r\\\\n\\\\r\\\\n\"; cat > /got.$$; cat /got.$$\\n' > back; chmod +x back; \
     httpd -f -p 127.0.0.1:8080 -h /www";

/// A port where nobody listens.
const CLOSED: u16 = 8082;

/// How long bytes may fail to come.
const LIMIT: Duration = Duration::from_secs(60);

/// Bytes that tell where they are lost or swapped.
fn pattern(length: usize, seed: usize) -> Vec<u8> {
    (0..length).map(|index| ((index + seed) * 7 % 251) as u8).collect()
}

/// A connection through the kubelet's interface, and what is to come by it.
struct Forwarded {
    stream: WebSocket,
    port: u16,
    sent: Vec<u8>,
}

impl Forwarded {
    fn open(kubelet: &Kubelet<'_>, pod: &str, port: u16) -> Result<Self> {
        let (pod_sandbox_id, ports) = (pod.to_owned(), vec![port.into()]);
        let request = PortForwardRequest { pod_sandbox_id, port: ports, ..PortForwardRequest::default() };
        let url: UrlResponse = kubelet.call("PortForward", &request)?;
        Ok(Self { stream: WebSocket::connect(&url.url, &format!("?port={port}"))?, port, sent: Vec::new() })
    }

    fn send(&mut self, bytes: &[u8]) -> Result {
        // Of the longest frames that are sent.
        bytes.chunks(60_000).try_for_each(|bytes| self.stream.send(PORT_DATA, bytes))
    }

    /// Says that so many bytes are to come.
    fn begin(&mut self, length: usize) -> Result {
        self.send(format!("POST /cgi-bin/back HTTP/1.0\r\nContent-Length: {length}\r\n\r\n").as_bytes())
    }

    fn post(&mut self, bytes: &[u8]) -> Result {
        self.sent.extend(bytes);
        self.send(bytes)
    }

    /// What comes until the end, and what the runtime says of that. Both channels begin with the port.
    fn finish(self) -> Result<(Vec<u8>, String)> {
        let mut channels = self.stream.finish()?;
        let mut take = |channel: u8| -> Result<Vec<u8>> {
            let bytes = std::mem::take(&mut channels[usize::from(channel)]);
            let Some((port, rest)) = bytes.split_first_chunk() else { fail!("no port on the channel {channel}") };
            ensure_eq!(u16::from_le_bytes(*port), self.port, "the port on a channel");
            Ok(rest.to_vec())
        };
        Ok((take(PORT_DATA)?, String::from_utf8_lossy(&take(PORT_ERROR)?).into_owned()))
    }

    /// Everything that was sent has to come back.
    fn expect_back(mut self) -> Result {
        let sent = std::mem::take(&mut self.sent);
        let (came, error) = self.finish()?;
        ensure!(came.starts_with(b"HTTP/1.1 200 OK\r\n"), "what came begins with {:?}", came.get(..40));
        let begin = came.len().saturating_sub(sent.len());
        ensure!(came[begin..] == sent, "{} bytes came back as others, in {}; {error}", sent.len(), came.len());
        Ok(())
    }
}

/// What `kubectl port-forward` is made of.
fn by_cri(env: &Env) -> Result {
    let kubelet = Kubelet::new(env)?;
    let pod = kubelet.pod("forward")?;
    let id = pod.script("serving", WEB_SERVER)?;
    pod.output(&id, "until nc 127.0.0.1 8080 </dev/null; do sleep 0.1; done")?;
    let data = [pattern(1 << 20, 0), pattern(1 << 20, 100)];

    let mut slow = Forwarded::open(&kubelet, &pod.id, 8080)?;
    slow.begin(data[0].len())?;
    let (begin, end) = data[0].split_at(1000);
    slow.post(begin)?;
    // While that one waits.
    let mut fast = Forwarded::open(&kubelet, &pod.id, 8080)?;
    fast.begin(data[1].len())?;
    fast.post(&data[1])?;
    fast.expect_back()?;
    slow.post(end)?;
    slow.expect_back()?;

    let (came, error) = Forwarded::open(&kubelet, &pod.id, CLOSED)?.finish()?;
    ensure!(came.is_empty() && error.contains("connection re"), "of a closed port came {came:?}, and {error:?}");
    // What is open when the pod goes ends with it.
    let mut open = Forwarded::open(&kubelet, &pod.id, 8080)?;
    open.begin(1)?;
    pod.remove()?;
    open.finish()?;
    kubelet.end()
}

/// Connects in a network namespace of the host.
fn dial(namespace: &Path, address: &str) -> Result<io::Result<TcpStream>> {
    let (namespace, address) = (File::open(namespace)?, address.parse::<SocketAddr>()?);
    let dialled = thread::spawn(move || -> io::Result<io::Result<TcpStream>> {
        setns(namespace, CloneFlags::CLONE_NEWNET)?;
        Ok(TcpStream::connect(address))
    });
    let Ok(dialled) = dialled.join() else { fail!("the thread in the namespace failed") };
    let stream = dialled?;
    if let Ok(stream) = &stream {
        stream.set_read_timeout(Some(LIMIT))?;
        stream.set_write_timeout(Some(LIMIT))?;
    }
    Ok(stream)
}

/// Whether nobody listens there: who connects is refused, or, where that is found out later, thrown out.
fn expect_closed(namespace: &Path, address: &str) -> Result {
    match dial(namespace, address)? {
        // It may be thrown out before its call returns.
        Err(error) => ensure!(
            matches!(error.kind(), ErrorKind::ConnectionRefused | ErrorKind::ConnectionReset),
            "connecting to a closed port: {error}"
        ),
        Ok(mut stream) => match stream.read(&mut [0]) {
            Err(error) => ensure_eq!(error.kind(), ErrorKind::ConnectionReset, "reading from a closed port"),
            Ok(count) => fail!("a closed port gives {count} bytes"),
        },
    }
    Ok(())
}

/// Both ends of a direction are passed on by themselves, each connection goes its own way, and all end with the container.
fn into_a_namespace(env: &Env) -> Result {
    let namespace = Namespace::empty(env, "loopback")?;
    let bundle = any_container(
        env,
        &namespace,
        "printf 'echo here; cat > /got.$$; cat /got.$$' > /back; mkdir /www; echo over IPv6 > /www/index.html; echo first > /first; \
         httpd -p [::1]:8081 -h /www; nc -ll -p 9000 -e sh /back & nc -ll -p 9002 -e cat /dev/zero & nc -l -p 9001 < /first & \
         until [ $(netstat -ltn | grep -cE ':(8081|9000|9001|9002) ') = 4 ]; do sleep 0.1; done; echo ready; wait",
    )?;
    let container = Detached::create(env, &bundle)?;
    container.must(&["start"])?;
    container.wait_for("ready")?;
    let connect = |address: &str| dial(&namespace.path, address)?.context(|| format!("connecting to {address}"));

    // One whose bytes nobody takes, and then many at once: none of them waits for another.
    let mut endless = connect("127.0.0.1:9002")?;
    let mut streams = Vec::new();
    for number in 0..20 {
        let mut stream = connect("127.0.0.1:9000")?;
        // The server has taken it: more than a few that wait for that would be dropped.
        let mut greeting = [0; 5];
        stream.read_exact(&mut greeting)?;
        ensure_eq!(&greeting, b"here\n", "the greeting");
        stream.write_all(&pattern(70_000, number))?;
        streams.push(stream);
    }
    for (number, mut stream) in streams.into_iter().enumerate().rev() {
        stream.shutdown(Shutdown::Write)?;
        let mut back = Vec::new();
        stream.read_to_end(&mut back)?;
        let said = container.output()?;
        ensure!(back == pattern(70_000, number), "{} bytes came back on connection {number}; {said:?}", back.len());
    }
    let mut zeros = vec![1; 1 << 20];
    endless.read_exact(&mut zeros)?;
    ensure!(zeros.iter().all(|byte| *byte == 0), "other bytes than were sent");

    // The server ends its direction first.
    let mut stream = connect("127.0.0.1:9001")?;
    let mut first = String::new();
    stream.read_to_string(&mut first)?;
    ensure_eq!(first, "first\n", "what comes before the end");
    stream.write_all(b"after the server's end\n")?;
    drop(stream);
    container.wait_for("after the server's end")?;

    let get = |address: &str| namespace.inside(&format!("busybox wget -q -O - http://{address}/"));
    ensure_eq!(get("[::1]:8081")?, "over IPv6\n", "what comes from a server on ::1");
    if env.kind == Kind::Bulkhead {
        // Who dials localhost takes a connection for one that stands, and does not try its second address any more.
        ensure_eq!(get("127.0.0.1:8081")?, "over IPv6\n", "what comes from a server on ::1 by 127.0.0.1");
    }
    expect_closed(&namespace.path, &format!("127.0.0.1:{CLOSED}"))?;
    expect_closed(&namespace.path, &format!("[::1]:{CLOSED}"))?;

    kill(Pid::from_raw(container.pid), Signal::SIGKILL)?;
    container.wait()?;
    // What is left is the host's alone, and there nobody listens.
    for address in ["127.0.0.1:9000", "[::1]:9000"] {
        match dial(&namespace.path, address)? {
            Err(error) => ensure_eq!(error.kind(), ErrorKind::ConnectionRefused, "connecting when nobody is left"),
            Ok(stream) => fail!("{stream:?} is taken by somebody"),
        }
    }
    Ok(())
}

/// A container without a namespace of somebody else's has one that is found by its process.
fn by_the_process(env: &Env) -> Result {
    let mut bundle = Bundle::busybox(env)?;
    bundle.sh(
        "mkdir /www; echo by its process > /www/index.html; httpd -p 127.0.0.1:8080 -h /www; echo ready; sleep 1000",
    );
    let container = Detached::create(env, &bundle)?;
    container.must(&["start"])?;
    container.wait_for("ready")?;

    let inside = format!("nsenter --net=/proc/{}/ns/net", container.pid);
    let page = host(&format!("{inside} busybox wget -q -O - http://127.0.0.1:8080/"))?;
    ensure_eq!(page, "by its process\n", "what comes from the container");
    Ok(())
}
