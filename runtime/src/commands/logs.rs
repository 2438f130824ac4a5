// SPDX-License-Identifier: Apache-2.0
//! `bulkhead logs`: what the guest's kernel wrote to its console.

use std::io::{self, Read};

use bulkhead_vmm::config::CONSOLE_LOG_MAX;
use clap::Args;

use super::{Global, Outcome};
use crate::supervisor::state::Found;

/// Print the console of a container's guest
#[derive(Debug, Args)]
pub(crate) struct Arguments {
    /// Name of the container
    #[arg(value_name = "ID")]
    id: String,
}

/// Prints the console as it is, for a pager or a file: the guest is free to write what it likes there.
pub(crate) fn run(global: &Global, arguments: &Arguments) -> Outcome {
    let console = Found::open(&global.root, &arguments.id)?.console()?;
    // It is the VMM that writes it.
    io::copy(&mut console.take(CONSOLE_LOG_MAX as u64), &mut io::stdout().lock())?;
    Ok(0)
}
