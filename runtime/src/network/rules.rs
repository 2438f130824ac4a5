// SPDX-License-Identifier: Apache-2.0
//! The rules of a network namespace that say which table of routes is asked, as far as a container gets them.

use std::io;

use bulkhead_netlink::{Attributes, Message, RuleHeader, Socket};

use super::survey::number;

/// Attributes of rules, and what they do that name a table (linux/fib_rules.h).
const FRA_PRIORITY: u16 = 6;
const FRA_SUPPRESS_PREFIXLEN: u16 = 14;
const FRA_TABLE: u16 = 15;
const FRA_PROTOCOL: u16 = 21;
const FR_ACT_TO_TBL: u8 = 1;
/// How older kernels say of a rule that they have made it.
const FIB_RULE_PERMANENT: u32 = 1;

/// The rules that every namespace has: their priorities, and the tables that they have asked for everything.
const STANDARD_RULES: [(u32, u8); 3] =
    [(0, libc::RT_TABLE_LOCAL), (32766, libc::RT_TABLE_MAIN), (32767, libc::RT_TABLE_DEFAULT)];

/// What there is, and what of it differs for the guest.
#[derive(Debug, Default, PartialEq)]
pub(super) struct Rules {
    /// Those that somebody has set, as the kernel lists them.
    pub(super) rules: Vec<Vec<u8>>,
    /// Of those that every namespace has, the ones that are there: their families, and their priorities.
    standard: Vec<(u8, u32)>,
    /// One text each.
    pub(super) left_out: Vec<String>,
}

impl Rules {
    /// Lists those of the socket's network namespace.
    pub(super) fn list(socket: &mut Socket) -> io::Result<Self> {
        let mut found = Self::default();
        let request = Message::new(libc::RTM_GETRULE, 0, &RuleHeader::default());
        let listed = socket.dump(request, libc::RTM_NEWRULE, |header, attributes| found.add(&header, attributes));
        match listed {
            // A kernel without them has one table.
            Err(error) if error.raw_os_error() == Some(libc::EOPNOTSUPP) => {}
            listed => listed?,
        }
        found.tell_missing();
        Ok(found)
    }

    fn add(&mut self, header: &RuleHeader, attributes: Attributes<'_>) {
        if ![libc::AF_INET as u8, libc::AF_INET6 as u8].contains(&header.family) {
            return;
        }
        let priority = number(attributes, FRA_PRIORITY);
        if is_standard(header, attributes) {
            return self.standard.push((header.family, priority.unwrap_or_default()));
        }
        let mut message = Message::new(libc::RTM_NEWRULE, 0, header).with_all(attributes.as_bytes());
        if priority.is_none() {
            // The kernel leaves out a 0, and would choose another.
            message = message.with_number(FRA_PRIORITY, 0);
        }
        self.rules.push(message.into_content());
    }

    /// The guest has the rules that every namespace has, whatever has become of them.
    fn tell_missing(&mut self) {
        for (family, word) in [(libc::AF_INET as u8, "IPv4"), (libc::AF_INET6 as u8, "IPv6")] {
            let has_rules = self.standard.iter().any(|(other, _)| *other == family)
                || self.rules.iter().any(|rule| rule.first() == Some(&family));
            // IPv6 has no table of that name.
            let standard = STANDARD_RULES
                .iter()
                .filter(|(_, table)| family == libc::AF_INET as u8 || *table != libc::RT_TABLE_DEFAULT);
            for (priority, table) in standard.filter(|_| has_rules) {
                if !self.standard.contains(&(family, *priority)) {
                    let what = format!("the guest has the rule of {word} at {priority} for all, by table {table}");
                    self.left_out.push(format!("{what}, though it is gone there"));
                }
            }
        }
    }
}

/// Whether it is, in full, one of the rules that every namespace has.
fn is_standard(header: &RuleHeader, attributes: Attributes<'_>) -> bool {
    let [_, destination_len, source_len, tos, table, _, _, action, flags @ ..] = header.bytes;
    let flags = u32::from_ne_bytes(flags) & !FIB_RULE_PERMANENT;
    let is_for_all = [destination_len, source_len, tos] == [0; 3] && action == FR_ACT_TO_TBL && flags == 0;
    let mut attributes = attributes;
    let priority = number(attributes, FRA_PRIORITY).unwrap_or_default();
    STANDARD_RULES.contains(&(priority, table))
        && is_for_all
        && attributes.all(|attribute| match attribute.kind {
            FRA_PRIORITY | FRA_PROTOCOL => true,
            FRA_TABLE => attribute.number() == Some(table.into()),
            // None is suppressed.
            FRA_SUPPRESS_PREFIXLEN => attribute.number() == Some(u32::MAX),
            _ => false,
        })
}

#[cfg(test)]
mod tests {
    use bulkhead_netlink::Header as _;

    use super::*;

    /// An attribute as it is written.
    fn attribute(kind: u16, value: &[u8]) -> Vec<u8> {
        let len = u16::try_from(value.len() + 4).unwrap();
        [&len.to_ne_bytes(), &kind.to_ne_bytes(), value].concat()
    }

    /// The rules that are listed, where each is a family, bytes of its source, a table, a priority, and further attributes.
    fn listed_rules(rules: &[(i32, u8, u8, u32, &[u8])]) -> Rules {
        let mut found = Rules::default();
        for (family, source_len, table, priority, more) in rules {
            let header = [*family as u8, 0, *source_len, 0, *table, 0, 0, FR_ACT_TO_TBL, 0, 0, 0, 0];
            let priority = match priority {
                0 => Vec::new(),
                priority => attribute(FRA_PRIORITY, &priority.to_ne_bytes()),
            };
            let none = attribute(FRA_SUPPRESS_PREFIXLEN, &u32::MAX.to_ne_bytes());
            let table = attribute(FRA_TABLE, &u32::from(*table).to_ne_bytes());
            let attributes = [none.as_slice(), &table, &priority, more].concat();
            found.add(&RuleHeader::read(&header).unwrap().0, Attributes::new(&attributes));
        }
        found.tell_missing();
        found
    }

    const IPV4_RULES: [(i32, u8, u8, u32, &[u8]); 3] =
        [(libc::AF_INET, 0, 255, 0, &[]), (libc::AF_INET, 0, 254, 32766, &[]), (libc::AF_INET, 0, 253, 32767, &[])];

    #[test]
    fn rules_that_every_namespace_has_are_its_own() {
        let ipv6 = [(libc::AF_INET6, 0, 255, 0, &[][..]), (libc::AF_INET6, 0, 254, 32766, &[])];
        let found = listed_rules(&[&IPV4_RULES[..], &ipv6].concat());
        assert_eq!((found.rules.len(), found.left_out), (0, Vec::new()));
    }

    #[test]
    fn what_shares_their_priorities_is_passed_on() {
        let mark = attribute(10, &7_u32.to_ne_bytes());
        let others = [
            (libc::AF_INET, 32, 100, 0, &[][..]),
            (libc::AF_INET, 0, 100, 32766, &[]),
            (libc::AF_INET, 0, 253, 32766, &[]),
            (libc::AF_INET, 0, 253, 32767, &mark),
        ];

        let found = listed_rules(&[&IPV4_RULES[..], &others].concat());

        assert_eq!((found.rules.len(), found.left_out.len()), (others.len(), 0));
        // The kernel does not write that.
        assert!(found.rules[0].ends_with(&attribute(FRA_PRIORITY, &0_u32.to_ne_bytes())));
    }

    #[test]
    fn what_is_gone_of_them_is_told() {
        let found = listed_rules(&IPV4_RULES[..2]);
        let told = "the guest has the rule of IPv4 at 32767 for all, by table 253, though it is gone there";
        assert_eq!(found.left_out, [told]);
    }
}
