// SPDX-License-Identifier: Apache-2.0
//! Containers under docker, with the runtime's path, as its users type it.

use std::fs;
use std::io::{Read, Write};
use std::net::{IpAddr, TcpListener, UdpSocket};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::network::{answer_name, answer_to, host};
use super::{Case, case};
use crate::engines::{BY_NAME, Docker, PAUSE, SHIM, USAGE, expect_usage_of_busy_box};
use crate::env::Env;
use crate::failure::{Context as _, Result, ensure, ensure_eq, skip};
use crate::pty::Terminal;

/// How long what is waited for may take.
const LIMIT: Duration = Duration::from_secs(120);

pub(super) const CASES: &[Case] = &[
    case!(foreground),
    case!(script_with_a_missing_interpreter),
    case!(init_of_the_engine),
    case!(usage_is_told).limit(600),
    case!(detached),
    case!(stopped_with_much_to_say).limit(600),
    case!(restarted),
    case!(bridge_and_published_port).limit(900),
    case!(connected_and_disconnected).limit(900),
    case!(names_on_a_network_of_ones_own).limit(900),
    case!(names_from_elsewhere).limit(900),
    case!(restarted_always).limit(600),
    case!(files_and_limits).limit(600),
    case!(terminals_and_logs).limit(600),
    case!(by_shim).limit(900),
];

fn foreground(env: &Env) -> Result {
    let docker = Docker::new(env)?;

    docker.run(&["--rm"], &["echo", "hello"]).output()?.expect_stdout("hello\n")?;
    docker.run(&["--rm"], &["sh", "-c", "exit 7"]).output()?.expect_code(7)?;
    docker.run(&["--rm", "-i"], &["wc", "-c"]).input(vec![b'x'; 300_000]).output()?.expect_stdout("300000\n")?;
    docker.run(&["--rm"], &["no-such-program"]).output()?.expect_code(127)?;
    docker.end()
}

/// The engine finds the words for 127 in the runtime's log.
fn script_with_a_missing_interpreter(env: &Env) -> Result {
    env.only_bulkhead()?; // runc's `start` is over before its program is executed.
    let docker = Docker::new(env)?;
    let script = env.work.join("script");
    fs::write(&script, "#!/no/such/interpreter\n")?;
    fs::set_permissions(&script, fs::Permissions::from_mode(0o755))?;
    let volume = format!("{}:/script", script.display());
    docker.run(&["--rm", "-v", &volume], &["/script"]).output()?.expect_code(127)?;
    docker.end()
}

fn init_of_the_engine(env: &Env) -> Result {
    let init = Path::new("/usr/bin/docker-init");
    if !init.exists() {
        skip!("there is no {} (package docker.io)", init.display());
    }
    let docker = Docker::new(env)?;

    let script = "tr '\\0' ' ' </proc/1/cmdline; echo; exit 5";
    let output = docker.run(&["--rm", "--init"], &["sh", "-c", script]).output()?;

    output.expect_code(5)?;
    ensure!(output.stdout().contains("init -- sh -c"), "the command line of process 1: {}", output.describe());
    docker.end()
}

/// What it uses is that of its machine: more than nothing, and within its limits.
fn usage_is_told(env: &Env) -> Result {
    let docker = Docker::new(env)?;
    let script = "i=0; while :; do i=$((i+1)); done";
    docker.run(&["-d", "--name", "box", "--memory", "128m"], &["sh", "-c", script]).output()?.expect_code(0)?;

    let told = docker.succeed(["stats", "--no-stream", "--format", USAGE, "box"])?;

    expect_usage_of_busy_box(&told.stdout())?;
    docker.succeed(["rm", "--force", "box"])?;
    docker.end()
}

fn detached(env: &Env) -> Result {
    let docker = Docker::new(env)?;
    let script = "trap 'exit 3' TERM; echo up; while :; do sleep 0.1; done";
    docker.run(&["-d", "--name", "box", "--memory", "128m"], &["sh", "-c", script]).output()?.expect_code(0)?;

    docker.call(["exec", "box", "sh", "-c", "cat /sys/fs/cgroup/memory.max; exit 9"]).output()?.expect_code(9)?;
    docker.call(["exec", "-i", "box", "cat"]).input("through").output()?.expect_stdout("through")?;
    docker.succeed(["logs", "box"])?.expect_stdout("up\n")?;
    docker.succeed(["pause", "box"])?;
    docker.succeed(["unpause", "box"])?;
    docker.succeed(["stop", "--time", "30", "box"])?;
    docker.succeed(["inspect", "--format", "{{.State.ExitCode}}", "box"])?.expect_stdout("3\n")?;
    docker.succeed(["rm", "box"])?;
    docker.end()
}

/// What it writes on its way out is all there when it is told to have ended, for the log and for who follows that.
fn stopped_with_much_to_say(env: &Env) -> Result {
    // More than pipes hold. The daemon keeps each line as JSON.
    const NUMBERS: u32 = 20_000;
    let docker = Docker::new(env)?;
    let script = format!("trap 'seq {NUMBERS}; exit 3' TERM; echo up; while :; do sleep 0.1; done");
    docker.run(&["-d", "--name", "box"], &["sh", "-c", &script]).output()?.expect_code(0)?;
    wait_for_log(&docker, 1)?;
    let following = docker.call(["logs", "--follow", "box"]).spawn()?;

    docker.succeed(["stop", "--time", "60", "box"])?;

    docker.succeed(["inspect", "--format", "{{.State.ExitCode}}", "box"])?.expect_stdout("3\n")?;
    let numbers = (1..=NUMBERS).map(|number| number.to_string());
    let expected = std::iter::once("up".to_owned()).chain(numbers).collect::<Vec<_>>().join("\n") + "\n";
    for (who, told) in [("the log", docker.succeed(["logs", "box"])?), ("who follows", following.finish()?)] {
        let told = told.stdout();
        ensure!(told == expected, "{who} has {} bytes of {}", told.len(), expected.len());
    }
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
    let docker = Docker::with_shims(env)?;

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

/// A container that runs comes into a further network, and leaves it.
fn connected_and_disconnected(env: &Env) -> Result {
    let docker = Docker::with_bridge(env)?;
    docker.succeed(["network", "create", "--subnet", "10.87.0.0/24", "second"])?;
    docker.run_on_bridge(&["-d", "--name", "box"], &["sleep", "1000"]).output()?.expect_code(0)?;
    let inside = |script: &str| docker.succeed(["exec", "box", "timeout", "60", "sh", "-c", script]);

    for _ in 0..2 {
        docker.succeed(["network", "connect", "second", "box"])?;
        inside("until ip -o -4 addr show | grep -F ' 10.87.0.'; do sleep 0.1; done")?;
        inside("until ping -c 1 -w 5 10.87.0.1; do sleep 0.1; done")?;
        docker.succeed(["network", "disconnect", "second", "box"])?;
        inside(
            "while ip -o -4 addr show | grep -F ' 10.87.0.'; do sleep 0.1; done; ! ip link show dev eth1 2>/dev/null",
        )?;
        // The first network is as it was.
        inside("ping -c 1 -w 30 172.17.0.1")?;
    }
    docker.succeed(["rm", "--force", "box"])?;
    docker.succeed(["network", "rm", "second"])?;
    docker.end()
}

/// On such a network containers find each other by name; docker's resolver is at a loopback address.
fn names_on_a_network_of_ones_own(env: &Env) -> Result {
    let docker = Docker::with_bridge(env)?;
    docker.succeed(["network", "create", "own"])?;
    let page = "mkdir /www; echo from the container >/www/index.html; httpd -p 80 -h /www; sleep 1000";
    let options = ["-d", "--network", "own", "--name", "server"];
    docker.run_on_bridge(&options, &["sh", "-c", page]).output()?.expect_code(0)?;

    let ask = "cat /etc/resolv.conf; wget -q -O - http://server/ || { sleep 5; wget -q -O - http://server/; }";
    let client = docker.run_on_bridge(&["--rm", "--network", "own"], &["sh", "-c", ask]).output()?;
    client.expect_in_stdout(&["nameserver 127.0.0.11\n", "from the container\n"])?;
    docker.succeed(["rm", "--force", "server"])?;
    docker.succeed(["network", "rm", "own"])?;
    docker.end()
}

/// Asks for example.test, by a datagram and over TCP.
const ASK: &str = r#"nslookup -type=a example.test
printf '\000\036\022\064\001\000\000\001\000\000\000\000\000\000\007example\004test\000\000\001\000\001' |
    nc 127.0.0.11 53 | hexdump -v -e '/1 "%02x"'"#;

/// Names that docker does not know it asks others for, from within the container's namespace.
fn names_from_elsewhere(env: &Env) -> Result {
    const SERVER: &str = "10.88.0.1:53";
    let docker = Docker::with_bridge(env)?;
    docker.succeed(["network", "create", "--subnet", "10.88.0.0/24", "own"])?;
    let (datagrams, connections) = (UdpSocket::bind(SERVER)?, TcpListener::bind(SERVER)?);
    datagrams.set_read_timeout(Some(LIMIT))?;

    let options = ["--rm", "--network", "own", "--dns", "10.88.0.1", "--name", "box"];
    let asking = docker.run_on_bridge(&options, &["sh", "-c", &format!("{ASK}; nslookup -type=a box")]).spawn()?;
    answer_name(&datagrams)?;
    let (mut asked, _) = connections.accept()?;
    asked.set_read_timeout(Some(LIMIT))?;
    let mut len = [0; 2];
    asked.read_exact(&mut len)?;
    let mut question = vec![0; u16::from_be_bytes(len).into()];
    asked.read_exact(&mut question)?;
    let answer = answer_to(question);
    asked.write_all(&[&(answer.len() as u16).to_be_bytes()[..], &answer].concat())?;

    // The last is what docker knows.
    asking.finish()?.expect_in_stdout(&["Address: 1.2.3.4\n", "000401020304", "Name:\tbox\nAddress: 10.88.0.2\n"])?;
    docker.succeed(["network", "rm", "own"])?;
    docker.end()
}

/// However its end comes: by its own doing, or because its machine is lost.
fn restarted_always(env: &Env) -> Result {
    let docker = Docker::new(env)?;
    let script = "trap 'exit 3' TERM; echo up; while :; do sleep 0.1; done";
    docker.run(&["-d", "--name", "box", "--restart", "always"], &["sh", "-c", script]).output()?.expect_code(0)?;
    wait_for_log(&docker, 1)?;

    docker.succeed(["exec", "box", "kill", "-TERM", "1"])?;
    wait_for_log(&docker, 2)?;
    let pid = docker.succeed(["inspect", "--format", "{{.State.Pid}}", "box"])?.stdout();
    let pid: i32 = pid.trim().parse().context(|| format!("the container's pid {pid:?}"))?;
    kill(Pid::from_raw(pid), Signal::SIGKILL)?;
    wait_for_log(&docker, 3)?;

    docker.succeed(["exec", "box", "echo", "fine"])?.expect_stdout("fine\n")?;
    docker.succeed(["inspect", "--format", "{{.RestartCount}}", "box"])?.expect_stdout("2\n")?;
    docker.succeed(["stop", "--time", "30", "box"])?;
    docker.succeed(["inspect", "--format", "{{.State.Running}}", "box"])?.expect_stdout("false\n")?;
    docker.succeed(["rm", "box"])?;
    docker.end()
}

/// Waits until the container has said `up` as often.
fn wait_for_log(docker: &Docker<'_>, times: usize) -> Result {
    let end = Instant::now() + LIMIT;
    loop {
        let log = docker.succeed(["logs", "box"])?;
        if log.stdout().matches("up\n").count() >= times {
            return Ok(());
        }
        ensure!(Instant::now() < end, "the container has not said `up` {times} times: {}", log.describe());
        thread::sleep(PAUSE);
    }
}

fn files_and_limits(env: &Env) -> Result {
    let docker = Docker::new(env)?;
    let limited = ["-d", "--name", "box", "--memory", "128m", "--memory-swap", "-1", "--pids-limit", "50"];
    docker.run(&limited, &["sleep", "1000"]).output()?.expect_code(0)?;
    let (there, back) = (env.work.join("there"), env.work.join("back"));
    fs::write(&there, "to the container\n")?;
    let [from, to] = [&there, &back].map(|path| path.display().to_string());

    docker.succeed(["cp", &from, "box:/there"])?;
    docker.succeed(["exec", "box", "cat", "/there"])?.expect_stdout("to the container\n")?;
    docker.succeed(["exec", "box", "sh", "-c", "echo from the container >/back; sync"])?;
    docker.succeed(["cp", "box:/back", &to])?;
    let copied = fs::read_to_string(&back)?;
    ensure!(copied == "from the container\n", "what was copied from the container: {copied:?}");

    let limits = ["exec", "box", "sh", "-c", "cat /sys/fs/cgroup/memory.max /sys/fs/cgroup/pids.max"];
    docker.succeed(limits)?.expect_stdout("134217728\n50\n")?;
    docker.succeed(["update", "--memory", "64m", "--pids-limit", "40", "box"])?;
    docker.succeed(limits)?.expect_stdout("67108864\n40\n")?;
    // More than the machine had when it was made: 128 and 96.
    docker.succeed(["update", "--memory", "300m", "box"])?;
    let hold = "dd if=/dev/zero of=/dev/null bs=260M count=1 2> /dev/null && echo held";
    docker.succeed(["exec", "box", "sh", "-c", hold])?.expect_stdout("held\n")?;

    // Nothing in it heeds TERM.
    docker.succeed(["stop", "--time", "1", "box"])?;
    docker.succeed(["inspect", "--format", "{{.State.ExitCode}}", "box"])?.expect_stdout("137\n")?;
    docker.succeed(["rm", "box"])?;
    docker.end()
}

fn terminals_and_logs(env: &Env) -> Result {
    let docker = Docker::new(env)?;
    let mut terminal = Terminal::new(33, 77)?;
    let options = ["-it", "--name", "box", "--rm"];
    let mut running = terminal.spawn(docker.run(&options, &["sh"]))?;
    terminal.type_text("echo re''ady\n")?;
    terminal.wait_for("ready")?;

    let mut logs = docker.call(["logs", "--follow", "box"]).spawn()?;
    logs.wait_for("ready")?;
    let mut second = Terminal::new(20, 60)?;
    let exec = second.spawn(docker.call(["exec", "-it", "box", "sh"]))?;
    // The client tells the size when the process is there already.
    second.type_text("while [ \"$(stty size)\" != '20 60' ]; do sleep 0.1; done; echo sec''ond; exit 4\n")?;
    second.wait_for("second")?;
    exec.finish()?.expect_code(4)?;
    ensure!(running.is_running()?, "the end of a process is not the end of the container");
    terminal.type_text("echo lat''er; exit 5\n")?;
    running.finish()?.expect_code(5)?;
    logs.finish()?.expect_in_stdout(&["later"])?;
    docker.end()
}
