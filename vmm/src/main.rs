// SPDX-License-Identifier: Apache-2.0
//! `bulkhead-vmm --config-fd N`: reads its machine's description from descriptor N, builds it, locks itself in, runs it.
//!
//! Started by the supervisor alone. Everything that it has to say goes to the report descriptor of its description; until
//! that is known, to stderr. Exit status: 0 when the machine ran and ended, 1 when it could not be built.

use std::fs::File;
use std::io::Read;
use std::os::fd::{BorrowedFd, FromRawFd, RawFd};
use std::process::ExitCode;
use std::sync::Arc;

use bulkhead_vmm::config::MachineConfig;
use bulkhead_vmm::report::{End, Report, Reporter};
use bulkhead_vmm::{jail, machine};
use nix::sys::prctl;
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use nix::sys::signal::{SigHandler, Signal, signal};
use nix::sys::stat::{Mode, umask};

/// Longest machine description.
const CONFIG_MAX: u64 = 1 << 20;

fn main() -> ExitCode {
    let config = match read_config() {
        Ok(config) => config,
        Err(message) => {
            #[expect(clippy::print_stderr, reason = "there is no report descriptor yet")]
            {
                eprintln!("bulkhead-vmm: {message}");
            }
            return ExitCode::FAILURE;
        }
    };
    // SAFETY: the supervisor has opened the descriptor for the VMM alone; it is taken over once, and never closed, so
    // that the borrowed one below stays valid.
    let (report, supervisor) =
        unsafe { (File::from_raw_fd(config.report_fd), BorrowedFd::borrow_raw(config.report_fd)) };
    let reporter = Arc::new(Reporter::new(report, config.trace));
    end_process_on_panic(&reporter);

    let result = prepare_process(&config)
        .and_then(|()| machine::build(&config, &reporter))
        .and_then(|machine| machine::run(machine, supervisor, &reporter));
    let (end, code) = match result {
        Ok(end) => (end, 0),
        Err(error) => (End::VmmError { message: machine::describe(&error) }, 1),
    };
    reporter.send(&Report::End(end));
    // Other threads run on; leaving by return would not wait for them either, but would run destructors under them.
    std::process::exit(code)
}

fn read_config() -> Result<MachineConfig, String> {
    let usage = "usage: bulkhead-vmm --config-fd N (started by bulkhead, not by hand)";
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let fd: RawFd = match arguments.as_slice() {
        [flag, fd] if flag == "--config-fd" => fd.parse().map_err(|_| usage.to_owned())?,
        _ => return Err(usage.to_owned()),
    };
    if fd < 3 {
        return Err(usage.to_owned());
    }
    // SAFETY: the supervisor has opened the descriptor for this alone; one that is not open fails to be read.
    let file = unsafe { File::from_raw_fd(fd) };
    let mut text = String::new();
    file.take(CONFIG_MAX)
        .read_to_string(&mut text)
        .map_err(|error| format!("cannot read the machine's description from descriptor {fd}: {error}"))?;
    serde_json::from_str(&text).map_err(|error| format!("cannot understand the machine's description: {error}"))
}

/// A panic anywhere is the VMM's own failure: it ends the machine at once, whatever thread it is in.
fn end_process_on_panic(reporter: &Arc<Reporter>) {
    let reporter = Arc::clone(reporter);
    std::panic::set_hook(Box::new(move |info| {
        let place = info.location().map(ToString::to_string).unwrap_or_default();
        let message = format!("internal error of the VMM at {place}: {}", info.payload_as_str().unwrap_or("panic"));
        reporter.send(&Report::End(End::VmmError { message }));
        std::process::abort();
    }));
}

/// What the process itself needs before anything else.
fn prepare_process(config: &MachineConfig) -> Result<(), machine::MachineError> {
    let host =
        |doing: &'static str| move |errno: nix::Error| machine::MachineError::Host { doing, source: errno.into() };
    prctl::set_pdeathsig(Signal::SIGKILL).map_err(host("tie itself to the supervisor"))?;
    // Ctrl-C on the caller's terminal is for the container. A process that leads a group already needs no session.
    let _ = nix::unistd::setsid();
    // A guest that writes past the limit on file sizes gets an error, not a dead machine.
    // SAFETY: ignoring a signal installs no handler that could run.
    unsafe { signal(Signal::SIGXFSZ, SigHandler::SigIgn) }.map_err(host("ignore SIGXFSZ"))?;
    let mut kept = vec![
        config.kvm_fd,
        config.kernel_fd,
        config.initramfs_fd,
        config.vsock.listener_fd,
        config.vsock.agent_fd,
        config.console_fd,
        config.report_fd,
        config.control_fd,
    ];
    kept.extend(config.nets.iter().flat_map(|net| net.link.descriptors()));
    kept.extend(config.disks.iter().map(|disk| disk.fd));
    jail::close_all_but(&kept)
        .map_err(|source| machine::MachineError::Host { doing: "close leaked descriptors", source })?;
    // Standard input and output are nodes of the host's /dev; standard error is not. Closed, they would be opened again.
    let stderr = rustix::stdio::stderr();
    rustix::stdio::dup2_stdin(stderr)
        .and_then(|()| rustix::stdio::dup2_stdout(stderr))
        .map_err(|errno| machine::MachineError::Host { doing: "let go of the null device", source: errno.into() })?;
    // The file server holds a descriptor for each file that the guest knows.
    let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE).map_err(host("read the limit of open files"))?;
    setrlimit(Resource::RLIMIT_NOFILE, hard, hard).map_err(host("raise the limit of open files"))?;
    // Modes come from the guest, which has applied its own mask.
    umask(Mode::empty());
    Ok(())
}
