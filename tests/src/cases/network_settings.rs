// SPDX-License-Identifier: Apache-2.0
//! What a network namespace has besides interfaces: settings of its kernel, and rules that filter packets.

use super::network::{Namespace, any_container, container};
use super::{Case, case};
use crate::engines::debian_program;
use crate::env::Env;
use crate::failure::{Result, ensure};

pub(super) const CASES: &[Case] = &[case!(settings_for_all_interfaces), case!(rules_are_told_of)];

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
         ipv4/ip_local_port_range ipv4/tcp_fin_timeout; ping -c 1 -w 20 10.9.84.1 >/dev/null && echo reached",
    )?;
    bundle.set("/linux/sysctl", serde_json::json!({ "net.core.somaxconn": "55", "net.ipv4.tcp_fin_timeout": "33" }));

    env.run(&bundle)?.output()?.expect_stdout("55\n111\n1\n1\n1\n7000-7002\n0\n900\t999\n33\nreached\n")
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
