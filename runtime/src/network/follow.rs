// SPDX-License-Identifier: Apache-2.0
//! What changes in a network namespace while its machine runs: the kernel tells that something has, and then all of it is
//! looked at again.

use std::io;
use std::path::PathBuf;
use std::time::Duration;

use bulkhead_netlink::{Events, Header, NeighbourHeader, Socket};
use bulkhead_protocol::agent::ConfigureNetworkRequest;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::time::sleep;

use super::survey::{Link, Survey};
use super::{Passed, is_idle, request, tap};
use crate::logging;

/// How long the changes that come together may take: who adds an interface adds its addresses and routes.
const SETTLE: Duration = Duration::from_millis(20);

/// The groups of rules: of `RTNLGRP_IPV4_RULE` and `RTNLGRP_IPV6_RULE` (linux/rtnetlink.h), whose second has no `RTMGRP_*`.
const RULES: u32 = 1 << (8 - 1) | 1 << (19 - 1);

/// A subscription to the changes of the calling thread's network namespace.
pub(super) fn subscribe() -> io::Result<Events> {
    let groups = libc::RTMGRP_LINK
        | libc::RTMGRP_NEIGH
        | libc::RTMGRP_IPV4_IFADDR
        | libc::RTMGRP_IPV4_ROUTE
        | libc::RTMGRP_IPV6_IFADDR
        | libc::RTMGRP_IPV6_ROUTE;
    Events::subscribe(groups.cast_unsigned() | RULES)
}

/// What is known of the network of a machine that runs.
#[derive(Debug)]
pub(super) struct View {
    pub(super) path: PathBuf,
    pub(super) socket: Socket,
    /// The interfaces that the machine has.
    pub(super) passed: Vec<Passed>,
    /// What its guest was told.
    pub(super) told: ConfigureNetworkRequest,
    /// What has been warned of.
    pub(super) warned: Vec<String>,
}

impl View {
    /// What the network is to be.
    fn look(&mut self) -> io::Result<ConfigureNetworkRequest> {
        let survey = Survey::take(&mut self.socket)?;
        let is_passed = |link: &&Link| self.passed.iter().any(|passed| passed.index == link.index);
        let late = survey.links.iter().filter(|link| !is_passed(link) && !is_idle(link) && !tap::is_one(link));
        let late =
            late.map(|link| format!("the interface {} came when the machine ran: it is not passed on", link.name));
        for warning in late.chain(survey.routes.left_out.iter().cloned()) {
            if !self.warned.contains(&warning) {
                logging::warn(format_args!("of the network namespace {}, {warning}", self.path.display()));
                self.warned.push(warning);
            }
        }
        Ok(request(survey, &self.passed))
    }
}

/// The network of a machine that runs.
#[derive(Debug)]
pub(crate) struct Follower {
    events: Events,
    view: View,
}

impl Follower {
    pub(super) fn new(events: Events, view: View) -> Self {
        Self { events, view }
    }

    /// Ties it to the event loop.
    ///
    /// # Errors
    ///
    /// That of epoll_ctl(2).
    pub(crate) fn follow(self) -> io::Result<Following> {
        let Self { events, view } = self;
        // SAFETY: `Events` owns its descriptor, always gives the same one, and closes it only when it is dropped, which is
        // after its registration: the `AsyncFd` owns it from here on and never gives it away.
        let events = unsafe { AsyncFd::register_with_interest(events, Interest::READABLE) }?;
        Ok(Following { events, view })
    }
}

/// The same, within an event loop.
#[derive(Debug)]
pub(crate) struct Following {
    events: AsyncFd<Events>,
    view: View,
}

impl Following {
    /// Waits for a change, and returns what the network is to be. One that is cancelled may lose it.
    ///
    /// # Errors
    ///
    /// The namespace cannot be looked at.
    pub(crate) async fn next(&mut self) -> io::Result<ConfigureNetworkRequest> {
        loop {
            let mut ready = self.events.readable_mut().await?;
            let changed = ready.get_inner_mut().drain(counts)?;
            ready.clear_ready();
            if !changed {
                continue;
            }
            sleep(SETTLE).await;
            self.events.get_mut().drain(counts)?;
            let wanted = self.view.look()?;
            if wanted != self.view.told {
                self.view.told = wanted.clone();
                return Ok(wanted);
            }
        }
    }
}

/// Whether a message may tell of something that the guest is told. Neighbours come and go.
fn counts(kind: u16, payload: &[u8]) -> bool {
    kind != libc::RTM_NEWNEIGH
        || NeighbourHeader::read(payload).is_some_and(|(header, _)| header.state & libc::NUD_PERMANENT != 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn neighbours_that_are_not_for_good_do_not_count() {
        let message = |state| {
            let header = NeighbourHeader { family: 2, index: 3, state, flags: 0 };
            bulkhead_netlink::Message::new(0, 0, &header).into_content()
        };

        assert!(!counts(libc::RTM_NEWNEIGH, &message(libc::NUD_REACHABLE)));
        assert!(counts(libc::RTM_NEWNEIGH, &message(libc::NUD_PERMANENT)));
        assert!(counts(libc::RTM_NEWADDR, &[]));
    }
}
