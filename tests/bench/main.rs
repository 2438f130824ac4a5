// SPDX-License-Identifier: Apache-2.0
//! Measures starts of containers and machines beside each other, and what they hold in memory when idle.
//!
//! `bulkhead-bench compare` starts the cases in turns, A B C A B C…, so that whatever changes on the machine meanwhile
//! concerns all of them; one round before is not counted. `bulkhead-bench phases` draws where the time of one start goes.
//! `bulkhead-bench network` compares networks in the same way.
//! Everything runs on a tmpfs (see `stage`). Needs root and KVM.

mod bundle;
mod cases;
mod error;
mod exec;
mod idle;
mod image;
mod memory;
mod network;
mod report;
mod stage;
mod start;
mod stats;
mod svg;
mod trace;
mod turns;

use std::fs::File;
use std::io::Write;
use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::{Args, Parser, Subcommand};

use bundle::Bundle;
use cases::{CASES, Case, Kind, Programs};
use error::{BenchError, file};
use report::Report;
use stage::Stage;

/// Measures starts, and what runs idle.
#[derive(Debug, Parser)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    Compare(Compare),
    Phases(Phases),
    Network(network::Options),
    /// What runs in each peer of `network`
    #[command(hide = true)]
    NetworkClient {
        /// The host's end of its network
        server: Ipv4Addr,
    },
}

/// Start Bulkhead and its peers in turns, and print how long each took and what it holds
#[derive(Debug, Args)]
#[command(args_override_self = true)]
struct Compare {
    /// Where Bulkhead is installed
    #[arg(long, value_name = "DIR")]
    tree: PathBuf,

    /// The static program that the QEMU case boots
    #[arg(long, value_name = "FILE")]
    guest_init: PathBuf,

    /// Starts of each case that count
    #[arg(long, value_name = "N", default_value_t = 10)]
    runs: usize,

    /// Only these cases, by name; all when not given
    #[arg(long, value_name = "NAME", value_delimiter = ',')]
    cases: Vec<String>,

    /// Leave out what idle containers hold
    #[arg(long)]
    no_memory: bool,

    /// The clock counts instructions: repeat starts during which it jumped
    #[arg(long)]
    counted: bool,

    /// Say this of the machine
    #[arg(long, value_name = "TEXT", default_value = "This machine, CLOCK_MONOTONIC.")]
    machine: String,

    /// Write the figures to FILE too, as JSON
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
}

/// Draw where the time of a start goes, from the trace of the fastest of a few
#[derive(Debug, Args)]
#[command(args_override_self = true)]
struct Phases {
    /// Where Bulkhead is installed
    #[arg(long, value_name = "DIR")]
    tree: PathBuf,

    /// Starts to choose from
    #[arg(long, value_name = "N", default_value_t = 3)]
    runs: usize,

    /// What the drawing is called
    #[arg(long, value_name = "TEXT", default_value = "The start of a container")]
    title: String,

    /// Write the drawing to FILE
    #[arg(long, value_name = "FILE")]
    svg: PathBuf,

    /// Write the trace to FILE, for chrome://tracing and Perfetto
    #[arg(long, value_name = "FILE")]
    trace: Option<PathBuf>,
}

fn main() -> ExitCode {
    let result = match Cli::parse().command {
        Command::Compare(arguments) => compare(&arguments),
        Command::Phases(arguments) => phases(&arguments).map(|()| true),
        Command::Network(options) => network::compare(&options),
        Command::NetworkClient { server } => network::client(server).map(|()| true),
    };
    match result {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            say(&format!("bench: {error}\n"));
            ExitCode::FAILURE
        }
    }
}

/// Progress and failures, for people.
pub(crate) fn say(text: &str) {
    let _ = std::io::stderr().write_all(text.as_bytes());
}

/// Opens an output file while the machine's own files can still be seen.
fn create(path: &Path) -> Result<File, BenchError> {
    File::create(path).map_err(file("create", path))
}

fn write(mut output: File, path: &Path, text: &str) -> Result<(), BenchError> {
    output.write_all(text.as_bytes()).map_err(file("write", path))
}

/// Gives whether all cases could be measured.
fn compare(arguments: &Compare) -> Result<bool, BenchError> {
    let chosen: Vec<Case> = CASES
        .iter()
        .filter(|case| arguments.cases.is_empty() || arguments.cases.iter().any(|name| name == case.name))
        .cloned()
        .collect();
    if let Some(unknown) = arguments.cases.iter().find(|name| CASES.iter().all(|case| case.name != **name)) {
        let names = CASES.map(|case| case.name).join(", ");
        return Err(BenchError::Case { case: unknown.clone(), why: format!("no such case; the cases are {names}") });
    }
    let json = arguments.json.as_deref().map(create).transpose()?;
    let stage = Stage::new()?;
    let kinds: Vec<Kind> = chosen.iter().map(|case| case.kind).collect();
    let programs = Programs::copy(&stage, &kinds, &arguments.tree, &arguments.guest_init)?;
    stage.enter()?;

    let (cases, repeated) = turns::measure(&programs, chosen, arguments.runs, arguments.counted);
    let mut report = Report {
        machine: arguments.machine.clone(),
        cases,
        repeated,
        idle: Vec::new(),
        agent_rss_kib: None,
        notes: Vec::new(),
    };
    if !arguments.no_memory {
        measure_memory(&programs, &kinds, &mut report);
    }
    std::io::stdout().write_all(report.tables().as_bytes()).map_err(file("write", "standard output"))?;
    if let (Some(output), Some(path)) = (json, &arguments.json) {
        write(output, path, &format!("{:#}\n", report.json()))?;
    }
    Ok(report.notes.is_empty() && report.cases.iter().all(|result| result.failure.is_none()))
}

fn measure_memory(programs: &Programs, kinds: &[Kind], report: &mut Report) {
    if kinds.iter().any(|kind| matches!(kind, Kind::Bulkhead(_))) {
        match idle::bulkhead(programs) {
            Ok(idle) => report.idle.push(idle),
            Err(error) => report.notes.push(error.to_string()),
        }
        match idle::agent_rss_kib(programs) {
            Ok(rss) => report.agent_rss_kib = Some(rss),
            Err(error) => report.notes.push(error.to_string()),
        }
    }
    if kinds.contains(&Kind::Qemu) {
        match idle::qemu(programs) {
            Ok(idle) => report.idle.push(idle),
            Err(error) => report.notes.push(error.to_string()),
        }
    }
}

fn phases(arguments: &Phases) -> Result<(), BenchError> {
    const TRACE: &str = "/tmp/trace.json";
    let svg = create(&arguments.svg)?;
    let trace_file = arguments.trace.as_deref().map(create).transpose()?;
    let stage = Stage::new()?;
    let kind = Kind::Bulkhead(Bundle::Echo);
    let programs = Programs::copy(&stage, &[kind], &arguments.tree, Path::new(""))?;
    stage.enter()?;

    let mut samples = Vec::new();
    for round in 0..=arguments.runs {
        let invocation = programs.invocation(kind, &format!("bench-{round}"), &["--trace", TRACE]);
        turns::settle();
        let sample = start::measure("bulkhead-echo", &invocation, bundle::ECHO_OUTPUT)?;
        if round > 0 {
            samples.push((sample, stage::read(TRACE)?));
        }
    }
    let Some((sample, trace)) = samples.into_iter().min_by_key(|(sample, _)| sample.exit) else {
        return Err(BenchError::Case { case: "phases".into(), why: "--runs must be 1 or more".into() });
    };
    let mut phases =
        trace::phases(&trace, sample.began_ns).map_err(|why| BenchError::Content { path: TRACE.into(), why })?;
    trace::add_beginnings(&mut phases);
    let marks: Vec<_> =
        sample.first_output.map(|at| ("first output".to_owned(), stats::millis(at))).into_iter().collect();

    let mut table = format!("{:>9} {:>9} {:>9}  phase\n", "begin", "end", "ms");
    for phase in &phases {
        let took = phase.end_ms - phase.begin_ms;
        table.push_str(&format!(
            "{:9.2} {:9.2} {took:9.2}  {}: {}\n",
            phase.begin_ms, phase.end_ms, phase.lane, phase.name
        ));
    }
    std::io::stdout().write_all(table.as_bytes()).map_err(file("write", "standard output"))?;
    write(svg, &arguments.svg, &svg::timeline(&arguments.title, &phases, &marks))?;
    match (trace_file, &arguments.trace) {
        (Some(output), Some(path)) => write(output, path, &trace),
        _ => Ok(()),
    }
}
