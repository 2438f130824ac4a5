// SPDX-License-Identifier: Apache-2.0
//! What the kernel makes of it, in a network namespace of the test's own; nothing without the right to make one.

use std::thread;

use bulkhead_netlink::{Attributes, LinkHeader, RuleHeader};

use super::super::group::FRA_PRIORITY;
use super::super::messages;
use super::*;

const MAC: [u8; 6] = [2, 9, 9, 9, 9, 1];

/// A namespace in which there is an interface, and the network that is made of it.
struct Guest {
    network: Network,
    socket: Socket,
}

/// Does something in such a one, on a thread of its own.
fn in_guest(test: impl FnOnce(&mut Guest) + Send + 'static) {
    let tested = thread::spawn(|| {
        if nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNET).is_err() {
            return;
        }
        let mut socket = Socket::open().unwrap();
        let up = libc::IFF_UP.cast_unsigned();
        let on = LinkHeader { index: 1, flags: up, change: up, ..Default::default() };
        socket.request(Message::new(libc::RTM_NEWLINK, 0, &on)).unwrap();
        let pair = Message::new(libc::RTM_NEWLINK, libc::NLM_F_CREATE, &LinkHeader::default())
            .with(libc::IFLA_ADDRESS, &MAC)
            .with_nested(libc::IFLA_LINKINFO, |info| info.with_text(libc::IFLA_INFO_KIND, "veth"));
        socket.request(pair).unwrap();
        for link in link::list(&mut socket).unwrap() {
            let on = LinkHeader { index: link.index, flags: up, change: up, ..Default::default() };
            socket.request(Message::new(libc::RTM_NEWLINK, 0, &on)).unwrap();
        }
        test(&mut Guest { network: Network::default(), socket });
    });
    tested.join().unwrap();
}

/// The interface, as the host has it.
fn interface() -> wire::NetworkInterface {
    let (mac, hardware_address) = (MAC.to_vec(), MAC.to_vec());
    wire::NetworkInterface { name: "eth0".into(), mac, hardware_address, mtu: 1500, up: true, ..Default::default() }
}

impl Guest {
    fn configure(&self, addresses: &[wire::NetworkAddress], routes: &[wire::NetworkRoute]) -> String {
        let interfaces = vec![wire::NetworkInterface { addresses: addresses.to_vec(), ..interface() }];
        self.become_as(&wire::ConfigureNetworkRequest { interfaces, routes: routes.to_vec(), ..Default::default() })
    }

    /// Returns what failed.
    fn become_as(&self, request: &wire::ConfigureNetworkRequest) -> String {
        self.network.configure(request).err().map(|failures| failures.to_string()).unwrap_or_default()
    }

    /// The interface's number.
    fn index(&self) -> i32 {
        self.network.there.lock().unwrap().interfaces[0].1
    }

    /// The setting of that name, as the guest was told it.
    fn setting(&self, name: &str) -> Setting {
        let there = self.network.there.lock().unwrap();
        there.settings.iter().find(|setting| format!("{setting:?}").contains(name)).unwrap().clone()
    }

    /// The routes of the main table: destination, prefix and gateway; those of the kernel and of link-local addresses not.
    fn routes(&mut self) -> Vec<String> {
        let mut routes = Vec::new();
        let request = Message::new(libc::RTM_GETROUTE, 0, &RouteHeader::default());
        let mut add = |header: RouteHeader, attributes: Attributes<'_>| {
            let text = |kind| attributes.find_kind(kind).map(|found| messages::text(found.value));
            let to = text(libc::RTA_DST).unwrap_or_else(|| "default".to_owned());
            if header.table == libc::RT_TABLE_MAIN && header.kind == libc::RTN_UNICAST && !to.starts_with('f') {
                let by = text(libc::RTA_GATEWAY).map(|gateway| format!(" via {gateway}")).unwrap_or_default();
                routes.push(format!("{to}/{}{by}", header.prefix_len));
            }
        };
        self.socket.dump(request, libc::RTM_NEWROUTE, &mut add).unwrap();
        routes.sort();
        routes
    }

    /// The IPv4 rules at some priority, in the kernel's order: what they ask, from where, and by which mark.
    fn rules(&mut self, priority: u32) -> Vec<String> {
        let mut rules = Vec::new();
        let header = RuleHeader { bytes: rule_header(0, 0), ..Default::default() };
        let mut add = |header: RuleHeader, attributes: Attributes<'_>| {
            let number = |kind| attributes.find_kind(kind).and_then(|found| found.number());
            let from =
                attributes.find_kind(libc::RTA_SRC).map(|source| format!(" from {}", messages::text(source.value)));
            let mark = number(FRA_FWMARK).map(|mark| format!(" mark {mark}"));
            if number(FRA_PRIORITY) == Some(priority) {
                rules.push(format!("{}{}{}", header.table, from.unwrap_or_default(), mark.unwrap_or_default()));
            }
        };
        self.socket.dump(Message::new(libc::RTM_GETRULE, 0, &header), libc::RTM_NEWRULE, &mut add).unwrap();
        rules
    }

    /// The IPv4 addresses of the interface, in the kernel's order; secondary ones with a mark.
    fn addresses(&mut self) -> Vec<String> {
        let mut addresses = Vec::new();
        let request = Message::new(libc::RTM_GETADDR, 0, &AddressHeader::default());
        let add = |header: AddressHeader, attributes: Attributes<'_>| {
            let flags = attributes.find_kind(libc::IFA_FLAGS).and_then(|flags| flags.number()).unwrap();
            let mark = if flags & libc::IFA_F_SECONDARY == 0 { "" } else { " secondary" };
            if header.family == libc::AF_INET as u8 && header.index > 1 {
                let address = attributes.find_kind(libc::IFA_LOCAL).unwrap();
                addresses.push(format!("{}{mark}", messages::text(address.value)));
            }
        };
        self.socket.dump(request, libc::RTM_NEWADDR, add).unwrap();
        addresses
    }
}

fn address(net: u8, last: u8) -> wire::NetworkAddress {
    wire::NetworkAddress { address: vec![10, 9, net, last], prefix_len: 24, ..Default::default() }
}

fn secondary(net: u8, last: u8) -> wire::NetworkAddress {
    wire::NetworkAddress { flags: libc::IFA_F_SECONDARY, ..address(net, last) }
}

fn without_route(address: wire::NetworkAddress) -> wire::NetworkAddress {
    wire::NetworkAddress { flags: address.flags | libc::IFA_F_NOPREFIXROUTE, ..address }
}

/// A route by way of 10.9.1.1; to everywhere if `to` is empty.
fn route(to: &[u8], source: &[u8]) -> wire::NetworkRoute {
    wire::NetworkRoute {
        interface: "eth0".into(),
        destination: to.to_vec(),
        prefix_len: if to.is_empty() { 0 } else { 16 },
        gateway: vec![10, 9, 1, 1],
        source: source.to_vec(),
        protocol: libc::RTPROT_BOOT.into(),
        ..Default::default()
    }
}

const FRA_FWMARK: u16 = 10;

/// Of a rule of IPv4 that asks a table.
fn rule_header(source_len: u8, table: u8) -> [u8; 12] {
    [libc::AF_INET as u8, 0, source_len, 0, table, 0, 0, u8::from(table != 0), 0, 0, 0, 0]
}

/// A rule of priority 100, as the host's kernel lists it; for one source, or for a mark.
fn rule(table: u8, source: &[u8], mark: Option<u32>) -> Vec<u8> {
    let header = RuleHeader { bytes: rule_header(source.len() as u8 * 8, table), ..Default::default() };
    let mut message = Message::new(libc::RTM_NEWRULE, 0, &header).with_number(FRA_PRIORITY, 100);
    if !source.is_empty() {
        message = message.with(libc::RTA_SRC, source);
    }
    if let Some(mark) = mark {
        message = message.with_number(FRA_FWMARK, mark);
    }
    message.into_content()
}

#[test]
fn the_only_address_is_replaced_and_the_routes_stay() {
    in_guest(|guest| {
        assert_eq!(guest.configure(&[address(1, 2)], &[route(&[], &[])]), "");
        assert_eq!(guest.routes(), ["10.9.1.0/24", "default/0 via 10.9.1.1"]);
        // A container's own.
        let own = messages::route_message(Some(guest.index()), &route(&[10, 50, 0, 0], &[])).unwrap();
        guest.socket.request(Message::with_content(libc::RTM_NEWROUTE, SET, &own.into_content())).unwrap();

        assert_eq!(guest.configure(&[address(2, 3)], &[route(&[], &[])]), "");

        assert_eq!(guest.routes(), ["10.50.0.0/16 via 10.9.1.1", "10.9.2.0/24", "default/0 via 10.9.1.1"]);
    });
}

const SET: i32 = libc::NLM_F_CREATE | libc::NLM_F_REPLACE;

#[test]
fn a_secondary_address_outlives_its_primary_one() {
    in_guest(|guest| {
        let of_three = route(&[], &[10, 9, 1, 3]);
        let all = [address(1, 2), secondary(1, 3), secondary(1, 4)];
        assert_eq!(guest.configure(&all, std::slice::from_ref(&of_three)), "");
        assert_eq!(guest.addresses(), ["10.9.1.2", "10.9.1.3 secondary", "10.9.1.4 secondary"]);

        assert_eq!(guest.configure(&[address(1, 3), secondary(1, 4)], std::slice::from_ref(&of_three)), "");

        assert_eq!(guest.addresses(), ["10.9.1.3", "10.9.1.4 secondary"]);
        assert_eq!(guest.routes(), ["10.9.1.0/24", "default/0 via 10.9.1.1"]);
        // And back in another order.
        assert_eq!(guest.configure(&[address(1, 4), secondary(1, 3), secondary(1, 2)], &[of_three]), "");
        assert_eq!(guest.addresses(), ["10.9.1.4", "10.9.1.3 secondary", "10.9.1.2 secondary"]);
        assert_eq!(guest.routes(), ["10.9.1.0/24", "default/0 via 10.9.1.1"]);
    });
}

#[test]
fn what_fails_is_named_keeps_nothing_back_and_is_tried_again() {
    in_guest(|guest| {
        // Nobody has that address yet.
        let routes = [route(&[10, 60, 0, 0], &[10, 9, 1, 9]), route(&[10, 61, 0, 0], &[])];
        let failure = "cannot add the route to 10.60.0.0/16 by eth0: Invalid argument (os error 22)";
        for _ in 0..2 {
            assert_eq!(guest.configure(&[address(1, 2)], &routes), failure);
            assert_eq!(guest.routes(), ["10.61.0.0/16 via 10.9.1.1", "10.9.1.0/24"]);
        }
        let own = messages::address_message(guest.index(), &address(1, 9)).unwrap();
        guest.socket.request(Message::with_content(libc::RTM_NEWADDR, SET, &own.into_content())).unwrap();

        assert_eq!(guest.configure(&[address(1, 2)], &routes), "");

        assert_eq!(guest.routes(), ["10.60.0.0/16 via 10.9.1.1", "10.61.0.0/16 via 10.9.1.1", "10.9.1.0/24"]);
    });
}

#[test]
fn what_a_container_has_taken_away_stays_away() {
    in_guest(|guest| {
        let routes = [route(&[], &[]), route(&[10, 61, 0, 0], &[])];
        assert_eq!(guest.configure(&[address(1, 2)], &routes), "");
        guest.setting("10.61.0.0").take_away(&mut guest.socket).unwrap();

        assert_eq!(guest.configure(&[address(2, 3)], &routes), "");

        assert_eq!(guest.routes(), ["10.9.2.0/24", "default/0 via 10.9.1.1"]);
    });
}

#[test]
fn the_kernels_route_for_an_address_goes_and_comes_back() {
    in_guest(|guest| {
        let other = || wire::NetworkRoute { prefix_len: 24, ..route(&[10, 9, 1, 0], &[]) };
        let ipv6 = |last: u8, flags| {
            let address = [&[0x2a, 1][..], &[0; 13], &[last]].concat();
            wire::NetworkAddress { address, prefix_len: 64, flags: flags | libc::IFA_F_NODAD, ..Default::default() }
        };
        let none = libc::IFA_F_NOPREFIXROUTE;
        let (all, without) = (["10.9.1.0/24", "2a01::/64"], [""; 0]);
        let with_routes = [address(1, 2), ipv6(2, 0), ipv6(3, 0)];
        let without_routes = [without_route(address(1, 2)), ipv6(2, none), ipv6(3, none)];

        assert_eq!(guest.configure(&without_routes, &[]), "");
        assert_eq!(guest.routes(), without);
        assert_eq!(guest.configure(&with_routes, &[]), "");
        assert_eq!(guest.routes(), all);
        assert_eq!(guest.configure(&without_routes, &[other()]), "");
        assert_eq!(guest.routes(), ["10.9.1.0/24 via 10.9.1.1"]);
    });
}

#[test]
fn a_gateway_that_is_on_no_network_is_looked_for_on_the_link() {
    in_guest(|guest| {
        // On the host it was on one.
        assert_eq!(guest.configure(&[address(2, 3)], &[route(&[], &[])]), "");
        assert_eq!(guest.routes(), ["10.9.2.0/24", "default/0 via 10.9.1.1"]);
        // It is there, and can be taken away.
        assert_eq!(guest.configure(&[address(2, 3)], &[]), "");
        assert_eq!(guest.routes(), ["10.9.2.0/24"]);
    });
}

#[test]
fn a_rule_goes_alone_though_others_say_the_same_and_more() {
    in_guest(|guest| {
        let (marked, from, all, other) =
            (rule(5, &[], Some(7)), rule(5, &[10, 9, 1, 2], None), rule(5, &[], None), rule(6, &[], None));
        let mut with = |rules: &[&Vec<u8>]| {
            let rules = rules.iter().map(|rule| (*rule).clone()).collect();
            let request = wire::ConfigureNetworkRequest { rules, ..Default::default() };
            assert_eq!(guest.become_as(&request), "");
            guest.rules(100)
        };

        assert_eq!(with(&[&marked, &from, &all, &other]), ["5 mark 7", "5 from 10.9.1.2", "5", "6"]);
        assert_eq!(with(&[&marked, &from, &other]), ["5 mark 7", "5 from 10.9.1.2", "6"]);
        assert_eq!(with(&[&from]), ["5 from 10.9.1.2"]);
        assert_eq!(with(&[&from, &all]), ["5 from 10.9.1.2", "5"]);
        assert_eq!(with(&[]), [""; 0]);
    });
}

#[test]
fn a_device_that_a_container_has_moved_away_is_not_missed() {
    in_guest(|guest| {
        assert_eq!(guest.configure(&[address(1, 2)], &[route(&[], &[])]), "");
        let gone = LinkHeader { index: guest.index(), ..Default::default() };
        guest.socket.request(Message::new(libc::RTM_DELLINK, 0, &gone)).unwrap();

        for _ in 0..2 {
            assert_eq!(guest.become_as(&wire::ConfigureNetworkRequest::default()), "");
        }
    });
}

#[test]
fn an_interface_forwards_otherwise_than_all_do() {
    in_guest(|guest| {
        let file = |name: &str| std::path::Path::new(link::SETTINGS).join("ipv4/conf").join(name);
        // As in a guest, whatever the tests' host does.
        if std::fs::write(file("all/forwarding"), "0").is_err() {
            return;
        }
        let with = |all: &str, one: i32| {
            let sysctls = [("forwarding", all), ("accept_redirects", "1")]
                .map(|(name, value)| (format!("ipv4/conf/all/{name}"), value.to_owned()));
            let interfaces = vec![wire::NetworkInterface { ipv4: vec![one], ..interface() }];
            let sysctls = sysctls.into_iter().collect();
            let request = wire::ConfigureNetworkRequest { interfaces, sysctls, ..Default::default() };
            assert_eq!(guest.become_as(&request), "");
            let read = |name| std::fs::read_to_string(file(name)).unwrap().trim().to_owned();
            [read("all/forwarding"), read("all/accept_redirects"), read("eth0/forwarding")]
        };

        assert_eq!(with("1", 0), ["1", "1", "0"]);
        assert_eq!(with("0", 0), ["0", "1", "0"]);
        assert_eq!(with("1", 0), ["1", "1", "0"]);
        assert_eq!(with("0", 1), ["0", "1", "1"]);
        assert_eq!(with("0", 0), ["0", "1", "0"]);
    });
}
