// SPDX-License-Identifier: Apache-2.0
//! An interface, as the kernel lists it.

use std::path::Path;

use bulkhead_netlink::{Attributes, LinkHeader};
use bulkhead_protocol::agent::{Ipv6Settings, NetworkAddress};

use super::survey::{bytes, number};

/// `IFLA_IPVLAN_MODE` (linux/if_link.h), and the names of the modes.
const IFLA_IPVLAN_MODE: u16 = 1;
const IPVLAN_MODES: [&str; 3] = ["l2", "l3", "l3s"];

/// `IFLA_INET_CONF` (linux/if_link.h): an array of numbers, whose places are `IPV4_DEVCONF_*` (linux/ip.h) less 1.
const IFLA_INET_CONF: u16 = 1;
/// `IFLA_INET6_CONF` (linux/if_link.h): an array of numbers, and their places (`DEVCONF_*`, linux/ipv6.h).
const IFLA_INET6_CONF: u16 = 2;
const ACCEPT_RA: usize = 3;
const AUTOCONF: usize = 5;
const DISABLE_IPV6: usize = 26;
const ACCEPT_DAD: usize = 27;

/// Kinds that take their frames from the interface below them.
const STACKED: [&str; 3] = ["macvlan", "ipvlan", "vlan"];

/// Where the kernel shows the devices of PCI.
pub(super) const PCI_DEVICES: &str = "/sys/bus/pci/devices";

/// An interface.
#[derive(Debug, Clone, Default, PartialEq)]
pub(super) struct Link {
    pub(super) index: i32,
    pub(super) name: String,
    /// What made it; empty for hardware.
    pub(super) kind: String,
    /// Of an ipvlan whose packets the host routes: the mode that says so.
    pub(super) routed: Option<&'static str>,
    /// Of hardware: what it is called on its bus; may be empty.
    pub(super) device: String,
    /// The interface that it takes its frames from, if that is in the same namespace.
    pub(super) lower: Option<i32>,
    /// `ARPHRD_*`.
    pub(super) hardware: u16,
    pub(super) mac: Vec<u8>,
    pub(super) mtu: u32,
    pub(super) up: bool,
    /// Whether it leads somewhere; one that is off is not asked.
    pub(super) carrier: bool,
    /// Whether nobody asks for hardware addresses there.
    pub(super) no_arp: bool,
    pub(super) addresses: Vec<NetworkAddress>,
    /// The IPv6 addresses of which the kernel has found out that nobody else has them.
    pub(super) probed: Vec<Vec<u8>>,
    /// What the kernel does with IPv4 there, in its own order.
    pub(super) ipv4: Vec<i32>,
    /// `None` where there is no IPv6.
    pub(super) ipv6: Option<Ipv6Settings>,
}

impl Link {
    /// One that the kernel lists, without its addresses; `None` for a loopback.
    pub(super) fn read(header: &LinkHeader, attributes: Attributes<'_>) -> Option<Self> {
        if header.hardware == libc::ARPHRD_LOOPBACK {
            return None;
        }
        let info = attributes.find_kind(libc::IFLA_LINKINFO).map(|info| info.nested());
        let kind = info.and_then(|info| info.find_kind(libc::IFLA_INFO_KIND)).and_then(|kind| kind.text());
        let kind = kind.unwrap_or_default().to_owned();
        let is_on = |flag: libc::c_int| header.flags & flag.cast_unsigned() != 0;
        Some(Self {
            index: header.index,
            name: attributes.find_kind(libc::IFLA_IFNAME)?.text()?.to_owned(),
            routed: info.filter(|_| kind == "ipvlan").and_then(ipvlan_mode).filter(|mode| *mode != "l2"),
            device: parent(attributes).unwrap_or_default(),
            lower: lower(&kind, attributes),
            kind,
            hardware: header.hardware,
            mac: bytes(attributes, libc::IFLA_ADDRESS),
            mtu: number(attributes, libc::IFLA_MTU)?,
            up: is_on(libc::IFF_UP),
            carrier: is_on(libc::IFF_LOWER_UP) || !is_on(libc::IFF_UP),
            no_arp: is_on(libc::IFF_NOARP),
            addresses: Vec::new(),
            probed: Vec::new(),
            ipv4: settings(attributes, libc::AF_INET, IFLA_INET_CONF).unwrap_or_default(),
            ipv6: ipv6(attributes),
        })
    }

    pub(super) fn is_ethernet(&self) -> bool {
        self.hardware == libc::ARPHRD_ETHER && self.mac.len() == 6
    }

    /// What it is, in words; `devices` is where the kernel shows those of PCI.
    pub(super) fn description(&self, devices: &Path) -> String {
        let Self { kind, device, .. } = self;
        let mut text = if !kind.is_empty() {
            kind.clone()
        } else if device.is_empty() {
            "a device of the host".to_owned()
        } else if devices.join(device).join("physfn").exists() {
            format!("the SR-IOV function {device} of the host's hardware")
        } else {
            format!("the host's hardware {device}")
        };
        if let Some(mode) = self.routed {
            text = format!("{text} in mode {mode}, in which the host routes its packets (mode l2 works)");
        }
        if !self.is_ethernet() {
            text.push_str(" without Ethernet frames");
        }
        text
    }
}

fn ipvlan_mode(info: Attributes<'_>) -> Option<&'static str> {
    let mode = info.find_kind(libc::IFLA_INFO_DATA)?.nested().find_kind(IFLA_IPVLAN_MODE)?;
    let number = mode.value.try_into().ok().map(u16::from_ne_bytes)?;
    IPVLAN_MODES.get(usize::from(number)).copied()
}

/// Linux tells it since 5.14.
fn parent(attributes: Attributes<'_>) -> Option<String> {
    attributes.find_kind(libc::IFLA_PARENT_DEV_NAME)?.text().map(str::to_owned)
}

/// An interface below that is in another network namespace comes with that one's number.
fn lower(kind: &str, attributes: Attributes<'_>) -> Option<i32> {
    let is_here = STACKED.contains(&kind) && attributes.find_kind(libc::IFLA_LINK_NETNSID).is_none();
    number(attributes, libc::IFLA_LINK).filter(|_| is_here).map(u32::cast_signed)
}

/// The numbers by which an interface is set up for a family of addresses.
fn settings(attributes: Attributes<'_>, family: libc::c_int, kind: u16) -> Option<Vec<i32>> {
    let families = attributes.find_kind(libc::IFLA_AF_SPEC)?.nested();
    let settings = families.find_kind(family as u16)?.nested().find_kind(kind)?;
    let (numbers, _) = settings.value.as_chunks();
    Some(numbers.iter().copied().map(i32::from_ne_bytes).collect())
}

fn ipv6(attributes: Attributes<'_>) -> Option<Ipv6Settings> {
    let numbers = settings(attributes, libc::AF_INET6, IFLA_INET6_CONF)?;
    let number = |place: usize| numbers.get(place).copied();
    Some(Ipv6Settings {
        accept_ra: number(ACCEPT_RA)?,
        autoconf: number(AUTOCONF)?,
        disable_ipv6: number(DISABLE_IPV6)?,
        accept_dad: number(ACCEPT_DAD)?,
        ..Default::default()
    })
}

#[cfg(test)]
mod tests {
    use bulkhead_netlink::{Header, Message};

    use super::*;

    /// An interface of that kind, with what else the kernel tells of it.
    fn read(kind: &str, mode: u16, more: impl FnOnce(Message) -> Message) -> Link {
        let header = LinkHeader { index: 3, hardware: libc::ARPHRD_ETHER, flags: 0x81, ..Default::default() };
        let message = Message::new(libc::RTM_NEWLINK, 0, &header)
            .with_text(libc::IFLA_IFNAME, "eth0")
            .with_number(libc::IFLA_MTU, 1500)
            .with_nested(libc::IFLA_LINKINFO, |info| {
                info.with_text(libc::IFLA_INFO_KIND, kind)
                    .with_nested(libc::IFLA_INFO_DATA, |data| data.with(IFLA_IPVLAN_MODE, &mode.to_ne_bytes()))
            });
        let content = more(message).into_content();
        let (header, attributes) = LinkHeader::read(&content).unwrap();
        Link::read(&header, Attributes::new(attributes)).unwrap()
    }

    #[test]
    fn what_lies_on_an_interface_of_the_same_namespace_is_known() {
        let on_five = |message: Message| message.with_number(libc::IFLA_LINK, 5);
        for kind in STACKED {
            assert_eq!(read(kind, 0, on_five).lower, Some(5), "{kind}");
            assert_eq!(
                read(kind, 0, |message| on_five(message).with_number(libc::IFLA_LINK_NETNSID, 0)).lower,
                None,
                "{kind}"
            );
        }
        // The other end of a pair.
        assert_eq!(read("veth", 0, on_five).lower, None);
    }

    #[test]
    fn flags_and_modes_are_read() {
        let routed = |kind, mode| read(kind, mode, |message| message).routed;
        let l2 = read("ipvlan", 0, |message| message);
        assert!(l2.up && !l2.carrier && l2.no_arp);
        assert_eq!([l2.routed, routed("ipvlan", 1), routed("ipvlan", 2)], [None, Some("l3"), Some("l3s")]);
        assert_eq!(routed("vlan", 1), None);
    }

    #[test]
    fn settings_of_each_family_are_read() {
        let mut numbers = [9_i32; 30];
        (numbers[ACCEPT_RA], numbers[AUTOCONF], numbers[DISABLE_IPV6], numbers[ACCEPT_DAD]) = (2, 0, 1, -1);
        let bytes: Vec<u8> = numbers.into_iter().flat_map(i32::to_ne_bytes).collect();
        let link = read("veth", 0, |message| {
            message.with_nested(libc::IFLA_AF_SPEC, |families| {
                families
                    .with_nested(libc::AF_INET as u16, |ipv4| ipv4.with(IFLA_INET_CONF, &bytes[..8]))
                    .with_nested(libc::AF_INET6 as u16, |ipv6| ipv6.with(IFLA_INET6_CONF, &bytes))
            })
        });

        let wanted = Ipv6Settings { accept_ra: 2, autoconf: 0, disable_ipv6: 1, accept_dad: -1, ..Default::default() };
        assert_eq!(link.ipv6, Some(wanted));
        assert_eq!(link.ipv4, [9, 9]);
        assert_eq!(read("veth", 0, |message| message).ipv6, None);
    }

    #[test]
    fn hardware_is_called_by_its_name() {
        let devices = tempfile::tempdir().unwrap();
        let link = Link { hardware: libc::ARPHRD_ETHER, mac: vec![2; 6], ..Link::default() };
        let describe = |device: &str| Link { device: device.to_owned(), ..link.clone() }.description(devices.path());
        for device in ["0000:03:00.0", "0000:03:10.2/physfn"] {
            std::fs::create_dir_all(devices.path().join(device)).unwrap();
        }

        assert_eq!(describe(""), "a device of the host");
        assert_eq!(describe("0000:03:00.0"), "the host's hardware 0000:03:00.0");
        assert_eq!(describe("0000:03:10.2"), "the SR-IOV function 0000:03:10.2 of the host's hardware");
    }
}
