// SPDX-License-Identifier: Apache-2.0
//! `bulkhead-e2e`: runs the end-to-end cases against an installed runtime, as root, on a machine whose KVM runs guests.
//!
//! Each case runs in a process of its own, with its own mount namespace, so that a hang is ended from outside and what a
//! case leaves behind is seen. `--runtime runc` runs those cases that hold for any OCI runtime, which checks the cases.
#![allow(clippy::print_stdout, clippy::print_stderr, reason = "a program that reports to the terminal")]

mod bundle;
mod cases;
mod cri;
mod detached;
mod engines;
mod env;
mod failure;
mod images;
mod leftovers;
mod loop_device;
mod messages;
mod options;
mod output;
#[path = "../bench/pods/mod.rs"]
mod pod_bench;
mod processes;
mod pty;
mod run;
mod runner;
mod skips;

use std::process::ExitCode;

fn main() -> ExitCode {
    let options = match options::Options::parse(std::env::args_os().skip(1)) {
        Ok(options) => options,
        Err(options::Stop::Help) => {
            print!("{}", options::HELP);
            return ExitCode::SUCCESS;
        }
        Err(options::Stop::Usage(problem)) => {
            eprintln!("bulkhead-e2e: {problem} (see --help)");
            return ExitCode::from(2);
        }
    };
    if let Some(name) = &options.case {
        return runner::run_one(&options, name);
    }
    if let Some(bench) = &options.pod_bench {
        return runner::run_bench(&options, bench);
    }
    let cases = match runner::selected(&options) {
        Ok(cases) => cases,
        Err(filter) => {
            eprintln!("bulkhead-e2e: no case has --filter {filter} in its name (see --list)");
            return ExitCode::from(2);
        }
    };
    if options.list {
        for case in cases {
            println!("{}{}", case.name(), if case.slow { " (slow)" } else { "" });
        }
        return ExitCode::SUCCESS;
    }
    runner::run_all(&options, cases)
}
