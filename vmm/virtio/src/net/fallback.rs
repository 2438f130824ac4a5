// SPDX-License-Identifier: Apache-2.0
//! That the VMM moves frames which vhost-net was to move: somebody is to know, and hears of the first time.

use std::fmt::Display;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::{Arc, OnceLock};

use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use crate::worker::eventfd_as_fd;

/// Where queues that fall back tell of it, and where it is heard. Clones are the same.
#[derive(Debug, Clone)]
pub struct Fallback(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    event: EventFd,
    reason: OnceLock<String>,
}

impl Fallback {
    /// Nothing has fallen back.
    ///
    /// # Errors
    ///
    /// When no descriptor is left.
    pub fn new() -> io::Result<Self> {
        let event = EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?;
        Ok(Self(Arc::new(Inner { event, reason: OnceLock::new() })))
    }

    /// Queues have fallen back. A guest can have its queues do so as often as it likes: only the first counts.
    pub fn tell(&self, reason: &impl Display) {
        if self.0.reason.set(reason.to_string()).is_ok() {
            // Fails only when it is signalled already.
            let _ = self.0.event.write(1);
        }
    }

    /// Why the first queues have fallen back, if some have and it was not asked for before.
    #[must_use]
    pub fn take(&self) -> Option<String> {
        self.0.event.read().ok()?;
        self.0.reason.get().cloned()
    }
}

impl AsFd for Fallback {
    /// A descriptor that is readable when there is something to [`take`](Self::take).
    fn as_fd(&self) -> BorrowedFd<'_> {
        eventfd_as_fd(&self.0.event)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_time_is_heard_once() {
        let fallback = Fallback::new().unwrap();
        assert_eq!(fallback.take(), None);

        fallback.clone().tell(&"a reason");
        fallback.tell(&"another");

        assert_eq!(fallback.take().as_deref(), Some("a reason"));
        assert_eq!(fallback.take(), None);
    }
}
