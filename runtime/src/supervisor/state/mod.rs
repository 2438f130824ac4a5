// SPDX-License-Identifier: Apache-2.0
//! What lies under `--root`: a directory for each container, with a record of it.

mod dir;
mod lookup;
mod record;
mod sweep;

pub(crate) use self::dir::{StateDir, StateDirError, check_id, vsock_path};
pub(crate) use self::lookup::{Found, LookupError};
pub(crate) use self::record::{Record, Status, now};
pub(crate) use self::sweep::{collect, sweep, sweep_one};

/// When a process started: with its id, this names it for good.
pub(crate) fn start_time(pid: u32) -> Option<u64> {
    sweep::start_time(pid)
}
