// SPDX-License-Identifier: Apache-2.0
//! The sandbox's network, as the host describes it.

use std::io;
use std::sync::{Mutex, PoisonError};

use bulkhead_netlink::{AddressHeader, Header, Message, NeighbourHeader, RouteHeader, RuleHeader, Socket};
use bulkhead_protocol::agent as wire;

use super::resolver::Resolver;
use super::{NetworkError, bring_loopback_up, link};

/// Makes what is not there, and changes what is there and differs.
const SET: i32 = libc::NLM_F_CREATE | libc::NLM_F_REPLACE;

/// The loopback's number in each network namespace (`LOOPBACK_IFINDEX`, net/flow.h of the kernel).
const LOOPBACK: i32 = 1;

/// The network of the guest's own namespace, as the host wanted it last.
#[derive(Debug, Default)]
pub(crate) struct Network {
    wanted: Mutex<Wanted>,
    /// The host's resolver, if it has one for the guest.
    pub(crate) resolver: Resolver,
}

/// What is wanted.
#[derive(Debug, Default)]
struct Wanted {
    /// The numbers of the interfaces, in their order.
    indices: Vec<i32>,
    request: wire::ConfigureNetworkRequest,
    /// The numbers of interfaces that were wanted once: their devices are of no use any more.
    gone: Vec<i32>,
}

impl Network {
    /// Makes the network of the calling process' network namespace what is wanted: what was wanted before and no longer is
    /// goes, and what has come is made. The rest stays, also what a container has changed.
    pub(crate) fn configure(&self, request: wire::ConfigureNetworkRequest) -> Result<(), NetworkError> {
        // Nothing panics while the lock is held.
        let mut before = self.wanted.lock().unwrap_or_else(PoisonError::into_inner);
        let mut socket = Socket::open().map_err(|error| NetworkError::new("open a netlink socket", error))?;
        let Wanted { indices, request: wanted, gone } = &mut *before;
        let wanted = wanted.interfaces.iter().zip(indices.iter().copied()).collect();
        let indices = link::set_up(&mut socket, &request.interfaces, link::Before { wanted, gone })?;
        let after = Wanted { indices, request, gone: before.gone.clone() };
        let old = before.settings()?;
        let new = after.settings()?;
        // In reverse: a route goes before the address that it needs.
        for setting in old.iter().rev().filter(|setting| !new.contains(setting)) {
            setting.take_away(&mut socket)?;
        }
        for setting in new.iter().filter(|setting| !old.contains(setting)) {
            setting.make(&mut socket)?;
        }
        *before = after;
        self.turn_resolver(before.request.resolver)
    }

    fn turn_resolver(&self, on: bool) -> Result<(), NetworkError> {
        if on {
            // It is at one of its addresses.
            bring_loopback_up().map_err(|failure| NetworkError::new("turn lo on", io::Error::other(failure)))?;
        }
        let turned = self.resolver.turn(on);
        turned.map_err(|error| NetworkError::new("take questions for the host's resolver at 127.0.0.11:53", error))
    }
}

/// One thing that is there, or not.
#[derive(Debug, PartialEq)]
struct Setting {
    /// What it is called.
    name: String,
    kind: Kind,
    /// Its header and its attributes.
    content: Vec<u8>,
}

/// How one is made, and how it is taken away.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Address,
    Neighbour,
    Rule,
    Route,
}

impl Setting {
    fn make(&self, socket: &mut Socket) -> Result<(), NetworkError> {
        let (kind, flags) = match self.kind {
            Kind::Address => (libc::RTM_NEWADDR, SET),
            Kind::Neighbour => (libc::RTM_NEWNEIGH, SET),
            Kind::Rule => (libc::RTM_NEWRULE, libc::NLM_F_CREATE | libc::NLM_F_EXCL),
            Kind::Route => (libc::RTM_NEWROUTE, SET),
        };
        match socket.request(Message::with_content(kind, flags, &self.content)) {
            // Rules cannot be replaced, nor do they differ where they are the same.
            Err(error) if self.kind == Kind::Rule && error.kind() == io::ErrorKind::AlreadyExists => Ok(()),
            made => made.map_err(|error| NetworkError::new(format!("add {}", self.name), error)),
        }
    }

    fn take_away(&self, socket: &mut Socket) -> Result<(), NetworkError> {
        let kind = match self.kind {
            Kind::Address => libc::RTM_DELADDR,
            Kind::Neighbour => libc::RTM_DELNEIGH,
            Kind::Rule => libc::RTM_DELRULE,
            Kind::Route => libc::RTM_DELROUTE,
        };
        match socket.request(Message::with_content(kind, 0, &self.content)) {
            // It went by itself, with an address or an interface; or a container has taken it away.
            Err(error)
                if [libc::ESRCH, libc::ENOENT, libc::EADDRNOTAVAIL, libc::ENETDOWN]
                    .map(Some)
                    .contains(&error.raw_os_error()) =>
            {
                Ok(())
            }
            gone => gone.map_err(|error| NetworkError::new(format!("remove {}", self.name), error)),
        }
    }
}

impl Wanted {
    /// What there is to be, in the order in which it can be made.
    fn settings(&self) -> Result<Vec<Setting>, NetworkError> {
        let Self { indices, request, .. } = self;
        let mut settings = Vec::new();
        let mut add = |kind, name: String, content: io::Result<Message>| {
            let content = content.map_err(|error| NetworkError::new(format!("add {name}"), error))?.into_content();
            settings.push(Setting { name, kind, content });
            Ok::<(), NetworkError>(())
        };
        for (interface, index) in request.interfaces.iter().zip(indices) {
            for address in &interface.addresses {
                let name = format!("address {}/{} to {}", text(&address.address), address.prefix_len, interface.name);
                add(Kind::Address, name, address_message(*index, address))?;
            }
        }
        for address in &request.loopback {
            let name = format!("address {}/{} to lo", text(&address.address), address.prefix_len);
            add(Kind::Address, name, address_message(LOOPBACK, address))?;
        }
        let index_of = |name: &str| -> io::Result<i32> {
            let mut interfaces = request.interfaces.iter().zip(indices);
            let found = interfaces.find(|(interface, _)| interface.name == name);
            found.map(|(_, index)| *index).ok_or_else(|| io::ErrorKind::NotFound.into())
        };
        for neighbour in &request.neighbours {
            let name = format!("neighbour {} of {}", text(&neighbour.address), neighbour.interface);
            let message = index_of(&neighbour.interface).and_then(|index| neighbour_message(index, neighbour));
            add(Kind::Neighbour, name, message)?;
        }
        for rule in &request.rules {
            add(Kind::Rule, "a rule for routes".to_owned(), rule_message(rule))?;
        }
        // The way to a gateway comes before the routes through it.
        let (direct, through): (Vec<_>, Vec<_>) = request.routes.iter().partition(|route| route.gateway.is_empty());
        for route in direct.into_iter().chain(through) {
            let to = if route.destination.is_empty() { "default".to_owned() } else { text(&route.destination) };
            let name = format!("the route to {to}/{} by {}", route.prefix_len, route.interface);
            let index = if route.interface.is_empty() { Ok(None) } else { index_of(&route.interface).map(Some) };
            add(Kind::Route, name, index.and_then(|index| route_message(index, route)))?;
        }
        Ok(settings)
    }
}

fn address_message(index: i32, address: &wire::NetworkAddress) -> io::Result<Message> {
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
    Ok(message)
}

fn route_message(index: Option<i32>, route: &wire::NetworkRoute) -> io::Result<Message> {
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

fn neighbour_message(index: i32, neighbour: &wire::NetworkNeighbour) -> io::Result<Message> {
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

fn rule_message(rule: &[u8]) -> io::Result<Message> {
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
fn text(address: &[u8]) -> String {
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
    use super::*;

    #[test]
    fn addresses_have_four_or_sixteen_bytes() {
        let address = wire::NetworkAddress { address: vec![10, 0, 0, 1], prefix_len: 24, ..Default::default() };
        assert!(address_message(2, &address).is_ok());
        assert!(address_message(2, &wire::NetworkAddress { address: vec![1; 5], ..Default::default() }).is_err());
        assert!(address_message(2, &wire::NetworkAddress { prefix_len: 256, ..address }).is_err());
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
    fn what_is_wanted_is_in_the_order_in_which_it_can_be_made() {
        let route = |gateway: &[u8]| wire::NetworkRoute {
            interface: "eth0".into(),
            gateway: gateway.to_vec(),
            ..Default::default()
        };
        let address = wire::NetworkAddress { address: vec![10, 0, 0, 2], prefix_len: 24, ..Default::default() };
        let interface = wire::NetworkInterface { name: "eth0".into(), addresses: vec![address], ..Default::default() };
        let request = wire::ConfigureNetworkRequest {
            interfaces: vec![interface],
            routes: vec![route(&[10, 0, 0, 1]), route(&[])],
            rules: vec![vec![0; RuleHeader::LEN]],
            ..Default::default()
        };

        let settings = Wanted { indices: vec![2], request, gone: Vec::new() }.settings().unwrap();

        let kinds: Vec<_> = settings.iter().map(|setting| setting.kind).collect();
        assert_eq!(kinds, [Kind::Address, Kind::Rule, Kind::Route, Kind::Route]);
        assert!(settings[2].content.len() < settings[3].content.len(), "the route with a gateway is the last");
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
