// SPDX-License-Identifier: Apache-2.0
//! What there is in a network namespace, as far as a container gets it.

use std::io;

use bulkhead_netlink::{AddressHeader, Attributes, LinkHeader, Message, NeighbourHeader, RouteHeader, Socket};
use bulkhead_protocol::agent::{NetworkAddress, NetworkNeighbour, NetworkRoute};

/// Who made a route: the kernel, for an address or on a router's word. The guest's makes its own.
const MADE_BY_KERNEL: [u8; 3] = [libc::RTPROT_KERNEL, libc::RTPROT_REDIRECT, RTPROT_RA];
/// `RTPROT_RA` (linux/rtnetlink.h).
const RTPROT_RA: u8 = 9;

/// What there is.
#[derive(Debug, Default)]
pub(super) struct Survey {
    /// All but the loopback, in the order of their making.
    pub(super) links: Vec<Link>,
    /// Those of the main table that somebody has set.
    pub(super) routes: Vec<NetworkRoute>,
    /// Those that are known for good.
    pub(super) neighbours: Vec<NetworkNeighbour>,
}

/// An interface.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Link {
    pub(super) index: i32,
    pub(super) name: String,
    /// What made it; empty for hardware.
    pub(super) kind: String,
    /// `ARPHRD_*`.
    pub(super) hardware: u16,
    pub(super) mac: Vec<u8>,
    pub(super) mtu: u32,
    pub(super) up: bool,
    pub(super) addresses: Vec<NetworkAddress>,
}

impl Survey {
    /// Looks around in the socket's network namespace.
    pub(super) fn take(socket: &mut Socket) -> io::Result<Self> {
        let mut survey = Self::default();
        let request = Message::new(libc::RTM_GETLINK, 0, &LinkHeader::default());
        socket.dump(request, libc::RTM_NEWLINK, |header, attributes| survey.links.extend(link(&header, attributes)))?;
        survey.links.sort_by_key(|link| link.index);
        let request = Message::new(libc::RTM_GETADDR, 0, &AddressHeader::default());
        socket.dump(request, libc::RTM_NEWADDR, |header: AddressHeader, attributes| {
            let mut links = survey.links.iter_mut();
            if let Some(link) = links.find(|link| link.index.cast_unsigned() == header.index) {
                link.addresses.extend(address(&header, attributes));
            }
        })?;
        let Self { links, routes, neighbours } = &mut survey;
        let request = Message::new(libc::RTM_GETROUTE, 0, &RouteHeader::default());
        socket.dump(request, libc::RTM_NEWROUTE, |header, attributes| {
            routes.extend(route(&header, attributes, links));
        })?;
        let request = Message::new(libc::RTM_GETNEIGH, 0, &NeighbourHeader::default());
        socket.dump(request, libc::RTM_NEWNEIGH, |header, attributes| {
            neighbours.extend(neighbour(&header, attributes, links));
        })?;
        Ok(survey)
    }
}

/// The value of an attribute; empty where there is none.
fn bytes(attributes: Attributes<'_>, kind: u16) -> Vec<u8> {
    attributes.find_kind(kind).map(|attribute| attribute.value.to_vec()).unwrap_or_default()
}

fn number(attributes: Attributes<'_>, kind: u16) -> Option<u32> {
    attributes.find_kind(kind).and_then(|attribute| attribute.number())
}

fn link(header: &LinkHeader, attributes: Attributes<'_>) -> Option<Link> {
    if header.hardware == libc::ARPHRD_LOOPBACK {
        return None;
    }
    let info = attributes.find_kind(libc::IFLA_LINKINFO);
    let kind = info.and_then(|info| info.nested().find_kind(libc::IFLA_INFO_KIND)).and_then(|kind| kind.text());
    Some(Link {
        index: header.index,
        name: attributes.find_kind(libc::IFLA_IFNAME)?.text()?.to_owned(),
        kind: kind.unwrap_or_default().to_owned(),
        hardware: header.hardware,
        mac: bytes(attributes, libc::IFLA_ADDRESS),
        mtu: number(attributes, libc::IFLA_MTU)?,
        up: header.flags & libc::IFF_UP.cast_unsigned() != 0,
        addresses: Vec::new(),
    })
}

fn address(header: &AddressHeader, attributes: Attributes<'_>) -> Option<NetworkAddress> {
    let peer = bytes(attributes, libc::IFA_ADDRESS);
    let local = attributes.find_kind(libc::IFA_LOCAL).map_or_else(|| peer.clone(), |local| local.value.to_vec());
    // The guest makes its own from the same hardware address.
    if header.family == libc::AF_INET6 as u8 && header.scope == libc::RT_SCOPE_LINK {
        return None;
    }
    // Whether it is another's has been found out here.
    let ipv6 = if header.family == libc::AF_INET6 as u8 { libc::IFA_F_NODAD } else { 0 };
    let flags = number(attributes, libc::IFA_FLAGS).unwrap_or_default() & libc::IFA_F_NOPREFIXROUTE | ipv6;
    Some(NetworkAddress {
        prefix_len: header.prefix_len.into(),
        peer: if peer == local { Vec::new() } else { peer },
        address: local,
        broadcast: bytes(attributes, libc::IFA_BROADCAST),
        scope: header.scope.into(),
        flags,
        ..Default::default()
    })
}

fn route(header: &RouteHeader, attributes: Attributes<'_>, links: &[Link]) -> Option<NetworkRoute> {
    let is_wanted = header.table == libc::RT_TABLE_MAIN
        && header.kind == libc::RTN_UNICAST
        && header.flags & libc::RTM_F_CLONED == 0
        && !MADE_BY_KERNEL.contains(&header.protocol);
    let index = number(attributes, libc::RTA_OIF)?;
    let link = links.iter().find(|link| link.index.cast_unsigned() == index)?;
    is_wanted.then(|| NetworkRoute {
        interface: link.name.clone(),
        ipv6: header.family == libc::AF_INET6 as u8,
        destination: bytes(attributes, libc::RTA_DST),
        prefix_len: header.prefix_len.into(),
        gateway: bytes(attributes, libc::RTA_GATEWAY),
        source: bytes(attributes, libc::RTA_PREFSRC),
        metric: number(attributes, libc::RTA_PRIORITY).unwrap_or_default(),
        scope: header.scope.into(),
        protocol: header.protocol.into(),
        flags: header.flags & RTNH_F_ONLINK,
        ..Default::default()
    })
}

/// `RTNH_F_ONLINK` (linux/rtnetlink.h): the gateway is on the link, whatever the addresses say.
const RTNH_F_ONLINK: u32 = 4;

fn neighbour(header: &NeighbourHeader, attributes: Attributes<'_>, links: &[Link]) -> Option<NetworkNeighbour> {
    let link = links.iter().find(|link| link.index == header.index)?;
    let is_ip = [libc::AF_INET as u8, libc::AF_INET6 as u8].contains(&header.family);
    let mac = bytes(attributes, libc::NDA_LLADDR);
    (is_ip && header.state & libc::NUD_PERMANENT != 0 && mac.len() == 6).then(|| NetworkNeighbour {
        interface: link.name.clone(),
        address: bytes(attributes, libc::NDA_DST),
        mac,
        flags: header.flags.into(),
        ..Default::default()
    })
}
