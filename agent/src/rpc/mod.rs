// SPDX-License-Identifier: Apache-2.0
//! The service that the host calls. Its methods decode, call the engine once, and map the result.

mod connection;
mod service;
mod status;

pub(crate) use connection::serve_until_closed;
pub use service::AgentService;
pub use status::error_chain;
