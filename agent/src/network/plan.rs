// SPDX-License-Identifier: Apache-2.0
//! From what is there to what is wanted: what is done, and in which order.

use std::cmp::Reverse;
use std::collections::{HashMap, HashSet};

use super::group::{self, Group};
use super::setting::{Kind, Place, Setting};

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
    /// Takes as long as both are, not as one times the other: a host may have thousands of routes, and change all at once.
    pub(super) fn new(there: &'a [Setting], wanted: &'a [Setting]) -> Self {
        let are_there: HashSet<&Setting> = there.iter().collect();
        let are_wanted: HashSet<&Setting> = wanted.iter().collect();
        let comes = |setting: &&Setting| !are_there.contains(*setting);
        let goes = |setting: &&Setting| !are_wanted.contains(*setting);
        let successors: HashMap<&Place, &Setting> = wanted.iter().filter(comes).map(|new| (&new.place, new)).collect();
        let mut plan = Self::default();
        let mut predecessors: HashMap<&Place, &Setting> = HashMap::new();
        // In reverse: a route goes before the address that it needs.
        for old in there.iter().rev().filter(goes) {
            match successors.get(&old.place) {
                Some(new) if new.can_be_made_of(old) => {
                    predecessors.insert(&old.place, old);
                }
                Some(_) => plan.first.push(old),
                // A rule that comes and says more than it would be taken for it.
                None if old.kind() == Kind::Rule => plan.first.push(old),
                None => plan.last.push(old),
            }
        }
        let groups: HashSet<Group> = plan.first.iter().filter_map(|old| Group::of(old)).collect();
        let shares_group = |setting: &&Setting| Group::of(setting).is_some_and(|group| groups.contains(&group));
        // Those of its group that stay go with it, and come back in their order.
        let behind: HashSet<&Setting> = wanted.iter().filter(|setting| !comes(setting)).filter(shares_group).collect();
        plan.first.extend(wanted.iter().filter(|setting| behind.contains(setting)));
        plan.first.sort_by_key(|old| Reverse(group::said_by_rule(old)));
        let is_made = |setting: &&Setting| comes(setting) || behind.contains(*setting);
        let make_of = |new: &'a Setting| (new, predecessors.get(&new.place).copied());
        plan.make = wanted.iter().filter(is_made).map(make_of).collect();
        plan
    }
}

#[cfg(test)]
mod tests {
    use bulkhead_netlink::{Message, RuleHeader};
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

    /// A rule that asks a table, for one source or for all.
    fn rule(table: u8, source: &[u8], priority: u32) -> Setting {
        let source_len = u8::try_from(source.len() * 8).unwrap();
        let bytes = [libc::AF_INET as u8, 0, source_len, 0, table, 0, 0, 1, 0, 0, 0, 0];
        let header = RuleHeader { bytes, ..Default::default() };
        let mut message = Message::new(libc::RTM_NEWRULE, 0, &header).with_number(group::FRA_PRIORITY, priority);
        if !source.is_empty() {
            message = message.with(libc::RTA_SRC, source);
        }
        Setting::new(Kind::Rule, format!("rule {table}"), Ok(message)).unwrap()
    }

    #[test]
    fn what_comes_is_made_before_what_goes_is_gone() {
        let there = [address(2, 24, 0), rule(1, &[], 9), default_route(1, 0)];
        let wanted = [address(3, 24, 0), rule(2, &[], 9), default_route(1, 0)];

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
    fn rules_of_the_same_priority_go_and_come_together() {
        let one = [10, 9, 1, 2];
        let there = [rule(5, &one, 100), rule(5, &[], 100), rule(6, &[], 100), rule(5, &[], 200)];
        let wanted = [there[0].clone(), there[2].clone(), there[3].clone()];

        let plan = Plan::new(&there, &wanted);

        // That which says the most goes first, or it would go in the place of another.
        assert_eq!(plan.first, [&there[0], &there[1], &there[2]]);
        assert_eq!(plan.make, [(&wanted[0], None), (&wanted[1], None)]);
        assert!(plan.last.is_empty());
    }

    #[test]
    fn a_rule_that_comes_leaves_the_others_alone() {
        let there = [rule(5, &[], 100)];
        let wanted = [rule(5, &[], 100), rule(6, &[], 100)];

        let plan = Plan::new(&there, &wanted);

        assert_eq!(plan, Plan { make: vec![(&wanted[1], None)], ..Default::default() });
    }

    /// Were each compared with each other one, this would not end.
    #[test]
    fn thousands_of_routes_change_at_once() {
        let all = |gateway| (1..=20_000).map(|metric| default_route(gateway, metric)).collect::<Vec<_>>();
        let (there, wanted) = (all(1), all(2));

        let plan = Plan::new(&there, &wanted);

        let pairs: Vec<_> = wanted.iter().zip(there.iter().map(Some)).collect();
        assert_eq!(plan, Plan { make: pairs, ..Default::default() });
    }

    #[test]
    fn another_name_changes_nothing() {
        let called = |name: &str| {
            let route = wire::NetworkRoute { gateway: vec![10, 9, 1, 1], ..Default::default() };
            Setting::new(Kind::Route, name.to_owned(), route_message(Some(2), &route)).unwrap()
        };

        assert_eq!(Plan::new(&[called("by eth0")], &[called("by net1")]), Plan::default());
    }

    #[test]
    fn where_all_is_the_same_nothing_is_done() {
        let same = [address(2, 24, 0), rule(1, &[], 9), default_route(1, 0)];
        assert_eq!(Plan::new(&same, &same), Plan::default());
    }
}
