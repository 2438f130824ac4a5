// SPDX-License-Identifier: Apache-2.0
//! What there is in a network namespace, as far as a container gets it.

use std::collections::HashMap;
use std::io;

use bulkhead_netlink::{AddressHeader, Attributes, LinkHeader, Message, NeighbourHeader, Socket};
use bulkhead_protocol::agent::{NetworkAddress, NetworkNeighbour};

use super::link::Link;
use super::routes::Routes;
use super::{address, netfilter, resolver, sysctls};

/// What there is.
#[derive(Debug, Default, PartialEq)]
pub(super) struct Survey {
    /// All but the loopback, in the order of their making.
    pub(super) links: Vec<Link>,
    /// The addresses of the loopback, but for those that every one has.
    pub(super) loopback: Vec<NetworkAddress>,
    pub(super) routes: Routes,
    /// Those that are known for good.
    pub(super) neighbours: Vec<NetworkNeighbour>,
    /// What is not passed on, or not as it is: one text each.
    pub(super) left_out: Vec<String>,
    /// Whether an engine has a resolver there; see [`Self::look_inside`].
    pub(super) resolver: bool,
    /// What is set there for all interfaces; see [`Self::look_inside`].
    pub(super) sysctls: HashMap<String, String>,
}

impl Survey {
    /// Looks around in the socket's network namespace, where no route is to lead through the interfaces of the numbers
    /// `given_up`.
    pub(super) fn take(socket: &mut Socket, given_up: &[i32]) -> io::Result<Self> {
        let mut survey = Self::default();
        let mut loopback = Link { name: "lo".to_owned(), ..Link::default() };
        let request = Message::new(libc::RTM_GETLINK, 0, &LinkHeader::default());
        socket.dump(request, libc::RTM_NEWLINK, |header: LinkHeader, attributes| {
            if header.hardware == libc::ARPHRD_LOOPBACK {
                loopback.index = header.index;
            }
            survey.links.extend(Link::read(&header, attributes));
        })?;
        survey.links.sort_by_key(|link| link.index);
        let request = Message::new(libc::RTM_GETADDR, 0, &AddressHeader::default());
        socket.dump(request, libc::RTM_NEWADDR, |header: AddressHeader, attributes| {
            let mut links = survey.links.iter_mut().chain([&mut loopback]);
            if let Some(link) = links.find(|link| link.index.cast_unsigned() == header.index) {
                survey.left_out.extend(address::add(link, &header, attributes).err());
            }
        })?;
        loopback.addresses.retain(|address| !address::is_every_loopbacks(&address.address));
        survey.loopback = loopback.addresses;
        let Self { links, routes, neighbours, left_out, .. } = &mut survey;
        let passed: Vec<_> = links.iter().filter(|link| !given_up.contains(&link.index)).collect();
        *routes = Routes::list(socket, &passed)?;
        address::mark_without_route(links, &routes.prefixes);
        left_out.append(&mut routes.left_out);
        let request = Message::new(libc::RTM_GETNEIGH, 0, &NeighbourHeader::default());
        socket.dump(request, libc::RTM_NEWNEIGH, |header, attributes| {
            neighbours.extend(neighbour(&header, attributes, links));
        })?;
        Ok(survey)
    }

    /// Adds what only a thread sees that is in the namespace; to be called by one.
    pub(super) fn look_inside(&mut self) {
        self.resolver = resolver::is_there();
        self.left_out.extend(netfilter::left_out(self.resolver));
        self.sysctls = sysctls::list(sysctls::FOLDER.as_ref());
    }
}

/// The value of an attribute, as a list of bytes; empty where there is none.
pub(super) fn bytes(attributes: Attributes<'_>, kind: u16) -> Vec<u8> {
    attributes.find_kind(kind).map(|attribute| attribute.value.to_vec()).unwrap_or_default()
}

pub(super) fn number(attributes: Attributes<'_>, kind: u16) -> Option<u32> {
    attributes.find_kind(kind).and_then(|attribute| attribute.number())
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
