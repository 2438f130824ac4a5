// SPDX-License-Identifier: Apache-2.0
//! `bulkhead ps`: the processes of a container, as the guest's kernel sees them.

use std::io::{self, Write};
use std::time::SystemTime;

use bulkhead_protocol::agent::ProcessInfo;
use clap::{Args, ValueEnum};
use containerd_shim_protos::api::PidsRequest;
use protobuf::Message;
use ttrpc::context::Context;

use super::{Global, Outcome, ps_columns};
use crate::supervisor::CallError;
use crate::supervisor::client::{self, ClientError};
use crate::supervisor::state::{Found, Status};

/// List the processes of a container
#[derive(Debug, Args)]
pub(crate) struct Arguments {
    /// Name of the container
    #[arg(value_name = "ID")]
    id: String,

    /// How to print them: a table, or the process ids as JSON
    #[arg(long, short, value_enum, default_value = "table", value_name = "FORMAT")]
    format: Format,

    /// Options as ps(1) has them: `-ef`, and `-o COLUMN,…`
    #[arg(value_name = "OPTION", trailing_var_arg = true, allow_hyphen_values = true)]
    options: Vec<String>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Format {
    Table,
    Json,
}

/// Prints the processes. Their ids are those of the guest.
pub(crate) fn run(global: &Global, arguments: &Arguments) -> Outcome {
    let columns = ps_columns::parse(&arguments.options)?;
    let found = Found::open(&global.root, &arguments.id)?;
    let processes = if found.status() == Status::Stopped { Vec::new() } else { processes(&found)? };
    let mut out = io::stdout().lock();
    if arguments.format == Format::Json {
        let pids: Vec<i32> = processes.iter().map(|process| process.pid).collect();
        // As runc has it where there is nothing to list.
        serde_json::to_writer(&mut out, &Some(pids).filter(|pids| !pids.is_empty()))?;
        writeln!(out)?;
        return Ok(0);
    }
    writeln!(out, "{}", ps_columns::header(&columns))?;
    for process in &processes {
        writeln!(out, "{}", ps_columns::row(&columns, process, SystemTime::now()))?;
    }
    Ok(0)
}

fn processes(found: &Found) -> Result<Vec<ProcessInfo>, ClientError> {
    let answer = client::call(found, CallError::NotRunning, async |task, id| {
        task.pids(Context::default(), &PidsRequest { id, ..Default::default() }).await
    })?;
    let details = answer.processes.iter().map(|process| ProcessInfo::parse_from_bytes(&process.info.value));
    details.collect::<Result<_, _>>().map_err(|_| ClientError::Answer)
}
