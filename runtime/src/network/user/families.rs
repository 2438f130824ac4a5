// SPDX-License-Identifier: Apache-2.0
//! Which families of addresses this host has a way out for: passt leads to no others.

use std::io;

use bulkhead_netlink::{Message, RouteHeader, Socket};

/// Families of addresses.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Families {
    pub(super) ipv4: bool,
    pub(super) ipv6: bool,
}

impl Families {
    /// Those for which the calling thread's network namespace has a default route.
    pub(super) fn of_this_namespace() -> io::Result<Self> {
        let mut found = Self::default();
        let request = Message::new(libc::RTM_GETROUTE, 0, &RouteHeader::default());
        Socket::open()?.dump(request, libc::RTM_NEWROUTE, |header, _| found.add(&header))?;
        Ok(found)
    }

    pub(super) fn is_empty(self) -> bool {
        self == Self::default()
    }

    fn add(&mut self, route: &RouteHeader) {
        let is_default = route.prefix_len == 0 && route.kind == libc::RTN_UNICAST && route.table == libc::RT_TABLE_MAIN;
        self.ipv4 |= is_default && route.family == libc::AF_INET as u8;
        self.ipv6 |= is_default && route.family == libc::AF_INET6 as u8;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_default_route_is_a_way_out() {
        let (kind, table, family) = (libc::RTN_UNICAST, libc::RT_TABLE_MAIN, libc::AF_INET6 as u8);
        let default = RouteHeader { family, kind, table, ..RouteHeader::default() };
        let families = |routes: &[RouteHeader]| {
            let mut families = Families::default();
            routes.iter().for_each(|route| families.add(route));
            families
        };

        assert_eq!(families(&[default]), Families { ipv4: false, ipv6: true });
        let none = [
            RouteHeader { kind: libc::RTN_UNREACHABLE, ..default },
            RouteHeader { table: libc::RT_TABLE_LOCAL, ..default },
            RouteHeader { prefix_len: 64, ..default },
        ];
        assert!(families(&none).is_empty());
    }
}
