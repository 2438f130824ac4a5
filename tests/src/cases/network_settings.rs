// SPDX-License-Identifier: Apache-2.0
//! What a network namespace has besides interfaces: settings of its kernel, rules that filter packets, and routes of which the
//! guest does not have all.

use super::network::{Namespace, any_container, container};
use super::{Case, case};
use crate::engines::debian_program;
use crate::env::Env;
use crate::failure::{Result, ensure};

pub(super) const CASES: &[Case] =
    &[case!(settings_for_all_interfaces), case!(rules_are_told_of), case!(routes_that_the_host_uses)];

/// What is set in the namespace holds in the container; what its configuration says goes before that.
fn settings_for_all_interfaces(env: &Env) -> Result {
    let namespace = Namespace::new(env, "sysctl")?.with_addresses(84)?;
    // In this order alone the kernel takes the last two.
    for setting in [
        "core.somaxconn=77",
        "ipv4.tcp_keepalive_time=111",
        "ipv4.conf.all.arp_ignore=1",
        "ipv4.conf.all.forwarding=1",
        "ipv4.conf.all.accept_redirects=1",
        // It was turned on with all.
        "ipv4.conf.eth0.forwarding=0",
        "ipv4.ip_local_reserved_ports=7000-7002",
        "ipv4.ip_unprivileged_port_start=0",
        "ipv4.ip_local_port_range=900\t999",
    ] {
        namespace.set(setting)?;
    }
    let mut bundle = any_container(
        env,
        &namespace,
        "cd /proc/sys/net; cat core/somaxconn ipv4/tcp_keepalive_time ipv4/conf/all/arp_ignore ipv4/conf/all/forwarding \
         ipv4/conf/all/accept_redirects ipv4/ip_local_reserved_ports ipv4/ip_unprivileged_port_start \
         ipv4/ip_local_port_range ipv4/tcp_fin_timeout ipv4/conf/eth0/forwarding; ping -c 1 -w 20 10.9.84.1 >/dev/null && echo reached",
    )?;
    bundle.set("/linux/sysctl", serde_json::json!({ "net.core.somaxconn": "55", "net.ipv4.tcp_fin_timeout": "33" }));

    env.run(&bundle)?.output()?.expect_stdout("55\n111\n1\n1\n1\n7000-7002\n0\n900\t999\n33\n0\nreached\n")
}

/// Nobody is to rely on rules in the namespace: the container's packets do not come by them.
fn rules_are_told_of(env: &Env) -> Result {
    debian_program("/usr/sbin/nft", "nftables")?;
    debian_program("/usr/sbin/iptables-legacy", "iptables")?;
    let namespace = Namespace::new(env, "rules")?.with_addresses(85)?;
    let run =
        || env.run(&container(env, &namespace, "ping -c 1 -w 20 10.9.85.1 >/dev/null && echo reached")?)?.output();
    let said = "the rules of netfilter";

    // Such have no effect on anything.
    namespace.inside("nft add table ip empty")?;
    let output = run()?;
    output.expect_stdout("reached\n")?;
    ensure!(!output.stderr().contains(said), "{}", output.describe());

    namespace.inside("nft add table inet fw")?;
    namespace.inside("nft add chain inet fw out { type filter hook output priority 0 ; policy drop ; }")?;
    namespace.inside("nft add table ip6 more")?;
    namespace.inside("nft add chain ip6 more some")?;
    namespace.inside("nft add rule ip6 more some drop")?;
    namespace.inside("iptables-legacy -t mangle -A OUTPUT -p udp -j DROP")?;
    let output = run()?;
    output.expect_in_stdout(&["reached\n"])?;
    let tables =
        format!("{}, {said} (tables: inet fw, ip mangle, ip6 more) are not passed on", namespace.path.display());
    ensure!(output.stderr().contains(&tables), "no word of {tables:?}: {}", output.describe());
    Ok(())
}

/// Of several next hops, and of several routes to the same place, the guest has the one that the host uses.
fn routes_that_the_host_uses(env: &Env) -> Result {
    let namespace = Namespace::new(env, "routes")?.with_addresses(86)?;
    for command in [
        "link add eth1 type dummy",
        "addr add 10.9.87.2/24 dev eth1",
        "link set eth1 up",
        "route add 10.71.0.0/16 nexthop via 10.9.87.7 dev eth1 nexthop via 10.9.86.8 dev eth0",
        // With it the first next hop is dead.
        "link set eth1 down",
        "route add 10.72.0.0/16 nexthop via inet6 fd09:86::7 dev eth0 nexthop via 10.9.86.8 dev eth0",
        "route add 10.73.0.0/16 via 10.9.86.8",
        "route append 10.73.0.0/16 via 10.9.86.9",
        "route add local 10.74.0.0/16 dev lo",
    ] {
        namespace.inside(&format!("ip {command}"))?;
    }

    let output = env.run(&container(env, &namespace, "ip route | grep ^10.7")?)?.output()?;

    let via = |net: u8| format!("10.7{net}.0.0/16 via 10.9.86.8 dev eth0");
    output.expect_in_stdout(&[&via(1), &via(2), &via(3)])?;
    ensure!(output.stdout().lines().count() == 3, "more routes than three: {}", output.describe());
    for told in [
        "the route to 10.71.0.0/16 has several next hops, of which the guest has one",
        "the route to 10.72.0.0/16 has several next hops, of which the guest has one",
        "the route to 10.73.0.0/16, which comes behind another one",
        "the route to 10.74.0.0/16, which is of kind 2",
    ] {
        ensure!(output.stderr().contains(told), "no word of {told:?}: {}", output.describe());
    }
    Ok(())
}
