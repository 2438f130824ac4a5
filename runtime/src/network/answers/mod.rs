// SPDX-License-Identifier: Apache-2.0
//! Answers to what a process asks servers of the name service from within a container's network namespace on the host, where all
//! frames are the guest's: docker's resolver does so for names that it does not know itself.
//!
//! A program, which the kernel asks for each frame that comes in, keeps those that belong to a socket of the namespace and come
//! from the port of the name service. For the namespace's own stack to send anything, it has to hear how neighbours answer, too;
//! their questions are left to the guest, which has the same addresses.

mod program;

use std::io;

use bulkhead_bpf::{Kind, Program};
use bulkhead_netlink::Socket;

use super::redirect;

/// What the program is called where filters are listed.
const NAME: &str = "answers";

/// Lets answers in at the interface `link`, which is joined to `tap`; it is undone as that is.
pub(super) fn let_in(socket: &mut Socket, link: i32, tap: i32) -> io::Result<()> {
    let program = Program::load(Kind::TrafficFilter, NAME, &program::assemble(tap))?;
    redirect::ask_first(socket, link, &program, NAME)
}
