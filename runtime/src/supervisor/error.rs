// SPDX-License-Identifier: Apache-2.0
//! Why a run failed, and the exit status that says so.

use std::fmt;
use std::io;
use std::path::PathBuf;
use std::time::Duration;

use thiserror::Error;

use super::agent::{AgentError, Refusal};
use super::console::ConsoleError;
use super::machine_cpus::OnlineError;
use super::machine_memory::GrowError;
use super::pod::DiskError;
use super::signals::Received;
use super::state::StateDirError;
use super::streams::{OpenStreamError, PreservedError};
use super::terminal::TerminalError;
use super::vmm::SpawnVmmError;
use super::vmm_control::ControlError;
use crate::cgroup::HostCgroupError;
use crate::hooks::HookError;
use crate::install::{FindPartsError, OpenPartError};
use crate::network::NetworkError;
use crate::network::user::PasstError;
use crate::notify::NotifyError;
use crate::resctrl::ResctrlError;
use crate::spec::SpecError;

/// How far a sandbox has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Phase {
    /// Its guest boots.
    Booting,
    /// Its agent makes the container.
    Starting,
    /// The container runs.
    Running,
    /// The container has ended.
    Draining,
}

/// A sandbox that ended before its container, or took it along.
#[derive(Debug)]
pub(crate) struct Loss {
    pub(crate) phase: Phase,
    pub(crate) cause: String,
    /// The end of the guest's console, one clean line.
    pub(crate) console: String,
}

impl fmt::Display for Loss {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(&self.cause)?;
        console(formatter, &self.console)
    }
}

fn console(formatter: &mut fmt::Formatter<'_>, tail: &str) -> fmt::Result {
    if tail.is_empty() { Ok(()) } else { write!(formatter, "; its console ends with: {tail}") }
}

/// A container that could not be started, or was lost.
#[derive(Debug, Error)]
pub(crate) enum RunError {
    #[error("cannot create the trace file {}", path.display())]
    Trace { path: PathBuf, source: io::Error },
    #[error("cannot receive signals")]
    Signals(#[source] io::Error),
    #[error("cannot set up the event loop")]
    EventLoop(#[source] io::Error),
    #[error("cannot make the mount namespace in which engines find the container's files")]
    Face(#[source] io::Error),
    #[error("cannot make a thread that reads the configuration")]
    Thread(#[source] io::Error),
    #[error("cannot find out the current folder")]
    Paths(#[source] io::Error),
    #[error(transparent)]
    Console(#[from] ConsoleError),
    #[error("the caller was gone before the container was created")]
    CallerGone,
    #[error(transparent)]
    Spec(#[from] SpecError),
    #[error(transparent)]
    Terminal(#[from] TerminalError),
    #[error(transparent)]
    FindParts(#[from] FindPartsError),
    #[error(transparent)]
    OpenPart(#[from] OpenPartError),
    #[error(transparent)]
    StateDir(#[from] StateDirError),
    #[error(transparent)]
    HostCgroup(#[from] HostCgroupError),
    #[error(transparent)]
    Resctrl(#[from] ResctrlError),
    #[error(transparent)]
    Network(#[from] NetworkError),
    #[error(transparent)]
    Passt(#[from] PasstError),
    #[error("cannot enter the container's network namespace")]
    NetworkNamespace(#[source] io::Error),
    #[error("cannot make namespaces for the hooks of hooks.createContainer")]
    HookNamespaces(#[source] io::Error),
    #[error("cannot set the guest's network up")]
    ConfigureNetwork(#[source] AgentError),
    #[error("cannot set up what the pod's containers share")]
    ConfigureSandbox(#[source] AgentError),
    #[error("cannot find the host's block devices in the guest")]
    FindDisks(#[source] AgentError),
    #[error(transparent)]
    Disk(#[from] DiskError),
    #[error(transparent)]
    Control(#[from] ControlError),
    #[error(transparent)]
    Memory(#[from] GrowError),
    #[error(transparent)]
    Cpus(#[from] OnlineError),
    #[error("the pod's machine has ended")]
    PodGone,
    #[error("the container is to see the processes of another one of its pod, which has them to itself")]
    ForeignPids,
    #[error(transparent)]
    Hook(#[from] HookError),
    #[error(transparent)]
    SpawnVmm(#[from] SpawnVmmError),
    #[error(transparent)]
    Preserved(#[from] PreservedError),
    #[error(transparent)]
    Notify(#[from] NotifyError),
    #[error(transparent)]
    OpenStream(#[from] OpenStreamError),
    #[error("cannot make the mount point {} in the root file system {}", path.display(), rootfs.display())]
    MountPoint { path: PathBuf, rootfs: PathBuf, source: io::Error },
    #[error("cannot write the pid file {}", path.display())]
    PidFile { path: PathBuf, source: io::Error },
    #[error("cannot start the container")]
    Create(#[source] AgentError),
    #[error("cannot write the container's files back to the host")]
    Delete(#[source] AgentError),
    #[error(transparent)]
    Agent(AgentError),
    #[error("{0} came before the container was started")]
    Interrupted(Received),
    #[error("{0} came before the container's last output was delivered and its files were written back")]
    InterruptedDrain(Received),
    #[error("{0}")]
    Lost(Loss),
    #[error("{}", deadline(*.phase, *.timeout, .console))]
    Deadline { phase: Phase, timeout: Duration, console: String },
}

fn deadline(phase: Phase, timeout: Duration, tail: &str) -> String {
    struct Tail<'a>(&'a str);
    impl fmt::Display for Tail<'_> {
        fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
            console(formatter, self.0)
        }
    }
    let what = match phase {
        Phase::Booting => "the guest's agent did not answer",
        _ => "the guest's agent did not start the container",
    };
    let limit = "BULKHEAD_BOOT_TIMEOUT_MS";
    format!("{what} within {} ms (limit: {limit}){}", timeout.as_millis(), Tail(tail))
}

impl RunError {
    /// The exit status of `bulkhead run`: 127 for a program that is not there, 126 for one that cannot be executed,
    /// 128 + n for signal n, 137 for a container that was lost with its sandbox (it has been killed, after all), and 1
    /// for anything else.
    pub(crate) fn exit_status(&self) -> u8 {
        match self {
            Self::Create(AgentError::Refused { kind: Refusal::ProgramNotFound, .. }) => 127,
            Self::Create(AgentError::Refused { kind: Refusal::ProgramNotExecutable, .. }) => 126,
            Self::Interrupted(signal) | Self::InterruptedDrain(signal) => signal.exit_status(),
            Self::Lost(Loss { phase: Phase::Running | Phase::Draining, .. }) => 137,
            _ => 1,
        }
    }

    /// Whether the machine may be gone.
    pub(crate) fn is_lost_connection(&self) -> bool {
        matches!(
            self,
            Self::Create(AgentError::Lost)
                | Self::ConfigureNetwork(AgentError::Lost)
                | Self::FindDisks(AgentError::Lost)
                | Self::Delete(AgentError::Lost)
                | Self::Agent(AgentError::Lost)
                | Self::OpenStream(_)
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::text::chain;

    #[test]
    fn exit_statuses_say_what_happened() {
        let refused = |kind| RunError::Create(AgentError::Refused { message: "m".into(), kind });
        let lost = |phase| RunError::Lost(Loss { phase, cause: "c".into(), console: String::new() });

        assert_eq!(refused(Refusal::ProgramNotFound).exit_status(), 127);
        assert_eq!(refused(Refusal::ProgramNotExecutable).exit_status(), 126);
        assert_eq!(refused(Refusal::Other).exit_status(), 1);
        assert_eq!(RunError::Interrupted(nix::sys::signal::Signal::SIGINT.into()).exit_status(), 130);
        assert_eq!(lost(Phase::Booting).exit_status(), 1);
        assert_eq!(lost(Phase::Running).exit_status(), 137);
    }

    #[test]
    fn a_loss_quotes_the_console_if_it_said_something() {
        let lost = |console: &str| {
            chain(&RunError::Lost(Loss { phase: Phase::Booting, cause: "it broke".into(), console: console.into() }))
        };

        assert_eq!(lost(""), "it broke");
        assert_eq!(lost("a | b"), "it broke; its console ends with: a | b");
    }

    #[test]
    fn a_deadline_says_which_and_how_to_change_it() {
        let error = RunError::Deadline { phase: Phase::Booting, timeout: Duration::from_secs(2), console: "x".into() };

        assert_eq!(
            chain(&error),
            "the guest's agent did not answer within 2000 ms (limit: BULKHEAD_BOOT_TIMEOUT_MS); its console ends with: x"
        );
    }
}
