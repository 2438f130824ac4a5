// SPDX-License-Identifier: Apache-2.0
//! One thing that is there in the guest's network, or not: an address, a neighbour, a rule, or a route.

use std::hash::{Hash, Hasher};
use std::io;

use bulkhead_netlink::{AddressHeader, Attributes, Header, Message, NeighbourHeader, RouteHeader, Socket};

use super::NetworkError;
use super::address::Address;

/// Makes what is not there, and changes what is there and differs.
const SET: i32 = libc::NLM_F_CREATE | libc::NLM_F_REPLACE;

/// What the kernel takes for the metric of an IPv6 route that has none (`IP6_RT_PRIO_USER`, net/ip6_route.h).
const DEFAULT_METRIC: u32 = 1024;

/// `RTNH_F_ONLINK` (linux/rtnetlink.h): the gateway is on the link, whatever the addresses say.
const RTNH_F_ONLINK: u32 = 4;

#[derive(Debug, Clone)]
pub(super) struct Setting {
    /// What it is called.
    name: String,
    pub(super) place: Place,
    /// Its header and its attributes.
    pub(super) content: Vec<u8>,
}

/// What it is called is no part of it: where an interface of the host has got another name, nothing that is on it has to be made again,
/// least of all what a container has taken away.
impl PartialEq for Setting {
    fn eq(&self, other: &Self) -> bool {
        (&self.place, &self.content) == (&other.place, &other.content)
    }
}

impl Eq for Setting {}

impl Hash for Setting {
    fn hash<H: Hasher>(&self, state: &mut H) {
        // The place is only what the content says.
        self.content.hash(state);
    }
}

/// That of which there is one: the kernel puts one in the place of another, or does not have both.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(super) enum Place {
    /// IPv4 has the same address in several networks; of IPv6 the prefix' length is 0 here.
    Address {
        index: u32,
        address: Vec<u8>,
        prefix_len: u8,
    },
    Neighbour {
        index: i32,
        address: Vec<u8>,
    },
    /// Rules are what they say.
    Rule(Vec<u8>),
    Route {
        family: u8,
        table: u32,
        destination: Vec<u8>,
        prefix_len: u8,
        tos: u8,
        metric: u32,
    },
}

impl Place {
    /// That of an address that is listed, or to be made.
    pub(super) fn of_address(header: &AddressHeader, attributes: Attributes<'_>) -> Self {
        let address = local(attributes).to_vec();
        let prefix_len = if address.len() == 4 { header.prefix_len } else { 0 };
        Self::Address { index: header.index, address, prefix_len }
    }

    pub(super) fn of_neighbour(header: &NeighbourHeader, attributes: Attributes<'_>) -> Self {
        Self::Neighbour { index: header.index, address: value(attributes, libc::NDA_DST).to_vec() }
    }

    pub(super) fn of_route(header: &RouteHeader, attributes: Attributes<'_>) -> Self {
        let default = if header.family == libc::AF_INET6 as u8 { DEFAULT_METRIC } else { 0 };
        Self::Route {
            family: header.family,
            table: number(attributes, libc::RTA_TABLE).unwrap_or_else(|| header.table.into()),
            destination: value(attributes, libc::RTA_DST).to_vec(),
            prefix_len: header.prefix_len,
            tos: header.tos,
            metric: number(attributes, libc::RTA_PRIORITY).unwrap_or(default),
        }
    }

    /// That of what is to be made; `None` if the content is not whole.
    fn of(kind: Kind, content: &[u8]) -> Option<Self> {
        Some(match kind {
            Kind::Address => of_content(content, Self::of_address)?,
            Kind::Neighbour => of_content(content, Self::of_neighbour)?,
            Kind::Route => of_content(content, Self::of_route)?,
            Kind::Rule => Self::Rule(content.to_vec()),
        })
    }
}

fn of_content<H: Header>(content: &[u8], place: impl Fn(&H, Attributes<'_>) -> Place) -> Option<Place> {
    H::read(content).map(|(header, attributes)| place(&header, Attributes::new(attributes)))
}

/// What kind of thing it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    Address,
    Neighbour,
    Rule,
    Route,
}

impl Setting {
    pub(super) fn new(kind: Kind, name: String, message: io::Result<Message>) -> Result<Self, NetworkError> {
        let made = message.and_then(|message| {
            let content = message.into_content();
            let place = Place::of(kind, &content).ok_or(io::ErrorKind::InvalidInput)?;
            Ok((place, content))
        });
        match made {
            Ok((place, content)) => Ok(Self { name, place, content }),
            Err(error) => Err(NetworkError::new(format!("add {name}"), error)),
        }
    }

    pub(super) fn kind(&self) -> Kind {
        match self.place {
            Place::Address { .. } => Kind::Address,
            Place::Neighbour { .. } => Kind::Neighbour,
            Place::Rule(_) => Kind::Rule,
            Place::Route { .. } => Kind::Route,
        }
    }

    /// Makes it; what is in its place becomes this, as far as the kernel can do that.
    pub(super) fn make(&self, socket: &mut Socket) -> Result<(), NetworkError> {
        let (kind, flags) = match self.kind() {
            Kind::Address => (libc::RTM_NEWADDR, SET),
            Kind::Neighbour => (libc::RTM_NEWNEIGH, SET),
            // With NLM_F_EXCL the kernel would take one that says more about addresses for it.
            Kind::Rule => (libc::RTM_NEWRULE, libc::NLM_F_CREATE),
            Kind::Route => (libc::RTM_NEWROUTE, SET),
        };
        let made = match socket.request(Message::with_content(kind, flags, &self.content)) {
            Err(error) if is_unreachable(&error) => match self.on_link() {
                Some(message) => socket.request(message),
                None => Err(error),
            },
            made => made,
        };
        made.map_err(|error| NetworkError::new(format!("add {}", self.name), error))
    }

    /// A request for a route whose gateway is on none of the interface's networks. The host's kernel has it from when there was such
    /// a network, and looks for the gateway on the link.
    fn on_link(&self) -> Option<Message> {
        let (header, attributes) = RouteHeader::read(&self.content).filter(|_| self.kind() == Kind::Route)?;
        let header = RouteHeader { flags: header.flags | RTNH_F_ONLINK, ..header };
        Some(Message::new(libc::RTM_NEWROUTE, SET, &header).with_all(attributes))
    }

    pub(super) fn take_away(&self, socket: &mut Socket) -> Result<(), NetworkError> {
        let kind = match self.kind() {
            Kind::Address => libc::RTM_DELADDR,
            Kind::Neighbour => libc::RTM_DELNEIGH,
            Kind::Rule => libc::RTM_DELRULE,
            Kind::Route => libc::RTM_DELROUTE,
        };
        match socket.request(Message::with_content(kind, 0, &self.content)) {
            // It went by itself, with an address or an interface; or a container has taken it away.
            Err(error) if is_gone(&error) => Ok(()),
            gone => gone.map_err(|error| NetworkError::new(format!("remove {}", self.name), error)),
        }
    }

    /// Whether the kernel makes this of another one that is in its place.
    pub(super) fn can_be_made_of(&self, old: &Self) -> bool {
        let (Some(new), Some(old)) = (Address::of(self), Address::of(old)) else {
            return true;
        };
        if new.is_ipv6() {
            return new.header.prefix_len == old.header.prefix_len;
        }
        let same = |kind| value(new.attributes, kind) == value(old.attributes, kind);
        new.header.scope == old.header.scope
            && same(libc::IFA_ADDRESS)
            && same(libc::IFA_BROADCAST)
            // A primary one becomes no secondary one; the other way round is the kernel's doing.
            && new.flags() & libc::IFA_F_SECONDARY <= old.flags() & libc::IFA_F_SECONDARY
    }

    /// Makes it of one that is in its place, and of which it can be made.
    pub(super) fn make_of(&self, old: &Self, socket: &mut Socket) -> Result<(), NetworkError> {
        self.make(socket)?;
        let (Some(new), Some(old)) = (Address::of(self), Address::of(old)) else {
            return Ok(());
        };
        let had_route = old.flags() & libc::IFA_F_NOPREFIXROUTE == 0;
        let has_route = new.flags() & libc::IFA_F_NOPREFIXROUTE == 0;
        // The kernel does not look at that flag of an IPv4 address which is there, nor at that of an IPv6 one with neighbours in
        // the prefix, unless the route is to come back.
        let result = match (had_route, has_route) {
            (true, false) => socket.request(new.prefix_route(libc::RTM_DELROUTE, 0)),
            (false, true) if !new.is_ipv6() && new.flags() & libc::IFA_F_SECONDARY == 0 => {
                socket.request(new.prefix_route(libc::RTM_NEWROUTE, libc::NLM_F_CREATE | libc::NLM_F_APPEND))
            }
            _ => Ok(()),
        };
        match result {
            Err(error) if !is_gone(&error) && error.kind() != io::ErrorKind::AlreadyExists => {
                Err(NetworkError::new(format!("change the route for {}", self.name), error))
            }
            _ => Ok(()),
        }
    }
}

/// Whether what was to go is not there.
fn is_gone(error: &io::Error) -> bool {
    let gone = [libc::ESRCH, libc::ENOENT, libc::EADDRNOTAVAIL, libc::ENETDOWN, libc::ENODEV];
    error.raw_os_error().is_some_and(|number| gone.contains(&number))
}

/// Whether it is the gateway that the kernel does not find a way to.
fn is_unreachable(error: &io::Error) -> bool {
    error.raw_os_error().is_some_and(|number| [libc::ENETUNREACH, libc::EHOSTUNREACH].contains(&number))
}

/// The value of an attribute; empty where there is none.
pub(super) fn value(attributes: Attributes<'_>, kind: u16) -> &[u8] {
    attributes.find_kind(kind).map(|attribute| attribute.value).unwrap_or_default()
}

pub(super) fn number(attributes: Attributes<'_>, kind: u16) -> Option<u32> {
    attributes.find_kind(kind).and_then(|attribute| attribute.number())
}

/// The address itself: where it has no peer, IPv6 has no attribute for it alone.
pub(super) fn local(attributes: Attributes<'_>) -> &[u8] {
    let local = value(attributes, libc::IFA_LOCAL);
    if local.is_empty() { value(attributes, libc::IFA_ADDRESS) } else { local }
}
