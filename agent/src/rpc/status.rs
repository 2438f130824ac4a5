// SPDX-License-Identifier: Apache-2.0
//! The engine's errors as ttrpc statuses: a code by which the host decides, and a line that a person reads.

use std::error::Error;

use bulkhead_protocol::{ERROR_PROCESS_FINISHED, ERROR_PROGRAM_NOT_EXECUTABLE, ERROR_PROGRAM_NOT_FOUND};
use ttrpc::Code;

use crate::container::{
    CgroupError, ControlError, CreateError, DeleteError, DeleteProcessError, ExecError, Failure, FindError,
    LaunchError, NoSuchContainer, ReadyError, ResizeError, SignalError, SpecError, Stage, StartError,
};
use crate::cpus::CpuError;
use crate::disks::DiskError;
use crate::memory::MemoryError;
use crate::network::{ConnectSpecError, NetworkError, NetworkFailures};

/// The error and what caused it, on one line.
pub fn error_chain(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(inner) = cause {
        text.push_str(": ");
        text.push_str(&inner.to_string());
        cause = inner.source();
    }
    text
}

/// An error that the host gets as a status.
pub(super) trait ToStatus: Error + Sized {
    /// What kind of error it is.
    fn code(&self) -> Code;

    /// The error as ttrpc sends it.
    fn into_status(self) -> ttrpc::Error {
        ttrpc::Error::RpcStatus(ttrpc::get_status(self.code(), error_chain(&self)))
    }
}

impl ToStatus for SpecError {
    fn code(&self) -> Code {
        Code::INVALID_ARGUMENT
    }
}

impl ToStatus for ConnectSpecError {
    fn code(&self) -> Code {
        Code::INVALID_ARGUMENT
    }
}

impl ToStatus for NetworkError {
    fn code(&self) -> Code {
        Code::INTERNAL
    }
}

impl ToStatus for NetworkFailures {
    fn code(&self) -> Code {
        Code::INTERNAL
    }
}

impl ToStatus for DiskError {
    fn code(&self) -> Code {
        Code::INTERNAL
    }
}

impl ToStatus for CpuError {
    fn code(&self) -> Code {
        Code::INTERNAL
    }
}

impl ToStatus for MemoryError {
    fn code(&self) -> Code {
        match self {
            Self::Unaligned { .. } => Code::INVALID_ARGUMENT,
            Self::BlockSize { .. } | Self::Probe { .. } => Code::INTERNAL,
        }
    }
}

impl ToStatus for NoSuchContainer {
    fn code(&self) -> Code {
        Code::NOT_FOUND
    }
}

impl ToStatus for Failure {
    fn code(&self) -> Code {
        match self.stage {
            Stage::ProgramNotFound => ERROR_PROGRAM_NOT_FOUND,
            Stage::ProgramNotExecutable => ERROR_PROGRAM_NOT_EXECUTABLE,
            _ => Code::INTERNAL,
        }
    }
}

impl ToStatus for FindError {
    fn code(&self) -> Code {
        Code::NOT_FOUND
    }
}

impl ToStatus for LaunchError {
    fn code(&self) -> Code {
        match self {
            Self::Failed(failure) => failure.code(),
            Self::NoStream { .. } => Code::DEADLINE_EXCEEDED,
            Self::Stdio(_) | Self::Clone(_) | Self::Channel(_) | Self::Ended { .. } => Code::INTERNAL,
        }
    }
}

impl ToStatus for CreateError {
    fn code(&self) -> Code {
        match self {
            Self::Spec(error) => error.code(),
            Self::IdInUse(_) => Code::ALREADY_EXISTS,
            Self::Deleted(_) => Code::ABORTED,
            Self::Launch(error) => error.code(),
            Self::Share(_) | Self::Cgroup(_) | Self::Tmpfs { .. } | Self::Socket { .. } | Self::CommonPids(_) => {
                Code::INTERNAL
            }
        }
    }
}

impl ToStatus for StartError {
    fn code(&self) -> Code {
        match self {
            // Not NOT_FOUND: in the answers to a start, that is a missing program.
            Self::NoSuchContainer(_) | Self::NotCreated { .. } => Code::FAILED_PRECONDITION,
            Self::Launch(error) => error.code(),
        }
    }
}

impl ToStatus for ExecError {
    fn code(&self) -> Code {
        match self {
            // Not NOT_FOUND, as in the answers to a start.
            Self::NoSuchContainer(_) | Self::Stopped(_) => Code::FAILED_PRECONDITION,
            Self::Spec(error) => error.code(),
            Self::NoId => Code::INVALID_ARGUMENT,
            Self::IdInUse { .. } => Code::ALREADY_EXISTS,
            Self::Cgroup(CgroupError::Below { .. }) => Code::INVALID_ARGUMENT,
            Self::Cgroup(_) => Code::INTERNAL,
            Self::Launch(error) => error.code(),
        }
    }
}

impl ToStatus for DeleteProcessError {
    fn code(&self) -> Code {
        match self {
            Self::Find(error) => error.code(),
            Self::Init(_) => Code::INVALID_ARGUMENT,
            Self::Running { .. } => Code::FAILED_PRECONDITION,
        }
    }
}

impl ToStatus for ControlError {
    fn code(&self) -> Code {
        match self {
            Self::NoSuchContainer(error) => error.code(),
            Self::Stopped { .. } => Code::FAILED_PRECONDITION,
            Self::Spec(error) => error.code(),
            // The kernel decides which values a file takes.
            Self::Cgroup(CgroupError::Set { .. }) => Code::INVALID_ARGUMENT,
            Self::Cgroup(_) => Code::INTERNAL,
            Self::NotFrozen { .. } => Code::DEADLINE_EXCEEDED,
        }
    }
}

impl ToStatus for ReadyError {
    fn code(&self) -> Code {
        match self {
            Self::NoSuchContainer(error) => error.code(),
            Self::NoSocket(_) => Code::FAILED_PRECONDITION,
        }
    }
}

impl ToStatus for SignalError {
    fn code(&self) -> Code {
        match self {
            Self::Find(error) => error.code(),
            Self::Finished => ERROR_PROCESS_FINISHED,
            Self::BadSignal(_) => Code::INVALID_ARGUMENT,
            Self::Cgroup(_) | Self::Kill { .. } => Code::INTERNAL,
        }
    }
}

impl ToStatus for ResizeError {
    fn code(&self) -> Code {
        match self {
            Self::Find(error) => error.code(),
            Self::NoTerminal => Code::FAILED_PRECONDITION,
            Self::Size(error) => error.code(),
            Self::Resize(_) => Code::INTERNAL,
        }
    }
}

impl ToStatus for DeleteError {
    fn code(&self) -> Code {
        match self {
            Self::NoSuchContainer(error) => error.code(),
            Self::Kill(error) => error.code(),
            Self::StillRunning { .. } => Code::DEADLINE_EXCEEDED,
            Self::Cgroup(_) | Self::Share(_) => Code::INTERNAL,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn missing_program_has_its_own_code_on_all_ways_to_it() {
        let failure = Failure::explained(Stage::ProgramNotFound, "exec: \"x\": executable file not found in $PATH");
        let launch = || LaunchError::from(failure.clone());
        assert_eq!(CreateError::from(launch()).code(), ERROR_PROGRAM_NOT_FOUND);
        assert_eq!(StartError::from(launch()).code(), ERROR_PROGRAM_NOT_FOUND);
        assert_eq!(ExecError::from(launch()).code(), ERROR_PROGRAM_NOT_FOUND);
        assert_ne!(ExecError::from(NoSuchContainer("x".to_owned())).code(), ERROR_PROGRAM_NOT_FOUND);
        assert_ne!(StartError::from(NoSuchContainer("x".to_owned())).code(), ERROR_PROGRAM_NOT_FOUND);
    }

    #[test]
    fn status_holds_the_whole_chain() {
        let error = LaunchError::Clone(std::io::Error::from_raw_os_error(libc::EAGAIN));
        let ttrpc::Error::RpcStatus(status) = error.into_status() else { panic!("not a status") };
        assert!(status.message().starts_with("cannot make the process: Resource temporarily"));
    }
}
