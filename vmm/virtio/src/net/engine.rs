// SPDX-License-Identifier: Apache-2.0
//! The running device: moves frames between the queues and the link, on a thread of its own.

use std::io;
use std::ops::ControlFlow;
use std::sync::Arc;
use std::time::{Duration, Instant};

use nix::sys::time::TimeSpec;
use nix::sys::timerfd::{ClockId, Expiration, TimerFd, TimerFlags, TimerSetTimeFlags};

use super::QueueError;
use super::limit::Limiter;
use super::link::Link;
use super::pair::Context;
use super::receive::{Received, Receiver};
use super::transmit::{Transmitted, Transmitter};
use crate::device::{ActiveQueue, GuestMemory, Interrupt};
use crate::worker::{Event, EventHandler, Interest, Poller, eventfd_as_fd};

const RX_TOKEN: u64 = 0;
const TX_TOKEN: u64 = 1;
const LINK_TOKEN: u64 = 2;
const TIMER_TOKEN: u64 = 3;

/// The queues and the link.
#[derive(Debug)]
pub struct Engine {
    poller: Poller,
    /// `None` once it has gone.
    link: Option<Arc<Link>>,
    /// What the link is waited for.
    interest: Interest,
    rx: Receiver,
    tx: Transmitter,
    interrupt: Arc<Interrupt>,
    limited: Option<Limited>,
}

/// The limits, and the timer that tells when they allow more.
#[derive(Debug)]
struct Limited {
    limiter: Arc<Limiter>,
    timer: TimerFd,
    /// When it will.
    due: Option<Instant>,
}

/// What there may be to do.
#[derive(Debug, Clone, Copy, Default)]
struct Work {
    receive: bool,
    transmit: bool,
    link_gone: bool,
}

impl Engine {
    /// Joins queues and link; an event that is pending already is found by the poller.
    ///
    /// # Errors
    ///
    /// When the host's kernel has no room for the poller.
    pub fn new(
        memory: &GuestMemory,
        accepted: u64,
        [rx, tx]: [ActiveQueue; 2],
        interrupt: Arc<Interrupt>,
        link: Arc<Link>,
    ) -> io::Result<Self> {
        let context = Context { memory: memory.clone(), accepted, interrupt, link, limiter: None, fallback: None };
        Self::start(Poller::new()?, context, [rx, tx])
    }

    /// The same on a poller that is there already.
    pub(super) fn start(poller: Poller, context: Context, [rx, tx]: [ActiveQueue; 2]) -> io::Result<Self> {
        let Context { memory, accepted, interrupt, link, limiter, .. } = context;
        // Each notification wakes the thread once, and no eventfd has to be read for that.
        poller.add(eventfd_as_fd(&rx.event), RX_TOKEN, Interest::IN | Interest::ET)?;
        poller.add(eventfd_as_fd(&tx.event), TX_TOKEN, Interest::IN | Interest::ET)?;
        let mut interest = Interest::IN;
        if link.has_frame() {
            // It was read for those that had the queues before. Fails only when the queue will be looked at anyway.
            let _ = rx.event.write(1);
            interest = Interest::empty();
        }
        poller.add(&link, LINK_TOKEN, interest)?;
        // There may be frames already. Fails only when the queue will be looked at anyway.
        let _ = tx.event.write(1);
        let limited = limiter.map(|limiter| Limited::new(limiter, &poller)).transpose()?;
        Ok(Self {
            poller,
            link: Some(link),
            interest,
            rx: Receiver::new(rx, memory.clone(), accepted),
            tx: Transmitter::new(tx, memory),
            interrupt,
            limited,
        })
    }

    /// Looks at what lies in both rings, and sends what there is to send.
    pub(super) fn look(&mut self) -> Result<(), QueueError> {
        self.rx.look()?;
        self.process(Work { transmit: true, ..Work::default() })
    }

    /// The queues as they stand.
    pub(super) fn into_queues(self) -> [ActiveQueue; 2] {
        [self.rx.into_queue(), self.tx.into_queue()]
    }

    fn work(&mut self, events: &[Event]) -> Work {
        let mut work = Work::default();
        for event in events {
            match event.token {
                // As long as the link is waited for, there is room, and the link says when there is a frame.
                RX_TOKEN => work.receive |= !self.interest.contains(Interest::IN),
                TX_TOKEN => work.transmit |= !self.interest.contains(Interest::OUT),
                TIMER_TOKEN => {
                    self.limited.iter_mut().for_each(|limited| limited.due = None);
                    work.receive |= !self.interest.contains(Interest::IN);
                    work.transmit |= !self.interest.contains(Interest::OUT);
                }
                _ => {
                    work.receive |= event.flags.contains(Interest::IN);
                    work.transmit |= event.flags.contains(Interest::OUT);
                    work.link_gone |= event.flags.intersects(Interest::ERR | Interest::HUP);
                }
            }
        }
        work
    }

    fn process(&mut self, work: Work) -> Result<(), QueueError> {
        let mut interest = self.interest;
        let limiter = self.limited.as_ref().map(|limited| Arc::clone(&limited.limiter));
        let (rx_pace, tx_pace) =
            (limiter.as_ref().map(|limiter| &limiter.rx), limiter.as_ref().map(|limiter| &limiter.tx));
        if work.link_gone {
            self.forget_link(&io::Error::other("the other end of its socket was closed"));
        }
        if work.receive
            && let Some(link) = &self.link
        {
            match self.rx.receive(link, rx_pace, &self.interrupt)? {
                Received::Some if link.has_frame() => {
                    interest.remove(Interest::IN);
                    // Looked at again after other events. Fails only when it will be looked at anyway.
                    let _ = self.rx.queue().event.write(1);
                }
                Received::All | Received::Some => interest.insert(Interest::IN),
                Received::NoRoom => interest.remove(Interest::IN),
                Received::Limited(wait) => {
                    interest.remove(Interest::IN);
                    self.continue_after(wait);
                }
                Received::Gone(error) => self.forget_link(&error),
            }
        }
        if work.transmit {
            interest.remove(Interest::OUT);
            match self.tx.transmit(self.link.as_deref(), tx_pace, &self.interrupt)? {
                Transmitted::All => {}
                // Looked at again after other events. Fails only when it will be looked at anyway.
                Transmitted::Some => drop(self.tx.queue().event.write(1)),
                Transmitted::LinkFull => interest.insert(Interest::OUT),
                Transmitted::Limited(wait) => self.continue_after(wait),
            }
            if self.link.as_ref().is_some_and(|link| !link.flush()) {
                interest.insert(Interest::OUT);
            }
        }
        self.watch_link(interest);
        Ok(())
    }

    fn continue_after(&mut self, wait: Duration) {
        if let Some(limited) = &mut self.limited {
            limited.continue_after(wait);
        }
    }

    /// Asks epoll for what matters now.
    fn watch_link(&mut self, interest: Interest) {
        let Some(link) = &self.link else { return };
        if interest == self.interest {
            return;
        }
        match self.poller.modify(link, LINK_TOKEN, interest) {
            Ok(()) => self.interest = interest,
            // A link that cannot be waited for is none.
            Err(error) => self.forget_link(&error),
        }
    }

    /// Goes on without the link: there is nothing to read, and what the guest sends is dropped.
    fn forget_link(&mut self, error: &io::Error) {
        if let Some(link) = self.link.take() {
            link.is_lost(error);
            // Fails only when it is not waited for.
            let _ = self.poller.remove(&link);
        }
        self.interest = Interest::empty();
        // The guest's frames must not wait for it any longer. Fails only when the queue will be looked at anyway.
        let _ = self.tx.queue().event.write(1);
    }
}

impl Limited {
    fn new(limiter: Arc<Limiter>, poller: &Poller) -> io::Result<Self> {
        let flags = TimerFlags::TFD_NONBLOCK | TimerFlags::TFD_CLOEXEC;
        let timer = TimerFd::new(ClockId::CLOCK_MONOTONIC, flags)?;
        poller.add(&timer, TIMER_TOKEN, Interest::IN | Interest::ET)?;
        Ok(Self { limiter, timer, due: None })
    }

    /// Wakes the thread when `wait` is over, unless it is woken before.
    fn continue_after(&mut self, wait: Duration) {
        let due = Instant::now() + wait;
        if self.due.is_some_and(|earlier| earlier <= due) {
            return;
        }
        // Fails for no time that is one.
        let _ = self.timer.set(Expiration::OneShot(TimeSpec::from_duration(wait)), TimerSetTimeFlags::empty());
        self.due = Some(due);
    }
}

impl EventHandler for Engine {
    fn poller(&self) -> &Poller {
        &self.poller
    }

    fn handle(&mut self, events: &[Event]) -> ControlFlow<()> {
        let work = self.work(events);
        match self.process(work) {
            Ok(()) => ControlFlow::Continue(()),
            // Whatever the cause, it is the guest's loss alone: there is nobody else to tell.
            Err(_) => {
                self.interrupt.signal_needs_reset();
                ControlFlow::Break(())
            }
        }
    }
}
