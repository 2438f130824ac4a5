// SPDX-License-Identifier: Apache-2.0
//! What the host wants there to be in the guest's network, one thing after the other.

use std::collections::HashSet;
use std::io;

use bulkhead_protocol::agent as wire;

use super::NetworkFailures;
use super::messages::{address_message, neighbour_message, route_message, rule_message, text};
use super::setting::{Kind, Place, Setting};

/// The loopback's number in each network namespace (`LOOPBACK_IFINDEX`, net/flow.h of the kernel).
const LOOPBACK: i32 = 1;

/// What there is to be, in the order in which it can be made, where `indices` are the numbers of the interfaces; nothing is of
/// those that are not found.
pub(super) fn settings(
    request: &wire::ConfigureNetworkRequest,
    indices: &[Option<i32>],
    failures: &mut NetworkFailures,
) -> Vec<Setting> {
    let mut settings = Vec::new();
    let mut add = |kind, name: String, message| match Setting::new(kind, name, message) {
        Ok(setting) => settings.push(setting),
        Err(failure) => failures.add(failure),
    };
    for (interface, index) in request.interfaces.iter().zip(indices) {
        let Some(index) = *index else { continue };
        // The kernel lists the IPv4 address first that came first, and of IPv6 that which came last.
        let (ipv4, ipv6): (Vec<_>, Vec<_>) = interface.addresses.iter().partition(|address| address.address.len() == 4);
        for address in ipv4.into_iter().chain(ipv6.into_iter().rev()) {
            let name = format!("address {}/{} to {}", text(&address.address), address.prefix_len, interface.name);
            add(Kind::Address, name, address_message(index, address));
        }
    }
    for address in &request.loopback {
        let name = format!("address {}/{} to lo", text(&address.address), address.prefix_len);
        add(Kind::Address, name, address_message(LOOPBACK, address));
    }
    // One that has no number is told of already.
    let index_of = |name: &str| -> Option<io::Result<i32>> {
        let mut interfaces = request.interfaces.iter().zip(indices);
        match interfaces.find(|(interface, _)| interface.name == name) {
            Some((_, index)) => index.map(Ok),
            None => Some(Err(io::ErrorKind::NotFound.into())),
        }
    };
    for neighbour in &request.neighbours {
        let name = format!("neighbour {} of {}", text(&neighbour.address), neighbour.interface);
        if let Some(index) = index_of(&neighbour.interface) {
            add(Kind::Neighbour, name, index.and_then(|index| neighbour_message(index, neighbour)));
        }
    }
    for rule in &request.rules {
        add(Kind::Rule, "a rule for routes".to_owned(), rule_message(rule));
    }
    // The way to a gateway comes before the routes through it.
    let (direct, through): (Vec<_>, Vec<_>) = request.routes.iter().partition(|route| route.gateway.is_empty());
    for route in direct.into_iter().chain(through) {
        let to = if route.destination.is_empty() { "default".to_owned() } else { text(&route.destination) };
        let name = format!("the route to {to}/{} by {}", route.prefix_len, route.interface);
        let index =
            if route.interface.is_empty() { Some(Ok(None)) } else { index_of(&route.interface).map(|i| i.map(Some)) };
        if let Some(index) = index {
            add(Kind::Route, name, index.and_then(|index| route_message(index, route)));
        }
    }
    // Of routes to the same place the kernel asks the first, and each would take that one's place.
    let mut routes: HashSet<Place> = HashSet::new();
    settings.retain(|setting| setting.kind() != Kind::Route || routes.insert(setting.place.clone()));
    settings
}

#[cfg(test)]
mod tests {
    use super::*;

    fn route(gateway: &[u8]) -> wire::NetworkRoute {
        wire::NetworkRoute { interface: "eth0".into(), gateway: gateway.to_vec(), ..Default::default() }
    }

    fn address(address: &[u8]) -> wire::NetworkAddress {
        wire::NetworkAddress { address: address.to_vec(), prefix_len: 24, ..Default::default() }
    }

    fn interface(addresses: Vec<wire::NetworkAddress>) -> wire::NetworkInterface {
        wire::NetworkInterface { name: "eth0".into(), addresses, ..Default::default() }
    }

    /// All of one interface, and what is said of it.
    fn all(request: &wire::ConfigureNetworkRequest, index: Option<i32>) -> (Vec<Setting>, String) {
        let mut failures = NetworkFailures::default();
        let settings = settings(request, &[index], &mut failures);
        (settings, failures.to_string())
    }

    #[test]
    fn what_is_wanted_is_in_the_order_in_which_it_can_be_made() {
        let direct = wire::NetworkRoute { metric: 1, ..route(&[]) };
        let request = wire::ConfigureNetworkRequest {
            interfaces: vec![interface(vec![address(&[10, 0, 0, 2])])],
            routes: vec![route(&[10, 0, 0, 1]), direct],
            rules: vec![vec![0; 12]],
            ..Default::default()
        };

        let (settings, failures) = all(&request, Some(2));

        let kinds: Vec<_> = settings.iter().map(Setting::kind).collect();
        assert_eq!(
            (kinds.as_slice(), failures.as_str()),
            (&[Kind::Address, Kind::Rule, Kind::Route, Kind::Route][..], "")
        );
        assert!(matches!(settings[2].place, Place::Route { metric: 1, .. }), "the route with a gateway is the last");
    }

    #[test]
    fn what_is_malformed_is_told_and_keeps_nothing_back() {
        let request = wire::ConfigureNetworkRequest {
            interfaces: vec![interface(vec![address(&[10, 0, 0]), address(&[10, 0, 0, 2])])],
            routes: vec![wire::NetworkRoute { interface: "eth7".into(), ..route(&[]) }],
            ..Default::default()
        };

        let (settings, failures) = all(&request, Some(2));

        assert_eq!(settings.len(), 1);
        assert!(failures.starts_with("cannot add address [10, 0, 0]/24 to eth0: "), "{failures}");
        assert!(failures.contains("; cannot add the route to default/0 by eth7: "), "{failures}");
        // Of an interface that is not there nothing more is said.
        assert_eq!(
            all(&wire::ConfigureNetworkRequest { routes: Vec::new(), ..request }, None),
            (Vec::new(), String::new())
        );
    }

    #[test]
    fn of_routes_to_the_same_place_the_first_is_made() {
        let routes = vec![route(&[10, 0, 0, 1]), route(&[10, 0, 0, 9])];
        let first = wire::ConfigureNetworkRequest {
            interfaces: vec![interface(Vec::new())],
            routes: vec![route(&[10, 0, 0, 1])],
            ..Default::default()
        };
        let both = wire::ConfigureNetworkRequest { routes, ..first.clone() };

        assert_eq!(all(&both, Some(2)).0, all(&first, Some(2)).0);
    }

    #[test]
    fn the_kernel_will_list_addresses_as_the_host_does() {
        let (one, other) = ([0xfd; 16], [0xfe; 16]);
        let addresses = vec![address(&[10, 0, 0, 2]), address(&[10, 0, 0, 3]), address(&one), address(&other)];
        let request = wire::ConfigureNetworkRequest { interfaces: vec![interface(addresses)], ..Default::default() };

        let places = all(&request, Some(2)).0.into_iter().map(|setting| setting.place);
        let made: Vec<_> = places
            .filter_map(|place| match place {
                Place::Address { address, .. } => Some(address),
                _ => None,
            })
            .collect();

        assert_eq!(made, [vec![10, 0, 0, 2], vec![10, 0, 0, 3], other.to_vec(), one.to_vec()]);
    }
}
