// SPDX-License-Identifier: Apache-2.0
//! The signals that are the container's: blocked, read from a signalfd(2), and forwarded.
//!
//! runc forwards every signal but SIGCHLD, SIGPIPE and SIGURG. So does Bulkhead, but for those that are raised by the
//! process' own faults.

use std::fmt;
use std::io;
use std::ops::RangeInclusive;

use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

const FORWARDED: [Signal; 14] = [
    Signal::SIGHUP,
    Signal::SIGINT,
    Signal::SIGQUIT,
    Signal::SIGUSR1,
    Signal::SIGUSR2,
    Signal::SIGALRM,
    Signal::SIGTERM,
    Signal::SIGCONT,
    Signal::SIGTSTP,
    Signal::SIGVTALRM,
    Signal::SIGPROF,
    Signal::SIGWINCH,
    Signal::SIGIO,
    Signal::SIGPWR,
];

/// The real-time signals that a C library leaves to programs; nix knows none.
const REALTIME: RangeInclusive<i32> = 34..=64;

/// A signal that came.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Received(i32);

impl Received {
    /// Its number, 1 to 64.
    pub(crate) fn number(self) -> u32 {
        self.0.unsigned_abs()
    }

    /// Whether it is that one.
    pub(crate) fn is(self, signal: Signal) -> bool {
        self.0 == signal as i32
    }

    /// The exit status of what it ended.
    pub(crate) fn exit_status(self) -> u8 {
        u8::try_from(128 + self.number()).unwrap_or(u8::MAX)
    }
}

impl From<Signal> for Received {
    fn from(signal: Signal) -> Self {
        Self(signal as i32)
    }
}

impl fmt::Display for Received {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match Signal::try_from(self.0) {
            Ok(signal) => signal.fmt(formatter),
            Err(_) => write!(formatter, "SIGRTMIN+{}", self.0 - REALTIME.start()),
        }
    }
}

/// The blocked signals, before there is an event loop.
#[derive(Debug)]
pub(crate) struct BlockedSignals(SignalFd);

impl BlockedSignals {
    /// Blocks the signals for this thread and those that it starts. Programs that it starts have none blocked: the
    /// standard library sees to that.
    pub(crate) fn block() -> io::Result<Self> {
        let set = forwarded();
        set.thread_block()?;
        Ok(Self(SignalFd::with_flags(&set, SfdFlags::SFD_NONBLOCK | SfdFlags::SFD_CLOEXEC)?))
    }

    /// Ties them to the event loop.
    pub(crate) fn into_stream(self) -> io::Result<SignalStream> {
        // SAFETY: a `SignalFd` owns its descriptor, always gives the same one, and closes it only when it is dropped,
        // which is after its registration: the `AsyncFd` owns it from here on and never gives it away.
        Ok(SignalStream(unsafe { AsyncFd::register_with_interest(self.0, Interest::READABLE) }?))
    }
}

/// The signals as they come in.
#[derive(Debug)]
pub(crate) struct SignalStream(AsyncFd<SignalFd>);

impl SignalStream {
    /// The next signal. Loses none when it is cancelled.
    pub(crate) async fn next(&self) -> io::Result<Received> {
        loop {
            let mut ready = self.0.readable().await?;
            match self.0.get_ref().read_signal()? {
                Some(info) => return Ok(Received(info.ssi_signo.cast_signed())),
                None => ready.clear_ready(),
            }
        }
    }
}

fn forwarded() -> SigSet {
    let mut set = *FORWARDED.into_iter().collect::<SigSet>().as_ref();
    for number in REALTIME {
        // SAFETY: `set` is a live set that has been initialised, and the numbers are those of signals.
        unsafe { libc::sigaddset(&raw mut set, number) };
    }
    // SAFETY: `set` was made of an initialised set by sigaddset(3) alone.
    unsafe { SigSet::from_sigset_t_unchecked(set) }
}

/// Whether a signal, sent before there is a container, means "do not start it".
pub(crate) fn ends_a_start(signal: Received) -> bool {
    [Signal::SIGHUP, Signal::SIGINT, Signal::SIGQUIT, Signal::SIGTERM].into_iter().any(|end| signal.is(end))
}

#[cfg(test)]
mod tests {
    use super::*;
    use nix::sys::signal::raise;

    #[tokio::test]
    async fn blocked_signals_arrive_in_the_stream() {
        let stream = BlockedSignals::block().unwrap().into_stream().unwrap();

        raise(Signal::SIGUSR1).unwrap();

        let received = stream.next().await.unwrap();
        assert!(received.is(Signal::SIGUSR1));
        assert_eq!((received.to_string(), received.number(), received.exit_status()), ("SIGUSR1".into(), 10, 138));
        // SAFETY: raise(3) takes a number; the signal is blocked, so that nothing is interrupted by it.
        unsafe { libc::raise(37) };
        let received = stream.next().await.unwrap();
        assert_eq!((received.to_string(), received.number()), ("SIGRTMIN+3".into(), 37));
    }
}
