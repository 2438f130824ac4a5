// SPDX-License-Identifier: Apache-2.0
//! The host's side of the device: what it hangs on, and which of its pairs of queues run. A pair that the guest does not use
//! has no thread, and its queue of the tap gets no frames.

use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use serde::{Deserialize, Serialize};
use virtio_bindings::virtio_net::{
    VIRTIO_NET_F_CTRL_MAC_ADDR, VIRTIO_NET_F_CTRL_RX, VIRTIO_NET_F_STATUS, VIRTIO_NET_S_LINK_UP,
};

use super::backend::{AttachError, Backend, LinkKind, Side};
use super::command::Command;
use super::filter::Filter;
use super::limit::{Limiter, Limits};
use super::pair::{Context, Pair};
use super::{MacAddress, features};
use crate::device::{ActiveQueue, GuestMemory, Interrupt};
use crate::worker::Worker;

/// What there is to know of a device beside its queues: what it is, and what the guest has asked for.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct NetState {
    /// The address that it was made with.
    pub permanent_mac: MacAddress,
    /// The address that the guest has given it.
    pub mac: MacAddress,
    /// How many pairs of queues there are.
    pub max_pairs: u16,
    /// How many of them the guest uses.
    pub pairs: u16,
    /// Whether what it hangs on leads somewhere.
    pub carrier: bool,
    /// Whether it hangs on something that does: the link that the guest sees.
    pub link_up: bool,
    /// Changes with `link_up`.
    pub generation: u32,
    /// The frames that the guest wants.
    pub filter: Filter,
    /// How much of them may go.
    pub limits: Limits,
}

impl NetState {
    /// The configuration space (virtio 1.2, section 5.1.4): address, status, number of pairs.
    fn config_space(&self) -> [u8; 10] {
        let mut space = [0; 10];
        space[..6].copy_from_slice(&self.mac.0);
        let status = if self.link_up { VIRTIO_NET_S_LINK_UP as u16 } else { 0 };
        space[6..8].copy_from_slice(&status.to_le_bytes());
        space[8..].copy_from_slice(&self.max_pairs.to_le_bytes());
        space
    }
}

/// A device's host side. Clones share it.
#[derive(Debug, Clone)]
pub struct Port(Arc<Mutex<Inner>>);

#[derive(Debug)]
struct Inner {
    state: NetState,
    kind: LinkKind,
    /// One for each pair of queues, or none while the device hangs on nothing.
    sides: Vec<Side>,
    limiter: Option<Arc<Limiter>>,
    active: Option<Active>,
}

/// The guest's side, once its driver has started the device.
#[derive(Debug)]
struct Active {
    memory: GuestMemory,
    accepted: u64,
    interrupt: Arc<Interrupt>,
    /// Those that the driver has set up.
    pairs: Vec<Queues>,
}

#[derive(Debug)]
enum Queues {
    Idle([ActiveQueue; 2]),
    Running(Worker<Pair>),
    /// Something failed; until the device is reset.
    Lost,
}

impl Port {
    pub(super) fn new(mac: MacAddress, kind: LinkKind, max_pairs: u16, limits: Limits) -> Self {
        let filter = Filter::default();
        let limiter = limits.are_set().then(|| Arc::new(Limiter::new(&limits)));
        let state = NetState {
            permanent_mac: mac,
            mac,
            max_pairs,
            pairs: 1,
            carrier: true,
            link_up: false,
            generation: 0,
            filter,
            limits,
        };
        Self(Arc::new(Mutex::new(Inner { state, kind, sides: Vec::new(), limiter, active: None })))
    }

    /// A poisoned lock means that another thread panicked, which ends the process; until then its state will do.
    fn inner(&self) -> MutexGuard<'_, Inner> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Hangs the device on something, also while it runs: the guest sees its link come up.
    ///
    /// # Errors
    ///
    /// When it cannot; it hangs on what it did before.
    pub fn attach(&self, backend: Backend) -> Result<(), AttachError> {
        let mut inner = self.inner();
        if !inner.sides.is_empty() {
            return Err(AttachError::Attached);
        }
        let (kind, pairs, is_limited) = (inner.kind, inner.state.max_pairs, inner.limiter.is_some());
        inner.sides = backend.into_sides(kind, pairs, is_limited)?;
        if let Err(error) = inner.connect() {
            inner.stop();
            inner.sides.clear();
            return Err(AttachError::Start(error));
        }
        inner.settle_link();
        Ok(())
    }

    /// Takes it off again: the guest sees its link go down. What it sends waits in its queues.
    pub fn detach(&self) {
        let mut inner = self.inner();
        inner.stop();
        inner.sides.clear();
        inner.settle_link();
    }

    /// What the device hangs on leads somewhere from now on, or no longer: the guest sees its link come up or go down.
    pub fn set_carrier(&self, on: bool) {
        let mut inner = self.inner();
        inner.state.carrier = on;
        inner.settle_link();
    }

    /// The device's state.
    #[must_use]
    pub fn state(&self) -> NetState {
        self.inner().state.clone()
    }

    /// What the driver sees of it.
    pub(super) fn config_space(&self) -> [u8; 10] {
        self.inner().state.config_space()
    }

    /// Changes when that does.
    pub(super) fn generation(&self) -> u32 {
        self.inner().state.generation
    }

    /// The driver has started the device with these pairs of queues.
    pub(super) fn activate(
        &self,
        memory: GuestMemory,
        accepted: u64,
        interrupt: Arc<Interrupt>,
        pairs: Vec<[ActiveQueue; 2]>,
    ) -> io::Result<()> {
        let mut inner = self.inner();
        let pairs = pairs.into_iter().map(Queues::Idle).collect();
        inner.active = Some(Active { memory, accepted, interrupt, pairs });
        inner.connect()
    }

    /// The device cannot go on before it is reset.
    pub(super) fn stop(&self) {
        self.inner().stop();
    }

    /// The driver has reset the device: what it has asked for is forgotten.
    pub(super) fn reset(&self) {
        let mut inner = self.inner();
        inner.stop();
        inner.active = None;
        let NetState { permanent_mac, .. } = inner.state;
        inner.state.mac = permanent_mac;
        inner.state.pairs = 1;
        inner.state.filter = Filter::default();
        inner.filter();
    }

    /// Does what the guest asks for by the control queue; whether it could be done.
    pub(super) fn obey(&self, command: Command) -> bool {
        let mut inner = self.inner();
        let Some(active) = &inner.active else { return false };
        let (accepted, pairs) = (active.accepted, active.pairs.len());
        let may = |feature| features::has(accepted, feature);
        let state = &mut inner.state;
        match command {
            Command::Promiscuous(on) if may(VIRTIO_NET_F_CTRL_RX) => state.filter.promiscuous = on,
            Command::AllMulticast(on) if may(VIRTIO_NET_F_CTRL_RX) => state.filter.all_multicast = on,
            Command::Table { unicast, multicast } if may(VIRTIO_NET_F_CTRL_RX) => {
                (state.filter.unicast, state.filter.multicast) = (unicast, multicast);
            }
            Command::Mac(mac) if may(VIRTIO_NET_F_CTRL_MAC_ADDR) => state.mac = mac,
            // More than one pair has been set up only where the driver knows of more.
            Command::Pairs(wanted) if (1..=pairs).contains(&wanted.into()) => {
                state.pairs = wanted;
                return inner.settle().is_ok();
            }
            _ => return false,
        }
        inner.filter();
        true
    }
}

impl Inner {
    /// Brings both sides together, as far as they are there.
    fn connect(&mut self) -> io::Result<()> {
        let Some(active) = &self.active else { return Ok(()) };
        for (index, side) in self.sides.iter().enumerate() {
            side.link.prepare(features::tap_offloads(active.accepted), index == 0)?;
        }
        self.filter();
        self.settle()
    }

    /// Lets the pairs run that the guest uses, and no others.
    fn settle(&mut self) -> io::Result<()> {
        let Some(active) = &mut self.active else { return Ok(()) };
        let Active { memory, accepted, interrupt, pairs } = active;
        for (index, queues) in pairs.iter_mut().enumerate() {
            let Some(side) = self.sides.get_mut(index) else { continue };
            if index >= usize::from(self.state.pairs) {
                queues.stop(index, side);
                continue;
            }
            let context = Context {
                memory: memory.clone(),
                accepted: *accepted,
                interrupt: Arc::clone(interrupt),
                link: Arc::clone(&side.link),
                limiter: self.limiter.clone(),
                fallback: side.fallback.clone(),
            };
            queues.start(index, side, context)?;
        }
        Ok(())
    }

    /// Stops all pairs. Nothing touches guest memory any more when this returns.
    fn stop(&mut self) {
        let pairs = self.active.iter_mut().flat_map(|active| &mut active.pairs);
        for ((index, queues), side) in pairs.enumerate().zip(&mut self.sides) {
            queues.stop(index, side);
        }
    }

    /// Tells the link which frames the guest wants. One that cannot filter lets all of them through.
    fn filter(&self) {
        if let Some(side) = self.sides.first() {
            side.link.filter(&self.state.filter.for_tap(self.state.mac));
        }
    }

    /// Brings the guest's link into the state in which it is to be.
    fn settle_link(&mut self) {
        let up = self.state.carrier && !self.sides.is_empty();
        if up == self.state.link_up {
            return;
        }
        self.state.link_up = up;
        self.state.generation = self.state.generation.wrapping_add(1);
        if let Some(active) = &self.active
            && features::has(active.accepted, VIRTIO_NET_F_STATUS)
        {
            active.interrupt.signal_config();
        }
    }
}

impl Queues {
    /// Starts pair number `index`, unless it runs.
    fn start(&mut self, index: usize, side: &mut Side, context: Context) -> io::Result<()> {
        match std::mem::replace(self, Self::Lost) {
            Self::Idle(queues) => {
                // The first queue of a tap always gets frames.
                if index > 0 {
                    side.link.take_part(true)?;
                }
                let pair = Pair::start(context, queues, side.vhost.take())?;
                *self = Self::Running(Worker::spawn(&format!("net-{index}"), pair)?);
            }
            other => *self = other,
        }
        Ok(())
    }

    /// Stops it, if it runs.
    fn stop(&mut self, index: usize, side: &mut Side) {
        match std::mem::replace(self, Self::Lost) {
            Self::Running(worker) => {
                if index > 0 {
                    // Fails only when the tap has gone.
                    let _ = side.link.take_part(false);
                }
                if let Some((queues, vhost)) = worker.stop().and_then(Pair::into_parts) {
                    side.vhost = vhost;
                    *self = Self::Idle(queues);
                }
            }
            other => *self = other,
        }
    }
}
