// SPDX-License-Identifier: Apache-2.0
//! The wire types between the host's supervisor and the guest's agent, and the constants of their vsock connections.
//!
//! # Connections
//!
//! | who connects | vsock port | what flows |
//! | --- | --- | --- |
//! | agent to host (CID 2) | [`AGENT_PORT`] | ttrpc; the agent is the server. Opened once, when the agent is ready. |
//! | host to agent | [`STREAM_PORT`] | one stream of a process, or one connection; the host first sends its [stream id](STREAM_ID_LEN). |
//!
//! A stream carries raw bytes. For stdin, the host shuts its sending side down at end of file; for stdout and stderr
//! the agent closes at end of file. What a stream does that stands for a connection is told in [`splice`].

#![allow(
    missing_docs,
    missing_debug_implementations,
    unreachable_pub,
    clippy::all,
    clippy::pedantic,
    clippy::restriction,
    reason = "generated code"
)]

/// The host's port that the agent connects to when it is ready to serve.
pub const AGENT_PORT: u32 = 1024;

/// The guest's port that accepts streams.
pub const STREAM_PORT: u32 = 1025;

/// The guest's context id: every sandbox has its own vsock device, so all use the same.
pub const GUEST_CID: u64 = 3;

/// Length of the header of a stream connection: the stream id, a little-endian `u32` that is not 0.
pub const STREAM_ID_LEN: usize = 4;

/// How many descriptors a process can be given beside its standard streams.
pub const MAX_PRESERVED: u32 = 32;

/// The ttrpc code of an error whose details name a program that does not exist (exit status 127).
pub const ERROR_PROGRAM_NOT_FOUND: ttrpc::Code = ttrpc::Code::NOT_FOUND;

/// The ttrpc code of an error whose details name a program that cannot be executed (exit status 126).
pub const ERROR_PROGRAM_NOT_EXECUTABLE: ttrpc::Code = ttrpc::Code::PERMISSION_DENIED;

/// The ttrpc code of an error that says that the process, to which a signal was to be sent, has ended.
pub const ERROR_PROCESS_FINISHED: ttrpc::Code = ttrpc::Code::ABORTED;

pub mod notification;
pub mod splice;

mod generated {
    include!(concat!(env!("OUT_DIR"), "/modules.rs"));
}

pub use generated::{agent, agent_ttrpc};
