// SPDX-License-Identifier: Apache-2.0
//! What happens when the agent cannot go on: the reason goes to the kernel's log, which the host keeps, and the guest
//! ends by a reset, which the host sees at once.

use std::sync::atomic::{AtomicBool, Ordering};

use rustix::system::{RebootCommand, reboot};

use crate::log::{self, Level};
use crate::sys;

/// Exit status of a container's process that panicked before it executed its program.
const PANIC_STATUS: i32 = 70;

/// Whether this process is a container's, on the way to its program.
static IN_CHILD: AtomicBool = AtomicBool::new(false);

/// Marks the calling process as a container's: its end is not the guest's.
pub(crate) fn enter_child() {
    IN_CHILD.store(true, Ordering::Relaxed);
}

/// Makes a panic end the guest, or just the process if it is a container's.
pub(super) fn install_panic_hook() {
    std::panic::set_hook(Box::new(|panic| {
        if IN_CHILD.load(Ordering::Relaxed) {
            // Its descriptors are closed, the log's too; the agent sees it end without a word.
            sys::exit_now(PANIC_STATUS);
        }
        end_guest(&panic.to_string());
    }));
}

/// Says why and ends the guest.
pub(super) fn end_guest(reason: &str) -> ! {
    log::write(Level::Critical, &format!("fatal: {reason}"));
    // If the kernel will not reset the machine, pid 1's exit makes it panic, which ends the guest as well.
    let _ = reboot(RebootCommand::Restart);
    sys::exit_now(1)
}
