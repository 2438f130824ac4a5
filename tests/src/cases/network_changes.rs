// SPDX-License-Identifier: Apache-2.0
//! What changes in a namespace while the container runs, and is not to be had without something else: addresses that take each
//! other's place, what the kernel takes along with them, what the guest refuses or has to wait for.

use std::fs;
use std::path::PathBuf;
use std::thread;
use std::time::{Duration, Instant};

use super::network::{Namespace, any_container, container, host};
use super::network_later::{give, move_away, move_back};
use super::{Case, case};
use crate::bundle::Bundle;
use crate::detached::Detached;
use crate::env::Env;
use crate::failure::{Result, ensure, skip};

pub(super) const CASES: &[Case] = &[
    case!(what_takes_the_place_of_another),
    case!(a_rule_goes_alone),
    case!(a_route_of_an_address_that_is_not_ready),
    case!(a_start_waits_for_an_address),
    case!(what_the_guest_refuses_keeps_nothing_back),
    case!(a_look_that_fails_is_not_the_last),
    case!(away_and_back_unseen),
];

/// For shells: waits for something, and says so. Not for ever: a failure is to show.
const SOON: &str =
    "soon() { for i in $(seq 600); do eval \"$2\" && { echo $1; return; }; sleep 0.1; done; ip addr; ip route; }; ";

/// Has `ip` do several things at once in a namespace.
fn at_once(env: &Env, namespace: &Namespace, commands: &[&str]) -> Result {
    let batch = env.work.join("batch");
    fs::write(&batch, commands.join("\n") + "\n")?;
    namespace.inside(&format!("ip -batch {}", batch.display())).map(drop)
}

/// What goes makes way for what comes, and the kernel takes other things along with it: those stay.
fn what_takes_the_place_of_another(env: &Env) -> Result {
    let namespace = Namespace::new(env, "instead")?.with_addresses(91)?;
    for net in [92, 93] {
        host(&format!("ip addr add 10.9.{net}.1/24 dev {}", namespace.host_end))?;
    }
    // Else a secondary address goes with its primary one on the host too.
    namespace.inside("sysctl -qw net.ipv4.conf.all.promote_secondaries=1")?;
    let lists = "a=$(ip -o -4 addr show dev eth0); r=$(ip route); case \"$a\" in *";
    let step = |seen: &str, there: &str, gone: &str, route: &str| {
        format!(
            "soon {seen} '{lists}{gone}*) false;; *{there}*) echo \"$r\" | grep -q \"{route}\";; *) false;; esac'; read line; "
        )
    };
    let script = [
        SOON,
        "echo ready; read line; ",
        &step("other", "10.9.92.2/24", "10.9.91.2/24", "^default via 10.9.91.1 dev eth0"),
        &step("second", "10.9.92.3/24", "10.9.92.2/24", "^10.71.0.0/16 via 10.9.92.1 dev eth0  src 10.9.92.3"),
        &step("elsewhere", "10.9.92.3/24", "none", "^default via 10.9.92.1 dev eth0"),
        "ping -c 1 -w 20 10.9.92.1 >/dev/null && echo reached; ip route | grep -c ^default",
    ];
    let bundle = any_container(env, &namespace, &script.concat())?;

    let mut running = env.run(&bundle)?.open_stdin().spawn()?;
    running.wait_for("ready\n")?;
    let steps: [(&str, &[&str]); 3] = [
        ("other", &["addr add 10.9.92.2/24 dev eth0", "addr del 10.9.91.2/24 dev eth0"]),
        ("second", &["addr del 10.9.92.2/24 dev eth0"]),
        ("elsewhere", &["route del default via 10.9.91.1 metric 77", "route add default via 10.9.92.1 metric 77"]),
    ];
    for (seen, commands) in steps {
        if seen == "second" {
            let route = "route add 10.71.0.0/16 via 10.9.92.1 src 10.9.92.3";
            at_once(env, &namespace, &["addr add 10.9.92.3/24 dev eth0", route])?;
        }
        at_once(env, &namespace, commands)?;
        running.write(b"\n")?;
        running.wait_for(&format!("{seen}\n"))?;
    }
    running.write(b"\n")?;

    running.finish()?.expect_stdout("ready\nother\nsecond\nelsewhere\nreached\n1\n")
}

/// The kernel would take the other one for it, which says the same and more.
fn a_rule_goes_alone(env: &Env) -> Result {
    let namespace = Namespace::new(env, "rule")?.with_addresses(104)?;
    let all = "table 5 priority 100";
    for which in ["fwmark 7", "from all"] {
        namespace.inside(&format!("ip rule add {which} {all}"))?;
    }
    let script = format!(
        "{SOON} rules() {{ ip rule | grep ^100: | grep -c \"$1\"; }}; echo ready; read line; \
         soon alone 'test $(rules .)$(rules fwmark) = 11'; read line; soon none 'test $(rules .) = 0'"
    );
    let bundle = any_container(env, &namespace, &script)?;

    let mut running = env.run(&bundle)?.open_stdin().spawn()?;
    running.wait_for("ready\n")?;
    // The host's kernel would take the other one, too.
    let (gone, marked) = (format!("rule del {all}"), format!("rule add fwmark 7 {all}"));
    at_once(env, &namespace, &[&gone, &gone, &marked])?;
    running.write(b"\n")?;
    running.wait_for("alone\n")?;
    namespace.inside(&format!("ip {gone}"))?;
    running.write(b"\n")?;

    running.finish()?.expect_stdout("ready\nalone\nnone\n")
}

/// Gives `eth0` an IPv6 address that the host's kernel does not wait with, but the guest's does, and a route of it.
fn add_unprobed(inside: &impl Fn(&str) -> Result<String>, net: u8) -> Result {
    for setting in ["dad_transmits", "router_solicitation_delay"] {
        inside(&format!("sysctl -qw net.ipv6.conf.eth0.{setting}=0"))?;
    }
    inside(&format!("ip addr add fd09:{net}::7/64 dev eth0"))?;
    let end = Instant::now() + Duration::from_secs(60);
    while let Err(error) = inside(&format!("ip -6 route add fd78::/48 via fd09:{net}::1 src fd09:{net}::7")) {
        if Instant::now() > end {
            return Err(error);
        }
        thread::sleep(Duration::from_millis(5));
    }
    Ok(())
}

const HAS_ROUTE: &str = "ip -6 route | grep \"^fd78::/48 via fd09:.*::1 dev eth0  src fd09:.*::7\" >/dev/null";

fn a_route_of_an_address_that_is_not_ready(env: &Env) -> Result {
    let namespace = Namespace::new(env, "unready")?.with_addresses(94)?;
    let script = format!("{SOON} echo ready; read line; soon made '{HAS_ROUTE}'");
    let bundle = any_container(env, &namespace, &script)?;

    let mut running = env.run(&bundle)?.open_stdin().spawn()?;
    running.wait_for("ready\n")?;
    add_unprobed(&|command: &str| namespace.inside(command), 94)?;
    running.write(b"\n")?;

    running.finish()?.expect_stdout("ready\nmade\n")
}

fn a_start_waits_for_an_address(env: &Env) -> Result {
    let mut bundle = Bundle::busybox(env)?;
    bundle.sh(&format!("{HAS_ROUTE} && echo there"));
    let container = Detached::create(env, &bundle)?;
    let inside = |command: &str| host(&format!("nsenter --net=/proc/{}/ns/net {command}", container.pid));
    host(&format!("ip link add bhl-95 type veth peer name eth0 netns {}", container.pid))?;
    host("ip link set bhl-95 up")?;
    inside("ip link set eth0 up")?;
    inside("ip addr add fd09:95::2/64 dev eth0 nodad")?;
    add_unprobed(&inside, 95)?;

    container.must(&["start"])?;

    let status = container.wait()?;
    ensure!(status == 0 && container.output()? == "there\n", "{status}, {:?}", container.output()?);
    Ok(())
}

/// The container has taken away an address of which a route is to be.
fn what_the_guest_refuses_keeps_nothing_back(env: &Env) -> Result {
    let namespace = Namespace::new(env, "refused")?.with_addresses(96)?;
    namespace.inside("ip addr add 10.9.96.7/24 dev eth0")?;
    let script = format!(
        "{SOON} ip addr del 10.9.96.7/24 dev eth0; echo ready; read line; \
         soon 'the rest' 'ip route | grep -q ^10.72.0.0/16' && ip route | grep -c ^10.71; read line; \
         ip addr add 10.9.96.7/24 dev eth0; soon all 'ip route | grep -q ^10.71.0.0/16'"
    );
    let bundle = container(env, &namespace, &script)?;

    let mut running = env.run(&bundle)?.open_stdin().spawn()?;
    running.wait_for("ready\n")?;
    let routes = ["route add 10.71.0.0/16 via 10.9.96.1 src 10.9.96.7", "route add 10.72.0.0/16 via 10.9.96.1"];
    at_once(env, &namespace, &routes)?;
    running.write(b"\n")?;
    running.wait_for("the rest\n0\n")?;
    // The tries are over, and begin again with a change.
    thread::sleep(Duration::from_secs(20));
    running.write(b"\n")?;
    at_once(env, &namespace, &["route add 10.73.0.0/16 via 10.9.96.1"])?;
    let output = running.finish()?;

    output.expect_in_stdout(&["ready\nthe rest\n0\nall\n"])?;
    let told = "not passed on in full: cannot add the route to 10.71.0.0/16 by eth0: Invalid argument";
    ensure!(output.stderr().matches(told).count() == 1, "not once {told:?}: {}", output.describe());
    Ok(())
}

/// A cgroup of this case, whose processes can begin no others. They are where they were when it is dropped.
struct Paralysis {
    folder: PathBuf,
    back: PathBuf,
    pid: i32,
}

impl Paralysis {
    fn of(env: &Env, pid: i32) -> Result<Self> {
        let root = PathBuf::from("/sys/fs/cgroup");
        if !root.join("cgroup.controllers").exists() {
            skip!("the host has cgroups of version 1");
        }
        let own = fs::read_to_string(format!("/proc/{pid}/cgroup"))?;
        let own = own.lines().find_map(|line| line.strip_prefix("0::/")).unwrap_or_default();
        fs::write(root.join("cgroup.subtree_control"), "+pids")?;
        let paralysis = Self { folder: root.join(format!("{}paralysis", env.id_prefix())), back: root.join(own), pid };
        fs::create_dir(&paralysis.folder)?;
        fs::write(paralysis.folder.join("pids.max"), "1")?;
        fs::write(paralysis.folder.join("cgroup.procs"), pid.to_string())?;
        Ok(paralysis)
    }
}

impl Drop for Paralysis {
    fn drop(&mut self) {
        let _ = fs::write(self.back.join("cgroup.procs"), self.pid.to_string());
        let _ = fs::remove_dir(&self.folder);
    }
}

/// The supervisor cannot look at the namespace for a while, and then it can.
fn a_look_that_fails_is_not_the_last(env: &Env) -> Result {
    env.only_bulkhead()?;
    let mut bundle = Bundle::busybox(env)?;
    bundle.sh("ip -o -4 addr show dev eth0 | grep -c 10.9.97.2; ip -o -4 addr show dev eth0 | grep -c 10.9.98.2");
    let container = Detached::create(env, &bundle)?;
    let inside = |command: &str| host(&format!("nsenter --net=/proc/{}/ns/net {command}", container.pid));
    let paralysis = Paralysis::of(env, container.pid)?;
    host(&format!("ip link add bhl-97 type veth peer name eth0 netns {}", container.pid))?;
    host("ip link set bhl-97 up")?;
    inside("ip link set eth0 up")?;
    inside("ip addr add 10.9.97.2/24 dev eth0")?;
    // It has been seen, in vain.
    thread::sleep(Duration::from_secs(3));
    drop(paralysis);
    inside("ip addr add 10.9.98.2/24 dev eth0")?;

    container.must(&["start"])?;

    let status = container.wait()?;
    ensure!(status == 0 && container.output()? == "1\n1\n", "{status}, {:?}", container.output()?);
    Ok(())
}

/// An interface has left the namespace and come back before the supervisor could look: all that hung on it is gone.
fn away_and_back_unseen(env: &Env) -> Result {
    env.only_bulkhead()?;
    let elsewhere = Namespace::empty(env, "elsewhere")?;
    let mut bundle = Bundle::busybox(env)?;
    let ping = "'ping -c 1 -w 2 10.9.88.1 >/dev/null'";
    bundle.sh(&format!("{SOON} soon reached {ping}; soon moved 'ip -o addr | grep -q 10.9.88.3/'; soon again {ping}"));
    let container = Detached::create(env, &bundle)?;
    give(container.pid, "eth0", 88)?;
    container.must(&["start"])?;
    container.wait_for("reached\n")?;

    let paralysis = Paralysis::of(env, container.pid)?;
    move_away(&container, &elsewhere)?;
    move_back(&container, &elsewhere, "10.9.88.3/24")?;
    drop(paralysis);

    container.wait_for("reached\nmoved\nagain\n")?;
    let status = container.wait()?;
    ensure!(status == 0, "the status is {status}: {:?}", container.output()?);
    Ok(())
}
