// SPDX-License-Identifier: Apache-2.0
//! The verbs, one a file: each takes its arguments, makes one call, and gives the exit status or what failed.

pub(crate) mod check;
pub(crate) mod checkpoint;
pub(crate) mod completion;
pub(crate) mod create;
pub(crate) mod delete;
pub(crate) mod events;
pub(crate) mod exec;
pub(crate) mod features;
pub(crate) mod gc;
pub(crate) mod install_containerd;
pub(crate) mod kill;
pub(crate) mod list;
pub(crate) mod logs;
pub(crate) mod man;
pub(crate) mod pause;
pub(crate) mod ps;
mod ps_columns;
pub(crate) mod resume;
pub(crate) mod run;
pub(crate) mod spec;
pub(crate) mod start;
pub(crate) mod state;
mod stats_shape;
mod table;
pub(crate) mod update;

use std::error::Error;
use std::path::PathBuf;

/// The version of the specification that is followed.
pub(crate) const OCI_VERSION: &str = "1.2.1";

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
