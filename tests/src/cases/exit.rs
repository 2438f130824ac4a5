// SPDX-License-Identifier: Apache-2.0
//! The exit status is the container's.

use serde_json::json;

use super::{Case, case};
use crate::bundle::Bundle;
use crate::env::{Env, Kind};
use crate::failure::{Result, ensure};
use crate::images;

pub(super) const CASES: &[Case] = &[
    case!(status_is_the_containers),
    case!(killed_by_the_kernel_is_128_and_the_signal),
    case!(fault_is_128_and_the_signal),
    case!(status_of_a_shell_whose_child_was_killed),
    case!(missing_program_is_127),
    case!(missing_absolute_program_is_127),
    case!(program_that_is_not_executable_is_126),
    case!(folder_as_program_is_126),
    case!(file_without_a_known_format_is_126),
    case!(script_with_a_missing_interpreter),
    case!(script_with_an_interpreter_runs),
    case!(orphans_end_with_the_container),
];

fn status_is_the_containers(env: &Env) -> Result {
    let mut bundle = Bundle::busybox(env)?;
    for code in [0, 1, 42, 255] {
        bundle.sh(&format!("exit {code}"));
        let output = env.run(&bundle)?.output()?;
        output.expect_code(code)?;
        output.expect_silent_stderr()?;
    }
    Ok(())
}

/// Process 1 of a container is killed by no signal of its own container; by a CPU time limit it is.
fn killed_by_the_kernel_is_128_and_the_signal(env: &Env) -> Result {
    let mut bundle = Bundle::busybox(env)?;
    bundle.sh("while :; do :; done").set("/process/rlimits", json!([{ "type": "RLIMIT_CPU", "soft": 1, "hard": 1 }]));

    let output = env.run(&bundle)?.output()?;

    output.expect_code(128 + 9)
}

/// Its own faults end process 1 as well.
fn fault_is_128_and_the_signal(env: &Env) -> Result {
    let mut bundle = Bundle::busybox(env)?;
    bundle.args(&["/opt/program"]);
    for (code, number) in [(images::ILLEGAL, 4), (images::PRIVILEGED, 11)] {
        bundle.add_file("opt/program", images::elf(code), 0o755)?;
        env.run(&bundle)?.output()?.expect_code(128 + number)?;
    }
    Ok(())
}

fn status_of_a_shell_whose_child_was_killed(env: &Env) -> Result {
    let mut bundle = Bundle::busybox(env)?;
    bundle.sh("sh -c 'kill -9 $$'; exit $?");

    env.run(&bundle)?.output()?.expect_code(137)
}

fn missing_program_is_127(env: &Env) -> Result {
    let mut bundle = Bundle::busybox(env)?;
    bundle.args(&["no-such-program", "argument"]);

    env.run(&bundle)?.output()?.expect_error_code(127, &["no-such-program"])
}

fn missing_absolute_program_is_127(env: &Env) -> Result {
    let mut bundle = Bundle::busybox(env)?;
    bundle.args(&["/opt/no-such-program"]);

    env.run(&bundle)?.output()?.expect_error_code(127, &["/opt/no-such-program"])
}

fn program_that_is_not_executable_is_126(env: &Env) -> Result {
    let mut bundle = Bundle::busybox(env)?;
    bundle.add_file("opt/plain", "#!/bin/sh\necho no\n", 0o644)?;
    bundle.args(&["/opt/plain"]);

    env.run(&bundle)?.output()?.expect_error_code(126, &["/opt/plain"])
}

fn folder_as_program_is_126(env: &Env) -> Result {
    let mut bundle = Bundle::busybox(env)?;
    bundle.args(&["/etc"]);

    env.run(&bundle)?.output()?.expect_error_code(126, &["/etc"])
}

fn file_without_a_known_format_is_126(env: &Env) -> Result {
    let mut bundle = Bundle::busybox(env)?;
    bundle.add_file("opt/noise", [0xd0, 0x0d, 0xfe, 0xed, 0, 0, 0, 0], 0o755)?;
    bundle.args(&["/opt/noise"]);

    env.run(&bundle)?.output()?.expect_error_code(126, &["/opt/noise"])
}

/// The kernel says that a file is missing, and a shell says either: 126, or 127.
fn script_with_a_missing_interpreter(env: &Env) -> Result {
    let mut bundle = Bundle::busybox(env)?;
    bundle.add_file("opt/script", "#!/opt/no-such-interpreter\n", 0o755)?;
    bundle.args(&["/opt/script"]);

    let output = env.run(&bundle)?.output()?;

    // Engines look for the words.
    output.expect_error(&["/opt/script", "no such file or directory"])?;
    if env.kind == Kind::Other { Ok(()) } else { output.expect_code(127) }
}

fn script_with_an_interpreter_runs(env: &Env) -> Result {
    let mut bundle = Bundle::busybox(env)?;
    bundle.add_file("opt/script", "#!/bin/sh\necho \"$0 $1\"\n", 0o755)?;
    bundle.args(&["/opt/script", "first argument"]);

    env.run(&bundle)?.output()?.expect_stdout("/opt/script first argument\n")
}

fn orphans_end_with_the_container(env: &Env) -> Result {
    let mut bundle = Bundle::busybox(env)?;
    bundle.sh("sleep 1000 & setsid sleep 1000 & echo done; exit 3");

    let output = env.run(&bundle)?.output()?;

    output.expect_code(3)?;
    ensure!(output.stdout() == "done\n", "{}", output.describe());
    Ok(())
}
