// SPDX-License-Identifier: Apache-2.0
//! A device's own thread: sleeps in epoll, handles what comes, and gives its handler back when it is stopped.

use std::io;
use std::mem::MaybeUninit;
use std::ops::ControlFlow;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::thread::JoinHandle;
use std::time::Duration;

use rustix::event::epoll::{self, CreateFlags, EventData, EventFlags};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use crate::thread::builder;

/// The token of a worker's stop event; no handler may use it.
pub const STOP_TOKEN: u64 = u64::MAX;

/// Most events that a handler is given at once.
const EVENTS_AT_ONCE: usize = 32;

/// What a descriptor has, or is wanted for.
pub type Interest = EventFlags;

/// An event: what happened to the descriptor that was registered with a token.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Event {
    /// The token.
    pub token: u64,
    /// What the descriptor has.
    pub flags: Interest,
}

/// A set of descriptors to wait for, level-triggered.
#[derive(Debug)]
pub struct Poller {
    epoll: OwnedFd,
}

impl Poller {
    /// An empty set.
    ///
    /// # Errors
    ///
    /// When no descriptor is left.
    pub fn new() -> io::Result<Self> {
        Ok(Self { epoll: epoll::create(CreateFlags::CLOEXEC)? })
    }

    /// Adds `source`. Even an empty interest learns of hang-up and error.
    ///
    /// # Errors
    ///
    /// `ENOSPC` and `ENOMEM` when the host's kernel has no room for it, `EEXIST` when it is in the set.
    pub fn add(&self, source: impl AsFd, token: u64, interest: Interest) -> io::Result<()> {
        Ok(epoll::add(&self.epoll, source, EventData::new_u64(token), interest)?)
    }

    /// Changes what `source` is waited for, and under which token.
    ///
    /// # Errors
    ///
    /// `ENOENT` when it is not in the set.
    pub fn modify(&self, source: impl AsFd, token: u64, interest: Interest) -> io::Result<()> {
        Ok(epoll::modify(&self.epoll, source, EventData::new_u64(token), interest)?)
    }

    /// Takes `source` out.
    ///
    /// # Errors
    ///
    /// `ENOENT` when it is not in the set.
    pub fn remove(&self, source: impl AsFd) -> io::Result<()> {
        Ok(epoll::delete(&self.epoll, source)?)
    }

    /// Waits until there is an event, or `timeout` is over, and puts what there is into `events`.
    ///
    /// # Errors
    ///
    /// None that a caller could mend; an interruption by a signal is no error.
    pub fn wait(&self, events: &mut Vec<Event>, timeout: Option<Duration>) -> io::Result<()> {
        events.clear();
        let timeout = timeout.map(|timeout| {
            rustix::event::Timespec::try_from(timeout)
                .unwrap_or(rustix::event::Timespec { tv_sec: i64::MAX, tv_nsec: 0 })
        });
        let mut buffer = [MaybeUninit::<epoll::Event>::uninit(); EVENTS_AT_ONCE];
        match epoll::wait(&self.epoll, &mut buffer, timeout.as_ref()) {
            Ok((ready, _)) => {
                events.extend(ready.iter().map(|event| Event { token: event.data.u64(), flags: event.flags }));
                Ok(())
            }
            Err(rustix::io::Errno::INTR) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }
}

/// The descriptor of an eventfd, borrowed for as long as the eventfd is.
#[must_use]
pub fn eventfd_as_fd(event: &EventFd) -> BorrowedFd<'_> {
    // SAFETY: `event` owns the descriptor and stays borrowed for the result's lifetime, so it is open for that long.
    unsafe { BorrowedFd::borrow_raw(event.as_raw_fd()) }
}

/// What a worker runs.
pub trait EventHandler: Send + 'static {
    /// The descriptors that the worker waits for.
    fn poller(&self) -> &Poller;

    /// Handles events. [`ControlFlow::Break`] ends the thread: the device has failed and has said so.
    fn handle(&mut self, events: &[Event]) -> ControlFlow<()>;
}

/// A running thread that owns a handler.
#[derive(Debug)]
pub struct Worker<H> {
    thread: JoinHandle<H>,
    stop: EventFd,
}

impl<H: EventHandler> Worker<H> {
    /// Starts a thread called `name` (at most 15 bytes are shown) that handles `handler`'s events.
    ///
    /// # Errors
    ///
    /// When there is no eventfd or thread to be had.
    pub fn spawn(name: &str, handler: H) -> io::Result<Self> {
        let stop = EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?;
        handler.poller().add(eventfd_as_fd(&stop), STOP_TOKEN, Interest::IN)?;
        let thread = builder(name).spawn(move || run(handler))?;
        Ok(Self { thread, stop })
    }

    /// Stops the thread, waits for it, and returns the handler; nothing of it runs any more. `None` when the thread has
    /// panicked, and the handler is lost.
    #[must_use]
    pub fn stop(self) -> Option<H> {
        // Fails only when the counter would overflow: then the stop event is readable already.
        let _ = self.stop.write(1);
        self.thread.join().ok()
    }
}

fn run<H: EventHandler>(mut handler: H) -> H {
    let mut events = Vec::with_capacity(EVENTS_AT_ONCE);
    loop {
        let waited = handler.poller().wait(&mut events, None);
        if waited.is_err() || events.iter().any(|event| event.token == STOP_TOKEN) {
            return handler;
        }
        if handler.handle(&events).is_break() {
            return handler;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::mpsc::{Sender, channel};

    struct Counter {
        poller: Poller,
        event: EventFd,
        handled: u64,
        tell: Sender<u64>,
    }

    impl EventHandler for Counter {
        fn poller(&self) -> &Poller {
            &self.poller
        }

        fn handle(&mut self, events: &[Event]) -> ControlFlow<()> {
            assert_eq!(events[0].token, 7);
            self.handled += self.event.read().unwrap();
            self.tell.send(self.handled).unwrap();
            if self.handled >= 100 { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
        }
    }

    fn counter(tell: Sender<u64>) -> (Counter, EventFd) {
        let event = EventFd::new(EFD_NONBLOCK).unwrap();
        let ours = event.try_clone().unwrap();
        let poller = Poller::new().unwrap();
        poller.add(eventfd_as_fd(&event), 7, Interest::IN).unwrap();
        (Counter { poller, event, handled: 0, tell }, ours)
    }

    #[test]
    fn a_worker_handles_events_and_gives_its_handler_back() {
        let (tell, told) = channel();
        let (handler, event) = counter(tell);
        let worker = Worker::spawn("counter", handler).unwrap();

        event.write(3).unwrap();
        assert_eq!(told.recv().unwrap(), 3);
        let handler = worker.stop().unwrap();

        assert_eq!(handler.handled, 3);
    }

    #[test]
    fn a_worker_that_broke_off_still_gives_its_handler_back() {
        let (tell, told) = channel();
        let (handler, event) = counter(tell);
        let worker = Worker::spawn("counter", handler).unwrap();

        event.write(100).unwrap();
        assert_eq!(told.recv().unwrap(), 100);

        assert_eq!(worker.stop().unwrap().handled, 100);
    }

    #[test]
    fn a_panicked_worker_has_no_handler_left() {
        let (tell, told) = channel();
        drop(told);
        let (handler, event) = counter(tell);
        let worker = Worker::spawn("counter", handler).unwrap();

        event.write(1).unwrap();
        while !worker.thread.is_finished() {
            std::thread::yield_now();
        }

        assert!(worker.stop().is_none());
    }
}
