// SPDX-License-Identifier: Apache-2.0
//! Who has asked for a container, does not wait for its end, and is told once it is there.

use std::io;
use std::os::unix::net::UnixStream;
use std::sync::Arc;

use tokio::sync::oneshot;

use super::container::Container;
use super::daemon::Reporter;

/// The caller. Dropped without a word, it is told that the container could not be made.
#[derive(Debug)]
pub(crate) enum Caller {
    /// The process that this one was forked from.
    Parent(Reporter),
    /// A call that this process serves.
    Call(oneshot::Sender<Result<Arc<Container>, String>>),
}

impl Caller {
    /// Tells that the container is created, or started.
    pub(super) fn succeeded(self, container: &Arc<Container>) {
        self.succeeded_and(None, container);
    }

    /// The same, with the line by which the container has told that it is ready.
    pub(super) fn succeeded_and(self, ready: Option<String>, container: &Arc<Container>) {
        match self {
            Self::Parent(reporter) => reporter.succeeded_and(ready),
            // A call that is no longer waited for has nobody to tell.
            Self::Call(reply) => drop(reply.send(Ok(Arc::clone(container)))),
        }
    }

    /// Tells why it could not be made; the status is for a process to end with.
    pub(crate) fn failed(self, message: String, status: u8) {
        match self {
            Self::Parent(reporter) => reporter.failed(message, status),
            Self::Call(reply) => drop(reply.send(Err(message))),
        }
    }

    /// What becomes readable when a parent is gone. A call's work does not end with its caller.
    pub(super) fn watch(&self) -> io::Result<Option<UnixStream>> {
        match self {
            Self::Parent(reporter) => reporter.watch().map(Some),
            Self::Call(_) => Ok(None),
        }
    }
}
