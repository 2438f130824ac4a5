// SPDX-License-Identifier: Apache-2.0
//! What can go wrong with each of the engine's operations.

use std::io;

use super::{CgroupError, Failure, SpecError};
use crate::storage::ShareError;

/// The engine has no container of this id.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("container does not exist: {0:?}")]
pub struct NoSuchContainer(pub String);

/// Why a container could not be made.
#[derive(Debug, thiserror::Error)]
pub enum CreateError {
    /// The request does not describe a container.
    #[error("the request is not valid")]
    Spec(#[from] SpecError),
    /// Another container has the id.
    #[error("container id {0:?} is in use")]
    IdInUse(String),
    /// A shared tree cannot be used.
    #[error(transparent)]
    Share(#[from] ShareError),
    /// The cgroup cannot be made or set.
    #[error(transparent)]
    Cgroup(#[from] CgroupError),
    /// The pipes of its standard streams cannot be made.
    #[error("cannot make the process's standard streams")]
    Stdio(#[source] io::Error),
    /// The process cannot be made.
    #[error("cannot make the container's first process")]
    Clone(#[source] io::Error),
    /// The agent and the process cannot talk.
    #[error("cannot talk with the container's first process")]
    Channel(#[source] io::Error),
    /// The process could not be set up.
    #[error(transparent)]
    Setup(#[from] Failure),
    /// The process ended before it was set up.
    #[error("the container's first process ended with status {code} while it was being set up")]
    Ended {
        /// Exit code, or 128 + signal.
        code: u8,
    },
    /// The container was made and could not be started.
    #[error(transparent)]
    Start(#[from] StartError),
}

/// Why a container could not be started.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// There is no such container.
    #[error(transparent)]
    NoSuchContainer(#[from] NoSuchContainer),
    /// It is not waiting to be started.
    #[error("cannot start container {id:?}: it is {state}")]
    NotCreated {
        /// The container.
        id: String,
        /// `running` or `stopped`.
        state: &'static str,
    },
    /// The host did not open a stream in time.
    #[error("the host has not opened stream {id} ({name}) within {seconds} s")]
    NoStream {
        /// The stream.
        id: u32,
        /// What the stream is for.
        name: &'static str,
        /// How long was waited.
        seconds: u64,
    },
    /// A pipe or terminal cannot be used.
    #[error("cannot use the process's standard streams")]
    Stdio(#[source] io::Error),
    /// The agent and the process cannot talk.
    #[error("cannot talk with the container's first process")]
    Channel(#[source] io::Error),
    /// The program could not be executed.
    #[error(transparent)]
    Exec(#[from] Failure),
}

/// Why a process could not be signalled.
#[derive(Debug, thiserror::Error)]
pub enum SignalError {
    /// There is no such container.
    #[error(transparent)]
    NoSuchContainer(#[from] NoSuchContainer),
    /// It has ended.
    #[error("process already finished")]
    Finished,
    /// There is no such signal.
    #[error("{0} is not a signal number: expected 1 to 64")]
    BadSignal(u32),
    /// The container's processes cannot be listed or killed.
    #[error(transparent)]
    Cgroup(#[from] CgroupError),
    /// The system refused.
    #[error("cannot send signal {signal}")]
    Kill {
        /// The signal.
        signal: i32,
        /// Why.
        source: io::Error,
    },
}

/// Why a terminal could not be resized.
#[derive(Debug, thiserror::Error)]
pub enum ResizeError {
    /// There is no such container.
    #[error(transparent)]
    NoSuchContainer(#[from] NoSuchContainer),
    /// Its process has pipes.
    #[error("the process has no terminal")]
    NoTerminal,
    /// The size cannot be a terminal's.
    #[error(transparent)]
    Size(#[from] SpecError),
    /// The system refused.
    #[error("cannot resize the terminal")]
    Resize(#[source] io::Error),
}

/// Why a container could not be deleted. It is still there, and deleting can be tried again.
#[derive(Debug, thiserror::Error)]
pub enum DeleteError {
    /// There is no such container.
    #[error(transparent)]
    NoSuchContainer(#[from] NoSuchContainer),
    /// It cannot be killed.
    #[error("cannot kill the container's processes")]
    Kill(#[from] SignalError),
    /// It was killed and does not end.
    #[error("the container's first process has not ended {seconds} s after it was killed")]
    StillRunning {
        /// How long was waited.
        seconds: u64,
    },
    /// Its cgroup cannot be removed.
    #[error(transparent)]
    Cgroup(#[from] CgroupError),
    /// Its files cannot be written back to the host.
    #[error(transparent)]
    Share(#[from] ShareError),
}
