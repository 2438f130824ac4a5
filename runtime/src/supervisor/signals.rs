// SPDX-License-Identifier: Apache-2.0
//! The signals that are the container's: blocked, read from a signalfd(2), and forwarded.
//!
//! runc forwards every signal but SIGCHLD, SIGPIPE and SIGURG. So does Bulkhead for the signals with a name that are not
//! raised by the process' own faults; real-time signals keep their default.

use std::io;

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

/// The blocked signals, before there is an event loop.
#[derive(Debug)]
pub(crate) struct BlockedSignals(SignalFd);

impl BlockedSignals {
    /// Blocks the signals for this thread and those that it starts. Programs that it starts have none blocked: the
    /// standard library sees to that.
    pub(crate) fn block() -> io::Result<Self> {
        let set: SigSet = FORWARDED.into_iter().collect();
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
    pub(crate) async fn next(&self) -> io::Result<Signal> {
        loop {
            let mut ready = self.0.readable().await?;
            match self.0.get_ref().read_signal()? {
                Some(info) => {
                    if let Ok(signal) = Signal::try_from(info.ssi_signo.cast_signed()) {
                        return Ok(signal);
                    }
                }
                None => ready.clear_ready(),
            }
        }
    }
}

/// Whether a signal, sent before there is a container, means "do not start it".
pub(crate) fn ends_a_start(signal: Signal) -> bool {
    matches!(signal, Signal::SIGHUP | Signal::SIGINT | Signal::SIGQUIT | Signal::SIGTERM)
}

#[cfg(test)]
mod tests {
    use super::*;
    use nix::sys::signal::raise;

    #[tokio::test]
    async fn blocked_signals_arrive_in_the_stream() {
        let stream = BlockedSignals::block().unwrap().into_stream().unwrap();

        raise(Signal::SIGUSR1).unwrap();

        assert_eq!(stream.next().await.unwrap(), Signal::SIGUSR1);
    }
}
