// SPDX-License-Identifier: Apache-2.0
//! The container engine on this machine, as root and without a VM.
//!
//! Each case runs in a process with a mount namespace of its own and one thread, because the engine forks. Without root,
//! or without a static busybox, everything is skipped and said so. A word on the command line selects the cases whose
//! names hold it.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::print_stdout, reason = "a test program without the harness")]

mod cases;
mod fixture;

use std::process::{Command, ExitCode, Stdio};

/// Names the case that this process is to run.
const CASE: &str = "BULKHEAD_AGENT_NATIVE_CASE";

/// A static busybox, which fills the containers' root file systems.
const BUSYBOX: &str = "/bin/busybox";

fn main() -> ExitCode {
    if let Ok(name) = std::env::var(CASE) {
        return run_here(&name);
    }
    if std::env::args().any(|argument| argument == "--list") {
        return ExitCode::SUCCESS;
    }
    if !rustix::process::geteuid().is_root() {
        println!("native engine tests: skipped: needs root");
        return ExitCode::SUCCESS;
    }
    if !std::path::Path::new(BUSYBOX).exists() {
        println!("native engine tests: skipped: needs a static {BUSYBOX} (package busybox-static)");
        return ExitCode::SUCCESS;
    }
    run_all()
}

fn run_all() -> ExitCode {
    let filter = std::env::args().skip(1).find(|argument| !argument.starts_with('-')).unwrap_or_default();
    let program = std::env::current_exe().expect("a test knows its own program");
    let selected = cases::CASES.iter().filter(|(name, _)| name.contains(&filter));
    let mut failed = Vec::new();
    let mut passed = 0;
    for (name, _) in selected {
        let output = Command::new(&program)
            .env(CASE, name)
            .env("RUST_BACKTRACE", "0")
            .stdin(Stdio::null())
            .output()
            .expect("a test can start its own program");
        let text = String::from_utf8_lossy(&output.stdout);
        match text.lines().find(|line| line.starts_with("skipped: ")) {
            _ if !output.status.success() => {
                println!("test {name} ... FAILED ({})", output.status);
                print!("{text}{}", String::from_utf8_lossy(&output.stderr));
                failed.push(name);
            }
            Some(reason) => println!("test {name} ... {reason}"),
            None => {
                println!("test {name} ... ok");
                passed += 1;
            }
        }
    }
    println!("\nnative engine tests: {passed} passed, {} failed {failed:?}", failed.len());
    if failed.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

fn run_here(name: &str) -> ExitCode {
    let Some((_, case)) = cases::CASES.iter().find(|(known, _)| *known == name) else {
        println!("there is no case {name}");
        return ExitCode::FAILURE;
    };
    fixture::isolate();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime starts");
    runtime.block_on(case());
    ExitCode::SUCCESS
}
