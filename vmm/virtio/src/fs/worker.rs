// SPDX-License-Identifier: Apache-2.0
//! The thread that owns a device's queues and its file server.

use std::io;
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;

use virtio_queue::{QueueOwnedT, QueueT};
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::server::{Server, Unanswerable};
use crate::buffers::{Buffers, GatherError};
use crate::device::{ActiveQueue, GuestMemory, Interrupt};

/// What the thread works with.
pub(super) struct Worker {
    pub(super) memory: GuestMemory,
    pub(super) queues: [ActiveQueue; 2],
    pub(super) interrupt: Arc<Interrupt>,
    pub(super) stop: Arc<Stop>,
    pub(super) server: Server,
}

/// How the thread is told to end.
#[derive(Debug)]
pub(super) struct Stop {
    is_set: AtomicBool,
    event: EventFd,
}

impl Stop {
    pub(super) fn new() -> io::Result<Self> {
        Ok(Self { is_set: AtomicBool::new(false), event: EventFd::new(EFD_NONBLOCK)? })
    }

    pub(super) fn set(&self) {
        self.is_set.store(true, Ordering::Release);
        // An eventfd's write fails only when it has been written to before.
        let _ = self.event.write(1);
    }

    /// Looked at before each request, so that a driver that never ceases to ask does not keep the thread.
    fn is_set(&self) -> bool {
        self.is_set.load(Ordering::Acquire)
    }
}

/// Why the thread has stopped serving. The device then needs a reset.
#[derive(Debug, thiserror::Error)]
enum WorkerError {
    #[error("cannot give the file server's thread its own working directory")]
    EnterThread(#[source] io::Error),
    #[error("cannot wait for the driver")]
    Wait(#[source] io::Error),
    #[error("the driver broke a queue's rings")]
    Queue(#[from] virtio_queue::Error),
    #[error(transparent)]
    Buffers(#[from] GatherError),
    #[error(transparent)]
    Unanswerable(#[from] Unanswerable),
}

/// Starts the thread.
pub(super) fn spawn(name: &str, worker: Worker) -> io::Result<JoinHandle<()>> {
    crate::thread::builder(name).spawn(move || {
        let _guard = AbortOnPanic;
        let interrupt = Arc::clone(&worker.interrupt);
        // Whatever the cause, it is the guest's loss alone: there is nobody else to tell.
        if worker.run().is_err() {
            interrupt.signal_needs_reset();
        }
    })
}

/// Ends the process when its thread panics.
struct AbortOnPanic;

impl Drop for AbortOnPanic {
    fn drop(&mut self) {
        if std::thread::panicking() {
            std::process::abort();
        }
    }
}

impl Worker {
    /// Serves both queues until told to stop.
    fn run(self) -> Result<(), WorkerError> {
        let Self { memory, mut queues, interrupt, stop, mut server } = self;
        server.enter_thread().map_err(WorkerError::EnterThread)?;
        let mut buffers = Buffers::default();
        let waiter = Waiter::new(&stop.event, &queues, server.change_event()).map_err(WorkerError::Wait)?;
        loop {
            server.catch_up();
            for active in &mut queues {
                drain(active, &memory, (&interrupt, &stop), &mut server, &mut buffers)?;
            }
            if stop.is_set() {
                return Ok(());
            }
            waiter.wait().map_err(WorkerError::Wait)?;
        }
    }
}

/// Waits for the driver, or for the end.
///
/// Edge-triggered: each notification wakes the thread once, and no eventfd has to be read for that.
struct Waiter(Epoll);

impl Waiter {
    fn new(stop: &EventFd, queues: &[ActiveQueue; 2], removal: Option<&EventFd>) -> io::Result<Self> {
        let epoll = Epoll::new()?;
        let [hiprio, requests] = queues;
        for event in [&hiprio.event, &requests.event, stop].into_iter().chain(removal) {
            let interest = EpollEvent::new(EventSet::IN | EventSet::EDGE_TRIGGERED, 0);
            epoll.ctl(ControlOperation::Add, event.as_raw_fd(), interest)?;
        }
        Ok(Self(epoll))
    }

    /// Returns when anything has been notified since the last time; the caller then looks at everything.
    fn wait(&self) -> io::Result<()> {
        match self.0.wait(-1, &mut [EpollEvent::default(); 4]) {
            Err(error) if error.kind() != io::ErrorKind::Interrupted => Err(error),
            _ => Ok(()),
        }
    }
}

/// Serves all that is available in a queue. The driver need not notify meanwhile.
fn drain<'m>(
    active: &mut ActiveQueue,
    memory: &'m GuestMemory,
    (interrupt, stop): (&Interrupt, &Stop),
    server: &mut Server,
    buffers: &mut Buffers<'m>,
) -> Result<(), WorkerError> {
    let queue = &mut active.queue;
    let mut is_expected = false;
    loop {
        let mut is_served = false;
        queue.disable_notification(memory)?;
        while let Some(chain) = queue.iter(memory)?.next() {
            if stop.is_set() {
                return Ok(());
            }
            is_served = true;
            let head = chain.head_index();
            buffers.gather(chain, memory)?;
            let written = server.serve(buffers)?;
            buffers.clear();
            queue.add_used(memory, head, written)?;
            // At once, not when all is done: another of the guest's CPUs may wait for this one.
            if queue.needs_notification(memory)? {
                interrupt.signal_used();
            }
        }
        // A ring that says there is more, and gives nothing, would be asked forever.
        if is_expected && !is_served {
            return Err(virtio_queue::Error::InvalidAvailRingIndex.into());
        }
        is_expected = queue.enable_notification(memory)?;
        if !is_expected {
            return Ok(());
        }
    }
}
