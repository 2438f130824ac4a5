// SPDX-License-Identifier: Apache-2.0
//! `bulkhead gc`: removes what killed supervisors have left.

use std::io::{self, Write};

use clap::Args;

use super::{Global, Outcome};
use crate::supervisor::{run_poststop_hooks, state};

/// Remove what a crash has left: state directories without a supervisor, and their VMMs
#[derive(Debug, Args)]
pub(crate) struct Arguments {
    /// Only print what would be removed
    #[arg(long)]
    dry_run: bool,
}

/// Prints each directory that is removed, and runs its container's poststop hooks, as `delete` does. Containers that have
/// ended in good order are left to `delete`.
pub(crate) fn run(global: &Global, arguments: &Arguments) -> Outcome {
    let mut out = io::stdout().lock();
    let mut told = Ok(());
    for (path, record) in state::collect(&global.root, arguments.dry_run)? {
        // The records are gone: hooks are run whoever reads this.
        if let Some(record) = record.filter(|_| !arguments.dry_run) {
            run_poststop_hooks(&record);
        }
        told = told.and_then(|()| writeln!(out, "{}", path.display()));
    }
    told?;
    Ok(0)
}
