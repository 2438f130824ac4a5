// SPDX-License-Identifier: Apache-2.0
//! What a device's queues come upon and somebody outside is to know: that the VMM moves frames which vhost-net was to move, or
//! that the device hangs on nothing any more. The first time is heard.

use std::fmt::Display;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::{Arc, OnceLock};

use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use crate::worker::eventfd_as_fd;

/// Where queues tell, and where it is heard. Clones are the same.
#[derive(Debug, Clone)]
pub struct Notice(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    event: EventFd,
    reason: OnceLock<String>,
}

impl Notice {
    /// Nothing has been told.
    ///
    /// # Errors
    ///
    /// When no descriptor is left.
    pub fn new() -> io::Result<Self> {
        let event = EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?;
        Ok(Self(Arc::new(Inner { event, reason: OnceLock::new() })))
    }

    /// It has come to that. A guest may have its queues tell as often as it likes: only the first time counts.
    pub fn tell(&self, reason: &impl Display) {
        if self.0.reason.set(reason.to_string()).is_ok() {
            // Fails only when it is signalled already.
            let _ = self.0.event.write(1);
        }
    }

    /// Why it has come to that, if it has and this was not asked before.
    #[must_use]
    pub fn take(&self) -> Option<String> {
        self.0.event.read().ok()?;
        self.0.reason.get().cloned()
    }
}

impl AsFd for Notice {
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
        let notice = Notice::new().unwrap();
        assert_eq!(notice.take(), None);

        notice.clone().tell(&"a reason");
        notice.tell(&"another");

        assert_eq!(notice.take().as_deref(), Some("a reason"));
        assert_eq!(notice.take(), None);
    }
}
