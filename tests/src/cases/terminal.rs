// SPDX-License-Identifier: Apache-2.0
//! A container with a terminal.

use nix::sys::signal::{Signal, kill};
use nix::sys::termios::Termios;
use nix::unistd::Pid;
use serde_json::json;

use super::{Case, case};
use crate::bundle::Bundle;
use crate::env::{Env, Kind};
use crate::failure::{Result, ensure, ensure_eq};
use crate::pty::Terminal;

pub(super) const CASES: &[Case] = &[
    case!(streams_are_a_terminal),
    case!(controlling_terminal),
    case!(size_is_right_from_the_first),
    case!(resizing_tells_the_container),
    case!(keys_go_through_raw),
    case!(interrupt_key_during_the_boot),
    case!(typed_text_is_echoed_once),
    case!(end_of_file_key),
    case!(modes_are_restored_at_the_end),
    case!(modes_are_restored_when_the_program_is_missing),
    case!(modes_are_restored_when_the_machine_is_killed),
    case!(modes_are_restored_after_sigterm),
    case!(much_output),
    case!(without_a_terminal_at_a_terminal),
    case!(terminal_asked_for_where_there_is_none),
];

fn bundle_with_terminal(env: &Env, script: &str) -> Result<Bundle> {
    let mut bundle = Bundle::busybox(env)?;
    bundle.sh(script).set("/process/terminal", json!(true));
    Ok(bundle)
}

fn ensure_same_modes(terminal: &Terminal, before: &Termios) -> Result {
    let after = terminal.modes()?;
    ensure_eq!(after.local_flags, before.local_flags, "the local modes");
    ensure_eq!(after.input_flags, before.input_flags, "the input modes");
    ensure_eq!(after.output_flags, before.output_flags, "the output modes");
    ensure_eq!(after.control_chars, before.control_chars, "the control characters");
    Ok(())
}

fn streams_are_a_terminal(env: &Env) -> Result {
    let script =
        "for fd in 0 1 2; do test -t $fd && echo terminal $fd; done; tty; test -c /dev/console && echo console";
    let bundle = bundle_with_terminal(env, script)?;
    let terminal = Terminal::new(24, 80)?;

    terminal.spawn(env.run(&bundle)?)?.finish()?.expect_code(0)?;

    let expected = "terminal 0\r\nterminal 1\r\nterminal 2\r\n/dev/pts/0\r\nconsole\r\n";
    terminal.wait_for("console\r\n")?;
    ensure_eq!(terminal.text(), expected, "the terminal");
    Ok(())
}

fn controlling_terminal(env: &Env) -> Result {
    let bundle = bundle_with_terminal(env, "echo 'through tty' >/dev/tty")?;
    let terminal = Terminal::new(24, 80)?;

    terminal.spawn(env.run(&bundle)?)?.finish()?.expect_code(0)?;

    terminal.wait_for("through tty\r\n")
}

fn size_is_right_from_the_first(env: &Env) -> Result {
    // Others tell the size after the start.
    let wait = if env.kind == Kind::Bulkhead { "" } else { "sleep 1; " };
    let bundle = bundle_with_terminal(env, &format!("{wait}stty size"))?;
    let terminal = Terminal::new(33, 101)?;

    terminal.spawn(env.run(&bundle)?)?.finish()?.expect_code(0)?;

    terminal.wait_for("33 101\r\n")
}

fn resizing_tells_the_container(env: &Env) -> Result {
    let script = "trap 'stty size; exit 3' WINCH; echo ready; while :; do sleep 0.1; done";
    let bundle = bundle_with_terminal(env, script)?;
    let terminal = Terminal::new(24, 80)?;

    let running = terminal.spawn(env.run(&bundle)?)?;
    terminal.wait_for("ready")?;
    // The first size may still be on its way, which is a change to the container too.
    std::thread::sleep(std::time::Duration::from_millis(300));
    terminal.resize(50, 132)?;
    running.finish()?.expect_code(3)?;

    terminal.wait_for("50 132\r\n")
}

/// Ctrl-C and its like are the container's terminal's business.
fn keys_go_through_raw(env: &Env) -> Result {
    let script = "trap 'echo interrupted' INT; trap 'echo quit; exit 5' QUIT; echo ready; while :; do sleep 0.1; done";
    let bundle = bundle_with_terminal(env, script)?;
    let mut terminal = Terminal::new(24, 80)?;

    let running = terminal.spawn(env.run(&bundle)?)?;
    terminal.wait_for("ready")?;
    terminal.wait_for_raw_mode()?;
    terminal.type_text("\x03")?;
    terminal.wait_for("interrupted")?;
    terminal.type_text("\x1c")?;

    running.finish()?.expect_code(5)
}

/// Before there is a container, it is the runtime that Ctrl-C ends.
fn interrupt_key_during_the_boot(env: &Env) -> Result {
    env.only_bulkhead()?; // Others have no boot.
    let bundle = bundle_with_terminal(env, "echo ready; sleep 1000")?;
    let mut terminal = Terminal::new(24, 80)?;
    let before = terminal.modes()?;

    let running = terminal.spawn(env.run(&bundle)?)?;
    running.wait_for_vmm()?;
    terminal.type_text("\x03")?;
    running.finish()?.expect_code(130)?;

    terminal.wait_for("SIGINT")?;
    ensure_same_modes(&terminal, &before)
}

fn typed_text_is_echoed_once(env: &Env) -> Result {
    let bundle = bundle_with_terminal(env, "echo ready; read line; echo \"<$line>\"")?;
    let mut terminal = Terminal::new(24, 80)?;

    let running = terminal.spawn(env.run(&bundle)?)?;
    terminal.wait_for("ready\r\n")?;
    terminal.wait_for_raw_mode()?;
    terminal.type_text("hello\r")?;
    running.finish()?.expect_code(0)?;

    terminal.wait_for("<hello>\r\n")?;
    ensure_eq!(terminal.text(), "ready\r\nhello\r\n<hello>\r\n", "the terminal");
    Ok(())
}

fn end_of_file_key(env: &Env) -> Result {
    let bundle = bundle_with_terminal(env, "echo ready; cat; echo end")?;
    let mut terminal = Terminal::new(24, 80)?;

    let running = terminal.spawn(env.run(&bundle)?)?;
    terminal.wait_for("ready\r\n")?;
    terminal.wait_for_raw_mode()?;
    terminal.type_text("text\r\x04")?;
    running.finish()?.expect_code(0)?;

    terminal.wait_for("text\r\ntext\r\nend\r\n")
}

fn modes_are_restored_at_the_end(env: &Env) -> Result {
    let bundle = bundle_with_terminal(env, "echo ready; read line; exit 9")?;
    let mut terminal = Terminal::new(24, 80)?;
    let before = terminal.modes()?;

    let running = terminal.spawn(env.run(&bundle)?)?;
    terminal.wait_for("ready")?;
    terminal.wait_for_raw_mode()?;
    terminal.type_text("\r")?;
    running.finish()?.expect_code(9)?;

    ensure_same_modes(&terminal, &before)
}

fn modes_are_restored_when_the_program_is_missing(env: &Env) -> Result {
    let mut bundle = bundle_with_terminal(env, "")?;
    bundle.args(&["no-such-program"]);
    let terminal = Terminal::new(24, 80)?;
    let before = terminal.modes()?;

    let output = terminal.spawn(env.run(&bundle)?)?.finish()?;

    ensure!(output.status.code() != Some(0), "{}", output.describe());
    terminal.wait_for("no-such-program")?;
    ensure_same_modes(&terminal, &before)
}

fn modes_are_restored_when_the_machine_is_killed(env: &Env) -> Result {
    env.only_bulkhead()?;
    let bundle = bundle_with_terminal(env, "echo ready; sleep 1000")?;
    let terminal = Terminal::new(24, 80)?;
    let before = terminal.modes()?;

    let running = terminal.spawn(env.run(&bundle)?)?;
    terminal.wait_for("ready")?;
    terminal.wait_for_raw_mode()?;
    kill(Pid::from_raw(running.wait_for_vmm()?), Signal::SIGKILL)?;
    let output = running.finish()?;

    ensure!(!output.status.success(), "{}", output.describe());
    terminal.wait_for("bulkhead: ")?;
    ensure_same_modes(&terminal, &before)
}

fn modes_are_restored_after_sigterm(env: &Env) -> Result {
    let bundle = bundle_with_terminal(env, "trap 'exit 7' TERM; echo ready; while :; do sleep 0.1; done")?;
    let terminal = Terminal::new(24, 80)?;
    let before = terminal.modes()?;

    let running = terminal.spawn(env.run(&bundle)?)?;
    terminal.wait_for("ready")?;
    terminal.wait_for_raw_mode()?;
    running.signal(Signal::SIGTERM)?;
    running.finish()?.expect_code(7)?;

    ensure_same_modes(&terminal, &before)
}

fn much_output(env: &Env) -> Result {
    let bundle = bundle_with_terminal(env, "seq 1 50000")?;
    let terminal = Terminal::new(24, 80)?;

    terminal.spawn(env.run(&bundle)?)?.finish()?.expect_code(0)?;

    let expected: String = (1..=50_000).map(|number| format!("{number}\r\n")).collect();
    terminal.wait_for("50000\r\n")?;
    ensure!(
        terminal.text() == expected,
        "{} bytes came, or others than the {} written",
        terminal.text().len(),
        expected.len()
    );
    Ok(())
}

/// Without `terminal`, the modes of the terminal at which the runtime is run are left alone.
fn without_a_terminal_at_a_terminal(env: &Env) -> Result {
    let mut bundle = Bundle::busybox(env)?;
    bundle.sh("echo ready; read line; echo \"<$line>\"");
    let mut terminal = Terminal::new(24, 80)?;
    let before = terminal.modes()?;

    let running = terminal.spawn(env.run(&bundle)?)?;
    terminal.wait_for("ready")?;
    ensure_same_modes(&terminal, &before)?;
    terminal.type_text("word\r")?;
    running.finish()?.expect_code(0)?;

    terminal.wait_for("<word>")?;
    ensure_same_modes(&terminal, &before)
}

fn terminal_asked_for_where_there_is_none(env: &Env) -> Result {
    let bundle = bundle_with_terminal(env, "echo hi")?;

    env.run(&bundle)?.output()?.expect_error(&["terminal"])
}
