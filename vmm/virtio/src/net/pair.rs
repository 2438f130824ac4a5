// SPDX-License-Identifier: Apache-2.0
//! A running pair of queues, and what a thread of its own does for it.
//!
//! Where the host's kernel moves the frames, the thread sleeps until that meets something that it does not like: a ring or
//! a chain that is malformed, or a tap that is gone. Then the thread takes the queues over, and finds out itself.

use std::fmt::Display;
use std::io;
use std::ops::ControlFlow;
use std::os::fd::{AsFd, AsRawFd};
use std::sync::Arc;
use std::sync::atomic::Ordering;

use virtio_queue::QueueT;
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::engine::Engine;
use super::limit::Limiter;
use super::link::Link;
use super::notice::Notice;
use super::vhost::VhostNet;
use crate::device::{ActiveQueue, GuestMemory, Interrupt};
use crate::worker::{Event, EventHandler, Interest, Poller, eventfd_as_fd};

const ERROR_TOKEN: u64 = 0;

/// What a pair of queues runs with.
#[derive(Debug, Clone)]
pub(super) struct Context {
    pub(super) memory: GuestMemory,
    pub(super) accepted: u64,
    pub(super) interrupt: Arc<Interrupt>,
    pub(super) link: Arc<Link>,
    /// Only a pair's own thread keeps to them.
    pub(super) limiter: Option<Arc<Limiter>>,
    /// Who is told when the host's kernel does not serve the queues, though it was to.
    pub(super) fallback: Option<Notice>,
}

impl Context {
    fn falls_back(&self, reason: &impl Display) {
        if let Some(fallback) = &self.fallback {
            fallback.tell(reason);
        }
    }
}

/// Who moves the frames of a pair.
#[derive(Debug)]
pub(super) enum Pair {
    /// This thread.
    Engine(Box<Engine>),
    /// The host's kernel.
    Vhost(Box<VhostPair>),
    /// Nobody: the queues are lost.
    Lost(Poller),
}

impl Pair {
    /// A pair that is served by the host's kernel if that has a `vhost` for it and takes it, else by its own thread.
    ///
    /// # Errors
    ///
    /// When the host's kernel has no room for what a thread needs.
    pub(super) fn start(context: Context, queues: [ActiveQueue; 2], vhost: Option<VhostNet>) -> io::Result<Self> {
        let poller = Poller::new()?;
        let queues = match vhost {
            None => queues,
            Some(vhost) => match VhostPair::start(&poller, &context, &queues, vhost) {
                Ok((vhost, errors)) => {
                    return Ok(Self::Vhost(Box::new(VhostPair { poller, errors, vhost, queues, context })));
                }
                Err(error) => {
                    return Self::go_on(poller, context, queues, &format_args!("it does not take the queues: {error}"));
                }
            },
        };
        Ok(Self::Engine(Box::new(Engine::start(poller, context, queues)?)))
    }

    /// The queues as they stand, and the vhost; nobody serves them any more. `None` when they are lost.
    pub(super) fn into_parts(self) -> Option<([ActiveQueue; 2], Option<VhostNet>)> {
        match self {
            Self::Engine(engine) => Some((engine.into_queues(), None)),
            Self::Vhost(pair) => pair.stop().ok().map(|(_, _, queues, vhost)| (queues, Some(vhost))),
            Self::Lost(_) => None,
        }
    }

    /// This thread goes on where the host's kernel could not.
    fn take_over(&mut self) -> io::Result<()> {
        match std::mem::replace(self, Self::Lost(Poller::new()?)) {
            Self::Vhost(pair) => {
                let (poller, context, queues, _) = pair.stop()?;
                *self = Self::go_on(poller, context, queues, &"it cannot go on with the queues")?;
            }
            other => *self = other,
        }
        Ok(())
    }

    /// This thread serves queues that the host's kernel does not, for `reason`. That is told once both have been looked at: what
    /// the guest broke is its loss alone, and says nothing of the kernel.
    pub(super) fn go_on(
        poller: Poller,
        context: Context,
        queues: [ActiveQueue; 2],
        reason: &impl Display,
    ) -> io::Result<Self> {
        let mut engine = Engine::start(poller, context.clone(), queues)?;
        if engine.look().is_err() {
            context.interrupt.signal_needs_reset();
            return Ok(Self::Lost(Poller::new()?));
        }
        context.falls_back(reason);
        Ok(Self::Engine(Box::new(engine)))
    }
}

impl EventHandler for Pair {
    fn poller(&self) -> &Poller {
        match self {
            Self::Engine(engine) => engine.poller(),
            Self::Vhost(pair) => &pair.poller,
            Self::Lost(poller) => poller,
        }
    }

    fn handle(&mut self, events: &[Event]) -> ControlFlow<()> {
        match self {
            Self::Engine(engine) => engine.handle(events),
            Self::Vhost(pair) => {
                let interrupt = Arc::clone(&pair.context.interrupt);
                if self.take_over().is_err() {
                    interrupt.signal_needs_reset();
                }
                if matches!(self, Self::Lost(_)) { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
            }
            Self::Lost(_) => ControlFlow::Break(()),
        }
    }
}

/// A pair of queues that the host's kernel serves.
#[derive(Debug)]
pub(super) struct VhostPair {
    poller: Poller,
    /// Signalled by the kernel when it cannot go on.
    errors: EventFd,
    vhost: VhostNet,
    queues: [ActiveQueue; 2],
    /// Keeps the memory mapped, and the tap open.
    context: Context,
}

impl VhostPair {
    /// Lets the kernel serve the queues, and `poller` wait for what it does not like.
    fn start(
        poller: &Poller,
        context: &Context,
        queues: &[ActiveQueue; 2],
        mut vhost: VhostNet,
    ) -> io::Result<(VhostNet, EventFd)> {
        let errors = EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?;
        let Context { memory, accepted, interrupt, link, .. } = context;
        let tap = link.as_fd().as_raw_fd();
        // Dropped on an error, it is closed, and what it has begun is undone.
        vhost.start(memory, *accepted, queues, interrupt.event(), &errors, tap)?;
        poller.add(eventfd_as_fd(&errors), ERROR_TOKEN, Interest::IN | Interest::ET)?;
        for queue in queues {
            // There may be something already. Fails only when it will be looked at anyway.
            let _ = queue.event.write(1);
        }
        Ok((vhost, errors))
    }

    /// Takes the queues back from the kernel.
    fn stop(self) -> io::Result<(Poller, Context, [ActiveQueue; 2], VhostNet)> {
        let Self { poller, errors, vhost, mut queues, context } = self;
        let next = vhost.stop()?;
        // Fails only when it is not waited for.
        let _ = poller.remove(eventfd_as_fd(&errors));
        for (active, next) in queues.iter_mut().zip(next) {
            let queue = &mut active.queue;
            queue.set_next_avail(next);
            let used = queue.used_idx(&context.memory, Ordering::Acquire).map_err(io::Error::other)?;
            queue.set_next_used(used.0);
        }
        Ok((poller, context, queues, vhost))
    }
}
