// SPDX-License-Identifier: Apache-2.0
//! Containers under docker, with the runtime's path, as its users type it.

use std::io::Write;
use std::net::{IpAddr, TcpListener};
use std::path::Path;

use super::network::host;
use super::{Case, case};
use crate::engines::{BY_NAME, Docker, SHIM};
use crate::env::Env;
use crate::failure::{Context as _, Result, ensure, ensure_eq};

pub(super) const CASES: &[Case] = &[
    case!(foreground),
    case!(detached),
    case!(restarted),
    case!(by_shim).limit(900),
    case!(bridge_and_published_port).limit(900),
];

fn foreground(env: &Env) -> Result {
    let docker = Docker::new(env)?;

    docker.run(&["--rm"], &["echo", "hello"]).output()?.expect_stdout("hello\n")?;
    docker.run(&["--rm"], &["sh", "-c", "exit 7"]).output()?.expect_code(7)?;
    docker.run(&["--rm", "-i"], &["wc", "-c"]).input(vec![b'x'; 300_000]).output()?.expect_stdout("300000\n")?;
    docker.run(&["--rm"], &["no-such-program"]).output()?.expect_code(127)?;
    if Path::new("/usr/bin/docker-init").exists() {
        let output = docker.run(&["--rm", "--init"], &["sh", "-c", "cat /proc/1/comm"]).output()?;
        output.expect_in_stdout(&["init"])?;
    }
    docker.end()
}

fn detached(env: &Env) -> Result {
    let docker = Docker::new(env)?;
    let script = "trap 'exit 3' TERM; echo up; while :; do sleep 0.1; done";
    docker.run(&["-d", "--name", "box", "--memory", "128m"], &["sh", "-c", script]).output()?.expect_code(0)?;

    docker.call(["exec", "box", "sh", "-c", "cat /sys/fs/cgroup/memory.max; exit 9"]).output()?.expect_code(9)?;
    docker.call(["exec", "-i", "box", "cat"]).input("through").output()?.expect_stdout("through")?;
    docker.succeed(["logs", "box"])?.expect_stdout("up\n")?;
    docker.succeed(["stats", "--no-stream", "--format", "{{.Name}}", "box"])?.expect_stdout("box\n")?;
    docker.succeed(["pause", "box"])?;
    docker.succeed(["unpause", "box"])?;
    docker.succeed(["stop", "--time", "30", "box"])?;
    docker.succeed(["inspect", "--format", "{{.State.ExitCode}}", "box"])?.expect_stdout("3\n")?;
    docker.succeed(["rm", "box"])?;
    docker.end()
}

fn restarted(env: &Env) -> Result {
    let docker = Docker::new(env)?;

    docker
        .run(&["-d", "--name", "box", "--restart", "on-failure:1"], &["sh", "-c", "echo once more; exit 1"])
        .output()?
        .expect_code(0)?;

    let waited = docker.succeed(["wait", "box"])?;
    ensure!(waited.stdout() == "1\n", "what wait tells: {}", waited.describe());
    // The first wait may have ended with the first run.
    docker.succeed(["wait", "box"])?;
    docker.succeed(["inspect", "--format", "{{.RestartCount}}", "box"])?.expect_stdout("1\n")?;
    docker.succeed(["logs", "box"])?.expect_stdout("once more\nonce more\n")?;
    docker.succeed(["rm", "box"])?;
    docker.end()
}

/// The runtime by the name of its shim: on the command line, and in the daemon's configuration.
fn by_shim(env: &Env) -> Result {
    env.only_bulkhead()?;
    let docker = Docker::new(env)?;
    docker.require_shims()?;

    docker
        .run_by(SHIM, &["--rm", "-i"], &["wc", "-c"])
        .input(vec![b'x'; 300_000])
        .output()?
        .expect_stdout("300000\n")?;
    docker.run_by(BY_NAME, &["--rm"], &["sh", "-c", "exit 7"]).output()?.expect_code(7)?;
    let script = "trap 'exit 3' TERM; echo up; while :; do sleep 0.1; done";
    docker.run_by(SHIM, &["-d", "--name", "box"], &["sh", "-c", script]).output()?.expect_code(0)?;
    docker.call(["exec", "box", "sh", "-c", "echo out; exit 9"]).output()?.expect_code(9)?;
    docker.call(["exec", "-i", "box", "cat"]).input("through").output()?.expect_stdout("through")?;
    docker.succeed(["logs", "box"])?.expect_stdout("up\n")?;
    docker.succeed(["stop", "--time", "30", "box"])?;
    docker.succeed(["inspect", "--format", "{{.State.ExitCode}}", "box"])?.expect_stdout("3\n")?;
    let runtime = docker.succeed(["inspect", "--format", "{{.HostConfig.Runtime}}", "box"])?.stdout();
    ensure_eq!(runtime.trim(), SHIM, "the runtime of the container");
    docker.succeed(["rm", "box"])?;
    docker.end()
}

/// Serves a page from port 80, and says what it gets from a port of the host.
const EXCHANGE: &str = "mkdir /www; echo from the container >/www/index.html; httpd -p 80 -h /www; \
                        gateway=$(ip route | sed -n 's/^default via \\([^ ]*\\).*/\\1/p'); nc $gateway 4010; sleep 1000";

/// Waits for somebody who connects, greets, and returns where that is.
fn greet(listener: &TcpListener) -> Result<IpAddr> {
    let (mut stream, from) = listener.accept().context(|| "waiting for the container".to_owned())?;
    stream.write_all(b"from the host\n")?;
    Ok(from.ip())
}

fn bridge_and_published_port(env: &Env) -> Result {
    let docker = Docker::with_bridge(env)?;
    let listener = TcpListener::bind("0.0.0.0:4010")?;
    let options = ["-d", "--name", "box", "-p", "8010:80"];
    docker.run_on_bridge(&options, &["sh", "-c", EXCHANGE]).output()?.expect_code(0)?;

    let address = greet(&listener)?;
    for place in [format!("{address}:80"), "127.0.0.1:8010".to_owned(), "172.17.0.1:8010".to_owned()] {
        ensure_eq!(host(&format!("busybox wget -q -O - http://{place}/"))?, "from the container\n", "the page");
    }
    docker.succeed(["logs", "box"])?.expect_stdout("from the host\n")?;
    // A second one reaches the first.
    let page = format!("http://{address}/");
    let second = docker.run_on_bridge(&["--rm"], &["wget", "-q", "-O", "-", &page]).output()?;
    second.expect_stdout("from the container\n")?;
    docker.succeed(["rm", "--force", "box"])?;
    docker.end()
}
