// SPDX-License-Identifier: Apache-2.0
//! `bulkhead completion`: what a shell needs to complete this command line, made from its definition.

use std::io::{self, Write};

use clap::Args;
use clap_complete::{Shell, generate};

use super::Outcome;

/// Print the completions for a shell
#[derive(Debug, Args)]
pub(crate) struct Arguments {
    /// The shell that reads them
    #[arg(value_enum, value_name = "SHELL")]
    shell: Shell,
}

/// Writes them to stdout.
pub(crate) fn run(arguments: &Arguments, mut definition: clap::Command) -> Outcome {
    let mut text = Vec::new();
    generate(arguments.shell, &mut definition, "bulkhead", &mut text);
    io::stdout().write_all(&text)?;
    Ok(0)
}
