// SPDX-License-Identifier: Apache-2.0
//! Interfaces: found by their hardware address, named, and turned on.

use std::io;

use bulkhead_netlink::{LinkHeader, Message, Socket};
use bulkhead_protocol::agent::NetworkInterface;

use super::{NetworkError, late};
use crate::init::SYS;

/// Longest name of an interface.
const NAME_MAX: usize = libc::IFNAMSIZ - 1;

/// An interface that is there.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Link {
    pub(super) index: i32,
    pub(super) name: String,
    pub(super) mac: Vec<u8>,
}

/// All interfaces.
pub(super) fn list(socket: &mut Socket) -> io::Result<Vec<Link>> {
    let mut links = Vec::new();
    let request = Message::new(libc::RTM_GETLINK, 0, &LinkHeader::default());
    socket.dump(request, libc::RTM_NEWLINK, |header: LinkHeader, attributes| {
        let name = attributes.find_kind(libc::IFLA_IFNAME).and_then(|name| name.text());
        let mac = attributes.find_kind(libc::IFLA_ADDRESS);
        if let (Some(name), Some(mac)) = (name, mac) {
            links.push(Link { index: header.index, name: name.to_owned(), mac: mac.value.to_vec() });
        }
    })?;
    Ok(links)
}

/// Gives each of `wanted` its name, its MTU and its state; returns the numbers of the interfaces, in that order. Those that
/// were wanted before have their numbers; if they are no longer wanted, they are turned off.
pub(super) fn set_up(
    socket: &mut Socket,
    wanted: &[NetworkInterface],
    before: &[(&NetworkInterface, i32)],
) -> Result<Vec<i32>, NetworkError> {
    let list = |socket: &mut Socket| {
        list(socket).map_err(|error| NetworkError::new("list the guest's network interfaces", error))
    };
    let mut links = list(socket)?;
    // One that came when the machine ran is found by looking again.
    let count = |links: &[Link], mac: &[u8]| links.iter().filter(|link| link.mac == mac).count();
    let is_short = |interface: &NetworkInterface| {
        wanted.iter().filter(|other| other.mac == interface.mac).count() > count(&links, &interface.mac)
    };
    if wanted.iter().any(is_short) {
        // What is not found is told below.
        let _ = late::look_again(SYS.as_ref());
        links = list(socket)?;
    }
    let mut found: Vec<&Link> = Vec::with_capacity(wanted.len());
    for interface in wanted {
        let name = &interface.name;
        if name.is_empty() || name.len() > NAME_MAX {
            let doing = format!("call a network interface {name:?}");
            return Err(NetworkError::new(doing, io::ErrorKind::InvalidInput));
        }
        // Several may share an address: their devices are in the order of the interfaces, and those of others are taken.
        let known = |(old, _): &&(&NetworkInterface, i32)| old.mac == interface.mac && old.name == *name;
        let known = before.iter().find(known).map(|(_, index)| *index);
        let is_others = |link: &Link| before.iter().any(|(old, index)| *index == link.index && is_wanted(old, wanted));
        let fits = |link: &&Link| match known {
            Some(index) => link.index == index,
            None => link.mac == interface.mac && !found.contains(link) && !is_others(link),
        };
        let Some(link) = links.iter().find(fits) else {
            let doing = format!("find the device of network interface {name}");
            return Err(NetworkError::new(doing, io::ErrorKind::NotFound));
        };
        found.push(link);
    }
    // A name that is wanted may still be another's: such a one gets out of the way first.
    for (link, interface) in found.iter().zip(wanted) {
        let is_wanted = wanted.iter().any(|other| other.name == link.name);
        if link.name != interface.name && is_wanted {
            let aside = format!("aside{}", link.index);
            let message = change(link.index, 0).with_text(libc::IFLA_IFNAME, &aside);
            let renamed = socket.request(message);
            renamed.map_err(|error| NetworkError::new(format!("rename network interface {}", link.name), error))?;
        }
    }
    for (link, interface) in found.iter().zip(wanted) {
        let old = before.iter().find(|(_, index)| *index == link.index).map(|(old, _)| *old);
        if old.is_some_and(|old| is_same(old, interface)) {
            continue;
        }
        if !interface.up && old.is_some_and(|old| old.up) {
            turn_off(socket, link.index, &interface.name)?;
        }
        let flags = if interface.up { libc::IFF_UP } else { 0 };
        let mut message = change(link.index, flags.cast_unsigned()).with_number(libc::IFLA_MTU, interface.mtu);
        if link.name != interface.name {
            message = message.with_text(libc::IFLA_IFNAME, &interface.name);
        }
        let changed = socket.request(message);
        changed.map_err(|error| NetworkError::new(format!("set up network interface {}", interface.name), error))?;
    }
    for (old, index) in before.iter().filter(|(_, index)| found.iter().all(|link| link.index != *index)) {
        turn_off(socket, *index, &old.name)?;
    }
    Ok(found.iter().map(|link| link.index).collect())
}

fn is_wanted(interface: &NetworkInterface, wanted: &[NetworkInterface]) -> bool {
    wanted.iter().any(|other| other.mac == interface.mac && other.name == interface.name)
}

/// Whether nothing of the interface itself differs.
fn is_same(before: &NetworkInterface, after: &NetworkInterface) -> bool {
    (&before.name, before.mtu, before.up) == (&after.name, after.mtu, after.up)
}

fn turn_off(socket: &mut Socket, index: i32, name: &str) -> Result<(), NetworkError> {
    let header = LinkHeader { index, change: libc::IFF_UP.cast_unsigned(), ..Default::default() };
    let turned_off = socket.request(Message::new(libc::RTM_NEWLINK, 0, &header));
    turned_off.map_err(|error| NetworkError::new(format!("turn network interface {name} off"), error))
}

/// A request to change an interface; it is on from then on if `flags` say so.
fn change(index: i32, flags: u32) -> Message {
    Message::new(libc::RTM_NEWLINK, 0, &LinkHeader { index, flags, change: flags, ..Default::default() })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_interface_without_device_is_named() {
        let mut socket = Socket::open().unwrap();
        let mut wanted = NetworkInterface { name: "eth0".into(), mac: vec![2, 9, 9, 9, 9, 9], ..Default::default() };

        let error = set_up(&mut socket, std::slice::from_ref(&wanted), &[]).unwrap_err();
        assert_eq!(error.to_string(), "cannot find the device of network interface eth0");

        wanted.name = "a-name-too-long-for-it".into();
        assert!(set_up(&mut socket, &[wanted], &[]).is_err());
    }
}
