// SPDX-License-Identifier: Apache-2.0
//! What the kernel does by itself in a network namespace, wherever a packet comes from: the guest's does the same. It is a list of
//! what belongs to a namespace and is set for containers, by plugins of CNI or by hooks; what is set for one interface is told with
//! that (`link`).

use std::collections::HashMap;
use std::fs;
use std::path::Path;

/// Where they are, as the calling thread's network namespace has them.
pub(super) const FOLDER: &str = "/proc/sys/net";

/// Their names below, by folder. A kernel may lack some. Those that a kernel chooses by the size of its memory (`tcp_rmem`, `tcp_wmem`,
/// `tcp_max_syn_backlog`) are not among them: a namespace has the host's, which are too large for the guest.
const NAMES: [(&str, &[&str]); 6] = [
    ("core", &["somaxconn"]),
    (
        "ipv4",
        &[
            "icmp_echo_ignore_all",
            "icmp_echo_ignore_broadcasts",
            "ip_default_ttl",
            "ip_local_port_range",
            "ip_local_reserved_ports",
            "ip_no_pmtu_disc",
            "ip_nonlocal_bind",
            "ip_unprivileged_port_start",
            "ping_group_range",
            "tcp_ecn",
            "tcp_fastopen",
            "tcp_fin_timeout",
            "tcp_keepalive_intvl",
            "tcp_keepalive_probes",
            "tcp_keepalive_time",
            "tcp_mtu_probing",
            "tcp_notsent_lowat",
            "tcp_retries1",
            "tcp_retries2",
            "tcp_sack",
            "tcp_slow_start_after_idle",
            "tcp_syn_retries",
            "tcp_synack_retries",
            "tcp_syncookies",
            "tcp_timestamps",
            "tcp_tw_reuse",
            "tcp_window_scaling",
            "udp_rmem_min",
            "udp_wmem_min",
        ],
    ),
    (
        "ipv4/conf/all",
        &[
            "accept_local",
            "accept_redirects",
            "accept_source_route",
            "arp_accept",
            "arp_announce",
            "arp_filter",
            "arp_ignore",
            "arp_notify",
            "forwarding",
            "log_martians",
            "promote_secondaries",
            "proxy_arp",
            "route_localnet",
            "rp_filter",
            "secure_redirects",
            "send_redirects",
            "src_valid_mark",
        ],
    ),
    ("ipv6", &["bindv6only", "ip_nonlocal_bind"]),
    ("ipv6/conf/all", &["forwarding"]),
    ("unix", &["max_dgram_qlen"]),
];

/// What there is below `folder`, by its name there.
pub(super) fn list(folder: &Path) -> HashMap<String, String> {
    let names = NAMES.iter().flat_map(|(folder, names)| names.iter().map(move |name| format!("{folder}/{name}")));
    let read = |name: String| {
        let value = fs::read_to_string(folder.join(&name)).ok()?;
        Some((name, value.trim().to_owned()))
    };
    names.filter_map(read).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_kernel_has_is_listed() {
        let folder = tempfile::tempdir().unwrap();
        for (name, value) in
            [("core/somaxconn", "128\n"), ("ipv4/ip_local_port_range", "7\t9\n"), ("core/other", "1\n")]
        {
            let path = folder.path().join(name);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, value).unwrap();
        }

        let listed = list(folder.path());

        assert_eq!(listed.len(), 2);
        assert_eq!((listed["core/somaxconn"].as_str(), listed["ipv4/ip_local_port_range"].as_str()), ("128", "7\t9"));
    }
}
