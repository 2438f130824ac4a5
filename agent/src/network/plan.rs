// SPDX-License-Identifier: Apache-2.0
//! From what is there to what is wanted: what is done, and in which order.

use super::setting::{Kind, Setting};

/// What is to be done. What is the same before and after is not among it.
#[derive(Debug, Default, PartialEq)]
pub(super) struct Plan<'a> {
    /// What goes before anything is made, because something comes in its place that the kernel does not make of it.
    pub(super) first: Vec<&'a Setting>,
    /// What is made, and what it is made of.
    pub(super) make: Vec<(&'a Setting, Option<&'a Setting>)>,
    /// What goes when the rest is there: an interface's last IPv4 address would take all routes along.
    pub(super) last: Vec<&'a Setting>,
}

impl<'a> Plan<'a> {
    pub(super) fn new(there: &'a [Setting], wanted: &'a [Setting]) -> Self {
        let mut plan = Self::default();
        let is_new = |setting: &&Setting| !there.contains(setting);
        // In reverse: a route goes before the address that it needs.
        for old in there.iter().rev().filter(|old| !wanted.contains(old)) {
            let successor = wanted.iter().filter(is_new).find(|new| new.place == old.place);
            match successor {
                Some(new) if new.can_be_made_of(old) => {}
                Some(_) => plan.first.push(old),
                // Where it says less than another one, it would be that which goes.
                None if old.kind() == Kind::Rule => plan.first.push(old),
                None => plan.last.push(old),
            }
        }
        // Those that come behind it in its network come behind it again.
        let is_behind = |setting: &&Setting| plan.first.iter().any(|old| old.shares_network(setting));
        let behind: Vec<_> = wanted.iter().filter(|setting| !is_new(setting)).filter(is_behind).collect();
        plan.first.extend(&behind);
        for new in wanted.iter().filter(|setting| is_new(setting) || behind.contains(setting)) {
            let is_of = |old: &&Setting| old.place == new.place && !plan.first.contains(old) && !wanted.contains(old);
            plan.make.push((new, there.iter().find(is_of)));
        }
        plan
    }
}

#[cfg(test)]
mod tests {
    use bulkhead_protocol::agent as wire;

    use super::super::messages::{address_message, route_message};
    use super::*;

    fn address(last: u8, prefix_len: u32, flags: u32) -> Setting {
        let address = vec![10, 9, 1, last];
        let address = wire::NetworkAddress { address, prefix_len, flags, ..Default::default() };
        Setting::new(Kind::Address, format!("{last}"), address_message(2, &address)).unwrap()
    }

    fn ipv6_address(prefix_len: u32, flags: u32) -> Setting {
        let address = wire::NetworkAddress { address: vec![0xfd; 16], prefix_len, flags, ..Default::default() };
        Setting::new(Kind::Address, "ipv6".to_owned(), address_message(2, &address)).unwrap()
    }

    fn default_route(gateway: u8, metric: u32) -> Setting {
        let route = wire::NetworkRoute { gateway: vec![10, 9, 1, gateway], metric, ..Default::default() };
        Setting::new(Kind::Route, format!("via {gateway}"), route_message(Some(2), &route)).unwrap()
    }

    fn rule(number: u8) -> Setting {
        let message = super::super::messages::rule_message(&[number; 12]);
        Setting::new(Kind::Rule, format!("rule {number}"), message).unwrap()
    }

    #[test]
    fn what_comes_is_made_before_what_goes_is_gone() {
        let there = [address(2, 24, 0), rule(1), default_route(1, 0)];
        let wanted = [address(3, 24, 0), rule(2), default_route(1, 0)];

        let plan = Plan::new(&there, &wanted);

        // But for rules.
        assert_eq!(plan.first, [&there[1]]);
        assert_eq!(plan.make, [(&wanted[0], None), (&wanted[1], None)]);
        assert_eq!(plan.last, [&there[0]]);
    }

    #[test]
    fn what_can_be_changed_does_not_go() {
        let there = [ipv6_address(64, 0), default_route(1, 5), default_route(3, 6)];
        let wanted = [ipv6_address(64, libc::IFA_F_NOPREFIXROUTE), default_route(2, 5)];

        let plan = Plan::new(&there, &wanted);

        assert!(plan.first.is_empty());
        assert_eq!(plan.make, [(&wanted[0], Some(&there[0])), (&wanted[1], Some(&there[1]))]);
        assert_eq!(plan.last, [&there[2]]);
    }

    #[test]
    fn what_cannot_be_changed_goes_first() {
        let (there, wanted) = ([ipv6_address(64, 0)], [ipv6_address(48, 0)]);

        let plan = Plan::new(&there, &wanted);

        assert_eq!((plan.first, plan.make, plan.last.len()), (vec![&there[0]], vec![(&wanted[0], None)], 0));
    }

    #[test]
    fn the_order_within_a_network_is_kept() {
        let secondary = libc::IFA_F_SECONDARY;
        let there = [address(2, 24, 0), address(3, 24, secondary), address(4, 24, secondary), address(5, 28, 0)];
        let wanted = [address(3, 24, 0), address(2, 24, secondary), address(4, 24, secondary), address(5, 28, 0)];

        let plan = Plan::new(&there, &wanted);

        // The second is made the first by the kernel, or goes with that one and is made again.
        assert_eq!(plan.first, [&there[0], &there[2]]);
        assert_eq!(plan.make, [(&wanted[0], Some(&there[1])), (&wanted[1], None), (&wanted[2], None)]);
        assert!(plan.last.is_empty());
    }

    #[test]
    fn where_all_is_the_same_nothing_is_done() {
        let same = [address(2, 24, 0), rule(1), default_route(1, 0)];
        assert_eq!(Plan::new(&same, &same), Plan::default());
    }
}
