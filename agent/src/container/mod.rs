// SPDX-License-Identifier: Apache-2.0
//! The container engine.
//!
//! # How a container is made
//!
//! ```text
//! agent                                         the container's first process
//!   check the request, enter the shared trees,
//!   make the cgroup and the pipes
//!   clone3 into new namespaces and the cgroup ─> root file system, mounts, devices, terminal, hidden paths,
//!                                                pivot_root, limits, credentials, look the program up
//!   <──────────────────────────── ready, or why not
//!   wait for the host's streams, start the pumps
//!   start ────────────────────────────────────> execve
//!   <──────────────────────────── closed (executed), or why not
//! ```
//!
//! A process that is exec'd in a running container goes the same way from `ready` on; how it gets into the container is
//! told in `join.rs`.
//!
//! A container that could not be made, or whose program could not be executed by the same request, leaves nothing behind.

mod attributes;
mod cgroup;
mod channel;
mod common_pids;
mod control;
mod devices;
mod engine;
mod error;
mod exec;
mod failure;
mod files;
mod hook;
mod id_map;
mod instance;
mod join;
mod launch;
mod listing;
mod notify;
mod proc_files;
mod process;
mod sandbox;
mod setup;
mod sockets;
mod spec;
mod stats;
mod sysctl;
mod trees;
mod update;

pub use cgroup::CgroupError;
pub(crate) use cgroup::MAX_CGROUP_DEPTH;
pub use control::OomKills;
pub use engine::{Engine, EngineConfig};
pub use error::{
    ControlError, CreateError, DeleteError, DeleteProcessError, ExecError, FindError, LaunchError, NoSuchContainer,
    NoSuchProcess, ReadyError, ResizeError, SignalError, StartError,
};
pub use failure::{Failure, Stage};
pub use process::Exit;
pub use sandbox::SandboxSpec;
pub use spec::{ContainerSpec, ProcessSpec, SpecError, TerminalSize};

pub(crate) use id_map::IdMappings;
pub(crate) use sockets::HostSockets;
pub(crate) use spec::{Capabilities, Mount, MountSource, StdioSpec, TmpfsSpec};
