// SPDX-License-Identifier: Apache-2.0
//! A resolver in the container's network namespace on the host, at a loopback address, as docker has one.

use std::fs::File;
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream, UdpSocket};
use std::thread;
use std::time::Duration;

use nix::sched::{CloneFlags, setns};

use super::network::{Namespace, answer_name, answer_to, any_container, container};
use super::{Case, case};
use crate::bundle::Bundle;
use crate::env::Env;
use crate::failure::{Context as _, Result, ensure, ensure_eq, fail};

pub(super) const CASES: &[Case] = &[
    case!(names_by_a_resolver_on_the_host),
    case!(names_that_the_resolver_asks_others_for),
    case!(long_answers_over_tcp),
    case!(nobody_to_ask),
];

/// Where it is.
const PLACE: &str = "127.0.0.11:53";

/// Makes a socket in a namespace.
fn inside<T: Send>(namespace: &Namespace, make: impl FnOnce() -> std::io::Result<T> + Send) -> Result<T> {
    let made = thread::scope(|scope| {
        let thread = scope.spawn(|| -> Result<T> {
            setns(File::open(&namespace.path)?, CloneFlags::CLONE_NEWNET)?;
            make().context(|| "making a socket in the namespace".to_owned())
        });
        thread.join()
    });
    made.unwrap_or_else(|_| fail!("the thread in the namespace failed"))
}

fn names_by_a_resolver_on_the_host(env: &Env) -> Result {
    let namespace = Namespace::new(env, "name")?.with_addresses(80)?;
    let socket = inside(&namespace, || UdpSocket::bind(PLACE))?;
    socket.set_read_timeout(Some(Duration::from_secs(60)))?;
    let bundle = container(env, &namespace, "nslookup -type=a example.test 127.0.0.11")?;

    let running = env.run(&bundle)?.spawn()?;
    answer_name(&socket)?;

    running.finish()?.expect_in_stdout(&["Name:\texample.test\n", "Address: 1.2.3.4\n"])
}

/// How a server is asked.
#[derive(Debug, Clone, Copy)]
enum Way {
    Datagrams,
    Connection,
}

/// The answer of the server at `address` to a question that is asked from within a namespace.
fn ask(namespace: &Namespace, address: &str, way: Way, question: &[u8]) -> Result<Vec<u8>> {
    let mut answer = vec![0; 512];
    let len = match way {
        Way::Datagrams => {
            let any = if address.starts_with('[') { "[::]:0" } else { "0.0.0.0:0" };
            let server = UdpSocket::bind(address)?;
            let asking = inside(namespace, || UdpSocket::bind(any))?;
            asking.connect(address)?;
            asking.set_read_timeout(Some(Duration::from_secs(30)))?;
            asking.send(question)?;
            answer_name(&server)?;
            asking.recv(&mut answer).context(|| format!("waiting for the answer of {address}"))?
        }
        Way::Connection => {
            let server = TcpListener::bind(address)?;
            let to = address.parse().context(|| format!("the address {address}"))?;
            let mut asking = inside(namespace, || TcpStream::connect_timeout(&to, Duration::from_secs(30)))?;
            asking.set_read_timeout(Some(Duration::from_secs(30)))?;
            asking.write_all(question)?;
            let (mut served, _) = server.accept()?;
            let mut taken = vec![0; question.len()];
            served.read_exact(&mut taken)?;
            served.write_all(&answer_to(taken))?;
            drop(served);
            answer.clear();
            asking.read_to_end(&mut answer).context(|| format!("waiting for the answer of {address}"))?
        }
    };
    answer.truncate(len);
    Ok(answer)
}

/// As docker's does, from within the namespace: its answers come in where the guest's frames do, and the guest has its own.
fn names_that_the_resolver_asks_others_for(env: &Env) -> Result {
    let namespace = Namespace::new(env, "askn")?.with_addresses(83)?;
    let before = namespace.leftovers()?;
    let socket = inside(&namespace, || UdpSocket::bind(PLACE))?;
    socket.set_read_timeout(Some(Duration::from_secs(60)))?;
    let script = "for name in one two three; do nslookup -type=a $name.test 127.0.0.11; done; \
                  nslookup -type=a four.test 10.9.83.1; ping -c 1 -w 20 10.9.83.1 >/dev/null && echo reached";
    let bundle = any_container(env, &namespace, script)?;

    let running = env.run(&bundle)?.spawn()?;
    for (address, way) in
        [("10.9.83.1:53", Way::Datagrams), ("[fd09:83::1]:53", Way::Datagrams), ("10.9.83.1:53", Way::Connection)]
    {
        let mut question = vec![0; 512];
        let (len, from) = socket.recv_from(&mut question).context(|| "waiting for a question".to_owned())?;
        socket.send_to(&ask(&namespace, address, way, &question[..len])?, from)?;
    }
    let server = UdpSocket::bind("10.9.83.1:53")?;
    server.set_read_timeout(Some(Duration::from_secs(60)))?;
    answer_name(&server)?;

    let output = running.finish()?;
    for name in ["one", "two", "three", "four"] {
        output.expect_in_stdout(&[&format!("Name:\t{name}.test\nAddress: 1.2.3.4\n")])?;
    }
    output.expect_in_stdout(&["reached\n"])?;
    ensure_eq!(namespace.leftovers()?, before, "what is in the namespace");
    Ok(())
}

/// Asks over TCP, twice on one connection.
const ASK: &str = r#"
import socket
stream = socket.create_connection(("127.0.0.11", 53), timeout=60)
for number in range(2):
    question = b"question %d" % number
    stream.sendall(len(question).to_bytes(2, "big") + question)
    file = stream.makefile("rb")
    answer = file.read(int.from_bytes(file.read(2), "big"))
    print(len(answer), answer.startswith(question))
"#;

/// Answers one question of each of two connections with itself, and so much more that no datagram would hold it.
fn answer_at_length(listener: &TcpListener) -> Result {
    const LEN: u16 = 65_000;
    for _ in 0..2 {
        let (mut stream, _): (TcpStream, _) = listener.accept()?;
        stream.set_read_timeout(Some(Duration::from_secs(60)))?;
        let mut len = [0; 2];
        stream.read_exact(&mut len)?;
        let mut answer = vec![0; usize::from(u16::from_be_bytes(len))];
        stream.read_exact(&mut answer)?;
        answer.resize(LEN.into(), b'.');
        stream.write_all(&[&LEN.to_be_bytes()[..], &answer].concat())?;
    }
    Ok(())
}

fn long_answers_over_tcp(env: &Env) -> Result {
    env.only_bulkhead()?;
    let namespace = Namespace::new(env, "tcpn")?.with_addresses(81)?;
    // That there is one shows in its socket for datagrams.
    let _datagrams = inside(&namespace, || UdpSocket::bind(PLACE))?;
    let listener = inside(&namespace, || TcpListener::bind(PLACE))?;
    let mut bundle = Bundle::debian(env)?;
    bundle.args(&["python3", "-c", ASK]);
    namespace.give_to(&mut bundle);

    let running = env.run(&bundle)?.spawn()?;
    answer_at_length(&listener)?;

    running.finish()?.expect_stdout("65000 True\n65000 True\n")
}

/// Without a resolver there, the place is the container's own.
fn nobody_to_ask(env: &Env) -> Result {
    let namespace = Namespace::new(env, "nons")?.with_addresses(82)?;
    let script = "nc -l -p 53 -e echo own & until nc 127.0.0.11 53 </dev/null; do sleep 0.1; done";
    let bundle = any_container(env, &namespace, script)?;

    let output = env.run(&bundle)?.output()?;

    ensure_eq!(output.stdout(), "own\n", "what is said there");
    ensure!(output.status.code() == Some(0), "{}", output.describe());
    Ok(())
}
