// SPDX-License-Identifier: Apache-2.0
//! What a device can hang on, and what that is to each of its pairs of queues.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use super::link::Link;
use super::notice::Notice;
use super::stream::Stream;
use super::tap::Tap;
use super::vhost::VhostNet;

/// What a device hangs on.
#[derive(Debug)]
pub enum Backend {
    /// A tap.
    Tap {
        /// It is open, with `IFF_TAP | IFF_NO_PI | IFF_VNET_HDR`; one descriptor for each pair of queues. If there are several,
        /// it has `IFF_MULTI_QUEUE`, and all but the first descriptor's queues are detached.
        taps: Vec<OwnedFd>,
        /// An open `/dev/vhost-net` for each pair of queues, or none.
        vhosts: Vec<OwnedFd>,
        /// Told when queues do without theirs.
        fallback: Notice,
    },
    /// A stream socket.
    Stream {
        /// It is connected, and each frame on it comes behind its length.
        socket: OwnedFd,
        /// Told when it is of no use any more.
        lost: Notice,
    },
}

/// Which kind of thing a device is made to hang on: what its driver may leave to it depends on that.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LinkKind {
    /// A tap.
    Tap,
    /// A stream socket, with one pair of queues.
    Stream,
}

/// A backend that a device cannot hang on.
#[derive(Debug, thiserror::Error)]
pub enum AttachError {
    /// It hangs on one.
    #[error("the network device hangs on something already")]
    Attached,
    /// It is made for another kind.
    #[error("the network device is made for a {0:?}")]
    Kind(LinkKind),
    /// The numbers of queues differ.
    #[error(
        "the network device has {pairs} pairs of queues, and got {taps} descriptors of a tap and {vhosts} of vhost-net"
    )]
    Count {
        /// The device's.
        pairs: u16,
        /// The tap's.
        taps: usize,
        /// The vhost's.
        vhosts: usize,
    },
    /// The host's kernel would not keep to the limits.
    #[error("the network device has limits, which vhost-net would not keep to")]
    Limited,
    /// The host's kernel refused something.
    #[error("cannot start the network device's queues")]
    Start(#[source] io::Error),
}

/// The host's side of a pair of queues.
#[derive(Debug)]
pub(super) struct Side {
    pub(super) link: Arc<Link>,
    /// While the pair does not run.
    pub(super) vhost: Option<VhostNet>,
    pub(super) fallback: Option<Notice>,
}

impl Side {
    fn tap(tap: OwnedFd, vhost: Option<VhostNet>, fallback: Notice) -> Self {
        Self { link: Arc::new(Link::Tap(Tap::new(tap))), vhost, fallback: Some(fallback) }
    }

    fn stream(socket: OwnedFd, lost: Notice) -> Self {
        Self { link: Arc::new(Link::Stream(Stream::new(socket, lost))), vhost: None, fallback: None }
    }
}

impl Backend {
    /// What it is to each pair of queues of a device that is made for that kind, as far as it fits.
    pub(super) fn into_sides(self, kind: LinkKind, pairs: u16, is_limited: bool) -> Result<Vec<Side>, AttachError> {
        match (self, kind) {
            (Self::Tap { taps, vhosts, fallback }, LinkKind::Tap) => {
                if is_limited && !vhosts.is_empty() {
                    return Err(AttachError::Limited);
                }
                if taps.len() != usize::from(pairs) || !(vhosts.is_empty() || vhosts.len() == taps.len()) {
                    return Err(AttachError::Count { pairs, taps: taps.len(), vhosts: vhosts.len() });
                }
                let mut vhosts = vhosts.into_iter().map(VhostNet::new);
                Ok(taps.into_iter().map(|tap| Side::tap(tap, vhosts.next(), fallback.clone())).collect())
            }
            (Self::Stream { socket, lost }, LinkKind::Stream) => Ok(vec![Side::stream(socket, lost)]),
            (_, kind) => Err(AttachError::Kind(kind)),
        }
    }
}
