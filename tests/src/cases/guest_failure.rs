// SPDX-License-Identifier: Apache-2.0
//! Guests that fail: each ends in a bounded time, and one line says why.

use std::fs;
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::json;

use super::{Case, case};
use crate::bundle::Bundle;
use crate::env::Env;
use crate::failure::{Result, ensure};
use crate::images;
use crate::output::Output;

pub(super) const CASES: &[Case] = &[
    case!(kernel_that_hangs_at_boot),
    case!(kernel_that_sleeps_at_boot),
    case!(console_is_quoted),
    case!(console_is_quoted_without_control_characters),
    case!(triple_fault),
    case!(shutdown_at_boot),
    case!(image_without_an_init),
    case!(image_with_an_init_that_ends),
    case!(image_with_an_init_that_hangs),
    case!(kernel_panic_while_running),
    case!(guest_that_stops_answering),
];

/// What a boot may take in these cases.
const BOOT_TIMEOUT_MS: &str = "4000";

fn run_with(env: &Env, variable: &str, file: &std::path::Path) -> Result<Output> {
    let bundle = Bundle::busybox(env)?;
    env.run(&bundle)?.variable(variable, file).variable("BULKHEAD_BOOT_TIMEOUT_MS", BOOT_TIMEOUT_MS).output()
}

fn kernel_that_hangs_at_boot(env: &Env) -> Result {
    env.only_bulkhead()?;
    let kernel = images::kernel(env, "spinning-kernel", images::SPIN)?;

    let output = run_with(env, "BULKHEAD_KERNEL", &kernel)?;

    output.expect_error_code(1, &["did not answer", BOOT_TIMEOUT_MS])?;
    output.expect_within(Duration::from_secs(12))
}

fn kernel_that_sleeps_at_boot(env: &Env) -> Result {
    env.only_bulkhead()?;
    let kernel = images::kernel(env, "sleeping-kernel", images::SLEEP)?;

    let output = run_with(env, "BULKHEAD_KERNEL", &kernel)?;

    output.expect_error_code(1, &["did not answer", BOOT_TIMEOUT_MS])?;
    output.expect_within(Duration::from_secs(12))
}

fn console_is_quoted(env: &Env) -> Result {
    env.only_bulkhead()?;
    let kernel =
        images::kernel(env, "telling-kernel", &images::print_and_sleep(b"first line\r\nthe cause of it all\r\n"))?;

    let output = run_with(env, "BULKHEAD_KERNEL", &kernel)?;

    output.expect_error_code(1, &["did not answer", "the cause of it all"])
}

fn console_is_quoted_without_control_characters(env: &Env) -> Result {
    env.only_bulkhead()?;
    let text =
        [b"\x1b]0;title\x07\x1b[2J", "flood ".repeat(400).as_bytes(), b"\x1b[31mred and late\0\x08\x9b\n"].concat();
    let kernel = images::kernel(env, "rude-kernel", &images::print_and_sleep(&text))?;

    let output = run_with(env, "BULKHEAD_KERNEL", &kernel)?;

    // Whether it is plain is looked at with every error.
    output.expect_error_code(1, &["red and late"])
}

fn triple_fault(env: &Env) -> Result {
    env.only_bulkhead()?;
    let kernel = images::kernel(env, "faulting-kernel", images::TRIPLE_FAULT)?;

    let output = run_with(env, "BULKHEAD_KERNEL", &kernel)?;

    output.expect_error_code(1, &["triple fault"])?;
    output.expect_within(Duration::from_secs(4))
}

fn shutdown_at_boot(env: &Env) -> Result {
    env.only_bulkhead()?;
    let kernel = images::kernel(env, "leaving-kernel", images::RESET)?;

    let output = run_with(env, "BULKHEAD_KERNEL", &kernel)?;

    output.expect_error_code(1, &["shut its machine down"])
}

fn image_without_an_init(env: &Env) -> Result {
    env.only_bulkhead()?;
    let image = images::image_without_init(env)?;

    let output = run_with(env, "BULKHEAD_INITRAMFS", &image)?;

    output.expect_error_code(1, &["panic"])
}

fn image_with_an_init_that_ends(env: &Env) -> Result {
    env.only_bulkhead()?;
    let image = images::image_with_init(env, "ending.cpio", "/bin/busybox".as_ref())?;

    // Called as `init` without a configuration it may do anything but serve.
    let output = run_with(env, "BULKHEAD_INITRAMFS", &image)?;

    output.expect_error_code(1, &[])?;
    output.expect_within(Duration::from_secs(12))
}

fn image_with_an_init_that_hangs(env: &Env) -> Result {
    env.only_bulkhead()?;
    let program = images::kernel(env, "spinning-program", images::SPIN)?;
    let image = images::image_with_init(env, "hanging.cpio", &program)?;

    let output = run_with(env, "BULKHEAD_INITRAMFS", &image)?;

    output.expect_error_code(1, &["did not answer"])?;
    output.expect_within(Duration::from_secs(12))
}

/// A container that may change its guest's settings can end that guest, and is told to have been killed.
fn kernel_panic_while_running(env: &Env) -> Result {
    env.only_bulkhead()?;
    let mut bundle = Bundle::busybox(env)?;
    bundle.set("/linux/readonlyPaths", json!([])).annotation("io.bulkhead.memory_mib", "128");
    bundle.sh("echo kept >/file; sync; echo before; echo 2 >/proc/sys/vm/panic_on_oom; tail /dev/zero");

    let output = env.run(&bundle)?.output()?;

    output.expect_code(137)?;
    output.expect_error_line(&["panic"])?;
    ensure!(output.stdout() == "before\n", "{}", output.describe());
    ensure!(fs::read_to_string(bundle.path("file"))? == "kept\n", "the file that was synced");
    Ok(())
}

/// A machine that stands still while its container runs: whoever wants the container to end gets that.
fn guest_that_stops_answering(env: &Env) -> Result {
    env.only_bulkhead()?;
    let mut bundle = Bundle::busybox(env)?;
    bundle.sh("echo ready; sleep 1000");
    let mut running = env.run(&bundle)?.spawn()?;
    running.wait_for("ready\n")?;
    kill(Pid::from_raw(running.wait_for_vmm()?), Signal::SIGSTOP)?;

    running.signal(Signal::SIGTERM)?;
    let output = running.finish()?;

    output.expect_code(137)?;
    output.expect_within(Duration::from_secs(90))?;
    output.expect_error_line(&["no longer answers"])
}
