// SPDX-License-Identifier: Apache-2.0
//! `bulkhead list`: the containers under `--root`.

use std::io::{self, Write};

use clap::{Args, ValueEnum};

use super::state::State;
use super::table::Table;
use super::{Global, Outcome};
use crate::supervisor::state::Found;

/// List containers
#[derive(Debug, Args)]
pub(crate) struct Arguments {
    /// How to print them
    #[arg(long, short, value_enum, default_value = "table", value_name = "FORMAT")]
    format: Format,

    /// Print their names only
    #[arg(long, short)]
    quiet: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Format {
    /// A line for each.
    Table,
    /// An array of what `state` prints.
    Json,
}

/// Prints the list.
pub(crate) fn run(global: &Global, arguments: &Arguments) -> Outcome {
    let states = Found::look_at_all(&global.root, |found| Some(State::of(found)))?;
    let mut out = io::stdout().lock();
    if arguments.quiet {
        for state in &states {
            writeln!(out, "{}", state.id)?;
        }
    } else if arguments.format == Format::Json {
        // As runc has it where there is nothing to list.
        serde_json::to_writer(&mut out, &Some(states).filter(|states| !states.is_empty()))?;
        writeln!(out)?;
    } else {
        let mut table = Table::new(["ID", "PID", "STATUS", "BUNDLE", "CREATED", "OWNER"]);
        for state in states {
            table.add([
                state.id,
                state.pid.to_string(),
                state.status.name().to_owned(),
                state.bundle.display().to_string(),
                state.created,
                state.owner.to_owned(),
            ]);
        }
        write!(out, "{table}")?;
    }
    Ok(0)
}
