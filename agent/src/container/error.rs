// SPDX-License-Identifier: Apache-2.0
//! What can go wrong with each of the engine's operations.

use std::io;

use super::{CgroupError, Failure, SpecError};
use crate::storage::ShareError;

/// The engine has no container of this id.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("container does not exist: {0:?}")]
pub struct NoSuchContainer(pub String);

/// A container has no exec'd process of this id.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("process does not exist: {exec_id:?} in container {id:?}")]
pub struct NoSuchProcess {
    /// The process.
    pub exec_id: String,
    /// The container.
    pub id: String,
}

/// Why a process could not be found.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum FindError {
    /// There is no such container.
    #[error(transparent)]
    Container(#[from] NoSuchContainer),
    /// There is no such process in it.
    #[error(transparent)]
    Process(#[from] NoSuchProcess),
}

/// Why a container could not be made.
#[derive(Debug, thiserror::Error)]
pub enum CreateError {
    /// The request does not describe a container.
    #[error("the request is not valid")]
    Spec(#[from] SpecError),
    /// Another container has the id.
    #[error("container id {0:?} is in use")]
    IdInUse(String),
    /// Somebody wanted it gone before it was there.
    #[error("container {0} has been deleted while it was being made")]
    Deleted(String),
    /// A shared tree cannot be used.
    #[error(transparent)]
    Share(#[from] ShareError),
    /// A tmpfs that containers have in common cannot be had.
    #[error("cannot make the sandbox's tmpfs {name:?}")]
    Tmpfs {
        /// Its name.
        name: String,
        /// Why.
        source: io::Error,
    },
    /// A socket in the place of one of the host's cannot be made.
    #[error("cannot make the socket for {destination}")]
    Socket {
        /// Where it is to be bound.
        destination: String,
        /// Why.
        source: io::Error,
    },
    /// The pid namespace that containers share cannot be made or entered.
    #[error("cannot enter the pid namespace that the containers share")]
    CommonPids(#[source] io::Error),
    /// The cgroup cannot be made or set.
    #[error(transparent)]
    Cgroup(#[from] CgroupError),
    /// Its first process could not be made or started.
    #[error(transparent)]
    Launch(#[from] LaunchError),
}

/// Why a process could not be made, set up or started.
#[derive(Debug, thiserror::Error)]
pub enum LaunchError {
    /// Its pipes or its terminal cannot be made or used.
    #[error("cannot make the process's standard streams")]
    Stdio(#[source] io::Error),
    /// It cannot be made.
    #[error("cannot make the process")]
    Clone(#[source] io::Error),
    /// The agent and the process cannot talk.
    #[error("cannot talk with the process that is being set up")]
    Channel(#[source] io::Error),
    /// It could not be set up, or its program could not be executed.
    #[error(transparent)]
    Failed(#[from] Failure),
    /// It ended before it was set up.
    #[error("the process ended with status {code} while it was being set up")]
    Ended {
        /// Exit code, or 128 + signal.
        code: u8,
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
    /// Its process could not be started.
    #[error(transparent)]
    Launch(#[from] LaunchError),
}

/// Why a process could not be exec'd in a container.
#[derive(Debug, thiserror::Error)]
pub enum ExecError {
    /// There is no such container.
    #[error(transparent)]
    NoSuchContainer(#[from] NoSuchContainer),
    /// The request does not describe a process.
    #[error("the request is not valid")]
    Spec(#[from] SpecError),
    /// It would have the name of the container's init.
    #[error("the exec id is empty")]
    NoId,
    /// Another process of the container has the id.
    #[error("exec id {exec_id:?} is in use in container {id:?}")]
    IdInUse {
        /// The process.
        exec_id: String,
        /// The container.
        id: String,
    },
    /// The container's init has ended.
    #[error("cannot exec in container {0:?}: it is stopped")]
    Stopped(String),
    /// The container's cgroup cannot be entered.
    #[error(transparent)]
    Cgroup(#[from] CgroupError),
    /// The process could not be made or started.
    #[error(transparent)]
    Launch(#[from] LaunchError),
}

/// Why an exec'd process could not be forgotten.
#[derive(Debug, thiserror::Error)]
pub enum DeleteProcessError {
    /// There is no such process.
    #[error(transparent)]
    Find(#[from] FindError),
    /// The container's init goes with the container.
    #[error("the init of container {0:?} is deleted with the container")]
    Init(String),
    /// It has not ended.
    #[error("cannot delete process {exec_id:?} of container {id:?}: it is running")]
    Running {
        /// The process.
        exec_id: String,
        /// The container.
        id: String,
    },
}

/// Why a container could not be paused, resumed, changed or looked at.
#[derive(Debug, thiserror::Error)]
pub enum ControlError {
    /// There is no such container.
    #[error(transparent)]
    NoSuchContainer(#[from] NoSuchContainer),
    /// The container's init has ended.
    #[error("cannot {action} container {id:?}: it is stopped")]
    Stopped {
        /// What was to be done.
        action: &'static str,
        /// The container.
        id: String,
    },
    /// The request is wrong.
    #[error("the request is not valid")]
    Spec(#[from] SpecError),
    /// The kernel would not do it.
    #[error(transparent)]
    Cgroup(#[from] CgroupError),
    /// It was not done in time.
    #[error("the processes of container {id:?} are not frozen after {seconds} s")]
    NotFrozen {
        /// The container.
        id: String,
        /// How long was waited.
        seconds: u64,
    },
}

/// Why there is no waiting for a container to be ready.
#[derive(Debug, thiserror::Error)]
pub enum ReadyError {
    /// There is no such container.
    #[error(transparent)]
    NoSuchContainer(#[from] NoSuchContainer),
    /// It was made without a socket to tell it at.
    #[error("container {0:?} has no notification socket")]
    NoSocket(String),
}

/// Why a process could not be signalled.
#[derive(Debug, thiserror::Error)]
pub enum SignalError {
    /// There is no such process.
    #[error(transparent)]
    Find(#[from] FindError),
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
    /// There is no such process.
    #[error(transparent)]
    Find(#[from] FindError),
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
