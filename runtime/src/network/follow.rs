// SPDX-License-Identifier: Apache-2.0
//! What changes in a network namespace while its machine runs: the kernel tells that something has, and then all of it is
//! looked at again.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use bulkhead_netlink::{Attributes, Events, Header, LinkHeader, NeighbourHeader, Socket};
use bulkhead_protocol::agent::ConfigureNetworkRequest;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::time::sleep;

use super::address::Probed;
use super::carrier::{self, Carrier};
use super::join::Joiner;
use super::link::Link;
use super::loopback::Loopback;
use super::survey::Survey;
use super::warned::Warned;
use super::{Device, Junctions, NetworkError, Passed, Resolver, is_idle, request, tap};
use crate::logging;
use crate::text;

/// How long the changes that come together may take: who adds an interface adds its addresses and routes.
const SETTLE: Duration = Duration::from_millis(20);

/// The groups of rules: of `RTNLGRP_IPV4_RULE` and `RTNLGRP_IPV6_RULE` (linux/rtnetlink.h), whose second has no `RTMGRP_*`.
const RULES: u32 = 1 << (8 - 1) | 1 << (19 - 1);

/// The groups of what is set by sysctls, as far as the kernel tells: of `RTNLGRP_IPV4_NETCONF` and `RTNLGRP_IPV6_NETCONF`.
const SETTINGS: u32 = 1 << (24 - 1) | 1 << (25 - 1);

/// A subscription to the changes of the calling thread's network namespace.
pub(super) fn subscribe() -> io::Result<Events> {
    let groups = libc::RTMGRP_LINK
        | libc::RTMGRP_NEIGH
        | libc::RTMGRP_IPV4_IFADDR
        | libc::RTMGRP_IPV4_ROUTE
        | libc::RTMGRP_IPV6_IFADDR
        | libc::RTMGRP_IPV6_ROUTE;
    Events::subscribe(groups.cast_unsigned() | RULES | SETTINGS)
}

/// What is known of the network of a machine that runs.
#[derive(Debug)]
pub(super) struct View {
    pub(super) joiner: Joiner,
    pub(super) junctions: Junctions,
    pub(super) socket: Socket,
    /// The interfaces that the machine has.
    pub(super) passed: Vec<Passed>,
    /// Those that it cannot have.
    pub(super) given_up: Vec<i32>,
    /// How many more it can be given.
    pub(super) room: usize,
    /// What its guest was told last, and whether it has all of it.
    pub(super) told: ConfigureNetworkRequest,
    pub(super) is_told: bool,
    pub(super) warned: Warned,
    pub(super) probed: Probed,
}

/// A device for an interface that has come, and the interface.
#[derive(Debug)]
pub(crate) struct Late {
    pub(crate) name: String,
    pub(crate) device: Device,
    index: i32,
}

/// What is to be done about a change.
#[derive(Debug)]
pub(crate) struct Change {
    /// The devices that the machine is to be given first.
    pub(crate) late: Vec<Late>,
    /// The devices, also of these, whose links are to change after that.
    pub(crate) carriers: Vec<Carrier>,
    /// What the guest is to be told then; `None` if it knows.
    pub(crate) request: Option<ConfigureNetworkRequest>,
    /// Whether that is something else than what it was told last, of which it may not have all.
    pub(crate) is_news: bool,
}

impl View {
    /// What is to be done, if anything.
    fn look(&mut self) -> io::Result<Change> {
        let mut survey = self.survey()?;
        self.forget_gone(&survey);
        let mut refused = self.rejoin(&survey);
        self.probed.mark(&mut survey.links, &self.passed);
        let mut late = Vec::new();
        for link in &survey.links {
            let is_known =
                self.passed.iter().any(|passed| passed.index == link.index) || self.given_up.contains(&link.index);
            if is_known || is_idle(link) || tap::is_one(link) {
                continue;
            }
            match self.join(link, &survey.links) {
                Ok(device) => {
                    // As the device is made.
                    self.passed.push(Passed { index: link.index, mac: device.mac, carrier: true });
                    late.push(Late { name: link.name.clone(), device, index: link.index });
                }
                Err(why) => refused.push((link.index, link.name.clone(), why)),
            }
        }
        for (index, name, why) in &refused {
            self.give_up(*index, name, why);
        }
        // Routes have other ways then. Without them the guest has what leads by the interfaces that it has.
        if !refused.is_empty()
            && let Ok(again) = self.survey()
        {
            survey = again;
            self.probed.mark(&mut survey.links, &self.passed);
        }
        if survey.resolver {
            self.junctions.let_answers_in(&mut self.socket);
        }
        self.warned.warn(&self.joiner.path, &survey.left_out);
        let carriers = carrier::changes(&mut self.passed, &survey.links);
        let (request, is_news) = self.news(survey);
        Ok(Change { late, carriers, request, is_news })
    }

    /// What there is.
    fn survey(&mut self) -> io::Result<Survey> {
        let mut survey = Survey::take(&mut self.socket, &self.given_up)?;
        self.junctions.namespace.inside(|| survey.look_inside())?;
        Ok(survey)
    }

    /// Joins interfaces again that have left and come back since the last look; which cannot be, and why.
    fn rejoin(&mut self, survey: &Survey) -> Vec<(i32, String, String)> {
        let Self { joiner, junctions, socket, passed, .. } = self;
        let known = survey.links.iter().filter(|link| passed.iter().any(|passed| passed.index == link.index));
        let rejoined = known.map(|link| (link, joiner.rejoin(socket, link, junctions)));
        rejoined.filter_map(|(link, done)| Some((link.index, link.name.clone(), text::chain(&done.err()?)))).collect()
    }

    /// Forgets the interfaces that are no longer there. What they have used of the machine's room stays used, and so do their
    /// taps, which the machine holds.
    fn forget_gone(&mut self, survey: &Survey) {
        let is_there = |index: i32| survey.links.iter().any(|link| link.index == index);
        self.given_up.retain(|index| is_there(*index));
        self.passed.retain(|passed| is_there(passed.index));
        let Self { junctions, socket, .. } = self;
        for joined in junctions.joined().iter().filter(|joined| !is_there(joined.link)) {
            if let Err(error) = tap::retire(socket, joined.tap) {
                logging::debug(format_args!("cannot turn off a tap whose interface {} has gone: {error}", joined.link));
            }
        }
        junctions.undo(|joined| !is_there(joined.link));
    }

    /// What the guest does not have yet, and whether that is something else than what it was told last.
    fn news(&mut self, survey: Survey) -> (Option<ConfigureNetworkRequest>, bool) {
        let wanted = request(survey, &self.passed);
        let is_news = self.told != wanted;
        if self.is_told && !is_news {
            return (None, false);
        }
        self.told = wanted.clone();
        self.is_told = true;
        (Some(wanted), is_news)
    }

    /// Joins an interface that has come to a tap.
    fn join(&mut self, link: &Link, links: &[Link]) -> Result<Device, String> {
        if self.room == 0 {
            return Err("the virtual machine has no room for more".to_owned());
        }
        self.joiner.check(link, links).map_err(|error| text::chain(&error))?;
        let Self { joiner, junctions, socket, .. } = self;
        let device = junctions.namespace.inside(|| joiner.join(socket, link, junctions));
        let enter = |source| NetworkError::Enter { path: joiner.path.clone(), source };
        let device = device.map_err(enter).and_then(|device| device);
        if device.is_ok() {
            self.room -= 1;
        }
        device.map_err(|error| text::chain(&error))
    }

    /// Does without an interface, with a warning.
    fn give_up(&mut self, index: i32, name: &str, why: &str) {
        let path = self.joiner.path.display();
        logging::warn(format_args!(
            "the interface {name} of the network namespace {path}, which came when the machine ran, is not passed on: {why}"
        ));
        self.given_up.push(index);
        self.passed.retain(|passed| passed.index != index);
        self.junctions.undo(|joined| joined.link == index);
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
    /// Waits for something that may be a change. It may be cancelled if the namespace is looked at then.
    ///
    /// # Errors
    ///
    /// The namespace cannot be followed.
    pub(crate) async fn changed(&mut self) -> io::Result<()> {
        loop {
            let mut ready = self.events.readable_mut().await?;
            let changed = ready.get_inner_mut().drain(counts)?;
            ready.clear_ready();
            if changed {
                sleep(SETTLE).await;
                self.events.get_mut().drain(counts)?;
                return Ok(());
            }
        }
    }

    /// What is to be done to have the guest as the namespace is.
    ///
    /// # Errors
    ///
    /// The namespace cannot be looked at.
    pub(crate) fn look(&mut self) -> io::Result<Change> {
        self.view.look()
    }

    /// The machine could not be given a device: it does without, and the guest is to be told less.
    pub(crate) fn give_up(&mut self, late: &Late, why: &str) {
        self.view.give_up(late.index, &late.name, why);
    }

    /// A link could not be changed: it is tried again with the next look.
    pub(crate) fn was_not_changed(&mut self, carrier: &Carrier) {
        for passed in self.view.passed.iter_mut().filter(|passed| passed.index == carrier.id) {
            passed.carrier = !carrier.on;
        }
    }

    /// The resolver that the guest was told of, if there is one.
    pub(crate) fn resolver(&self) -> Option<Resolver> {
        self.view.told.resolver.then(|| Resolver::new(Arc::clone(&self.view.junctions.namespace)))
    }

    /// The loopback addresses of the namespace on the host.
    pub(crate) fn loopback(&self) -> Loopback {
        Loopback::new(Arc::clone(&self.view.junctions.namespace))
    }

    /// The guest does not have all of what it was told last: it is told again with the next look.
    pub(crate) fn was_not_told(&mut self) {
        self.view.is_told = false;
    }
}

/// Whether a message may tell of something that the guest is told. Neighbours come and go; and what a tap can do changes whenever
/// a guest sets its device up again.
fn counts(kind: u16, payload: &[u8]) -> bool {
    match kind {
        libc::RTM_NEWNEIGH => {
            NeighbourHeader::read(payload).is_some_and(|(header, _)| header.state & libc::NUD_PERMANENT != 0)
        }
        libc::RTM_NEWLINK => !LinkHeader::read(payload)
            .and_then(|(header, attributes)| Link::read(&header, Attributes::new(attributes)))
            .is_some_and(|link| tap::is_one(&link)),
        _ => true,
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use bulkhead_netlink::Message;
    use bulkhead_protocol::agent::NetworkAddress;

    use super::super::{DeviceOptions, NetworkNamespace, Recorder};
    use super::*;
    use crate::spec::NetSettings;

    #[test]
    fn neighbours_that_are_not_for_good_do_not_count() {
        let message = |state| {
            let header = NeighbourHeader { family: 2, index: 3, state, flags: 0 };
            Message::new(0, 0, &header).into_content()
        };

        assert!(!counts(libc::RTM_NEWNEIGH, &message(libc::NUD_REACHABLE)));
        assert!(counts(libc::RTM_NEWNEIGH, &message(libc::NUD_PERMANENT)));
        assert!(counts(libc::RTM_NEWADDR, &[]));
    }

    #[test]
    fn what_becomes_of_taps_does_not_count() {
        let message = |name: &str, kind: &str| {
            let header = LinkHeader { index: 5, hardware: libc::ARPHRD_ETHER, ..Default::default() };
            Message::new(libc::RTM_NEWLINK, 0, &header)
                .with_text(libc::IFLA_IFNAME, name)
                .with_number(libc::IFLA_MTU, 1500)
                .with_nested(libc::IFLA_LINKINFO, |info| info.with_text(libc::IFLA_INFO_KIND, kind))
                .into_content()
        };

        assert!(!counts(libc::RTM_NEWLINK, &message("bh-2", "tun")));
        assert!(counts(libc::RTM_NEWLINK, &message("eth0", "tun")));
        assert!(counts(libc::RTM_NEWLINK, &message("bh-2", "veth")));
        assert!(counts(libc::RTM_DELLINK, &message("bh-2", "tun")));
        assert!(counts(libc::RTM_NEWLINK, &[]));
    }

    #[test]
    fn what_the_guest_was_told_in_vain_is_told_again_and_is_no_news() {
        let namespace = NetworkNamespace::open(Path::new("/proc/self/ns/net")).unwrap();
        let joiner = Joiner { path: "/run/netns/x".into(), options: DeviceOptions::new(NetSettings::default(), 1) };
        let mut view = View {
            joiner,
            junctions: Junctions::new(namespace, Vec::new(), Recorder::new(|_| Ok(()))),
            socket: Socket::open().unwrap(),
            passed: Vec::new(),
            given_up: Vec::new(),
            room: 0,
            told: ConfigureNetworkRequest::default(),
            is_told: true,
            warned: Warned::default(),
            probed: Probed::default(),
        };
        assert_eq!(view.news(Survey::default()), (None, false));

        let survey = || Survey { loopback: vec![NetworkAddress::default()], ..Survey::default() };
        assert!(matches!(view.news(survey()), (Some(_), true)));
        assert_eq!(view.news(survey()), (None, false));
        view.is_told = false;
        assert!(matches!(view.news(survey()), (Some(_), false)));
    }
}
