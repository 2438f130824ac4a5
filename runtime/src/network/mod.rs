// SPDX-License-Identifier: Apache-2.0
//! The host's side of a sandbox's network: each interface of a network namespace is joined to a tap, whose other side is
//! a network device of the guest.
//!
//! | module | what it knows |
//! | --- | --- |
//! | `namespace` | a network namespace, and how work is done in it |
//! | `own` | the one that this process is in, and the host's |
//! | `claim` | that a namespace is one machine's |
//! | `survey`, `routes` | what there is in one |
//! | `tap` | interfaces whose other side is a descriptor |
//! | `vhost` | the host's kernel in the VMM's stead |
//! | `redirect` | filters that join two interfaces |
//! | `follow` | what changes while the machine runs |
//! | `record` | what is to be undone should the supervisor be killed |
//!
//! The interface stays where it is, with all its addresses; the guest's device has the same ones. What comes in at it goes
//! out at the tap, and the other way round, so the host's own network never sees a frame that is the guest's.

mod claim;
mod follow;
mod namespace;
mod own;
mod record;
mod redirect;
mod routes;
mod survey;
mod tap;
mod vhost;

use std::io;
use std::os::fd::OwnedFd;
use std::path::PathBuf;

use bulkhead_netlink::Socket;
use bulkhead_protocol::agent::{ConfigureNetworkRequest, NetworkInterface};
use bulkhead_vmm::config::{Limits, MAX_NETS, MIN_MTU};
use thiserror::Error;

use self::claim::Claim;
use self::follow::View;
pub(crate) use self::follow::{Follower, Following};
pub(crate) use self::namespace::NetworkNamespace;
pub(crate) use self::own::on_host;
pub(crate) use self::record::NetworkRecord;
use self::routes::Routes;
use self::survey::{Link, Survey};
use crate::logging;
use crate::spec::NetSettings;

/// What can be joined to a tap. Hardware is not among them: it would be the host's own, or a function of it.
const SUPPORTED: [&str; 6] = ["veth", "macvlan", "ipvlan", "vlan", "dummy", "tun"];

/// A network that cannot be had.
#[derive(Debug, Error)]
pub(crate) enum NetworkError {
    #[error("cannot enter the network namespace {}", path.display())]
    Enter { path: PathBuf, source: io::Error },
    #[error("cannot {doing} in the network namespace {}", path.display())]
    Step { doing: String, path: PathBuf, source: io::Error },
    #[error(
        "cannot pass on the interface {name} of the network namespace {}: it is {kind}; possible are {}",
        path.display(), SUPPORTED.join(", ")
    )]
    Unsupported { name: String, kind: String, path: PathBuf },
    #[error("cannot pass on the interface {name} of the network namespace {}: its MTU of {mtu} is too small", path.display())]
    Mtu { name: String, mtu: u32, path: PathBuf },
    #[error(
        "the network namespace {} is another virtual machine's, and cannot be shared with it: give the container a network of its own",
        .0.display()
    )]
    InUse(PathBuf),
    #[error("the network namespace {} has {count} interfaces; a virtual machine has {MAX_NETS} at most", path.display())]
    TooMany { count: usize, path: PathBuf },
    #[error("cannot use {}, which the annotation io.bulkhead.net.vhost asks for (module vhost_net)", vhost::DEVICE)]
    Vhost(#[source] io::Error),
}

/// How a guest's network devices are made.
#[derive(Debug, Clone, Copy)]
pub(crate) struct DeviceOptions {
    /// How many pairs of queues each has.
    pairs: usize,
    settings: NetSettings,
}

impl DeviceOptions {
    /// One pair of queues: the guest is not given more yet.
    pub(crate) fn new(settings: NetSettings) -> Self {
        Self { pairs: 1, settings }
    }
}

/// A network device of the guest.
#[derive(Debug)]
pub(crate) struct Device {
    /// A descriptor of the tap for each pair of queues.
    pub(crate) taps: Vec<OwnedFd>,
    /// vhost-net for each pair of queues, or none.
    pub(crate) vhosts: Vec<OwnedFd>,
    pub(crate) limits: Limits,
    pub(crate) mac: [u8; 6],
    pub(crate) mtu: u16,
}

/// An interface of the host that is joined to a tap.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Joined {
    link: i32,
    tap: i32,
    /// Whether it could not be filtered before.
    is_prepared: bool,
}

impl Joined {
    /// Takes the filters away. The tap goes with its last descriptor.
    fn undo(self, socket: &mut Socket) -> io::Result<()> {
        // The interface may have been joined to another machine's tap after this one's was gone.
        if tap::index(self.link).is_some_and(|tap| tap != self.tap) {
            return Ok(());
        }
        let removed = redirect::remove(socket, self.link);
        match if self.is_prepared { redirect::unprepare(socket, self.link) } else { removed } {
            Err(error) if error.raw_os_error() != Some(libc::ENODEV) => Err(error),
            // The interface may be gone, with all that hung on it.
            _ => Ok(()),
        }
    }
}

/// A sandbox's network. Everything is as it was before when this has been dropped.
#[derive(Debug)]
pub(crate) struct Network {
    namespace: NetworkNamespace,
    joined: Vec<Joined>,
    /// That the namespace is this machine's; a network that is only there to be undone has none.
    claim: Option<Claim>,
}

/// A network, what the VMM gets of it, and what the guest is told.
#[derive(Debug)]
pub(crate) struct Connected {
    pub(crate) network: Network,
    pub(crate) devices: Vec<Device>,
    pub(crate) request: ConfigureNetworkRequest,
    /// What changes from then on.
    pub(crate) follower: Follower,
}

/// An interface that the machine has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Passed {
    index: i32,
    /// That of the machine's device.
    mac: [u8; 6],
}

impl Connected {
    /// Who moves the frames: the host's kernel, or the VMM.
    pub(crate) fn backend(&self) -> &'static str {
        if self.devices.iter().any(|device| !device.vhosts.is_empty()) { "vhost-net" } else { "tap" }
    }
}

impl Network {
    /// Joins each interface of a network namespace to a tap.
    ///
    /// # Errors
    ///
    /// What could not be done; nothing of it is left.
    pub(crate) fn connect(namespace: NetworkNamespace, options: DeviceOptions) -> Result<Connected, NetworkError> {
        // Dropped on an error, it takes back what was done.
        let mut network = Self { namespace, joined: Vec::new(), claim: None };
        let Self { namespace, joined, claim } = &mut network;
        let path = namespace.path().to_owned();
        let enter = |source| NetworkError::Enter { path: path.clone(), source };
        namespace.let_go_of_path().map_err(enter)?;
        let connected = namespace.inside(|| Connector { path: path.clone(), options, joined, claim }.connect());
        let (devices, request, follower) = connected.map_err(enter)??;
        Ok(Connected { network, devices, request, follower })
    }
}

impl Drop for Network {
    fn drop(&mut self) {
        let (namespace, joined) = (&self.namespace, &self.joined);
        if joined.is_empty() {
            return;
        }
        let undone = namespace.inside(|| {
            let mut socket = Socket::open()?;
            joined.iter().try_for_each(|joined| joined.undo(&mut socket))
        });
        if let Err(error) = undone.and_then(|undone| undone) {
            logging::debug(format_args!("filters are left in {}: {error}", namespace.path().display()));
        }
    }
}

/// The work in the namespace.
struct Connector<'a> {
    path: PathBuf,
    options: DeviceOptions,
    /// What has been done so far.
    joined: &'a mut Vec<Joined>,
    claim: &'a mut Option<Claim>,
}

impl Connector<'_> {
    fn connect(&mut self) -> Result<(Vec<Device>, ConfigureNetworkRequest, Follower), NetworkError> {
        let claim = Claim::take().map_err(self.cannot("claim it for one virtual machine"))?;
        *self.claim = Some(claim.ok_or_else(|| NetworkError::InUse(self.path.clone()))?);
        let mut socket = Socket::open().map_err(self.cannot("open a netlink socket"))?;
        // What changes after the survey is seen.
        let events = follow::subscribe().map_err(self.cannot("follow its changes"))?;
        let mut survey = Survey::take(&mut socket).map_err(self.cannot("look at the interfaces"))?;
        survey.links.retain(|link| !is_idle(link));
        for link in &survey.links {
            self.check(link)?;
        }
        let count = survey.links.len();
        if count > MAX_NETS {
            return Err(NetworkError::TooMany { count, path: self.path.clone() });
        }
        let mut devices = Vec::with_capacity(count);
        let mut passed = Vec::with_capacity(count);
        for link in &survey.links {
            let device = self.join(&mut socket, link)?;
            passed.push(Passed { index: link.index, mac: device.mac });
            devices.push(device);
        }
        for route in &survey.routes.left_out {
            logging::warn(format_args!("of the network namespace {}, {route}", self.path.display()));
        }
        let warned = survey.routes.left_out.clone();
        let told = request(survey, &passed);
        let view = View { path: self.path.clone(), socket, passed, told: told.clone(), warned };
        Ok((devices, told, Follower::new(events, view)))
    }

    fn check(&self, link: &Link) -> Result<(), NetworkError> {
        let (name, path) = (link.name.clone(), self.path.clone());
        if tap::is_one(link) {
            return Err(NetworkError::InUse(path));
        }
        if !SUPPORTED.contains(&link.kind.as_str()) || link.hardware != libc::ARPHRD_ETHER || link.mac.len() != 6 {
            let kind = if link.kind.is_empty() { "a device of the host" } else { &link.kind };
            return Err(NetworkError::Unsupported { name, kind: kind.to_owned(), path });
        }
        if link.mtu < u32::from(MIN_MTU) {
            return Err(NetworkError::Mtu { name, mtu: link.mtu, path });
        }
        Ok(())
    }

    fn join(&mut self, socket: &mut Socket, link: &Link) -> Result<Device, NetworkError> {
        let name = tap::name(link.index);
        let taps =
            tap::make(&name, self.options.pairs).map_err(self.cannot(&format!("make the tap {name} (module tun)")))?;
        let index = tap::index(link.index).ok_or(io::ErrorKind::NotFound);
        let index = index.map_err(self.cannot(&format!("find the tap {name}")))?;
        let turned_on = tap::turn_on(socket, index, link.mtu);
        turned_on.map_err(self.cannot(&format!("turn the tap {name} on")))?;
        let doing = format!(
            "join the interface {} and the tap {name} (modules sch_ingress, cls_matchall, act_mirred)",
            link.name
        );
        let is_new = redirect::prepare(socket, link.index).map_err(self.cannot(&doing))?;
        // A filter that is there already has been left by a killed supervisor, as has what it hangs on.
        let is_prepared = redirect::remove(socket, link.index).is_ok() || is_new;
        self.joined.push(Joined { link: link.index, tap: index, is_prepared });
        redirect::prepare(socket, index)
            .and_then(|_| redirect::add(socket, index, link.index))
            .and_then(|()| redirect::add(socket, link.index, index))
            .map_err(self.cannot(&doing))?;
        let mac = link.mac.as_slice().try_into().unwrap_or_default();
        let limits = self.options.settings.limits;
        Ok(Device { taps, vhosts: self.vhosts()?, limits, mac, mtu: u16::try_from(link.mtu).unwrap_or(u16::MAX) })
    }

    fn vhosts(&self) -> Result<Vec<OwnedFd>, NetworkError> {
        let DeviceOptions { pairs, settings } = self.options;
        match settings.vhost {
            Some(false) => Ok(Vec::new()),
            Some(true) => vhost::open(pairs).map_err(NetworkError::Vhost),
            // It keeps to no limits.
            None if settings.limits.are_set() => Ok(Vec::new()),
            // Without it, the VMM does it.
            None => Ok(vhost::open(pairs).unwrap_or_default()),
        }
    }

    fn cannot<E: Into<io::Error>>(&self, doing: &str) -> impl FnOnce(E) -> NetworkError + use<E> {
        let (doing, path) = (doing.to_owned(), self.path.clone());
        move |source| NetworkError::Step { doing, path, source: source.into() }
    }
}

/// What the guest is told of what there is: the interfaces that its machine has, and what leads through them.
fn request(survey: Survey, passed: &[Passed]) -> ConfigureNetworkRequest {
    let Survey { links, routes: Routes { mut routes, rules, .. }, mut neighbours } = survey;
    let mac_of =
        |link: &Link| passed.iter().find(|passed| passed.index == link.index).map(|passed| passed.mac.to_vec());
    let interface = |link: Link| {
        let mac = mac_of(&link)?;
        let Link { name, mtu, up, addresses, .. } = link;
        Some(NetworkInterface { name, mac, mtu, up, addresses, ..Default::default() })
    };
    let interfaces: Vec<_> = links.into_iter().filter_map(interface).collect();
    let is_there = |name: &str| interfaces.iter().any(|interface| interface.name == name);
    routes.retain(|route| route.interface.is_empty() || is_there(&route.interface));
    neighbours.retain(|neighbour| is_there(&neighbour.interface));
    ConfigureNetworkRequest { interfaces, routes, neighbours, rules, ..Default::default() }
}

/// Whether an interface is one that a tunnel's module makes in each namespace, and that nobody has turned on.
fn is_idle(link: &Link) -> bool {
    !link.up && !link.kind.is_empty() && !SUPPORTED.contains(&link.kind.as_str())
}

#[cfg(test)]
mod tests;
