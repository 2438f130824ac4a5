// SPDX-License-Identifier: Apache-2.0
//! The sandbox's network, as the host describes it.

use std::io;

use bulkhead_netlink::{AddressHeader, Message, NeighbourHeader, RouteHeader, Socket};
use bulkhead_protocol::agent as wire;

use super::{NetworkError, link};

/// Makes what is not there, and changes what is there and differs.
const SET: i32 = libc::NLM_F_CREATE | libc::NLM_F_REPLACE;

/// Sets the network of the calling process's network namespace up. What is there already stays.
pub(crate) fn configure(request: &wire::ConfigureNetworkRequest) -> Result<(), NetworkError> {
    let mut socket = Socket::open().map_err(|error| NetworkError::new("open a netlink socket", error))?;
    let indices = link::set_up(&mut socket, &request.interfaces)?;
    for (interface, index) in request.interfaces.iter().zip(&indices) {
        for address in &interface.addresses {
            add_address(&mut socket, &interface.name, *index, address)?;
        }
    }
    let index_of = |name: &str| -> Result<i32, io::Error> {
        let mut interfaces = request.interfaces.iter().zip(&indices);
        let found = interfaces.find(|(interface, _)| interface.name == name);
        found.map(|(_, index)| *index).ok_or_else(|| io::ErrorKind::NotFound.into())
    };
    for neighbour in &request.neighbours {
        let message = index_of(&neighbour.interface).and_then(|index| neighbour_message(index, neighbour));
        let added = message.and_then(|message| socket.request(message));
        let name = text(&neighbour.address);
        added.map_err(|error| NetworkError::new(format!("add neighbour {name} of {}", neighbour.interface), error))?;
    }
    // The way to a gateway comes before the routes through it.
    let (direct, through): (Vec<_>, Vec<_>) = request.routes.iter().partition(|route| route.gateway.is_empty());
    for route in direct.into_iter().chain(through) {
        let message = index_of(&route.interface).and_then(|index| route_message(index, route));
        let added = message.and_then(|message| socket.request(message));
        let name = if route.destination.is_empty() { "default".to_owned() } else { text(&route.destination) };
        let doing = || format!("add the route to {name}/{} by {}", route.prefix_len, route.interface);
        added.map_err(|error| NetworkError::new(doing(), error))?;
    }
    Ok(())
}

fn add_address(
    socket: &mut Socket,
    interface: &str,
    index: i32,
    address: &wire::NetworkAddress,
) -> Result<(), NetworkError> {
    let added = address_message(index, address).and_then(|message| socket.request(message));
    let doing = || format!("add address {}/{} to {interface}", text(&address.address), address.prefix_len);
    added.map_err(|error| NetworkError::new(doing(), error))
}

fn address_message(index: i32, address: &wire::NetworkAddress) -> io::Result<Message> {
    let header = AddressHeader {
        family: family(&address.address)?,
        prefix_len: byte(address.prefix_len)?,
        scope: byte(address.scope)?,
        index: index.cast_unsigned(),
    };
    let peer = if address.peer.is_empty() { &address.address } else { &address.peer };
    let mut message = Message::new(libc::RTM_NEWADDR, SET, &header)
        .with(libc::IFA_LOCAL, &address.address)
        .with(libc::IFA_ADDRESS, peer)
        .with_number(libc::IFA_FLAGS, address.flags);
    if !address.broadcast.is_empty() {
        message = message.with(libc::IFA_BROADCAST, &address.broadcast);
    }
    Ok(message)
}

fn route_message(index: i32, route: &wire::NetworkRoute) -> io::Result<Message> {
    let header = RouteHeader {
        family: if route.ipv6 { libc::AF_INET6 } else { libc::AF_INET } as u8,
        prefix_len: byte(route.prefix_len)?,
        table: libc::RT_TABLE_MAIN,
        protocol: byte(route.protocol)?,
        scope: byte(route.scope)?,
        kind: libc::RTN_UNICAST,
        flags: route.flags,
    };
    let mut message = Message::new(libc::RTM_NEWROUTE, SET, &header).with_number(libc::RTA_OIF, index.cast_unsigned());
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
    Ok(Message::new(libc::RTM_NEWNEIGH, SET, &header)
        .with(libc::NDA_DST, &neighbour.address)
        .with(libc::NDA_LLADDR, &neighbour.mac))
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
        assert!(route_message(2, &route).is_ok());
        assert!(route_message(2, &wire::NetworkRoute { ipv6: true, ..route }).is_err());
    }

    #[test]
    fn addresses_are_written_as_usual() {
        assert_eq!(text(&[10, 1, 2, 3]), "10.1.2.3");
        assert_eq!(text(&[0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1]), "::1");
    }
}
