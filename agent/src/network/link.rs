// SPDX-License-Identifier: Apache-2.0
//! Interfaces: found by their hardware address, named, and turned on.

use std::io;

use bulkhead_netlink::{LinkHeader, Message, Socket};
use bulkhead_protocol::agent::NetworkInterface;

use super::{NetworkError, NetworkFailures, settings};
use crate::init::SYS;
use crate::late;

/// Longest name of an interface.
const NAME_MAX: usize = libc::IFNAMSIZ - 1;

/// Where the kernel keeps what it does by itself.
pub(super) const SETTINGS: &str = "/proc/sys/net";

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

/// What is known of the interfaces from before.
#[derive(Debug)]
pub(super) struct Before<'a> {
    /// Those that were wanted, and their numbers.
    pub(super) wanted: Vec<(&'a NetworkInterface, i32)>,
    /// The numbers of those that are of no use any more. Their devices stay.
    pub(super) gone: &'a mut Vec<i32>,
    /// What was set last for all interfaces of forwarding: a new one begins with that.
    pub(super) forwarding: i32,
}

impl Before<'_> {
    /// An interface of before, by its number, that is still of use.
    fn by_index(&self, index: i32) -> Option<&NetworkInterface> {
        let found = self.wanted.iter().find(|(_, old)| *old == index && !self.gone.contains(old));
        found.map(|(interface, _)| *interface)
    }

    /// The number that an interface has from before.
    fn index_of(&self, interface: &NetworkInterface) -> Option<i32> {
        let is_it = |(old, index): &&(&NetworkInterface, i32)| is_one(old, interface) && !self.gone.contains(index);
        self.wanted.iter().find(is_it).map(|(_, index)| *index)
    }

    /// Turns those off that are not among `wanted`, and takes their names away.
    fn let_go(&mut self, socket: &mut Socket, wanted: &[NetworkInterface], failures: &mut NetworkFailures) {
        for (old, index) in &self.wanted {
            if self.gone.contains(index) || wanted.iter().any(|interface| is_one(old, interface)) {
                continue;
            }
            let let_go = turn_off(socket, *index, &old.name)
                .and_then(|()| rename(socket, *index, &old.name, &format!("gone{index}")));
            match let_go {
                Err(failure) if !failure.is_without_device() => failures.add(failure),
                // Or a container has moved it to another namespace, or removed it.
                _ => self.gone.push(*index),
            }
        }
    }
}

/// An interface that was found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Found {
    pub(super) index: i32,
    /// Whether it is as it is wanted.
    pub(super) is_done: bool,
}

/// Gives each of `wanted` its name, its hardware address, its MTU and its state; returns the interfaces, in that order, as far as they
/// are found. The devices of some have come into `windows` while the machine ran. Those that were wanted before have their numbers; if
/// they are no longer wanted, they are turned off.
///
/// # Errors
///
/// It cannot be told which there are.
pub(super) fn set_up(
    socket: &mut Socket,
    wanted: &[NetworkInterface],
    windows: &[u32],
    mut before: Before<'_>,
    failures: &mut NetworkFailures,
) -> Result<Vec<Option<Found>>, NetworkError> {
    before.let_go(socket, wanted, failures);
    let links = present(socket, wanted, windows, &before)?;
    let found = find(&links, wanted, &before, failures);
    // A name that is wanted may still be another's: such a one gets out of the way first.
    let mut names: Vec<String> =
        found.iter().map(|link| link.map(|link| link.name.clone()).unwrap_or_default()).collect();
    for ((link, interface), name) in found.iter().zip(wanted).zip(&mut names) {
        let is_wanted = wanted.iter().any(|other| other.name == *name);
        if let Some(link) = link
            && *name != interface.name
            && is_wanted
        {
            let aside = format!("aside{}", link.index);
            match rename(socket, link.index, name, &aside) {
                Ok(()) => *name = aside,
                Err(failure) => failures.add(failure),
            }
        }
    }
    let mut done = Vec::with_capacity(found.len());
    for ((link, interface), name) in found.into_iter().zip(wanted).zip(&names) {
        done.push(link.map(|link| {
            let result = adapt(socket, link, name, &before, interface);
            let is_done = result.is_ok();
            if let Err(failure) = result {
                failures.add(failure);
            }
            Found { index: link.index, is_done }
        }));
    }
    Ok(done)
}

/// Makes an interface that is called `name` by now what is wanted.
fn adapt(
    socket: &mut Socket,
    link: &Link,
    name: &str,
    before: &Before<'_>,
    interface: &NetworkInterface,
) -> Result<(), NetworkError> {
    let old = before.by_index(link.index);
    if old.is_some_and(|old| is_same(old, interface)) {
        return Ok(());
    }
    if !interface.up && old.is_some_and(|old| old.up) {
        turn_off(socket, link.index, &interface.name)?;
    }
    // Before it is on: what a router says may come at once.
    let new = settings::of_new(before.forwarding);
    let settled = settings::follow(SETTINGS.as_ref(), name, old.unwrap_or(&new), interface);
    settled.map_err(|error| NetworkError::new(format!("set up IP on network interface {}", interface.name), error))?;
    let mut message = change(link.index, interface).with_number(libc::IFLA_MTU, interface.mtu);
    if *name != interface.name {
        message = message.with_text(libc::IFLA_IFNAME, &interface.name);
    }
    // One that a container has given it stays until the host's changes.
    let is_news = old.is_none_or(|old| old.hardware_address != interface.hardware_address);
    if is_news && link.mac != interface.hardware_address {
        message = message.with(libc::IFLA_ADDRESS, &interface.hardware_address);
    }
    let changed = socket.request(message);
    changed.map_err(|error| NetworkError::new(format!("set up network interface {}", interface.name), error))
}

/// The interfaces that are there and of use, after another look for those that came when the machine ran.
fn present(
    socket: &mut Socket,
    wanted: &[NetworkInterface],
    windows: &[u32],
    before: &Before<'_>,
) -> Result<Vec<Link>, NetworkError> {
    let mut links = list_links(socket)?;
    links.retain(|link| !before.gone.contains(&link.index));
    let is_short = |interface: &NetworkInterface| {
        let count = links.iter().filter(|link| link.mac == interface.mac).count();
        wanted.iter().filter(|other| other.mac == interface.mac).count() > count
    };
    // A container may have made one with the same address; but at boot all are there.
    let is_new = |interface: &NetworkInterface| !before.wanted.is_empty() && before.index_of(interface).is_none();
    if wanted.iter().any(|interface| is_short(interface) || is_new(interface)) {
        for window in windows {
            // What is not found is told later.
            let _ = late::look_at(SYS.as_ref(), *window);
        }
        links = list_links(socket)?;
        links.retain(|link| !before.gone.contains(&link.index));
    }
    Ok(links)
}

fn list_links(socket: &mut Socket) -> Result<Vec<Link>, NetworkError> {
    list(socket).map_err(|error| NetworkError::new("list the guest's network interfaces", error))
}

/// The interface of the guest for each of `wanted`.
fn find<'a>(
    links: &'a [Link],
    wanted: &[NetworkInterface],
    before: &Before<'_>,
    failures: &mut NetworkFailures,
) -> Vec<Option<&'a Link>> {
    let mut found: Vec<Option<&Link>> = Vec::with_capacity(wanted.len());
    for interface in wanted {
        let name = &interface.name;
        if name.is_empty() || name.len() > NAME_MAX {
            let doing = format!("call a network interface {name:?}");
            failures.add(NetworkError::new(doing, io::ErrorKind::InvalidInput));
            found.push(None);
            continue;
        }
        // Several may share an address: their devices are in the order of the interfaces, and those of others are taken.
        let known = before.index_of(interface);
        let fits = |link: &&Link| match known {
            Some(index) => link.index == index,
            None => link.mac == interface.mac && !found.contains(&Some(link)) && before.by_index(link.index).is_none(),
        };
        let link = links.iter().find(fits);
        if link.is_none() {
            let doing = format!("find the device of network interface {name}");
            failures.add(NetworkError::new(doing, io::ErrorKind::NotFound));
        }
        found.push(link);
    }
    found
}

/// Whether both are the same interface of the host.
fn is_one(before: &NetworkInterface, after: &NetworkInterface) -> bool {
    (before.id, &before.mac) == (after.id, &after.mac)
}

/// Whether nothing of the interface itself differs.
fn is_same(before: &NetworkInterface, after: &NetworkInterface) -> bool {
    (&before.name, before.mtu, before.up, before.no_arp, &before.hardware_address, &before.ipv4, &before.ipv6)
        == (&after.name, after.mtu, after.up, after.no_arp, &after.hardware_address, &after.ipv4, &after.ipv6)
}

fn turn_off(socket: &mut Socket, index: i32, name: &str) -> Result<(), NetworkError> {
    let header = LinkHeader { index, change: libc::IFF_UP.cast_unsigned(), ..Default::default() };
    let turned_off = socket.request(Message::new(libc::RTM_NEWLINK, 0, &header));
    turned_off.map_err(|error| NetworkError::new(format!("turn network interface {name} off"), error))
}

fn rename(socket: &mut Socket, index: i32, from: &str, to: &str) -> Result<(), NetworkError> {
    let header = LinkHeader { index, ..Default::default() };
    let renamed = socket.request(Message::new(libc::RTM_NEWLINK, 0, &header).with_text(libc::IFLA_IFNAME, to));
    renamed.map_err(|error| NetworkError::new(format!("rename network interface {from}"), error))
}

/// A request to change an interface: it is on from then on if it is to be.
fn change(index: i32, interface: &NetworkInterface) -> Message {
    let up = if interface.up { libc::IFF_UP } else { 0 };
    let no_arp = if interface.no_arp { libc::IFF_NOARP } else { 0 };
    let (flags, change) = ((up | no_arp).cast_unsigned(), (up | libc::IFF_NOARP).cast_unsigned());
    Message::new(libc::RTM_NEWLINK, 0, &LinkHeader { index, flags, change, ..Default::default() })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn interface(name: &str, id: i32) -> NetworkInterface {
        NetworkInterface { name: name.into(), mac: vec![2, 9, 9, 9, 9, 9], id, ..Default::default() }
    }

    fn link(name: &str, index: i32) -> Link {
        Link { index, name: name.into(), mac: vec![2, 9, 9, 9, 9, 9] }
    }

    #[test]
    fn an_interface_without_device_is_named() {
        let mut socket = Socket::open().unwrap();
        let mut try_for = |wanted: NetworkInterface| {
            let mut failures = NetworkFailures::default();
            let before = Before { wanted: Vec::new(), gone: &mut Vec::new(), forwarding: 0 };
            let found = set_up(&mut socket, &[wanted], &[], before, &mut failures).unwrap();
            assert_eq!(found, [None]);
            failures.to_string()
        };

        assert_eq!(try_for(interface("eth0", 2)), "cannot find the device of network interface eth0: entity not found");
        assert!(try_for(interface("a-name-too-long-for-it", 2)).starts_with("cannot call a network interface "));
    }

    #[test]
    fn one_that_comes_in_the_place_of_another_has_a_device_of_its_own() {
        let (old, new) = (interface("eth0", 2), interface("eth0", 5));
        let links = [link("gone2", 2), link("eth1", 3)];
        let indices = |wanted: &[NetworkInterface], gone: &mut Vec<i32>| {
            let before = Before { wanted: vec![(&old, 2)], gone, forwarding: 0 };
            let found = find(&links, wanted, &before, &mut NetworkFailures::default());
            found.iter().map(|link| link.unwrap().index).collect::<Vec<_>>()
        };

        assert_eq!(indices(std::slice::from_ref(&old), &mut Vec::new()), [2]);
        assert_eq!(indices(&[interface("renamed", 2)], &mut Vec::new()), [2]);
        assert_eq!(indices(std::slice::from_ref(&new), &mut Vec::new()), [3]);
        let before = Before { wanted: vec![(&old, 2)], gone: &mut vec![2], forwarding: 0 };
        assert!(before.index_of(&old).is_none() && before.by_index(2).is_none());
    }
}
