// SPDX-License-Identifier: Apache-2.0
//! Rules of netfilter in a network namespace. A machine's frames never come by them: they are for what the namespace's own stack
//! sends and gets. Whoever has made some is to know.

use std::collections::BTreeSet;
use std::fs;
use std::io;
use std::path::Path;

use bulkhead_netlink::{Message, NetfilterHeader, Socket};

/// That the kernel has nf_tables shows here: one that has not is not to load it for us to find nothing.
const MODULE: &str = "/sys/module/nf_tables";

/// The messages of nf_tables (linux/netfilter/nf_tables.h), of the subsystem `NFNL_SUBSYS_NFTABLES`.
const SUBSYSTEM: u16 = 10 << 8;
const NEW_CHAIN: u16 = SUBSYSTEM | 3;
const GET_CHAIN: u16 = SUBSYSTEM | 4;
const NEW_RULE: u16 = SUBSYSTEM | 6;
const GET_RULE: u16 = SUBSYSTEM | 7;

/// `NFTA_RULE_TABLE`; `NFTA_CHAIN_TABLE` and `NFTA_CHAIN_POLICY`, and of that `NF_DROP`, in network order.
const RULE_TABLE: u16 = 1;
const CHAIN_TABLE: u16 = 1;
const CHAIN_POLICY: u16 = 5;
const DROP: [u8; 4] = 0_u32.to_be_bytes();

/// What families (`NFPROTO_*`, linux/netfilter.h) are called.
const FAMILIES: [(u8, &str); 6] = [(1, "inet"), (2, "ip"), (3, "arp"), (5, "netdev"), (7, "bridge"), (10, "ip6")];

/// The tables of the older iptables that anybody has used in the namespace: the files, and their families' names.
const OLDER: [(&str, &str); 2] = [("ip_tables_names", "ip"), ("ip6_tables_names", "ip6")];

/// Where docker has the rules by which its resolver is found; they are all there is of it.
const OF_RESOLVER: (&str, &str) = ("ip", "nat");

/// A table: the name of its family, and its own.
type Table = (String, String);

/// In words, what rules there are in the calling thread's network namespace; those aside that belong to a resolver.
pub(super) fn left_out(resolver: bool) -> Option<String> {
    let mut tables = older();
    if Path::new(MODULE).exists() {
        // A kernel that does not answer has none, or none that this process could have seen.
        tables.extend(current().unwrap_or_default());
    }
    tables.retain(|(family, name)| !resolver || (family.as_str(), name.as_str()) != OF_RESOLVER);
    text(&tables)
}

fn text(tables: &BTreeSet<Table>) -> Option<String> {
    let names: Vec<_> = tables.iter().map(|(family, name)| format!("{family} {name}")).collect();
    let names = (!names.is_empty()).then(|| names.join(", "))?;
    Some(format!("the rules of netfilter (tables: {names}) are not passed on, and filter nothing of the container's"))
}

/// The tables of nf_tables that have a rule, or drop what no rule is for.
fn current() -> io::Result<BTreeSet<Table>> {
    let mut socket = Socket::open_netfilter()?;
    let mut tables = BTreeSet::new();
    let all = NetfilterHeader::default();
    socket.dump(Message::new(GET_RULE, 0, &all), NEW_RULE, |header: NetfilterHeader, attributes| {
        let name = attributes.find_kind(RULE_TABLE).and_then(|name| name.text());
        tables.extend(name.map(|name| table(header, name)));
    })?;
    socket.dump(Message::new(GET_CHAIN, 0, &all), NEW_CHAIN, |header: NetfilterHeader, attributes| {
        let name = attributes.find_kind(CHAIN_TABLE).and_then(|name| name.text());
        let drops = attributes.find_kind(CHAIN_POLICY).is_some_and(|policy| policy.value == DROP);
        tables.extend(name.filter(|_| drops).map(|name| table(header, name)));
    })?;
    Ok(tables)
}

fn table(header: NetfilterHeader, name: &str) -> Table {
    let family = FAMILIES.iter().find(|(number, _)| *number == header.family);
    (family.map_or_else(|| header.family.to_string(), |(_, name)| (*name).to_owned()), name.to_owned())
}

/// The tables of the older iptables; what is in them that one does not tell who merely looks.
fn older() -> BTreeSet<Table> {
    let mut tables = BTreeSet::new();
    for (file, family) in OLDER {
        let names = fs::read_to_string(Path::new("/proc/thread-self/net").join(file)).unwrap_or_default();
        tables.extend(names.lines().map(|name| (family.to_owned(), name.to_owned())));
    }
    tables
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tables_are_named() {
        let tables: [Table; 2] = [("inet", "fw"), ("ip", "filter")].map(|(a, b)| (a.to_owned(), b.to_owned()));

        assert_eq!(text(&BTreeSet::new()), None);
        assert_eq!(
            text(&tables.into()).unwrap(),
            "the rules of netfilter (tables: inet fw, ip filter) are not passed on, and filter nothing of the container's"
        );
        assert_eq!(table(NetfilterHeader { family: 10 }, "nat"), ("ip6".to_owned(), "nat".to_owned()));
        assert_eq!(table(NetfilterHeader { family: 99 }, "x"), ("99".to_owned(), "x".to_owned()));
    }
}
