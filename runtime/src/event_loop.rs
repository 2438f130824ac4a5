// SPDX-License-Identifier: Apache-2.0
//! The event loop of a thread.

use std::io;
use std::os::unix::net::UnixStream;

use tokio::runtime::{Builder, Runtime};

/// Makes an event loop for this thread alone.
pub(crate) fn new() -> io::Result<Runtime> {
    // It opens six descriptors, and has no error, but a panic, for those two of them by which it hears of signals.
    drop([UnixStream::pair()?, UnixStream::pair()?, UnixStream::pair()?]);
    Builder::new_current_thread().enable_all().build()
}
