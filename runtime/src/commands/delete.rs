// SPDX-License-Identifier: Apache-2.0
//! `bulkhead delete`: removes what is left of a container.

use clap::Args;

use super::{Global, Outcome};
use crate::supervisor;

/// Remove a container that has ended
#[derive(Debug, Args)]
pub(crate) struct Arguments {
    /// Name of the container
    #[arg(value_name = "ID")]
    id: String,

    /// Kill it first, if it runs; a container that does not exist is no error
    #[arg(long, short)]
    force: bool,
}

/// Deletes the container.
pub(crate) fn run(global: &Global, arguments: &Arguments) -> Outcome {
    supervisor::delete(&global.root, &arguments.id, arguments.force)?;
    Ok(0)
}
