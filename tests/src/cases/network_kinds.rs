// SPDX-License-Identifier: Apache-2.0
//! Namespaces whose interface is no veth: what CNI's plugins make of an interface of the host, and a tap.

use super::network::{Namespace, any_container, container, host};
use super::{Case, case};
use crate::env::Env;
use crate::failure::{Result, ensure, ensure_eq};

pub(super) const CASES: &[Case] = &[
    case!(macvlan),
    case!(ipvlan),
    case!(vlan),
    case!(vlan_made_inside),
    case!(tap),
    case!(kinds_that_are_refused),
    case!(ipvlan_whose_packets_are_routed_is_refused),
    case!(one_on_another_is_refused),
];

/// Two interfaces of the host joined by a cable: one is the host's, the other carries those of containers.
pub(super) struct Cable {
    pub(super) upper: String,
    pub(super) lower: String,
}

impl Cable {
    pub(super) fn new(name: &str) -> Result<Self> {
        let cable = Self { upper: format!("btu-{name}"), lower: format!("btl-{name}") };
        let Self { upper, lower } = &cable;
        host(&format!("ip link add {upper} type veth peer name {lower}"))?;
        host(&format!("ip link set {upper} up"))?;
        host(&format!("ip link set {lower} up"))?;
        Ok(cable)
    }
}

impl Drop for Cable {
    fn drop(&mut self) {
        // With it goes all that hangs on either end.
        let _ = host(&format!("ip link del {}", self.upper));
    }
}

/// Serves a page, and reaches the host, in network number `net`.
fn script(net: u8) -> String {
    format!(
        "mkdir /www; echo from the container >/www/index.html; httpd -p 80 -h /www; \
         ping -c 1 -w 20 10.9.{net}.1 >/dev/null && ping -6 -c 1 -w 20 fd09:{net}::1 >/dev/null && echo reached; \
         echo ready; read line"
    )
}

/// Runs a container on an interface of a kind that hangs on the lower end of a cable.
fn both_ways(env: &Env, kind: &str, net: u8) -> Result {
    let cable = Cable::new(&net.to_string())?;
    let namespace = Namespace::empty(env, "kind")?;
    let words = format!("type {kind}");
    host(&format!("ip link add link {} name eth0 netns {} {words}", cable.lower, namespace.path.display()))?;
    namespace.inside("ip link set eth0 up")?;
    let mut host_end = cable.upper.clone();
    if kind.starts_with("vlan") {
        host_end = format!("btv-{net}");
        host(&format!("ip link add link {} name {host_end} {words}", cable.upper))?;
        host(&format!("ip link set {host_end} up"))?;
    }
    namespace.addresses(&host_end, net)?;
    reaches_and_serves(env, &namespace, net)
}

/// Runs a container in a namespace that is number 2 in network number `net`, of which the host is number 1; nothing of it is left.
pub(super) fn reaches_and_serves(env: &Env, namespace: &Namespace, net: u8) -> Result {
    let before = namespace.leftovers()?;
    let bundle = any_container(env, namespace, &script(net))?;

    let mut running = env.run(&bundle)?.open_stdin().spawn()?;
    running.wait_for("ready\n")?;
    for address in [format!("10.9.{net}.2"), format!("[fd09:{net}::2]")] {
        ensure_eq!(host(&format!("busybox wget -q -O - http://{address}/"))?, "from the container\n", "the page");
    }
    running.write(b"\n")?;

    running.finish()?.expect_stdout("reached\nready\n")?;
    ensure_eq!(namespace.leftovers()?, before, "what is in the namespace");
    Ok(())
}

fn macvlan(env: &Env) -> Result {
    both_ways(env, "macvlan mode bridge", 40)
}

fn ipvlan(env: &Env) -> Result {
    both_ways(env, "ipvlan mode l2", 41)
}

fn vlan(env: &Env) -> Result {
    both_ways(env, "vlan id 7", 42)
}

/// Frames with a tag go through as they are.
fn vlan_made_inside(env: &Env) -> Result {
    let namespace = Namespace::new(env, "tag")?;
    let tagged = "btv-43";
    host(&format!("ip link add link {} name {tagged} type vlan id 9", namespace.host_end))?;
    host(&format!("ip addr add 10.9.43.1/24 dev {tagged}"))?;
    host(&format!("ip addr add fd09:43::1/64 dev {tagged} nodad"))?;
    host(&format!("ip link set {tagged} up"))?;
    let made = "ip link add link eth0 name tagged type vlan id 9; ip link set tagged up; \
                ip addr add 10.9.43.2/24 dev tagged; ip addr add fd09:43::2/64 dev tagged; \
                while ip -o -6 addr show dev tagged | grep -q tentative; do sleep 0.1; done; ";
    let bundle = any_container(env, &namespace, &(made.to_owned() + &script(43)))?;

    let mut running = env.run(&bundle)?.open_stdin().spawn()?;
    running.wait_for("ready\n")?;
    ensure_eq!(host("busybox wget -q -O - http://10.9.43.2/")?, "from the container\n", "the page");
    running.write(b"\n")?;

    running.finish()?.expect_stdout("reached\nready\n")
}

/// A tap of somebody else's, who is not there: the guest has it as the namespace has it.
fn tap(env: &Env) -> Result {
    let namespace = Namespace::empty(env, "tap")?;
    namespace.inside("ip tuntap add dev eth0 mode tap")?;
    namespace.inside("ip link set eth0 address 02:09:44:00:00:02 mtu 1300 up")?;
    namespace.inside("ip addr add 10.9.44.2/24 dev eth0")?;
    let bundle = container(env, &namespace, "cat /sys/class/net/eth0/address /sys/class/net/eth0/mtu; ip -o -4 addr")?;

    let output = env.run(&bundle)?.output()?;

    output.expect_code(0)?;
    output.expect_in_stdout(&["02:09:44:00:00:02\n1300\n", "inet 10.9.44.2/24"])
}

/// What is no interface of Ethernet's frames, or has none of its own, is named.
fn kinds_that_are_refused(env: &Env) -> Result {
    for (name, kind) in [("br7", "bridge"), ("vx7", "vxlan id 7 dstport 4789"), ("tun7", "tun")] {
        let namespace = Namespace::empty(env, name)?;
        if kind == "tun" {
            namespace.inside(&format!("ip tuntap add dev {name} mode tun"))?;
        } else {
            namespace.inside(&format!("ip link add {name} type {kind}"))?;
        }
        namespace.inside(&format!("ip link set {name} up"))?;
        let bundle = container(env, &namespace, "echo started")?;

        let output = env.run(&bundle)?.output()?;

        let kind = kind.split(' ').next().unwrap_or_default();
        output.expect_error(&[name, "network namespace", &format!("it is {kind}"), "possible are"])?;
        ensure!(!namespace.leftovers_of(name)?.contains("bh-"), "a tap is left beside {name}");
    }
    Ok(())
}

fn ipvlan_whose_packets_are_routed_is_refused(env: &Env) -> Result {
    let cable = Cable::new("46")?;
    for mode in ["l3", "l3s"] {
        let namespace = Namespace::empty(env, mode)?;
        let path = namespace.path.display();
        host(&format!("ip link add link {} name eth0 netns {path} type ipvlan mode {mode}", cable.lower))?;
        let bundle = container(env, &namespace, "echo started")?;

        let output = env.run(&bundle)?.output()?;

        output.expect_error(&[
            "eth0",
            "network namespace",
            &format!("it is ipvlan in mode {mode},"),
            "mode l2 works",
        ])?;
        // All interfaces on one have the same mode.
        namespace.inside("ip link del eth0")?;
    }
    Ok(())
}

/// All frames would go to the one below.
fn one_on_another_is_refused(env: &Env) -> Result {
    let namespace = Namespace::new(env, "stack")?;
    let bundle = container(env, &namespace, "ls /sys/class/net")?;
    for kind in ["vlan id 7", "macvlan mode bridge"] {
        namespace.inside(&format!("ip link add link eth0 name upper type {kind}"))?;
        let output = env.run(&bundle)?.output()?;
        output.expect_error(&["upper", "network namespace", "it lies on eth0 there", "make it in the container"])?;
        ensure!(!namespace.leftovers()?.contains("bh-"), "a tap is left beside a {kind}");
        namespace.inside("ip link del upper")?;
    }
    // The ends of a pair lie on nothing.
    namespace.inside("ip link add eth1 type veth peer name eth2")?;
    env.run(&bundle)?.output()?.expect_stdout("eth0\neth1\neth2\nlo\n")
}
