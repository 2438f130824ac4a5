// SPDX-License-Identifier: Apache-2.0
//! The routes of a network namespace, as far as a container gets them.

use std::io;
use std::net::{Ipv4Addr, Ipv6Addr};

use bulkhead_netlink::{Attributes, Message, RouteHeader, Socket};
use bulkhead_protocol::agent::NetworkRoute;

use super::link::Link;
use super::rules::Rules;
use super::survey::{bytes, number};

/// Who made a route: the kernel, for an address or on a router's word. The guest's makes its own.
const MADE_BY_KERNEL: [u8; 3] = [libc::RTPROT_KERNEL, libc::RTPROT_REDIRECT, RTPROT_RA];
/// `RTPROT_RA` (linux/rtnetlink.h).
const RTPROT_RA: u8 = 9;

/// Routes that lead nowhere; they have no interface.
const DEAD_ENDS: [u8; 4] = [libc::RTN_BLACKHOLE, libc::RTN_UNREACHABLE, libc::RTN_PROHIBIT, libc::RTN_THROW];

/// `RTNH_F_ONLINK` (linux/rtnetlink.h): the gateway is on the link, whatever the addresses say.
const RTNH_F_ONLINK: u32 = 4;

/// Attributes of a route that are not passed on (linux/rtnetlink.h): a gateway of another family, and encapsulation.
const REFUSED: [(u16, &str); 2] = [(18, "via a gateway of another family"), (22, "with encapsulation")];

/// Bytes of a next hop in front of its attributes: length, flags, weight, and interface (`struct rtnexthop`).
const NEXT_HOP_LEN: usize = 8;

/// Where the kernel has a route to an address' network, which it has made itself.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Prefix {
    pub(super) interface: u32,
    pub(super) network: Vec<u8>,
    pub(super) prefix_len: u8,
}

/// What there is, and what of it is not passed on.
#[derive(Debug, Default, PartialEq)]
pub(super) struct Routes {
    /// Those that somebody has set.
    pub(super) routes: Vec<NetworkRoute>,
    /// Those that somebody has set, as the kernel lists them.
    pub(super) rules: Vec<Vec<u8>>,
    /// Those that the kernel has made for addresses.
    pub(super) prefixes: Vec<Prefix>,
    /// One text each.
    pub(super) left_out: Vec<String>,
}

impl Routes {
    /// Lists those of the socket's network namespace that lead through one of the interfaces, or nowhere.
    pub(super) fn list(socket: &mut Socket, links: &[Link]) -> io::Result<Self> {
        let mut found = Self::default();
        let request = Message::new(libc::RTM_GETROUTE, 0, &RouteHeader::default());
        socket.dump(request, libc::RTM_NEWROUTE, |header, attributes| found.add_route(&header, attributes, links))?;
        let Rules { rules, mut left_out, .. } = Rules::list(socket)?;
        found.rules = rules;
        found.left_out.append(&mut left_out);
        Ok(found)
    }

    fn add_route(&mut self, header: &RouteHeader, attributes: Attributes<'_>, links: &[Link]) {
        let table = number(attributes, libc::RTA_TABLE).unwrap_or_else(|| header.table.into());
        if header.protocol == libc::RTPROT_KERNEL
            && let Some(interface) = number(attributes, libc::RTA_OIF)
        {
            let network = network(header, attributes);
            self.prefixes.push(Prefix { interface, network, prefix_len: header.prefix_len });
        }
        let is_kernels = table == u32::from(libc::RT_TABLE_LOCAL)
            || header.flags & libc::RTM_F_CLONED != 0
            || MADE_BY_KERNEL.contains(&header.protocol);
        if is_kernels {
            return;
        }
        match route(header, table, attributes, links) {
            Ok((route, doubt)) => {
                self.routes.push(route);
                self.left_out.extend(doubt.map(|doubt| format!("{} {doubt}", name(header, attributes))));
            }
            Err(why) => self.left_out.push(format!("{}, {why}", name(header, attributes))),
        }
    }
}

/// The network that a route leads to, as long as an address.
fn network(header: &RouteHeader, attributes: Attributes<'_>) -> Vec<u8> {
    let network = bytes(attributes, libc::RTA_DST);
    match network.is_empty() {
        true => vec![0; if header.family == libc::AF_INET6 as u8 { 16 } else { 4 }],
        false => network,
    }
}

/// A route, and what of it is different for the guest; or why it is not passed on.
fn route(
    header: &RouteHeader,
    table: u32,
    attributes: Attributes<'_>,
    links: &[Link],
) -> Result<(NetworkRoute, Option<&'static str>), String> {
    let is_dead_end = DEAD_ENDS.contains(&header.kind);
    if !is_dead_end && header.kind != libc::RTN_UNICAST {
        return Err(format!("which is of kind {}", header.kind));
    }
    if header.source_len != 0 {
        return Err("which is for packets of one source".to_owned());
    }
    if let Some((_, what)) = REFUSED.iter().find(|(kind, _)| attributes.find_kind(*kind).is_some()) {
        return Err(format!("which is {what}"));
    }
    let link = |index: u32| links.iter().find(|link| link.index.cast_unsigned() == index);
    let hops = attributes.find_kind(libc::RTA_MULTIPATH).map(|hops| next_hops(hops.value)).unwrap_or_default();
    let hop = hops.iter().find(|hop| link(hop.interface).is_some());
    let index = hop.map(|hop| hop.interface).or_else(|| number(attributes, libc::RTA_OIF));
    let interface = match index.and_then(link) {
        _ if is_dead_end => String::new(),
        Some(link) => link.name.clone(),
        None => return Err("which leads through an interface that is not passed on".to_owned()),
    };
    let (gateway, flags) = match hop {
        Some(hop) => (bytes(hop.attributes, libc::RTA_GATEWAY), hop.flags),
        None => (bytes(attributes, libc::RTA_GATEWAY), header.flags),
    };
    let route = NetworkRoute {
        interface,
        ipv6: header.family == libc::AF_INET6 as u8,
        destination: bytes(attributes, libc::RTA_DST),
        prefix_len: header.prefix_len.into(),
        gateway,
        source: bytes(attributes, libc::RTA_PREFSRC),
        metric: number(attributes, libc::RTA_PRIORITY).unwrap_or_default(),
        scope: header.scope.into(),
        protocol: header.protocol.into(),
        flags: flags & RTNH_F_ONLINK,
        table,
        kind: header.kind.into(),
        tos: header.tos.into(),
        metrics: bytes(attributes, libc::RTA_METRICS),
        ..Default::default()
    };
    Ok((route, (hops.len() > 1).then_some("has several next hops, of which the guest has one")))
}

/// One of the ways of a route.
struct NextHop<'a> {
    interface: u32,
    flags: u32,
    attributes: Attributes<'a>,
}

/// The ways; ends at the first that is not whole.
fn next_hops(mut bytes: &[u8]) -> Vec<NextHop<'_>> {
    let mut hops = Vec::new();
    while let Some(([l0, l1, flags, _, i0, i1, i2, i3], _)) = bytes.split_first_chunk::<NEXT_HOP_LEN>() {
        let len = usize::from(u16::from_ne_bytes([*l0, *l1]));
        let Some(attributes) = bytes.get(NEXT_HOP_LEN..len).map(Attributes::new) else {
            break;
        };
        hops.push(NextHop { interface: u32::from_ne_bytes([*i0, *i1, *i2, *i3]), flags: (*flags).into(), attributes });
        bytes = bytes.get(len.next_multiple_of(4)..).unwrap_or_default();
    }
    hops
}

/// What a route is called.
fn name(header: &RouteHeader, attributes: Attributes<'_>) -> String {
    let destination = bytes(attributes, libc::RTA_DST);
    let address = if let Ok(bytes) = <[u8; 4]>::try_from(destination.as_slice()) {
        Ipv4Addr::from(bytes).to_string()
    } else if let Ok(bytes) = <[u8; 16]>::try_from(destination.as_slice()) {
        Ipv6Addr::from(bytes).to_string()
    } else {
        return "the default route".to_owned();
    };
    format!("the route to {address}/{}", header.prefix_len)
}

#[cfg(test)]
mod tests {
    use super::*;

    const HEADER: RouteHeader = RouteHeader {
        family: libc::AF_INET as u8,
        prefix_len: 16,
        source_len: 0,
        tos: 0,
        table: libc::RT_TABLE_MAIN,
        protocol: libc::RTPROT_STATIC,
        scope: libc::RT_SCOPE_UNIVERSE,
        kind: libc::RTN_UNICAST,
        flags: 0,
    };

    fn links() -> [Link; 1] {
        [Link { index: 3, name: "eth0".to_owned(), ..Link::default() }]
    }

    /// An attribute as it is written.
    fn attribute(kind: u16, value: &[u8]) -> Vec<u8> {
        let len = u16::try_from(value.len() + 4).unwrap();
        [&len.to_ne_bytes(), &kind.to_ne_bytes(), value].concat()
    }

    fn listed(header: &RouteHeader, attributes: &[Vec<u8>]) -> Routes {
        let mut routes = Routes::default();
        let to = attribute(libc::RTA_DST, &[10, 7, 0, 0]);
        routes.add_route(header, Attributes::new(&[to, attributes.concat()].concat()), &links());
        routes
    }

    #[test]
    fn a_route_of_any_table_is_passed_on() {
        let by = attribute(libc::RTA_OIF, &3_u32.to_ne_bytes());
        let table = attribute(libc::RTA_TABLE, &1000_u32.to_ne_bytes());

        let found = listed(&HEADER, &[by.clone(), table]);

        assert_eq!((found.routes[0].interface.as_str(), found.routes[0].table), ("eth0", 1000));
        assert!(found.left_out.is_empty());
        assert_eq!(
            listed(&RouteHeader { table: libc::RT_TABLE_LOCAL, ..HEADER }, std::slice::from_ref(&by)),
            Routes::default()
        );
        let kernels = listed(&RouteHeader { protocol: libc::RTPROT_KERNEL, ..HEADER }, &[by]);
        let prefix = Prefix { interface: 3, network: vec![10, 7, 0, 0], prefix_len: 16 };
        assert_eq!((kernels.routes.len(), kernels.prefixes), (0, vec![prefix]));
    }

    #[test]
    fn a_dead_end_has_no_interface() {
        let found = listed(&RouteHeader { kind: libc::RTN_BLACKHOLE, ..HEADER }, &[]);
        assert_eq!((found.routes[0].interface.as_str(), found.routes[0].kind), ("", libc::RTN_BLACKHOLE.into()));
    }

    #[test]
    fn of_several_ways_one_that_the_guest_has_is_taken_and_told() {
        let hop = |interface: u32, gateway: [u8; 4]| {
            let gateway = attribute(libc::RTA_GATEWAY, &gateway);
            let len = u16::try_from(NEXT_HOP_LEN + gateway.len()).unwrap();
            [&len.to_ne_bytes()[..], &[0, 0], &interface.to_ne_bytes(), &gateway].concat()
        };
        let hops = [hop(9, [10, 0, 0, 9]), hop(3, [10, 0, 0, 3])].concat();

        let found = listed(&HEADER, &[attribute(libc::RTA_MULTIPATH, &hops)]);

        assert_eq!(found.routes[0].gateway, [10, 0, 0, 3]);
        assert_eq!(found.left_out, ["the route to 10.7.0.0/16 has several next hops, of which the guest has one"]);
    }

    #[test]
    fn what_is_not_passed_on_is_told() {
        let by = attribute(libc::RTA_OIF, &3_u32.to_ne_bytes());
        let cases = [
            (HEADER, vec![], "which leads through an interface that is not passed on"),
            (RouteHeader { kind: libc::RTN_LOCAL, ..HEADER }, vec![by.clone()], "which is of kind 2"),
            (RouteHeader { source_len: 8, ..HEADER }, vec![by.clone()], "which is for packets of one source"),
            (HEADER, vec![by, attribute(22, &[])], "which is with encapsulation"),
        ];
        for (header, attributes, why) in cases {
            let found = listed(&header, &attributes);
            assert_eq!((found.routes.len(), &found.left_out[0]), (0, &format!("the route to 10.7.0.0/16, {why}")));
        }
    }
}
