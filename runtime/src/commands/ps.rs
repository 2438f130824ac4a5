// SPDX-License-Identifier: Apache-2.0
//! `bulkhead ps`: the processes of a container, as the guest's kernel sees them.

use std::io::{self, Write};
use std::time::{SystemTime, UNIX_EPOCH};

use bulkhead_protocol::agent::ProcessInfo;
use clap::{Args, ValueEnum};
use containerd_shim_protos::api::PidsRequest;
use protobuf::Message;
use ttrpc::context::Context;

use super::{Global, Outcome};
use crate::logging;
use crate::supervisor::CallError;
use crate::supervisor::client::{self, ClientError};
use crate::supervisor::state::{Found, Status};
use crate::text;

/// List the processes of a container
#[derive(Debug, Args)]
pub(crate) struct Arguments {
    /// Name of the container
    #[arg(value_name = "ID")]
    id: String,

    /// How to print them: a table, or the process ids as JSON
    #[arg(long, short, value_enum, default_value = "table", value_name = "FORMAT")]
    format: Format,

    /// Accepted for runc's sake: there is one table
    #[arg(value_name = "OPTION", hide = true, trailing_var_arg = true, allow_hyphen_values = true)]
    options: Vec<String>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Format {
    Table,
    Json,
}

/// Prints the processes. Their ids are those of the guest.
pub(crate) fn run(global: &Global, arguments: &Arguments) -> Outcome {
    let found = Found::open(&global.root, &arguments.id)?;
    let processes = if found.status() == Status::Stopped { Vec::new() } else { processes(&found)? };
    let mut out = io::stdout().lock();
    if arguments.format == Format::Json {
        let pids: Vec<i32> = processes.iter().map(|process| process.pid).collect();
        serde_json::to_writer(&mut out, &pids)?;
        writeln!(out)?;
        return Ok(0);
    }
    let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs());
    writeln!(out, "{:<8} {:>7} {:>7}  C {:<5} {:<8} {:>8} CMD", "UID", "PID", "PPID", "STIME", "TTY", "TIME")?;
    for process in &processes {
        writeln!(out, "{}", line(process, now))?;
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

/// A line in the shape of `ps -ef`. Users are numbers: the names are the container's own business.
fn line(process: &ProcessInfo, now: u64) -> String {
    let cpu_seconds = process.cpu_ms / 1000;
    let alive_seconds = now.saturating_sub(process.started_s).max(1);
    let usage = (cpu_seconds.saturating_mul(100) / alive_seconds).min(99);
    let time = format!("{:02}:{:02}:{:02}", cpu_seconds / 3600, cpu_seconds / 60 % 60, cpu_seconds % 60);
    format!(
        "{:<8} {:>7} {:>7} {usage:>2} {:<5} {:<8} {time:>8} {}",
        process.uid,
        process.pid,
        process.parent_pid,
        started(process.started_s, now),
        text::one_line(&process.terminal),
        text::one_line(&process.command),
    )
}

/// The time of the day in UTC, or, of an earlier day, month and day.
fn started(at: u64, now: u64) -> String {
    // The guest's word: a year beyond four digits has no shape to rely on.
    let (at, now) = (logging::rfc3339(at.min(u64::from(u32::MAX))), logging::rfc3339(now.min(u64::from(u32::MAX))));
    if at[..10] == now[..10] { at[11..16].to_owned() } else { at[5..10].to_owned() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_has_the_columns_of_ps() {
        let process = ProcessInfo {
            pid: 41,
            parent_pid: 1,
            uid: 1000,
            started_s: 1_709_251_199,
            cpu_ms: 3_723_000,
            terminal: "?".into(),
            command: "sleep\n9".into(),
            ..ProcessInfo::default()
        };

        let same_day = line(&process, 1_709_251_199);
        let later = line(&process, 1_709_251_199 + 86_400);

        assert_eq!(same_day, "1000          41       1 99 23:59 ?        01:02:03 sleep | 9");
        assert_eq!(later, "1000          41       1  4 02-29 ?        01:02:03 sleep | 9");
    }

    #[test]
    fn no_time_of_a_guest_breaks_a_line() {
        assert_eq!(started(u64::MAX, 0), "02-07");
    }
}
