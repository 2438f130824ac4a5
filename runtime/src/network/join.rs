// SPDX-License-Identifier: Apache-2.0
//! Joining an interface and a tap, in the network namespace that the calling thread is in.

use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

use bulkhead_netlink::Socket;

use super::link::{Link, PCI_DEVICES};
use super::{
    Device, DeviceLink, DeviceOptions, Joined, Junctions, MIN_MTU, NetworkError, SUPPORTED, redirect, tap, vhost,
};

/// What is the same for all interfaces of a namespace.
#[derive(Debug, Clone)]
pub(super) struct Joiner {
    /// The namespace's.
    pub(super) path: PathBuf,
    pub(super) options: DeviceOptions,
}

impl Joiner {
    /// Whether an interface can be passed on, which is one of `links`.
    pub(super) fn check(&self, link: &Link, links: &[Link]) -> Result<(), NetworkError> {
        let (name, path) = (link.name.clone(), self.path.clone());
        if tap::is_one(link) {
            return Err(NetworkError::InUse(path));
        }
        if !SUPPORTED.contains(&link.kind.as_str()) || !link.is_ethernet() || link.routed.is_some() {
            return Err(NetworkError::Unsupported { name, kind: link.description(Path::new(PCI_DEVICES)), path });
        }
        if let Some(lower) = links.iter().find(|other| link.lower == Some(other.index)) {
            return Err(NetworkError::Stacked { name, lower: lower.name.clone(), path });
        }
        if link.mtu < MIN_MTU {
            return Err(NetworkError::Mtu { name, mtu: link.mtu, path });
        }
        Ok(())
    }

    /// Joins it to a new tap, and adds to `junctions` what is to be undone, also when it fails.
    pub(super) fn join(&self, socket: &mut Socket, link: &Link, junctions: &Junctions) -> Result<Device, NetworkError> {
        let name = tap::name(link.index);
        let taps =
            tap::make(&name, self.options.pairs).map_err(self.cannot(&format!("make the tap {name} (module tun)")))?;
        let index = tap::index(link.index).ok_or(io::ErrorKind::NotFound);
        let index = index.map_err(self.cannot(&format!("find the tap {name}")))?;
        let turned_on = tap::turn_on(socket, index, link.mtu);
        turned_on.map_err(self.cannot(&format!("turn the tap {name} on")))?;
        let doing = joining(link);
        // A filter that is there already has been left by a killed supervisor, as has what it hangs on.
        let was_joined = redirect::remove(socket, link.index).is_ok();
        let prepared = redirect::prepared(socket).map_err(self.cannot(&doing))?;
        let is_prepared = was_joined || !prepared.contains(&link.index);
        let begun = junctions.begin(Joined { link: link.index, tap: index, is_prepared, is_answered: false });
        begun.map_err(self.cannot("note what is to be undone"))?;
        redirect::join(socket, link.index, index).map_err(self.cannot(&doing))?;
        let mac = link.mac.as_slice().try_into().unwrap_or_default();
        let limits = self.options.settings.limits;
        let device_link = DeviceLink::Tap { taps, vhosts: self.vhosts()? };
        Ok(Device { link: device_link, limits, mac, id: link.index, carrier: link.carrier })
    }

    /// Joins an interface again to its tap, if it has lost what hung on it: it has left the namespace and come back, and nobody
    /// has looked meanwhile.
    pub(super) fn rejoin(&self, socket: &mut Socket, link: &Link, junctions: &Junctions) -> Result<(), NetworkError> {
        let doing = joining(link);
        if redirect::prepared(socket).map_err(self.cannot(&doing))?.contains(&link.index) {
            return Ok(());
        }
        // The last, should one that could not be undone have had that number.
        let Some(tap) = junctions.joined().iter_mut().rev().find(|joined| joined.link == link.index).map(|joined| {
            (joined.is_prepared, joined.is_answered) = (true, false);
            joined.tap
        }) else {
            return Ok(());
        };
        junctions.note().map_err(self.cannot("note what is to be undone"))?;
        // What leads to an interface that has left does not lead to it when it is back.
        let _ = redirect::remove(socket, tap);
        redirect::join(socket, link.index, tap).map_err(self.cannot(&doing))
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

    pub(super) fn cannot<E: Into<io::Error>>(&self, doing: &str) -> impl FnOnce(E) -> NetworkError + use<E> {
        let (doing, path) = (doing.to_owned(), self.path.clone());
        move |source| NetworkError::Step { doing, path, source: source.into() }
    }
}

/// What is done with an interface.
fn joining(Link { index, name, .. }: &Link) -> String {
    format!(
        "join the interface {name} and the tap {} (modules sch_ingress, cls_matchall, act_mirred)",
        tap::name(*index)
    )
}
