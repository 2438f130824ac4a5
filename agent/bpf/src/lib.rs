// SPDX-License-Identifier: Apache-2.0
//! The little of bpf(2) that the runtime and the agent speak: programs are loaded and attached here; what they decide is the
//! callers'. Numbers are those of <linux/bpf.h>.

mod program;
mod socket_map;
mod sys;

pub use program::{INSTRUCTION_LEN, Kind, Link, Program};
pub use socket_map::SocketMap;
