// SPDX-License-Identifier: Apache-2.0
//! The verbs, one a file: each takes its arguments, makes one call, and gives the exit status or what failed.

pub(crate) mod check;
pub(crate) mod run;
pub(crate) mod spec;

use std::error::Error;
use std::path::PathBuf;

/// The options that go before any verb and concern the verb.
#[derive(Debug)]
pub(crate) struct Global {
    /// Where the state of sandboxes is kept.
    pub(crate) root: PathBuf,
    /// Where to write a trace.
    pub(crate) trace: Option<PathBuf>,
}

/// A verb that failed: why, and the exit status that says so.
#[derive(Debug)]
pub(crate) struct Failure {
    pub(crate) error: Box<dyn Error + Send + Sync>,
    pub(crate) status: u8,
}

impl<E: Error + Send + Sync + 'static> From<E> for Failure {
    fn from(error: E) -> Self {
        Self { error: Box::new(error), status: 1 }
    }
}

/// What a verb ends with: an exit status of its own, or a failure.
pub(crate) type Outcome = Result<u8, Failure>;
