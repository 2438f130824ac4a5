// SPDX-License-Identifier: Apache-2.0
//! `bulkhead gc`: removes what killed supervisors have left.

use std::io::{self, Write};

use clap::Args;

use super::{Global, Outcome};
use crate::supervisor::state;

/// Remove what a crash has left: state directories without a supervisor, and their VMMs
#[derive(Debug, Args)]
pub(crate) struct Arguments {
    /// Only print what would be removed
    #[arg(long)]
    dry_run: bool,
}

/// Prints each directory that is removed. Containers that have ended in good order are left to `delete`.
pub(crate) fn run(global: &Global, arguments: &Arguments) -> Outcome {
    let mut out = io::stdout().lock();
    for path in state::collect(&global.root, arguments.dry_run) {
        writeln!(out, "{}", path.display())?;
    }
    Ok(0)
}
