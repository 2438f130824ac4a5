// SPDX-License-Identifier: Apache-2.0
//! The host's side of a sandbox's network: each interface of a network namespace is joined to a tap, whose other side is
//! a network device of the guest.
//!
//! | module | what it knows |
//! | --- | --- |
//! | `namespace` | a network namespace, and how work is done in it |
//! | `own` | the one that this process is in, and the host's |
//! | `claim` | that a namespace is one machine's |
//! | `survey`, `link`, `address`, `routes`, `next_hops`, `rules` | what there is in one |
//! | `warned` | what has been said of what is left out |
//! | `netfilter` | rules there that are not the guest's |
//! | `sysctls` | what is set there for all interfaces |
//! | `carrier` | whether an interface leads somewhere |
//! | `join` | an interface and a tap, joined |
//! | `tap` | interfaces whose other side is a descriptor |
//! | `vhost` | the host's kernel in the VMM's stead |
//! | `redirect` | filters that join two interfaces |
//! | `resolver` | an engine's, which answers at a loopback address |
//! | `answers` | what that asks others |
//! | `follow` | what changes while the machine runs |
//! | `loopback` | connections to the namespace's loopback addresses, which are meant for the guest |
//! | `record` | what is to be undone should the supervisor be killed |
//! | `user` | a network of another kind: of no namespace, by a program that makes the guest's connections its own |
//!
//! The interface stays where it is, with all its addresses; the guest's device has the same ones. What comes in at it goes
//! out at the tap, and the other way round, so the host's own network never sees a frame that is the guest's.

mod address;
mod answers;
mod carrier;
mod claim;
mod follow;
mod join;
mod link;
mod loopback;
mod namespace;
mod netfilter;
mod next_hops;
mod node;
mod own;
mod record;
mod redirect;
mod resolver;
mod routes;
mod rules;
mod survey;
mod sysctls;
mod tap;
pub(crate) mod user;
mod vhost;
mod warned;

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::PathBuf;
use std::slice;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use bulkhead_netlink::Socket;
use bulkhead_protocol::agent::{ConfigureNetworkRequest, NetworkInterface};
use bulkhead_vmm::config::{Limits, MAX_NET_PAIRS, MAX_NETS};
use thiserror::Error;

use self::address::Probed;
pub(crate) use self::carrier::Carrier;
use self::claim::Claim;
use self::follow::View;
pub(crate) use self::follow::{Change, Follower, Following};
use self::join::Joiner;
use self::link::Link;
pub(crate) use self::loopback::{Listening, Loopback};
pub(crate) use self::namespace::NetworkNamespace;
pub(crate) use self::own::on_host;
pub(crate) use self::record::Recorder;
pub(crate) use self::resolver::Resolver;
use self::routes::Routes;
use self::survey::Survey;
use self::warned::Warned;
use crate::logging;
use crate::spec::NetSettings;

/// What can be joined to a tap. Hardware is not among them: it would be the host's own, or a function of it.
const SUPPORTED: [&str; 6] = ["veth", "macvlan", "ipvlan", "vlan", "dummy", "tun"];

/// How many interfaces a machine can be given that come when it runs, as far as it has room for them.
const SPARE_NETS: usize = 4;

/// How long the taps may stay of a machine whose supervisor was killed, and which ends for that.
const TAPS_STAY: Duration = Duration::from_secs(3);
const TAPS_PAUSE: Duration = Duration::from_millis(20);

/// Least MTU of an interface (that of IPv4).
const MIN_MTU: u32 = 68;

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
    #[error(
        "cannot pass on the interface {name} of the network namespace {}: it lies on {lower} there, to which all frames would go: \
         make it in the container, or leave {lower} in another namespace",
        path.display()
    )]
    Stacked { name: String, lower: String, path: PathBuf },
    #[error("cannot pass on the interface {name} of the network namespace {}: its MTU of {mtu} is too small", path.display())]
    Mtu { name: String, mtu: u32, path: PathBuf },
    #[error(
        "the network namespace {} is another virtual machine's, and cannot be shared with it: give the container a network of its own",
        .0.display()
    )]
    InUse(PathBuf),
    #[error("the network namespace {} has {count} interfaces; a virtual machine has {MAX_NETS} at most", path.display())]
    TooMany { count: usize, path: PathBuf },
    #[error(
        "a hook has put the interface {name} into the container's network namespace, and the annotation io.bulkhead.net.user asks \
         for another network: leave out one of them"
    )]
    Foreign { name: String },
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
    /// A pair of queues for each vCPU, as far as there are so many.
    pub(crate) fn new(settings: NetSettings, vcpus: u8) -> Self {
        Self { pairs: usize::from(vcpus).clamp(1, MAX_NET_PAIRS), settings }
    }
}

/// A network device of the guest.
#[derive(Debug)]
pub(crate) struct Device {
    pub(crate) link: DeviceLink,
    pub(crate) limits: Limits,
    pub(crate) mac: [u8; 6],
    /// The number of the interface, by which the VMM is told of it.
    pub(crate) id: i32,
    /// Whether that leads somewhere.
    pub(crate) carrier: bool,
}

/// What it hangs on.
#[derive(Debug)]
pub(crate) enum DeviceLink {
    Tap {
        /// A descriptor of the tap for each pair of queues.
        taps: Vec<OwnedFd>,
        /// vhost-net for each pair of queues, or none.
        vhosts: Vec<OwnedFd>,
    },
    /// A stream socket.
    Stream(OwnedFd),
}

/// An interface of the host that is joined to a tap.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Joined {
    link: i32,
    tap: i32,
    /// Whether it could not be filtered before.
    is_prepared: bool,
    /// Whether the namespace's own stack gets answers there, or cannot.
    is_answered: bool,
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
            // The interface may be gone, with all that hung on it; or nothing hangs on it yet.
            Err(error) if ![libc::ENODEV, libc::ENOENT].map(Some).contains(&error.raw_os_error()) => Err(error),
            _ => Ok(()),
        }
    }
}

/// The interfaces of a namespace that are joined to taps; copies mean the same.
#[derive(Debug, Clone)]
struct Junctions {
    namespace: Arc<NetworkNamespace>,
    joined: Arc<Mutex<Vec<Joined>>>,
    recorder: Arc<Recorder>,
}

impl Junctions {
    fn new(namespace: NetworkNamespace, joined: Vec<Joined>, recorder: Recorder) -> Self {
        Self { namespace: Arc::new(namespace), joined: Arc::new(Mutex::new(joined)), recorder: Arc::new(recorder) }
    }

    fn joined(&self) -> MutexGuard<'_, Vec<Joined>> {
        // Nothing panics while the lock is held.
        self.joined.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Has what a resolver there asks others answered by way of each interface.
    fn let_answers_in(&self, socket: &mut Socket) {
        for joined in self.joined().iter_mut().filter(|joined| !joined.is_answered) {
            joined.is_answered = true;
            if let Err(error) = answers::let_in(socket, joined.link, joined.tap) {
                logging::warn(format_args!(
                    "names that the resolver in the network namespace {} has to ask others for are not found (module cls_bpf): \
                     {error}",
                    self.namespace.path().display()
                ));
            }
        }
    }

    /// Takes apart what `which` says, and writes down what is left.
    fn undo(&self, which: impl Fn(&Joined) -> bool) {
        if self.take_apart(which)
            && let Err(error) = self.note()
        {
            logging::warn(format_args!("cannot note what is to be undone of the network: {error}"));
        }
    }

    /// Takes apart what `which` says, if there is any.
    fn take_apart(&self, which: impl Fn(&Joined) -> bool) -> bool {
        let undone: Vec<_> = {
            let mut joined = self.joined();
            let (undone, left) = joined.drain(..).partition(which);
            *joined = left;
            undone
        };
        if undone.is_empty() {
            return false;
        }
        let failed = self.namespace.inside(|| {
            let mut socket = Socket::open()?;
            // All of them, also after one that fails.
            let failed =
                undone.iter().filter_map(|joined| Some((*joined, joined.undo(&mut socket).err()?.to_string())));
            Ok(failed.collect())
        });
        let failed: Vec<_> = failed.flatten().unwrap_or_else(|error: io::Error| {
            let why = error.to_string();
            undone.iter().map(|joined| (*joined, why.clone())).collect()
        });
        for (joined, why) in failed {
            let (link, path) = (joined.link, self.namespace.path().display());
            logging::warn(format_args!(
                "cannot remove the filters of the interface with number {link} in the network namespace {path}: {why}"
            ));
            // It stays noted, to be undone again; no answers are let in there.
            self.joined().push(Joined { is_answered: true, ..joined });
        }
        true
    }
}

/// A sandbox's network. Everything is as it was before when this has been dropped.
#[derive(Debug)]
pub(crate) struct Network {
    junctions: Junctions,
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
    /// Whether the device's link is up.
    carrier: bool,
}

/// Who moves frames.
const VHOST_NET: &str = "vhost-net";
pub(crate) const TAP: &str = "tap";
pub(crate) const NOBODY: &str = "none";

impl Device {
    /// Who moves its frames.
    pub(crate) fn backend(&self) -> &'static str {
        match &self.link {
            DeviceLink::Tap { vhosts, .. } if !vhosts.is_empty() => VHOST_NET,
            DeviceLink::Tap { .. } => TAP,
            DeviceLink::Stream(_) => user::PASST,
        }
    }

    /// How many pairs of queues it has.
    pub(crate) fn pairs(&self) -> usize {
        match &self.link {
            DeviceLink::Tap { taps, .. } => taps.len(),
            DeviceLink::Stream(_) => 1,
        }
    }

    /// All of its descriptors: a tap's first.
    pub(crate) fn descriptors(&self) -> impl Iterator<Item = BorrowedFd<'_>> {
        let (fds, more) = match &self.link {
            DeviceLink::Tap { taps, vhosts } => (taps.as_slice(), vhosts.as_slice()),
            DeviceLink::Stream(socket) => (slice::from_ref(socket), [].as_slice()),
        };
        fds.iter().chain(more).map(AsFd::as_fd)
    }
}

impl Connected {
    /// Who moves the frames: the host's kernel, or the VMM; `None` as long as there are no devices.
    pub(crate) fn backend(&self) -> Option<&'static str> {
        let mut backends = self.devices.iter().map(Device::backend);
        let first = backends.next()?;
        Some(backends.find(|backend| *backend == VHOST_NET).unwrap_or(first))
    }

    /// How many devices the machine is to have room for besides.
    pub(crate) fn spare_nets(&self) -> usize {
        SPARE_NETS.min(MAX_NETS.saturating_sub(self.devices.len()))
    }
}

impl Network {
    /// Joins each interface of a network namespace to a tap. What is to be undone is written down by `recorder` before it is
    /// done, now and later.
    ///
    /// # Errors
    ///
    /// What could not be done; nothing of it is left.
    pub(crate) fn connect(
        mut namespace: NetworkNamespace,
        options: DeviceOptions,
        recorder: Recorder,
    ) -> Result<Connected, NetworkError> {
        let path = namespace.path().to_owned();
        let enter = |source| NetworkError::Enter { path: path.clone(), source };
        namespace.let_go_of_path().map_err(enter)?;
        // Dropped on an error, it takes back what was done.
        let mut network = Self { junctions: Junctions::new(namespace, Vec::new(), recorder), claim: None };
        let Self { junctions, claim } = &mut network;
        let connected = junctions.namespace.inside(|| {
            let joiner = Joiner { path: path.clone(), options };
            Connector { joiner, junctions, claim }.connect()
        });
        let (devices, request, follower) = connected.map_err(enter)??;
        Ok(Connected { network, devices, request, follower })
    }

    /// Its loopback addresses on the host.
    pub(crate) fn loopback(&self) -> Loopback {
        Loopback::new(Arc::clone(&self.junctions.namespace))
    }
}

impl Drop for Network {
    fn drop(&mut self) {
        // The record goes with the sandbox' folder.
        self.junctions.take_apart(|_| true);
    }
}

/// The work in the namespace.
struct Connector<'a> {
    joiner: Joiner,
    /// What has been done so far.
    junctions: &'a Junctions,
    claim: &'a mut Option<Claim>,
}

impl Connector<'_> {
    fn connect(&mut self) -> Result<(Vec<Device>, ConfigureNetworkRequest, Follower), NetworkError> {
        let joiner = &self.joiner;
        let path = joiner.path.clone();
        let claim = Claim::take().map_err(joiner.cannot("claim it for one virtual machine"))?;
        *self.claim = Some(claim.ok_or_else(|| NetworkError::InUse(path.clone()))?);
        let mut socket = Socket::open().map_err(joiner.cannot("open a netlink socket"))?;
        // What changes after the survey is seen.
        let events = follow::subscribe().map_err(joiner.cannot("follow its changes"))?;
        let mut survey = look(&mut socket).map_err(joiner.cannot("look at the interfaces"))?;
        survey.links.retain(|link| !is_idle(link));
        for link in &survey.links {
            joiner.check(link, &survey.links)?;
        }
        let mut probed = Probed::default();
        probed.mark(&mut survey.links, &[]);
        let count = survey.links.len();
        if count > MAX_NETS {
            return Err(NetworkError::TooMany { count, path });
        }
        let mut devices = Vec::with_capacity(count);
        let mut passed = Vec::with_capacity(count);
        for link in &survey.links {
            let device = joiner.join(&mut socket, link, self.junctions)?;
            passed.push(Passed { index: link.index, mac: device.mac, carrier: device.carrier });
            devices.push(device);
        }
        if survey.resolver {
            self.junctions.let_answers_in(&mut socket);
        }
        let mut warned = Warned::default();
        warned.warn(&path, &survey.left_out);
        let told = request(survey, &passed);
        let (joiner, junctions) = (joiner.clone(), self.junctions.clone());
        let room = SPARE_NETS.min(MAX_NETS - count);
        let (told_last, given_up) = (told.clone(), Vec::new());
        let view =
            View { joiner, junctions, socket, passed, given_up, room, told: told_last, is_told: true, warned, probed };
        Ok((devices, told, Follower::new(events, view)))
    }
}

/// What there is in the calling thread's network namespace, which is claimed: taps of another machine are of one that has no
/// supervisor any more, and are waited for.
fn look(socket: &mut Socket) -> io::Result<Survey> {
    let end = Instant::now() + TAPS_STAY;
    loop {
        let mut survey = Survey::take(socket, &[])?;
        survey.look_inside();
        if !survey.links.iter().any(tap::is_one) || Instant::now() >= end {
            return Ok(survey);
        }
        thread::sleep(TAPS_PAUSE);
    }
}

/// Fails if there is an interface in a namespace that was made for the container, and in which nothing is to be.
///
/// # Errors
///
/// That there is, or that it cannot be found out.
pub(crate) fn expect_none(namespace: &NetworkNamespace) -> Result<(), NetworkError> {
    let path = || namespace.path().to_owned();
    let survey = namespace.inside(|| Survey::take(&mut Socket::open()?, &[]));
    let survey = survey.map_err(|source| NetworkError::Enter { path: path(), source })?;
    let survey = survey.map_err(|source| {
        let doing = "look at the interfaces".to_owned();
        NetworkError::Step { doing, path: path(), source }
    })?;
    match survey.links.into_iter().find(|link| !is_idle(link)) {
        Some(Link { name, .. }) => Err(NetworkError::Foreign { name }),
        None => Ok(()),
    }
}

/// What the guest is told of what there is: the interfaces that its machine has, and what leads through them.
fn request(survey: Survey, passed: &[Passed]) -> ConfigureNetworkRequest {
    let Survey { links, loopback, routes, mut neighbours, resolver, sysctls, .. } = survey;
    let Routes { mut routes, rules, .. } = routes;
    let mac_of =
        |link: &Link| passed.iter().find(|passed| passed.index == link.index).map(|passed| passed.mac.to_vec());
    let interface = |link: Link| {
        let mac = mac_of(&link)?;
        let Link { index: id, name, mac: hardware_address, mtu, up, no_arp, addresses, ipv4, ipv6, .. } = link;
        let ipv6 = ipv6.into();
        Some(NetworkInterface {
            name,
            mac,
            mtu,
            up,
            addresses,
            id,
            hardware_address,
            no_arp,
            ipv4,
            ipv6,
            ..Default::default()
        })
    };
    let interfaces: Vec<_> = links.into_iter().filter_map(interface).collect();
    let is_there = |name: &str| interfaces.iter().any(|interface| interface.name == name);
    routes.retain(|route| route.interface.is_empty() || is_there(&route.interface));
    neighbours.retain(|neighbour| is_there(&neighbour.interface));
    ConfigureNetworkRequest { interfaces, loopback, routes, neighbours, rules, resolver, sysctls, ..Default::default() }
}

/// Whether an interface is one that a tunnel's module makes in each namespace, and that nobody has turned on.
fn is_idle(link: &Link) -> bool {
    !link.up && !link.kind.is_empty() && !SUPPORTED.contains(&link.kind.as_str())
}

#[cfg(test)]
mod tests;
