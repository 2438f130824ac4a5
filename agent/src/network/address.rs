// SPDX-License-Identifier: Apache-2.0
//! Addresses among the settings: the networks that they are in, and the routes which the kernel makes for them.

use bulkhead_netlink::{AddressHeader, Attributes, Header, Message, RouteHeader};

use super::messages::IFA_RT_PRIORITY;
use super::setting::{Kind, Setting, local, number, value};

/// An address that is a setting.
pub(super) struct Address<'a> {
    pub(super) header: AddressHeader,
    pub(super) attributes: Attributes<'a>,
}

impl<'a> Address<'a> {
    pub(super) fn of(setting: &'a Setting) -> Option<Self> {
        let (header, attributes) = AddressHeader::read(&setting.content)?;
        (setting.kind() == Kind::Address).then(|| Self { header, attributes: Attributes::new(attributes) })
    }

    pub(super) fn is_ipv6(&self) -> bool {
        self.header.family == libc::AF_INET6 as u8
    }

    pub(super) fn flags(&self) -> u32 {
        number(self.attributes, libc::IFA_FLAGS).unwrap_or_default()
    }

    /// The network that is on the link: an IPv4 peer's, which is the address itself where there is none.
    pub(super) fn network(&self) -> Vec<u8> {
        let address = if self.is_ipv6() { local(self.attributes) } else { value(self.attributes, libc::IFA_ADDRESS) };
        let bits = (0_u32..).step_by(8).map(|before| u32::from(self.header.prefix_len).saturating_sub(before).min(8));
        address.iter().zip(bits).map(|(byte, bits)| byte & !(0xff_u16 >> bits) as u8).collect()
    }

    /// A request for the route that the kernel makes for it.
    pub(super) fn prefix_route(&self, kind: u16, flags: i32) -> Message {
        let scope = if self.is_ipv6() { libc::RT_SCOPE_UNIVERSE } else { libc::RT_SCOPE_LINK };
        let header = RouteHeader {
            family: self.header.family,
            prefix_len: self.header.prefix_len,
            table: libc::RT_TABLE_MAIN,
            protocol: libc::RTPROT_KERNEL,
            scope,
            kind: libc::RTN_UNICAST,
            ..Default::default()
        };
        let mut message = Message::new(kind, flags, &header)
            .with(libc::RTA_DST, &self.network())
            .with_number(libc::RTA_OIF, self.header.index);
        if !self.is_ipv6() {
            message = message.with(libc::RTA_PREFSRC, local(self.attributes));
        }
        match number(self.attributes, IFA_RT_PRIORITY) {
            Some(metric) => message.with_number(libc::RTA_PRIORITY, metric),
            None => message,
        }
    }
}
