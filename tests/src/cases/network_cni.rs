// SPDX-License-Identifier: Apache-2.0
//! Namespaces into which plugins of CNI have put an interface, as containerd, CRI-O and Multus have them do it.

use std::path::PathBuf;

use serde_json::{Value, json};

use super::network::{Namespace, any_container, host};
use super::network_kinds::{Cable, reaches_and_serves};
use super::{Case, case};
use crate::engines::debian_program;
use crate::env::Env;
use crate::failure::{Result, ensure};

pub(super) const CASES: &[Case] = &[case!(ptp), case!(macvlan), case!(ipvlan), case!(tuning)];

/// A plugin, and what it is told of the network.
struct Plugin<'e> {
    env: &'e Env,
    program: PathBuf,
    configuration: Value,
}

impl<'e> Plugin<'e> {
    /// One of that kind for network number `net`, whose first address is the gateway's, and whose second is the first to be given.
    fn new(env: &'e Env, kind: &str, net: u8, settings: &Value) -> Result<Self> {
        let program = debian_program(&format!("/usr/lib/cni/{kind}"), "containernetworking-plugins")?;
        let mut configuration = json!({
            "cniVersion": "0.4.0", "name": "e2e", "type": kind,
            "ipam": {
                "type": "host-local", "dataDir": env.work.join("addresses"),
                "ranges": [[{ "subnet": format!("10.9.{net}.0/24") }], [{ "subnet": format!("fd09:{net}::/64") }]],
                "routes": [{ "dst": "0.0.0.0/0" }, { "dst": "::/0" }],
            },
        });
        for (name, value) in settings.as_object().into_iter().flatten() {
            configuration[name] = value.clone();
        }
        Ok(Self { env, program, configuration })
    }

    /// Has it do something about `eth0` of a namespace, and returns what it says.
    fn call(&self, command: &str, namespace: &Namespace) -> Result<String> {
        let no_words: [&str; 0] = [];
        let run = self.env.tool(&self.program, no_words).input(self.configuration.to_string());
        let run = run.variable("CNI_COMMAND", command).variable("CNI_CONTAINERID", self.env.id_prefix());
        let run = run.variable("CNI_NETNS", &namespace.path).variable("CNI_IFNAME", "eth0");
        let folder = self.program.parent().unwrap_or(&self.program);
        let output = run.variable("CNI_PATH", folder).output()?;
        output.expect_code(0)?;
        Ok(output.stdout())
    }
}

/// Runs a container on what a plugin makes, and has that taken away.
fn exchange(env: &Env, plugin: &Plugin<'_>, net: u8) -> Result {
    let namespace = Namespace::empty(env, "cni")?;
    plugin.call("ADD", &namespace)?;
    reaches_and_serves(env, &namespace, net)?;
    plugin.call("DEL", &namespace)?;
    let left = namespace.inside("ip -o link")?;
    ensure!(!left.contains("eth0"), "the plugin has not taken the interface away: {left}");
    Ok(())
}

/// A veth pair with routes by way of the gateway alone, also to the network's own addresses.
fn ptp(env: &Env) -> Result {
    // The plugin has the host forward packets.
    env.own_network()?;
    let plugin = Plugin::new(env, "ptp", 47, &json!({ "ipMasq": false }))?;
    exchange(env, &plugin, 47)?;

    let namespace = Namespace::empty(env, "cni")?;
    plugin.call("ADD", &namespace)?;
    let script = "ip route get 10.9.47.77; ip -6 route get fd09:47::77";
    env.run(&any_container(env, &namespace, script)?)?
        .output()?
        .expect_in_stdout(&["10.9.47.77 via 10.9.47.1 ", " via fd09:47::1 "])?;
    plugin.call("DEL", &namespace).map(drop)
}

fn macvlan(env: &Env) -> Result {
    on_a_cable(env, "macvlan", "bridge", 48)
}

fn ipvlan(env: &Env) -> Result {
    on_a_cable(env, "ipvlan", "l2", 49)
}

fn on_a_cable(env: &Env, kind: &str, mode: &str, net: u8) -> Result {
    env.own_network()?;
    let cable = Cable::new(&net.to_string())?;
    for address in [format!("10.9.{net}.1/24"), format!("fd09:{net}::1/64 nodad")] {
        host(&format!("ip addr add {address} dev {}", cable.upper))?;
    }
    let plugin = Plugin::new(env, kind, net, &json!({ "master": cable.lower, "mode": mode }))?;
    exchange(env, &plugin, net)
}

/// A plugin that comes after another, and changes what that has made.
fn tuning(env: &Env) -> Result {
    env.own_network()?;
    let namespace = Namespace::empty(env, "cni")?;
    let first = Plugin::new(env, "ptp", 55, &json!({ "ipMasq": false }))?;
    let made: Value = serde_json::from_str(&first.call("ADD", &namespace)?)?;
    let sysctl = json!({ "net.ipv4.conf.eth0.arp_ignore": "2", "net.ipv4.conf.eth0.rp_filter": "1" });
    let settings = json!({ "sysctl": sysctl, "mac": "02:09:55:00:00:77", "mtu": 1370, "prevResult": made });
    let plugin = Plugin::new(env, "tuning", 55, &settings)?;
    plugin.call("ADD", &namespace)?;
    let script = "cd /sys/class/net/eth0; cat address mtu; cd /proc/sys/net/ipv4/conf/eth0; cat arp_ignore rp_filter; \
                  ping -c 1 -w 20 10.9.55.1 >/dev/null && echo reached";

    env.run(&any_container(env, &namespace, script)?)?
        .output()?
        .expect_stdout("02:09:55:00:00:77\n1370\n2\n1\nreached\n")?;

    plugin.call("DEL", &namespace)?;
    first.call("DEL", &namespace).map(drop)
}
