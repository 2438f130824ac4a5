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
//! A container that could not be made, or whose program could not be executed by the same request, leaves nothing behind.

mod cgroup;
mod channel;
mod devices;
mod engine;
mod error;
mod failure;
mod instance;
mod setup;
mod spec;
mod sysctl;

pub use cgroup::CgroupError;
pub use engine::{Engine, EngineConfig};
pub use error::{CreateError, DeleteError, NoSuchContainer, ResizeError, SignalError, StartError};
pub use failure::{Failure, Stage};
pub use instance::Exit;
pub use spec::{ContainerSpec, SpecError, TerminalSize};

pub(crate) use spec::{Capabilities, Mount, MountSource, ProcessSpec, StdioSpec};
