// SPDX-License-Identifier: Apache-2.0
//! `bulkhead run`: creates a container, starts it, and, unless it is to be left alone, waits for it and removes it.

use clap::Args;

use super::create::{Common, create};
use super::{Failure, Global, Outcome};
use crate::supervisor::{self, Mode};

/// Create a container from a bundle, start it, and wait for its end
#[derive(Debug, PartialEq, Eq, Args)]
pub(crate) struct Arguments {
    #[command(flatten)]
    pub(crate) common: Common,

    /// Return once the container runs; `delete` removes it after its end
    #[arg(long, short)]
    detach: bool,

    /// Accepted for runc's sake: whatever the container leaves behind stays in its guest
    #[arg(long, hide = true)]
    no_subreaper: bool,

    /// Leave the state of the container after its end, until `delete`
    #[arg(long)]
    keep: bool,
}

/// Runs the container; in the foreground the status is the container's.
pub(crate) fn run(global: &Global, arguments: Arguments) -> Outcome {
    if arguments.detach {
        return create(arguments.common.options(global, Mode::Detached { start: true }));
    }
    let options = arguments.common.options(global, Mode::Foreground { keep: arguments.keep });
    supervisor::run(options).map_err(|error| Failure { status: error.exit_status(), error: Box::new(error) })
}
