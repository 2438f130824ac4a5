// SPDX-License-Identifier: Apache-2.0
//! Settings that cannot go one by one: where one of them goes, the kernel may take others for it, or along with it.

use bulkhead_netlink::{AddressHeader, Attribute, Attributes, Header, RuleHeader};

use super::address::Address;
use super::setting::{Kind, Setting, number};

/// Attributes of rules (linux/fib_rules.h).
pub(super) const FRA_PRIORITY: u16 = 6;
const FRA_SUPPRESS_IFGROUP: u16 = 13;
const FRA_SUPPRESS_PREFIXLEN: u16 = 14;
const FRA_PROTOCOL: u16 = 21;

/// What settings have in common of which one does not go alone.
#[derive(Debug, PartialEq, Eq, Hash)]
pub(super) enum Group {
    /// IPv4 addresses of one network of one interface: the first of them is primary, and takes the others along.
    Network { index: u32, prefix_len: u8, network: Vec<u8> },
    /// Rules of one family and one priority: of those that say at least what one says that is to go, the kernel removes the first.
    Priority { family: u8, priority: u32 },
}

impl Group {
    pub(super) fn of(setting: &Setting) -> Option<Self> {
        match setting.kind() {
            Kind::Address => {
                let address = Address::of(setting).filter(|address| !address.is_ipv6())?;
                let AddressHeader { index, prefix_len, .. } = address.header;
                Some(Self::Network { index, prefix_len, network: address.network() })
            }
            Kind::Rule => {
                let (RuleHeader { family, .. }, attributes) = RuleHeader::read(&setting.content)?;
                let priority = number(Attributes::new(attributes), FRA_PRIORITY).unwrap_or_default();
                Some(Self::Priority { family, priority })
            }
            Kind::Neighbour | Kind::Route => None,
        }
    }
}

/// How much a rule says: none is taken for one that says more. Nothing where it is no rule.
pub(super) fn said_by_rule(setting: &Setting) -> usize {
    let Some((header, attributes)) = RuleHeader::read(&setting.content).filter(|_| setting.kind() == Kind::Rule) else {
        return 0;
    };
    let [_, destination_len, source_len, tos, table, _, _, action, ..] = header.bytes;
    let in_header = [destination_len, source_len, tos, table, action].iter().filter(|byte| **byte != 0).count();
    in_header + Attributes::new(attributes).filter(says_something).count()
}

/// Whether the kernel looks at it when it is asked to remove a rule; the other attributes are there only then.
fn says_something(attribute: &Attribute<'_>) -> bool {
    match attribute.kind {
        // None is suppressed.
        FRA_SUPPRESS_IFGROUP | FRA_SUPPRESS_PREFIXLEN => attribute.number() != Some(u32::MAX),
        // `RTPROT_UNSPEC`
        FRA_PROTOCOL => attribute.value != [0],
        _ => true,
    }
}
