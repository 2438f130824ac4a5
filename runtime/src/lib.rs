// SPDX-License-Identifier: Apache-2.0
//! Bulkhead's command line and supervisor.
//!
//! | module | what it knows |
//! | --- | --- |
//! | `cli`, `commands` | the command line; one verb a file |
//! | `spec` | config.json: from bytes to what the guest's agent is told |
//! | `storage` | which trees of the host the guest gets to see |
//! | `supervisor` | a sandbox's life: state directory, VMM, agent, streams, signals, exit; and its clients |
//! | `cgroup` | the sandbox's cgroup on the host |
//! | `network` | the sandbox's network on the host |
//! | `bpf` | how programs for the kernel are put together |
//! | `shim` | containerd's side of the supervisor |
//! | `hooks` | the programs that run at points of a container's life |
//! | `pidfd`, `said` | a program's end, and what it said before |
//! | `install` | where the VMM, the kernel and the guest image lie |
//! | `user_namespace` | whether this is the host's root |
//! | `heap` | how the allocator is to keep memory |
//! | `logging`, `trace` | what is written for a person, a machine, or a trace viewer |

mod apart;
mod bpf;
mod cgroup;
mod cli;
mod commands;
mod event_loop;
mod heap;
mod hooks;
mod install;
mod logging;
mod network;
mod notify;
mod pidfd;
mod resctrl;
mod said;
mod shim;
mod spec;
mod storage;
mod supervisor;
#[cfg(test)]
mod test_program;
mod text;
mod trace;
mod user_namespace;

use std::panic;
use std::process::ExitCode;

/// Runs the program on the process' arguments and environment: the command line, or, by its name, containerd's shim.
#[must_use]
pub fn main() -> ExitCode {
    heap::keep_small();
    panic::set_hook(Box::new(|info| {
        let place = info.location().map_or_else(String::new, |place| format!(" at {}:{}", place.file(), place.line()));
        let payload = info.payload();
        let message = payload.downcast_ref::<&str>().copied();
        let message = message.or_else(|| payload.downcast_ref::<String>().map(String::as_str)).unwrap_or("panic");
        logging::error(format_args!("internal error{place}: {}", text::one_line(message)));
    }));
    // What is set up is undone as the stack unwinds; the hook has told the cause.
    let run = if shim::is_called() { shim::run } else { cli::run };
    panic::catch_unwind(run).unwrap_or(ExitCode::FAILURE)
}
