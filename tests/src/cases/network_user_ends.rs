// SPDX-License-Identifier: Apache-2.0
//! How a network that passt makes ends, and where it is refused.

use std::fs;
use std::net::TcpListener;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::json;

use super::network::{Namespace, host};
use super::network_user::{PATIENCE, container, host_network};
use super::{Case, case};
use crate::bundle::Bundle;
use crate::env::Env;
use crate::failure::{Context as _, Result, ensure, fail};
use crate::processes::{self, Process};
use crate::run::Running;

pub(super) const CASES: &[Case] = &[
    case!(a_container_outlives_its_network),
    case!(passt_goes_with_the_supervisor),
    case!(a_stopped_passt_goes_with_the_supervisor),
    case!(what_passt_cannot_have_ends_the_start),
    case!(wrong_settings_are_refused),
    case!(a_hook_that_makes_a_network_is_refused),
    case!(an_absent_passt_is_told),
    case!(a_host_without_a_way_out_is_told),
];

/// The passt below a run. On a processor that can do it, it becomes another program of that name.
fn passt(running: &Running) -> Result<i32> {
    let is_passt = |process: &Process| process.name.starts_with("passt") && process.state != 'Z';
    match processes::descendants(running.pid()).into_iter().find(is_passt) {
        Some(process) => Ok(process.pid),
        None => fail!("no passt below the runtime"),
    }
}

fn end(pid: i32, signal: Signal) -> Result {
    kill(Pid::from_raw(pid), signal).context(|| format!("sending {signal} to process {pid}"))
}

fn a_container_outlives_its_network(env: &Env) -> Result {
    host_network(env)?;
    let script = "echo ready; until [ $(cat /sys/class/net/eth0/carrier) = 0 ]; do sleep 0.1; done; echo down; read line; echo end";
    let bundle = container(env, script, &[])?;
    let id = env.id();
    let mut running = env.run_as(&bundle, &id)?.open_stdin().spawn()?;
    running.wait_for("ready\n")?;

    end(passt(&running)?, Signal::SIGKILL)?;

    running.wait_for("down\n")?;
    env.call(["state", &id]).output()?.expect_in_stdout(&["\"io.bulkhead.net.backend\": \"none\""])?;
    running.write(b"\n")?;
    let output = running.finish()?;
    output.expect_in_stdout(&["ready\ndown\nend\n"])?;
    let told = output.stderr();
    ensure!(told.contains("no network from here on: passt was killed by signal 9"), "{}", output.describe());
    Ok(())
}

/// What is left of the run is found when the case has ended.
fn kill_supervisor(env: &Env, first: Option<Signal>) -> Result {
    host_network(env)?;
    let bundle = container(env, "echo ready; sleep 1000", &[("io.bulkhead.net.publish", "8080:80")])?;
    let mut running = env.run(&bundle)?.spawn()?;
    running.wait_for("ready\n")?;
    let pid = passt(&running)?;
    if let Some(signal) = first {
        end(pid, signal)?;
    }

    running.signal(Signal::SIGKILL)?;
    running.finish()?;

    let until = std::time::Instant::now() + PATIENCE;
    while Process::of(pid).is_some_and(|process| process.state != 'Z') {
        ensure!(std::time::Instant::now() < until, "passt has outlived its supervisor");
        std::thread::sleep(std::time::Duration::from_millis(20));
    }
    env.clean_up()
}

fn passt_goes_with_the_supervisor(env: &Env) -> Result {
    kill_supervisor(env, None)
}

fn a_stopped_passt_goes_with_the_supervisor(env: &Env) -> Result {
    kill_supervisor(env, Some(Signal::SIGSTOP))
}

fn what_passt_cannot_have_ends_the_start(env: &Env) -> Result {
    host_network(env)?;
    let published = |ports| container(env, "true", &[("io.bulkhead.net.publish", ports)]);
    let taken = TcpListener::bind("0.0.0.0:8080")?;
    let bundle = published("8081:80,8080:80")?;
    env.run(&bundle)?.output()?.expect_error(&["cannot publish the port 8080:80/tcp", "in use"])?;
    drop(taken);
    env.run(&bundle)?.output()?.expect_code(0)?;

    env.run(&published("192.0.2.77:8080:80")?)?.output()?.expect_error(&["192.0.2.77:8080:80/tcp", "ssign"])?;
    // Root may have it, and passt, which is nobody, may not.
    fs::write("/proc/sys/net/ipv4/ip_unprivileged_port_start", "1024")?;
    env.run(&published("80:80")?)?.output()?.expect_error(&["passt ended", "80:80"])
}

fn wrong_settings_are_refused(env: &Env) -> Result {
    host_network(env)?;
    for (key, value, words) in [
        ("io.bulkhead.net.user", "maybe", ["\"maybe\"", "true or false"]),
        ("io.bulkhead.net.publish", "80", ["\"80\"", "8080:80"]),
        ("io.bulkhead.net.publish", "8080:80,8080:81", ["8080:81", "8080:80/tcp has it"]),
        ("io.bulkhead.net.publish", "70000:80/tcp", ["70000:80", "is not a port"]),
        ("io.bulkhead.net.host_loopback", "1", ["\"1\"", "true or false"]),
        ("io.bulkhead.net.vhost", "true", ["io.bulkhead.net.user", "io.bulkhead.net.vhost"]),
    ] {
        let bundle = container(env, "true", &[(key, value)])?;
        env.run(&bundle)?.output()?.expect_error(&words)?;
    }
    let mut alone = Bundle::busybox(env)?;
    alone.annotation("io.bulkhead.net.publish", "8080:80");
    env.run(&alone)?.output()?.expect_error(&["io.bulkhead.net.publish", "without io.bulkhead.net.user=true"])?;
    let namespace = Namespace::new(env, "user")?;
    let mut bundle = container(env, "true", &[])?;
    namespace.give_to(&mut bundle);
    let path = namespace.path.display().to_string();
    env.run(&bundle)?.output()?.expect_error(&["io.bulkhead.net.user", "network namespace", &path])
}

fn a_hook_that_makes_a_network_is_refused(env: &Env) -> Result {
    host_network(env)?;
    let mut bundle = container(env, "ip -o addr show dev eth0", &[])?;
    let hook = |script: &str| json!([{ "path": "/bin/sh", "args": ["sh", "-c", script], "env": ["PATH=/usr/sbin:/usr/bin:/sbin:/bin"] }]);
    bundle.set("/hooks", json!({ "prestart": hook("nsenter --net=/proc/$PPID/ns/net ip link add bht-hook type veth peer name bht-peer") }));

    env.run(&bundle)?.output()?.expect_error(&["bht-", "io.bulkhead.net.user", "hook"])?;

    // One with other work is none of its business.
    bundle.set("/hooks", json!({ "prestart": hook("nsenter --net=/proc/$PPID/ns/net ip link set lo up") }));
    env.run(&bundle)?.output()?.expect_in_stdout(&["10.0.2.15"])?;
    ensure!(!host("ip -o link")?.contains("bht-"), "the hook's interface is the host's");
    Ok(())
}

fn an_absent_passt_is_told(env: &Env) -> Result {
    host_network(env)?;
    let bundle = container(env, "true", &[])?;

    let nowhere = env.folder("nowhere")?;
    env.run(&bundle)?
        .variable("PATH", &nowhere)
        .output()?
        .expect_error(&["apt install passt", "io.bulkhead.net.user"])?;
    let named = env.run(&bundle)?.variable("BULKHEAD_PASST", "/no/such/passt").output()?;
    named.expect_error(&["/no/such/passt", "apt install passt"])?;
    let found = env.run(&bundle)?.variable("PATH", &nowhere).variable("BULKHEAD_PASST", "/usr/bin/passt").output()?;
    found.expect_code(0)?;

    // A host that has none is as good as any for containers without it.
    let check = env.call(["check"]).variable("PATH", &nowhere).output()?;
    check.expect_in_stdout(&["ok   passt: ", "apt install passt"])?;
    env.call(["check"]).output()?.expect_in_stdout(&["ok   passt: /usr/bin/passt\n"])
}

fn a_host_without_a_way_out_is_told(env: &Env) -> Result {
    host_network(env)?;
    host("ip route del default")?;
    host("ip -6 route del default")?;

    env.run(&container(env, "true", &[])?)?.output()?.expect_error(&["no default route", "io.bulkhead.net.user"])
}
