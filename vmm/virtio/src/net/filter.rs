// SPDX-License-Identifier: Apache-2.0
//! Which frames the guest wants, and the filter of the tap that keeps the others on the host.
//!
//! A filter only saves the guest work: what it does not want may reach it all the same (virtio 1.2, section 5.1.6.5.1).

use serde::{Deserialize, Serialize};

use super::MacAddress;

/// Most addresses that a tap compares one by one (`FLT_EXACT_COUNT`, drivers/net/tun.c). Further ones are looked up by a
/// hash, which only group addresses are.
const EXACT_MAX: usize = 8;
const BROADCAST: MacAddress = MacAddress([0xff; 6]);

/// What the guest wants, as it has said by the control queue.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Filter {
    /// Everything.
    pub promiscuous: bool,
    /// All that is sent to groups.
    pub all_multicast: bool,
    /// What is sent to these, beside the device's own address.
    pub unicast: Vec<MacAddress>,
    /// What is sent to these groups.
    pub multicast: Vec<MacAddress>,
}

impl Default for Filter {
    /// Nothing has been said yet: everything.
    fn default() -> Self {
        Self { promiscuous: true, all_multicast: false, unicast: Vec::new(), multicast: Vec::new() }
    }
}

impl Filter {
    /// The same for a tap, whose guest has the address `mac`; as close as it can be had.
    pub(super) fn for_tap(&self, mac: MacAddress) -> TapFilter {
        // The own address and the broadcast are compared one by one.
        if self.promiscuous || self.unicast.len() + 1 > EXACT_MAX {
            return TapFilter { all_multicast: false, addresses: Vec::new() };
        }
        let mut addresses = vec![mac];
        addresses.extend(&self.unicast);
        addresses.push(BROADCAST);
        addresses.extend(&self.multicast);
        TapFilter { all_multicast: self.all_multicast, addresses }
    }
}

/// A tap's filter: frames to these addresses pass; all do if there are none.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct TapFilter {
    all_multicast: bool,
    addresses: Vec<MacAddress>,
}

impl TapFilter {
    /// A `struct tun_filter` (linux/if_tun.h): flags, the number of addresses, the addresses.
    pub(super) fn to_bytes(&self) -> Vec<u8> {
        let flags = if self.all_multicast { libc::TUN_FLT_ALLMULTI as u16 } else { 0 };
        let count = u16::try_from(self.addresses.len()).unwrap_or(u16::MAX);
        let mut bytes = [flags.to_ne_bytes(), count.to_ne_bytes()].concat();
        bytes.extend(self.addresses.iter().take(count.into()).flat_map(|address| address.0));
        bytes
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const OWN: MacAddress = MacAddress([2, 0, 0, 0, 0, 1]);

    #[test]
    fn a_guest_that_has_said_nothing_gets_everything() {
        assert_eq!(Filter::default().for_tap(OWN).to_bytes(), [0, 0, 0, 0]);
    }

    #[test]
    fn the_own_address_and_the_broadcast_are_always_wanted() {
        let filter = Filter { promiscuous: false, all_multicast: true, ..Filter::default() };

        let bytes = filter.for_tap(OWN).to_bytes();

        assert_eq!(bytes, [1, 0, 2, 0, 2, 0, 0, 0, 0, 1, 255, 255, 255, 255, 255, 255]);
    }

    #[test]
    fn more_addresses_than_a_tap_compares_are_everything() {
        let unicast = (0..8).map(|number| MacAddress([2, 0, 0, 0, 1, number])).collect();
        let mut filter = Filter { promiscuous: false, unicast, ..Filter::default() };
        assert_eq!(filter.for_tap(OWN).to_bytes(), [0, 0, 0, 0]);

        filter.unicast.pop();
        assert_eq!(filter.for_tap(OWN).to_bytes().len(), 4 + 9 * 6);
    }
}
