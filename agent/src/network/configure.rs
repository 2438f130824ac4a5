// SPDX-License-Identifier: Apache-2.0
//! The sandbox's network, as the host describes it.

use std::collections::{HashMap, HashSet};
use std::io;
use std::sync::{Mutex, PoisonError};

use bulkhead_netlink::{AddressHeader, Message, NeighbourHeader, RouteHeader, Socket};
use bulkhead_protocol::agent as wire;

use super::plan::Plan;
use super::resolver::Resolver;
use super::setting::{Kind, Place, Setting};
use super::wanted::settings;
use super::{NetworkError, NetworkFailures, bring_loopback_up, link, settings as sysctls};

/// The network of the guest's own namespace, as the host wanted it last.
#[derive(Debug, Default)]
pub(crate) struct Network {
    there: Mutex<There>,
    /// The host's resolver, if it has one for the guest.
    pub(crate) resolver: Resolver,
}

/// What has been made of what the host wanted. What could not be is tried again with the next change.
#[derive(Debug, Default)]
struct There {
    /// The interfaces as they were set up last, and their numbers.
    interfaces: Vec<(wire::NetworkInterface, i32)>,
    settings: Vec<Setting>,
    /// What was wanted for all interfaces.
    sysctls: HashMap<String, String>,
    /// What was set last for all interfaces of forwarding, which is off in a namespace that is new.
    forwarding: i32,
    /// The numbers of interfaces that were wanted once: their devices are of no use any more.
    gone: Vec<i32>,
}

impl Network {
    /// Makes the network of the calling process' network namespace what is wanted: what was wanted before and no longer is
    /// goes, and what has come is made. The rest stays, also what a container has changed.
    ///
    /// # Errors
    ///
    /// What could not be done; all else has been.
    pub(crate) fn configure(&self, request: &wire::ConfigureNetworkRequest) -> Result<(), NetworkFailures> {
        let mut failures = NetworkFailures::default();
        match Socket::open() {
            // Nothing panics while the lock is held.
            Ok(mut socket) => {
                self.there.lock().unwrap_or_else(PoisonError::into_inner).become_as(
                    request,
                    &mut socket,
                    &mut failures,
                );
            }
            Err(error) => failures.add(NetworkError::new("open a netlink socket", error)),
        }
        if let Err(failure) = self.turn_resolver(request.resolver) {
            failures.add(failure);
        }
        failures.into_result()
    }

    fn turn_resolver(&self, on: bool) -> Result<(), NetworkError> {
        if on {
            // It is at one of its addresses.
            bring_loopback_up().map_err(|failure| NetworkError::new("turn lo on", io::Error::other(failure)))?;
        }
        let turned = self.resolver.turn(on);
        turned.map_err(|error| NetworkError::new("take questions for the host's resolver at 127.0.0.11:53", error))
    }
}

impl There {
    fn become_as(
        &mut self,
        request: &wire::ConfigureNetworkRequest,
        socket: &mut Socket,
        failures: &mut NetworkFailures,
    ) {
        // What is said of all interfaces goes before what is said of one.
        let forwarding = sysctls::follow_common(link::SETTINGS.as_ref(), &self.sysctls, &request.sysctls);
        if let Some(forwarding) = forwarding {
            self.note_forwarding(forwarding);
        }
        self.sysctls.clone_from(&request.sysctls);
        let was_there = present(socket, &self.settings, failures);
        let Self { interfaces, gone, .. } = self;
        let wanted = interfaces.iter().map(|(interface, index)| (interface, *index)).collect();
        let before = link::Before { wanted, gone, forwarding: self.forwarding };
        let found = match link::set_up(socket, &request.interfaces, &request.windows, before, failures) {
            Ok(found) => found,
            Err(failure) => return failures.add(failure),
        };
        self.remember(&request.interfaces, &found);
        let indices: Vec<_> = found.iter().map(|found| found.as_ref().map(|found| found.index)).collect();
        let wanted = settings(request, &indices, failures);
        self.settings = carry_out(&self.settings, &wanted, &was_there, socket, failures);
    }

    /// Remembers that each interface forwards as was set for all: where one is to do otherwise, that has to be set again.
    fn note_forwarding(&mut self, forwarding: i32) {
        self.forwarding = forwarding;
        for (interface, _) in &mut self.interfaces {
            sysctls::set_forwarding(interface, forwarding);
        }
    }

    /// Remembers how the interfaces are by now.
    fn remember(&mut self, wanted: &[wire::NetworkInterface], found: &[Option<link::Found>]) {
        let mut old = std::mem::take(&mut self.interfaces);
        old.retain(|(_, index)| !self.gone.contains(index));
        for (interface, found) in wanted.iter().zip(found) {
            if let Some(link::Found { index, is_done: true }) = found {
                old.retain(|(_, old)| old != index);
                self.interfaces.push((interface.clone(), *index));
            }
        }
        // Those with which something has failed are as they were.
        self.interfaces.append(&mut old);
    }
}

/// Has what is there become what is wanted, where `was_there` are the places that were taken before the interfaces changed; returns
/// what is there then.
fn carry_out(
    there: &[Setting],
    wanted: &[Setting],
    was_there: &HashSet<Place>,
    socket: &mut Socket,
    failures: &mut NetworkFailures,
) -> Vec<Setting> {
    let plan = Plan::new(there, wanted);
    let mut after = Vec::new();
    let mut take_away = |setting: &Setting, socket: &mut Socket| {
        if let Err(failure) = setting.take_away(socket) {
            failures.add(failure);
            after.push(setting.clone());
        }
    };
    for setting in &plan.first {
        take_away(setting, socket);
    }
    let mut made: HashSet<&Setting> = HashSet::new();
    for (new, old) in &plan.make {
        let result = match old {
            Some(old) => new.make_of(old, socket),
            None => new.make(socket),
        };
        if result.is_ok() {
            made.insert(*new);
        }
    }
    for setting in &plan.last {
        take_away(setting, socket);
    }
    // With an address or an interface the kernel takes others along, and routes; and some can be made only now.
    let is_there = match there {
        // As at boot.
        [] => made.iter().map(|setting| setting.place.clone()).collect(),
        _ => present(socket, wanted, failures),
    };
    let to_make: HashSet<&Setting> = plan.make.iter().map(|(new, _)| *new).collect();
    for setting in wanted {
        let (is_made, is_to_make) = (made.contains(setting), to_make.contains(setting));
        let was_taken_along = (is_made || !is_to_make && was_there.contains(&setting.place))
            && setting.kind() != Kind::Rule
            && !is_there.contains(&setting.place);
        if was_taken_along || is_to_make && !is_made {
            match setting.make(socket) {
                Ok(()) => after.push(setting.clone()),
                Err(failure) => failures.add(failure),
            }
        } else {
            after.push(setting.clone());
        }
    }
    after
}

/// Which of the places of some settings are taken in the guest, also by what a container has put there. Of rules nothing is said.
fn present(socket: &mut Socket, settings: &[Setting], failures: &mut NetworkFailures) -> HashSet<Place> {
    let mut taken = HashSet::new();
    if settings.is_empty() {
        return taken;
    }
    let places: HashSet<&Place> = settings.iter().map(|setting| &setting.place).collect();
    let mut take = |place: Place| {
        // A container may have made many more.
        if places.contains(&place) {
            taken.insert(place);
        }
    };
    let mut list = || {
        let request = Message::new(libc::RTM_GETADDR, 0, &AddressHeader::default());
        socket.dump(request, libc::RTM_NEWADDR, |header, attributes| take(Place::of_address(&header, attributes)))?;
        let request = Message::new(libc::RTM_GETNEIGH, 0, &NeighbourHeader::default());
        socket.dump(request, libc::RTM_NEWNEIGH, |header: NeighbourHeader, attributes| {
            if header.state & libc::NUD_PERMANENT != 0 {
                take(Place::of_neighbour(&header, attributes));
            }
        })?;
        let request = Message::new(libc::RTM_GETROUTE, 0, &RouteHeader::default());
        socket.dump(request, libc::RTM_NEWROUTE, |header: RouteHeader, attributes| {
            // The kernel's own are none of the host's.
            if header.protocol != libc::RTPROT_KERNEL {
                take(Place::of_route(&header, attributes));
            }
        })
    };
    if let Err(error) = list() {
        failures.add(NetworkError::new("list what there is in the guest's network", error));
        // Nothing is known to be missing.
        return places.into_iter().cloned().collect();
    }
    taken
}

#[cfg(test)]
mod tests;
