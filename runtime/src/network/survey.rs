// SPDX-License-Identifier: Apache-2.0
//! What there is in a network namespace, as far as a container gets it.

use std::io;

use bulkhead_netlink::{AddressHeader, Attributes, LinkHeader, Message, NeighbourHeader, Socket};
use bulkhead_protocol::agent::{NetworkAddress, NetworkNeighbour};

use super::routes::Routes;

/// What there is.
#[derive(Debug, Default, PartialEq)]
pub(super) struct Survey {
    /// All but the loopback, in the order of their making.
    pub(super) links: Vec<Link>,
    pub(super) routes: Routes,
    /// Those that are known for good.
    pub(super) neighbours: Vec<NetworkNeighbour>,
}

/// An interface.
#[derive(Debug, Clone, Default, PartialEq)]
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
                let address = address(&header, attributes, &link.mac);
                link.addresses.extend(address);
            }
        })?;
        let Self { links, routes, neighbours } = &mut survey;
        *routes = Routes::list(socket, links)?;
        let request = Message::new(libc::RTM_GETNEIGH, 0, &NeighbourHeader::default());
        socket.dump(request, libc::RTM_NEWNEIGH, |header, attributes| {
            neighbours.extend(neighbour(&header, attributes, links));
        })?;
        Ok(survey)
    }
}

/// The value of an attribute, as a list of bytes; empty where there is none.
pub(super) fn bytes(attributes: Attributes<'_>, kind: u16) -> Vec<u8> {
    attributes.find_kind(kind).map(|attribute| attribute.value.to_vec()).unwrap_or_default()
}

pub(super) fn number(attributes: Attributes<'_>, kind: u16) -> Option<u32> {
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

fn address(header: &AddressHeader, attributes: Attributes<'_>, mac: &[u8]) -> Option<NetworkAddress> {
    let peer = bytes(attributes, libc::IFA_ADDRESS);
    let local = attributes.find_kind(libc::IFA_LOCAL).map_or_else(|| peer.clone(), |local| local.value.to_vec());
    let all_flags = number(attributes, libc::IFA_FLAGS).unwrap_or_default();
    // The guest makes its own from the same hardware address, or from its own secret.
    if all_flags & libc::IFA_F_STABLE_PRIVACY != 0
        || local.ends_with(&interface_identifier(mac)) && is_link_local(&local)
    {
        return None;
    }
    // Whether it is another's has been found out here.
    let ipv6 = if header.family == libc::AF_INET6 as u8 { libc::IFA_F_NODAD } else { 0 };
    let flags = all_flags & libc::IFA_F_NOPREFIXROUTE | ipv6;
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

fn is_link_local(address: &[u8]) -> bool {
    address.len() == 16 && address.starts_with(&[0xfe, 0x80])
}

/// The last 8 bytes of the link-local address that the kernel makes for a hardware address (RFC 4291, appendix A).
fn interface_identifier(mac: &[u8]) -> [u8; 8] {
    match *mac {
        [a, b, c, d, e, f] => [a ^ 2, b, c, 0xff, 0xfe, d, e, f],
        _ => [0; 8],
    }
}

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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_address_that_the_kernel_makes_is_known() {
        let identifier = interface_identifier(&[0x02, 0x42, 0xac, 0x11, 0x00, 0x02]);
        assert_eq!(identifier, [0x00, 0x42, 0xac, 0xff, 0xfe, 0x11, 0x00, 0x02]);
        assert!(is_link_local(&[0xfe, 0x80, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1]));
        assert!(!is_link_local(&[0xfe, 0x80, 0, 1]));
    }
}
