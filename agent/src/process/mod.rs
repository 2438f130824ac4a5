// SPDX-License-Identifier: Apache-2.0
//! A container's process: what it reads and writes, who it is, what it may use, what it executes, how it ends.

mod apart;
pub(crate) mod credentials;
pub(crate) mod exec;
mod fd_stream;
pub(crate) mod preserved;
pub(crate) mod pump;
mod pumps;
mod reaper;
pub(crate) mod rlimits;
pub(crate) mod scheduling;
pub(crate) mod seccomp;
pub(crate) mod stdio;
mod streams;
pub(crate) mod terminal;
pub(crate) mod users;

pub(crate) use apart::{apart, read_apart};
pub use fd_stream::FdStream;
pub(crate) use pumps::Pumps;
pub use reaper::{ExitStatus, Reaper};
pub use streams::{StreamTable, StreamTableFull};
