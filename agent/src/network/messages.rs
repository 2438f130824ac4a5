// SPDX-License-Identifier: Apache-2.0
//! What the host tells of addresses, neighbours, rules and routes, as rtnetlink(7) has it.

use std::io;

use bulkhead_netlink::{AddressHeader, Header, Message, NeighbourHeader, RouteHeader, RuleHeader};
use bulkhead_protocol::agent as wire;

/// `IFA_RT_PRIORITY` (linux/if_addr.h): the metric of the route that the kernel makes for an address.
pub(super) const IFA_RT_PRIORITY: u16 = 9;

pub(super) fn address_message(index: i32, address: &wire::NetworkAddress) -> io::Result<Message> {
    let header = AddressHeader {
        family: family(&address.address)?,
        prefix_len: byte(address.prefix_len)?,
        scope: byte(address.scope)?,
        index: index.cast_unsigned(),
    };
    let peer = if address.peer.is_empty() { &address.address } else { &address.peer };
    let mut message = Message::new(libc::RTM_NEWADDR, 0, &header)
        .with(libc::IFA_LOCAL, &address.address)
        .with(libc::IFA_ADDRESS, peer)
        .with_number(libc::IFA_FLAGS, address.flags);
    if !address.broadcast.is_empty() {
        message = message.with(libc::IFA_BROADCAST, &address.broadcast);
    }
    if address.metric != 0 {
        message = message.with_number(IFA_RT_PRIORITY, address.metric);
    }
    Ok(message)
}

pub(super) fn route_message(index: Option<i32>, route: &wire::NetworkRoute) -> io::Result<Message> {
    let header = RouteHeader {
        family: if route.ipv6 { libc::AF_INET6 } else { libc::AF_INET } as u8,
        prefix_len: byte(route.prefix_len)?,
        source_len: 0,
        tos: byte(route.tos)?,
        table: match route.table {
            0 => libc::RT_TABLE_MAIN,
            table => u8::try_from(table).unwrap_or(libc::RT_TABLE_UNSPEC),
        },
        protocol: byte(route.protocol)?,
        scope: byte(route.scope)?,
        kind: if route.kind == 0 { libc::RTN_UNICAST } else { byte(route.kind)? },
        flags: route.flags,
    };
    let mut message = Message::new(libc::RTM_NEWROUTE, 0, &header);
    if let Some(index) = index {
        message = message.with_number(libc::RTA_OIF, index.cast_unsigned());
    }
    if header.table == libc::RT_TABLE_UNSPEC {
        message = message.with_number(libc::RTA_TABLE, route.table);
    }
    if !route.metrics.is_empty() {
        message = message.with(libc::RTA_METRICS, &route.metrics);
    }
    for (kind, address) in
        [(libc::RTA_DST, &route.destination), (libc::RTA_GATEWAY, &route.gateway), (libc::RTA_PREFSRC, &route.source)]
    {
        if !address.is_empty() {
            if family(address)? != header.family {
                return Err(io::ErrorKind::InvalidInput.into());
            }
            message = message.with(kind, address);
        }
    }
    Ok(if route.metric == 0 { message } else { message.with_number(libc::RTA_PRIORITY, route.metric) })
}

pub(super) fn neighbour_message(index: i32, neighbour: &wire::NetworkNeighbour) -> io::Result<Message> {
    let header = NeighbourHeader {
        family: family(&neighbour.address)?,
        index,
        state: libc::NUD_PERMANENT,
        flags: byte(neighbour.flags)?,
    };
    Ok(Message::new(libc::RTM_NEWNEIGH, 0, &header)
        .with(libc::NDA_DST, &neighbour.address)
        .with(libc::NDA_LLADDR, &neighbour.mac))
}

pub(super) fn rule_message(rule: &[u8]) -> io::Result<Message> {
    let (header, attributes) = RuleHeader::read(rule).ok_or(io::ErrorKind::InvalidInput)?;
    Ok(Message::new(libc::RTM_NEWRULE, 0, &header).with_all(attributes))
}

/// The family of an IP address of that length.
fn family(address: &[u8]) -> io::Result<u8> {
    match address.len() {
        4 => Ok(libc::AF_INET as u8),
        16 => Ok(libc::AF_INET6 as u8),
        _ => Err(io::ErrorKind::InvalidInput.into()),
    }
}

fn byte(number: u32) -> io::Result<u8> {
    u8::try_from(number).map_err(|_| io::ErrorKind::InvalidInput.into())
}

/// An IP address as one writes it.
pub(super) fn text(address: &[u8]) -> String {
    if let Ok(bytes) = <[u8; 4]>::try_from(address) {
        std::net::Ipv4Addr::from(bytes).to_string()
    } else if let Ok(bytes) = <[u8; 16]>::try_from(address) {
        std::net::Ipv6Addr::from(bytes).to_string()
    } else {
        format!("{address:?}")
    }
}

#[cfg(test)]
mod tests {
    use bulkhead_netlink::Attributes;

    use super::*;

    #[test]
    fn addresses_have_four_or_sixteen_bytes() {
        let address = wire::NetworkAddress { address: vec![10, 0, 0, 1], prefix_len: 24, ..Default::default() };
        assert!(address_message(2, &address).is_ok());
        assert!(address_message(2, &wire::NetworkAddress { address: vec![1; 5], ..Default::default() }).is_err());
        assert!(address_message(2, &wire::NetworkAddress { prefix_len: 256, ..address }).is_err());
    }

    #[test]
    fn the_metric_of_an_address_is_told() {
        let metric = |metric| {
            let address = vec![10, 0, 0, 1];
            let address = wire::NetworkAddress { address, prefix_len: 24, metric, ..Default::default() };
            let content = address_message(2, &address).unwrap().into_content();
            let (_, attributes) = AddressHeader::read(&content).unwrap();
            Attributes::new(attributes).find_kind(IFA_RT_PRIORITY).and_then(|metric| metric.number())
        };
        assert_eq!([metric(0), metric(77)], [None, Some(77)]);
    }

    #[test]
    fn a_routes_addresses_are_of_one_family() {
        let route = wire::NetworkRoute { gateway: vec![10, 0, 0, 1], ..Default::default() };
        assert!(route_message(Some(2), &route).is_ok());
        assert!(route_message(Some(2), &wire::NetworkRoute { ipv6: true, ..route }).is_err());
    }

    #[test]
    fn a_route_of_another_table_names_it() {
        let content = |table| {
            let route = wire::NetworkRoute { table, kind: libc::RTN_BLACKHOLE.into(), ..Default::default() };
            route_message(None, &route).unwrap().into_content()
        };
        let header = |content: &[u8]| RouteHeader::read(content).unwrap().0;

        assert_eq!(header(&content(0)).table, libc::RT_TABLE_MAIN);
        assert_eq!(header(&content(100)).table, 100);
        assert!(content(1000).ends_with(&1000_u32.to_ne_bytes()));
        assert_eq!(header(&content(0)).kind, libc::RTN_BLACKHOLE);
    }

    #[test]
    fn a_rule_that_is_too_short_is_refused() {
        assert!(rule_message(&[0; 11]).is_err());
    }

    #[test]
    fn addresses_are_written_as_usual() {
        assert_eq!(text(&[10, 1, 2, 3]), "10.1.2.3");
        assert_eq!(text(&[0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1]), "::1");
    }
}
