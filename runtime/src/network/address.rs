// SPDX-License-Identifier: Apache-2.0
//! The addresses of an interface, as far as a container gets them, and who finds out whether another machine has one too.

use std::net::{Ipv4Addr, Ipv6Addr};

use bulkhead_netlink::{AddressHeader, Attributes};
use bulkhead_protocol::agent::NetworkAddress;

use super::Passed;
use super::link::Link;
use super::routes::Prefix;
use super::survey::{bytes, number};

/// `IFA_PROTO` (linux/if_addr.h), and what it says of one that the kernel made on a router's word; since Linux 5.18.
const IFA_PROTO: u16 = 11;
const IFAPROT_KERNEL_RA: u8 = 2;

/// `IFA_RT_PRIORITY` (linux/if_addr.h): the metric of the route that the kernel makes for it.
const IFA_RT_PRIORITY: u16 = 9;

/// What an address says that it says to the guest. A secondary one of IPv4 comes behind another of its network.
const IPV4_FLAGS: u32 = libc::IFA_F_NOPREFIXROUTE | libc::IFA_F_SECONDARY;
const IPV6_FLAGS: u32 = libc::IFA_F_NOPREFIXROUTE | libc::IFA_F_NODAD;

/// How the kernel's own IPv6 addresses show before that: they end some day, and are a privacy address, or what those are made of.
const MADE_BY_ITSELF: u32 = libc::IFA_F_TEMPORARY | libc::IFA_F_MANAGETEMPADDR;

/// Adds to a link what an address of it means for the guest.
///
/// # Errors
///
/// Why the address is left out.
pub(super) fn add(link: &mut Link, header: &AddressHeader, attributes: Attributes<'_>) -> Result<(), String> {
    let peer = bytes(attributes, libc::IFA_ADDRESS);
    let local = attributes.find_kind(libc::IFA_LOCAL).map_or_else(|| peer.clone(), |local| local.value.to_vec());
    let all_flags = number(attributes, libc::IFA_FLAGS).unwrap_or_default();
    let is_ipv6 = header.family == libc::AF_INET6 as u8;
    if is_ipv6 && is_made_in_guest(all_flags, &local, attributes, &link.mac) {
        return Ok(());
    }
    if is_ipv6 && all_flags & libc::IFA_F_DADFAILED != 0 {
        return Err(format!(
            "the address {}/{} of {} is left out: another machine has it",
            text(&local),
            header.prefix_len,
            link.name
        ));
    }
    if is_ipv6 && all_flags & libc::IFA_F_TENTATIVE == 0 {
        link.probed.push(local.clone());
    }
    link.addresses.push(NetworkAddress {
        prefix_len: header.prefix_len.into(),
        peer: if peer == local { Vec::new() } else { peer },
        address: local,
        broadcast: bytes(attributes, libc::IFA_BROADCAST),
        scope: header.scope.into(),
        flags: all_flags & if is_ipv6 { IPV6_FLAGS } else { IPV4_FLAGS },
        metric: number(attributes, IFA_RT_PRIORITY).unwrap_or_default(),
        ..Default::default()
    });
    Ok(())
}

/// Marks the addresses for which the kernel has no route, where it makes one by itself: somebody has taken that away, and so the
/// guest's is to make none.
pub(super) fn mark_without_route(links: &mut [Link], made: &[Prefix]) {
    for link in links {
        for address in &mut link.addresses {
            let has_route = match route_of(address, link.up, link.carrier) {
                Some((network, prefix_len)) => made.iter().any(|prefix| {
                    prefix.interface == link.index.cast_unsigned()
                        && (prefix.network.as_slice(), u32::from(prefix.prefix_len)) == (&network, prefix_len)
                }),
                None => true,
            };
            if !has_route {
                address.flags |= libc::IFA_F_NOPREFIXROUTE;
            }
        }
    }
}

/// The network to which the kernel makes a route for an address of an interface; `None` where it makes none. IPv6 may wait with it for
/// the first carrier.
fn route_of(address: &NetworkAddress, is_up: bool, carrier: bool) -> Option<(Vec<u8>, u32)> {
    let is_ipv4 = address.address.len() == 4;
    let on_link = if is_ipv4 && !address.peer.is_empty() { &address.peer } else { &address.address };
    let bits = (0_u32..).step_by(8).map(|before| address.prefix_len.saturating_sub(before).min(8));
    let network: Vec<u8> = on_link.iter().zip(bits).map(|(byte, bits)| byte & !(0xff_u16 >> bits) as u8).collect();
    let is_made = if is_ipv4 {
        is_up && network.first() != Some(&0) && (address.prefix_len < 32 || network != address.address)
    } else {
        is_up && carrier
    };
    is_made.then_some((network, address.prefix_len))
}

/// Whether the kernel gives that address to each loopback.
pub(super) fn is_every_loopbacks(address: &[u8]) -> bool {
    *address == Ipv4Addr::LOCALHOST.octets() || *address == Ipv6Addr::LOCALHOST.octets()
}

/// Whether the guest makes the same itself: from the same hardware address, from its own secret, or on the word of a router,
/// which only the guest hears from then on.
fn is_made_in_guest(flags: u32, local: &[u8], attributes: Attributes<'_>, mac: &[u8]) -> bool {
    let has_identifier = local.ends_with(&interface_identifier(mac));
    let is_by_router = attributes.find_kind(IFA_PROTO).is_some_and(|by| by.value == [IFAPROT_KERNEL_RA]);
    let ends = flags & libc::IFA_F_PERMANENT == 0;
    flags & libc::IFA_F_STABLE_PRIVACY != 0
        || has_identifier && is_link_local(local)
        || is_by_router
        || ends && (has_identifier || flags & MADE_BY_ITSELF != 0)
}

fn is_link_local(address: &[u8]) -> bool {
    address.len() == 16 && address.starts_with(&[0xfe, 0x80])
}

/// The last 8 bytes of the addresses that the kernel makes for a hardware address (RFC 4291, appendix A).
fn interface_identifier(mac: &[u8]) -> [u8; 8] {
    match *mac {
        [a, b, c, d, e, f] => [a ^ 2, b, c, 0xff, 0xfe, d, e, f],
        _ => [0; 8],
    }
}

/// An address as one writes it.
fn text(address: &[u8]) -> String {
    if let Ok(bytes) = <[u8; 4]>::try_from(address) {
        Ipv4Addr::from(bytes).to_string()
    } else if let Ok(bytes) = <[u8; 16]>::try_from(address) {
        Ipv6Addr::from(bytes).to_string()
    } else {
        format!("{address:?}")
    }
}

/// Of which IPv6 addresses the guest need not find out whether another machine has them (duplicate address detection).
///
/// The host's kernel can find that out until the interface is joined to a tap; from then on the answers go to the guest. What
/// was said of an address first holds as long as it is there.
#[derive(Debug, Default)]
pub(super) struct Probed(Vec<(i32, Vec<u8>, u32)>);

impl Probed {
    /// Marks the addresses of all `links`, of which those of `joined` are joined to taps.
    pub(super) fn mark(&mut self, links: &mut [Link], joined: &[Passed]) {
        let mut now = Vec::new();
        for link in links {
            let is_joined = joined.iter().any(|passed| passed.index == link.index);
            for address in link.addresses.iter_mut().filter(|address| address.address.len() == 16) {
                let is_it =
                    |(index, known, _): &&(i32, Vec<u8>, u32)| *index == link.index && *known == address.address;
                let flag = match self.0.iter().find(is_it) {
                    Some((_, _, flag)) => *flag,
                    None if !is_joined && link.probed.contains(&address.address) => libc::IFA_F_NODAD,
                    None => address.flags & libc::IFA_F_NODAD,
                };
                address.flags = address.flags & !libc::IFA_F_NODAD | flag;
                now.push((link.index, address.address.clone(), flag));
            }
        }
        self.0 = now;
    }
}

#[cfg(test)]
mod tests {
    use bulkhead_netlink::{Header, Message};

    use super::*;

    const MAC: [u8; 6] = [0x02, 0x42, 0xac, 0x11, 0x00, 0x02];
    /// Addresses of which one ends with what the hardware address gives.
    const OWN: [u8; 16] = [0xfd, 9, 0, 0, 0, 0, 0, 0, 0x00, 0x42, 0xac, 0xff, 0xfe, 0x11, 0x00, 0x02];
    const SET: [u8; 16] = [0xfd, 9, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 7];

    fn link() -> Link {
        Link { index: 3, name: "eth0".to_owned(), mac: MAC.to_vec(), ..Link::default() }
    }

    /// Adds an address with these flags, and perhaps a word on who made it.
    fn add_to(link: &mut Link, address: [u8; 16], flags: u32, by: Option<u8>) -> Result<(), String> {
        let header = AddressHeader { family: libc::AF_INET6 as u8, prefix_len: 64, scope: 0, index: 3 };
        let message = Message::new(libc::RTM_NEWADDR, 0, &header)
            .with(libc::IFA_ADDRESS, &address)
            .with_number(libc::IFA_FLAGS, flags);
        let content = by.into_iter().fold(message, |message, by| message.with(IFA_PROTO, &[by])).into_content();
        let (header, attributes) = AddressHeader::read(&content).unwrap();
        add(link, &header, Attributes::new(attributes))
    }

    #[test]
    fn the_address_that_the_kernel_makes_is_known() {
        assert_eq!(interface_identifier(&MAC), OWN[8..]);
        assert!(is_link_local(&[0xfe, 0x80, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1]));
        assert!(!is_link_local(&[0xfe, 0x80, 0, 1]));
    }

    #[test]
    fn a_loopbacks_own_addresses_are_known() {
        assert!(is_every_loopbacks(&[127, 0, 0, 1]) && is_every_loopbacks(&Ipv6Addr::LOCALHOST.octets()));
        assert!(!is_every_loopbacks(&[127, 0, 0, 2]) && !is_every_loopbacks(&SET));
    }

    #[test]
    fn what_the_kernel_made_on_a_routers_word_is_the_guests_to_make() {
        let count = |address, flags, by| {
            let mut link = link();
            add_to(&mut link, address, flags, by).unwrap();
            link.addresses.len()
        };

        assert_eq!(count(SET, 0, Some(IFAPROT_KERNEL_RA)), 0);
        assert_eq!(count(OWN, 0, None), 0);
        assert_eq!(count(SET, libc::IFA_F_TEMPORARY, None), 0);
        assert_eq!(count(OWN, libc::IFA_F_PERMANENT, None), 1);
        // A client of DHCP has set it.
        assert_eq!(count(SET, 0, None), 1);
    }

    #[test]
    fn the_guest_finds_out_of_an_address_what_the_host_has_not() {
        let flags = |flags, joined: &[Passed]| {
            let mut link = link();
            add_to(&mut link, SET, flags | libc::IFA_F_PERMANENT, None).unwrap();
            Probed::default().mark(std::slice::from_mut(&mut link), joined);
            link.addresses[0].flags
        };
        let joined = [Passed { index: 3, mac: MAC, carrier: true }];

        assert_eq!(flags(0, &[]), libc::IFA_F_NODAD);
        assert_eq!(flags(libc::IFA_F_TENTATIVE, &[]), 0);
        // The host hears of no other any more, unless somebody has said that there is none.
        assert_eq!(flags(0, &joined), 0);
        assert_eq!(flags(libc::IFA_F_NODAD, &joined), libc::IFA_F_NODAD);
    }

    #[test]
    fn what_was_said_of_an_address_holds_as_long_as_it_is_there() {
        let mut probed = Probed::default();
        let mut flags = |flags| {
            let mut link = link();
            add_to(&mut link, SET, flags | libc::IFA_F_PERMANENT, None).unwrap();
            probed.mark(std::slice::from_mut(&mut link), &[]);
            link.addresses[0].flags
        };

        assert_eq!([flags(libc::IFA_F_TENTATIVE), flags(0)], [0, 0]);
        probed.mark(&mut [], &[]);
        let mut link = link();
        add_to(&mut link, SET, libc::IFA_F_PERMANENT, None).unwrap();
        probed.mark(std::slice::from_mut(&mut link), &[]);
        assert_eq!(link.addresses[0].flags, libc::IFA_F_NODAD);
    }

    #[test]
    fn where_the_kernels_route_was_taken_away_the_guest_makes_none() {
        let address = |address: &[u8], prefix_len, peer: &[u8]| NetworkAddress {
            address: address.to_vec(),
            prefix_len,
            peer: peer.to_vec(),
            ..Default::default()
        };
        let prefix =
            |interface, network: &[u8], prefix_len| Prefix { interface, network: network.to_vec(), prefix_len };
        let is_without = |address: &NetworkAddress, made: &[Prefix], up, carrier| {
            let mut links = [Link { addresses: vec![address.clone()], up, carrier, ..link() }];
            mark_without_route(&mut links, made);
            links[0].addresses[0].flags == libc::IFA_F_NOPREFIXROUTE
        };
        let ipv4 = address(&[10, 9, 1, 130], 26, &[]);
        let ipv6 = address(&SET, 64, &[]);
        let peer = address(&[10, 9, 1, 2], 32, &[10, 8, 1, 1]);
        let made = [
            prefix(3, &[10, 9, 1, 128], 26),
            prefix(3, &[[0xfd, 9].as_slice(), &[0; 14]].concat(), 64),
            prefix(3, &[10, 8, 1, 1], 32),
        ];
        for address in [&ipv4, &ipv6, &peer] {
            assert!(!is_without(address, &made, true, true), "{address:?}");
            assert!(is_without(address, &[], true, true), "{address:?}");
            assert!(is_without(address, &made.clone().map(|made| Prefix { interface: 4, ..made }), true, true));
            assert!(!is_without(address, &[], false, false), "{address:?}");
        }
        // The kernel makes none for these: an address alone, and before there is a carrier.
        assert!(!is_without(&address(&[10, 9, 1, 2], 32, &[]), &[], true, true));
        assert!(!is_without(&ipv6, &[], true, false));
    }

    #[test]
    fn what_an_address_says_of_itself_is_told() {
        let flags = libc::IFA_F_PERMANENT | libc::IFA_F_SECONDARY | libc::IFA_F_NOPREFIXROUTE;
        let header = AddressHeader { family: libc::AF_INET as u8, prefix_len: 24, scope: 0, index: 3 };
        let content = Message::new(libc::RTM_NEWADDR, 0, &header)
            .with(libc::IFA_LOCAL, &[10, 9, 1, 2])
            .with(libc::IFA_ADDRESS, &[10, 9, 1, 2])
            .with_number(libc::IFA_FLAGS, flags)
            .with_number(IFA_RT_PRIORITY, 77)
            .into_content();
        let mut link = link();
        let (header, attributes) = AddressHeader::read(&content).unwrap();
        add(&mut link, &header, Attributes::new(attributes)).unwrap();

        let NetworkAddress { metric, flags, .. } = link.addresses[0];
        assert_eq!((metric, flags), (77, libc::IFA_F_SECONDARY | libc::IFA_F_NOPREFIXROUTE));
    }

    #[test]
    fn an_address_of_anothers_is_left_out_by_name() {
        let mut link = link();
        let flags = libc::IFA_F_PERMANENT | libc::IFA_F_TENTATIVE | libc::IFA_F_DADFAILED;

        let why = add_to(&mut link, SET, flags, None).unwrap_err();

        assert_eq!(why, "the address fd09::7/64 of eth0 is left out: another machine has it");
        assert!(link.addresses.is_empty());
    }
}
