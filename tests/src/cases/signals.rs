// SPDX-License-Identifier: Apache-2.0
//! Signals to the runtime go to the container.

use nix::sys::signal::Signal;

use super::{Case, case};
use crate::bundle::Bundle;
use crate::env::{Env, Kind};
use crate::failure::Result;

pub(super) const CASES: &[Case] =
    &[case!(each_is_forwarded), case!(sigterm_ends_a_container_that_handles_it), case!(ignored_signal_changes_nothing)];

fn each_is_forwarded(env: &Env) -> Result {
    let forwarded = [
        (Signal::SIGHUP, "HUP"),
        (Signal::SIGINT, "INT"),
        (Signal::SIGQUIT, "QUIT"),
        (Signal::SIGUSR1, "USR1"),
        (Signal::SIGUSR2, "USR2"),
        (Signal::SIGWINCH, "WINCH"),
        (Signal::SIGTERM, "TERM"),
    ];
    // Others take SIGWINCH for a matter of terminals only.
    let forwarded =
        forwarded.into_iter().filter(|(_, name)| env.kind == Kind::Bulkhead || *name != "WINCH").collect::<Vec<_>>();
    let traps: String = forwarded.iter().map(|(_, name)| format!("trap 'echo got {name}' {name}; ")).collect();
    let mut bundle = Bundle::busybox(env)?;
    bundle.sh(&format!("{traps}trap 'echo got 37' 37; echo ready; while [ ! -e /stop ]; do sleep 0.1; done; exit 8"));

    let mut running = env.run(&bundle)?.spawn()?;
    running.wait_for("ready\n")?;
    for (signal, name) in forwarded {
        running.signal(signal)?;
        running.wait_for(&format!("got {name}\n"))?;
    }
    // Those without a name are forwarded as well.
    running.real_time_signal(37)?;
    running.wait_for("got 37\n")?;
    // Until the container looks up that name again, it may believe for a moment that it is absent.
    std::fs::write(bundle.path("stop"), "")?;
    running.signal(Signal::SIGTERM)?;

    let end = running.finish()?;
    end.expect_code(8)?;
    end.expect_silent_stderr()
}

fn sigterm_ends_a_container_that_handles_it(env: &Env) -> Result {
    let mut bundle = Bundle::busybox(env)?;
    bundle.sh("trap 'echo cleaning up; exit 21' TERM; echo ready; while :; do sleep 0.1; done");

    let mut running = env.run(&bundle)?.spawn()?;
    running.wait_for("ready\n")?;
    running.signal(Signal::SIGTERM)?;

    let output = running.finish()?;
    output.expect_code(21)?;
    output.expect_silent_stderr()
}

fn ignored_signal_changes_nothing(env: &Env) -> Result {
    let mut bundle = Bundle::busybox(env)?;
    bundle.sh("trap '' INT; echo ready; read line; echo \"<$line>\"");

    let mut running = env.run(&bundle)?.open_stdin().spawn()?;
    running.wait_for("ready\n")?;
    running.signal(Signal::SIGINT)?;
    running.write(b"still here\n")?;

    running.finish()?.expect_stdout("ready\n<still here>\n")
}
