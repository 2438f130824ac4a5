// SPDX-License-Identifier: Apache-2.0
//! The routes of a network namespace, as far as a container gets them.

use std::collections::HashSet;
use std::io;
use std::net::{Ipv4Addr, Ipv6Addr};

use bulkhead_netlink::{Attributes, Message, RouteHeader, Socket};
use bulkhead_protocol::agent::NetworkRoute;

use super::link::Link;
use super::next_hops::{self, NOT_PASSED_ON, NextHop};
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
    /// Those of `routes`.
    places: HashSet<Place>,
}

/// That of which the guest has one route: of several the host's kernel asks the first that it lists.
#[derive(Debug, PartialEq, Eq, Hash)]
struct Place {
    ipv6: bool,
    table: u32,
    destination: Vec<u8>,
    prefix_len: u32,
    tos: u32,
    metric: u32,
}

impl Place {
    fn of(route: &NetworkRoute) -> Self {
        let NetworkRoute { ipv6, table, prefix_len, tos, metric, .. } = *route;
        Self { ipv6, table, destination: route.destination.clone(), prefix_len, tos, metric }
    }
}

impl Routes {
    /// Lists those of the socket's network namespace that lead through one of the interfaces, or nowhere.
    pub(super) fn list(socket: &mut Socket, links: &[&Link]) -> io::Result<Self> {
        let mut found = Self::default();
        let request = Message::new(libc::RTM_GETROUTE, 0, &RouteHeader::default());
        socket.dump(request, libc::RTM_NEWROUTE, |header, attributes| found.add_route(&header, attributes, links))?;
        let Rules { rules, mut left_out, .. } = Rules::list(socket)?;
        found.rules = rules;
        found.left_out.append(&mut left_out);
        Ok(found)
    }

    fn add_route(&mut self, header: &RouteHeader, attributes: Attributes<'_>, links: &[&Link]) {
        let table = number(attributes, libc::RTA_TABLE).unwrap_or_else(|| header.table.into());
        if header.protocol == libc::RTPROT_KERNEL
            && let Some(interface) = number(attributes, libc::RTA_OIF)
        {
            let network = network(header, attributes);
            self.prefixes.push(Prefix { interface, network, prefix_len: header.prefix_len });
        }
        if is_kernels(header, table) {
            return;
        }
        let name = name(header, attributes);
        match route(header, table, attributes, links) {
            Ok((route, _)) if !self.places.insert(Place::of(&route)) => {
                self.left_out.push(format!("{name}, which comes behind another one"));
            }
            Ok((route, doubt)) => {
                self.routes.push(route);
                self.left_out.extend(doubt.map(|doubt| format!("{name} {doubt}")));
            }
            Err(why) => self.left_out.push(format!("{name}, {why}")),
        }
    }
}

/// Whether the kernel has made a route. All in the table of its own addresses count as such, since older kernels do not say
/// so of what they send to groups; but for local ones, of which it does say so.
fn is_kernels(header: &RouteHeader, table: u32) -> bool {
    let is_somebodys = header.kind == libc::RTN_LOCAL && header.protocol != libc::RTPROT_UNSPEC;
    header.flags & libc::RTM_F_CLONED != 0
        || MADE_BY_KERNEL.contains(&header.protocol)
        || table == u32::from(libc::RT_TABLE_LOCAL) && !is_somebodys
}

/// Whether it is one of IP.
fn is_ip(header: &RouteHeader) -> bool {
    [libc::AF_INET as u8, libc::AF_INET6 as u8].contains(&header.family)
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
    links: &[&Link],
) -> Result<(NetworkRoute, Option<&'static str>), String> {
    if !is_ip(header) {
        return Err(format!("which is of the address family {}", header.family));
    }
    let is_dead_end = DEAD_ENDS.contains(&header.kind);
    if !is_dead_end && header.kind != libc::RTN_UNICAST {
        return Err(format!("which is of kind {}", header.kind));
    }
    if header.source_len != 0 {
        return Err("which is for packets of one source".to_owned());
    }
    next_hops::refuse(attributes)?;
    let hops = attributes.find_kind(libc::RTA_MULTIPATH).map(|hops| next_hops::read(hops.value)).unwrap_or_default();
    let interface = number(attributes, libc::RTA_OIF).unwrap_or_default();
    let hop = match hops.is_empty() {
        true => NextHop { interface, flags: header.flags, attributes },
        false => next_hops::choose(&hops, links)?,
    };
    let interface = match hop.link(links) {
        _ if is_dead_end => String::new(),
        Some(link) => link.name.clone(),
        None => return Err(NOT_PASSED_ON.to_owned()),
    };
    let route = NetworkRoute {
        interface,
        ipv6: header.family == libc::AF_INET6 as u8,
        destination: bytes(attributes, libc::RTA_DST),
        prefix_len: header.prefix_len.into(),
        gateway: bytes(hop.attributes, libc::RTA_GATEWAY),
        source: bytes(attributes, libc::RTA_PREFSRC),
        metric: number(attributes, libc::RTA_PRIORITY).unwrap_or_default(),
        scope: header.scope.into(),
        protocol: header.protocol.into(),
        flags: hop.flags & RTNH_F_ONLINK,
        table,
        kind: header.kind.into(),
        tos: header.tos.into(),
        metrics: bytes(attributes, libc::RTA_METRICS),
        ..Default::default()
    };
    Ok((route, (hops.len() > 1).then_some("has several next hops, of which the guest has one")))
}

/// What a route is called.
fn name(header: &RouteHeader, attributes: Attributes<'_>) -> String {
    if !is_ip(header) {
        return "a route".to_owned();
    }
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
    use super::next_hops::tests::{attribute, hop};
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

    /// Adds a route to what is listed.
    fn list(routes: &mut Routes, header: &RouteHeader, attributes: &[Vec<u8>]) {
        let link = Link { index: 3, name: "eth0".to_owned(), up: true, ..Link::default() };
        let to = attribute(libc::RTA_DST, &[10, 7, 0, 0]);
        routes.add_route(header, Attributes::new(&[to, attributes.concat()].concat()), &[&link]);
    }

    fn listed(header: &RouteHeader, attributes: &[Vec<u8>]) -> Routes {
        let mut routes = Routes::default();
        list(&mut routes, header, attributes);
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
        let way = |interface, gateway: [u8; 4]| hop(interface, 0, &attribute(libc::RTA_GATEWAY, &gateway));
        let hops = [way(9, [10, 0, 0, 9]), way(3, [10, 0, 0, 3])].concat();

        let found = listed(&HEADER, &[attribute(libc::RTA_MULTIPATH, &hops)]);

        assert_eq!(found.routes[0].gateway, [10, 0, 0, 3]);
        assert_eq!(found.left_out, ["the route to 10.7.0.0/16 has several next hops, of which the guest has one"]);
    }

    #[test]
    fn what_is_not_passed_on_is_told() {
        let by = attribute(libc::RTA_OIF, &3_u32.to_ne_bytes());
        let dead = attribute(libc::RTA_MULTIPATH, &[hop(9, 0, &[]), hop(3, 1, &[])].concat());
        let local = RouteHeader { kind: libc::RTN_LOCAL, ..HEADER };
        let cases = [
            (HEADER, vec![], "which leads through an interface that is not passed on"),
            (local, vec![by.clone()], "which is of kind 2"),
            (RouteHeader { table: libc::RT_TABLE_LOCAL, ..local }, vec![by.clone()], "which is of kind 2"),
            (RouteHeader { source_len: 8, ..HEADER }, vec![by.clone()], "which is for packets of one source"),
            (HEADER, vec![by, attribute(22, &[])], "which is with encapsulation"),
            (HEADER, vec![dead], "of which no next hop is alive"),
        ];
        for (header, attributes, why) in cases {
            let found = listed(&header, &attributes);
            assert_eq!((found.routes.len(), &found.left_out[0]), (0, &format!("the route to 10.7.0.0/16, {why}")));
        }
        let labels = listed(&RouteHeader { family: libc::AF_MPLS as u8, ..HEADER }, &[]);
        assert_eq!((labels.routes.len(), &*labels.left_out[0]), (0, "a route, which is of the address family 28"));
    }

    #[test]
    fn what_the_kernel_has_made_is_not_told() {
        let local = RouteHeader { table: libc::RT_TABLE_LOCAL, kind: libc::RTN_LOCAL, ..HEADER };
        for protocol in [libc::RTPROT_KERNEL, libc::RTPROT_UNSPEC] {
            assert_eq!(listed(&RouteHeader { protocol, ..local }, &[]), Routes::default());
        }
    }

    #[test]
    fn of_several_routes_the_first_is_passed_on_and_the_others_are_told() {
        let by = |gateway: u8, more: &[u8]| {
            let (by, gateway) = (3_u32.to_ne_bytes(), attribute(libc::RTA_GATEWAY, &[10, 0, 0, gateway]));
            [attribute(libc::RTA_OIF, &by), gateway, more.to_vec()]
        };
        let mut found = Routes::default();
        list(&mut found, &HEADER, &by(1, &[]));
        list(&mut found, &HEADER, &by(2, &[]));
        // Elsewhere.
        list(&mut found, &HEADER, &by(3, &attribute(libc::RTA_PRIORITY, &5_u32.to_ne_bytes())));
        list(&mut found, &RouteHeader { tos: 4, ..HEADER }, &by(4, &[]));
        list(&mut found, &RouteHeader { prefix_len: 24, ..HEADER }, &by(5, &[]));
        list(&mut found, &RouteHeader { table: 7, ..HEADER }, &by(6, &[]));

        let gateways: Vec<_> = found.routes.iter().map(|route| route.gateway[3]).collect();
        assert_eq!(gateways, [1, 3, 4, 5, 6]);
        assert_eq!(found.left_out, ["the route to 10.7.0.0/16, which comes behind another one"]);
    }
}
