// SPDX-License-Identifier: Apache-2.0
//! What a process has from descriptor 3 on: in the place of each descriptor of the host's that it is given, a pipe or a socket
//! of the guest's, whose other end is joined with a stream.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use bulkhead_protocol::MAX_PRESERVED;
use rustix::io::fcntl_dupfd_cloexec;
use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};

use super::{FdStream, Pumps, pump, stdio};
use crate::container::{Failure, Stage};
use crate::sys;

/// The number of the first.
const FIRST: i32 = 3;

/// The first number that none of them can have.
const FIRST_BEYOND: i32 = FIRST + MAX_PRESERVED.cast_signed();

/// What one is to be, and the stream that it is joined with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum PreservedSpec {
    Null,
    Input(u32),
    Output(u32),
    Connection(u32),
}

impl PreservedSpec {
    /// The host's name for the stream.
    pub(crate) fn stream(self) -> Option<u32> {
        match self {
            Self::Null => None,
            Self::Input(id) | Self::Output(id) | Self::Connection(id) => Some(id),
        }
    }
}

/// The agent's end of one that is joined with a stream.
#[derive(Debug)]
pub(crate) enum AgentPreserved {
    Input(OwnedFd),
    Output(OwnedFd),
    Connection(OwnedFd),
}

/// The process's ends, and the agent's of those that have one.
pub(crate) type Ends = (Vec<OwnedFd>, Vec<Option<AgentPreserved>>);

/// Makes them, owned by the process's user.
pub(crate) fn make(specs: &[PreservedSpec], uid: u32) -> io::Result<Ends> {
    let (mut child, mut agent) = (Vec::new(), Vec::new());
    for spec in specs {
        let (its, ours) = make_one(*spec, uid)?;
        child.push(beyond(its)?);
        agent.push(ours);
    }
    Ok((child, agent))
}

fn make_one(spec: PreservedSpec, uid: u32) -> io::Result<(OwnedFd, Option<AgentPreserved>)> {
    Ok(match spec {
        PreservedSpec::Null => (stdio::null()?, None),
        PreservedSpec::Input(_) => {
            let (read, write) = stdio::pipe_of(uid)?;
            (read, Some(AgentPreserved::Input(write)))
        }
        PreservedSpec::Output(_) => {
            let (read, write) = stdio::pipe_of(uid)?;
            (write, Some(AgentPreserved::Output(read)))
        }
        PreservedSpec::Connection(_) => {
            let (its, ours) = socketpair(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC, None)?;
            (its, Some(AgentPreserved::Connection(ours)))
        }
    })
}

/// The same open file by a number that [`install`] leaves alone; the other one is closed.
pub(crate) fn beyond(descriptor: OwnedFd) -> io::Result<OwnedFd> {
    Ok(fcntl_dupfd_cloexec(&descriptor, FIRST_BEYOND)?)
}

/// Makes them the calling process's descriptors from 3 on, as the last thing that needs a descriptor before its program.
pub(crate) fn install(preserved: &[OwnedFd]) -> Result<(), Failure> {
    for (number, descriptor) in (FIRST..).zip(preserved) {
        sys::put_at(descriptor, number)
            .map_err(|error| Failure::new(Stage::Stdio, format!("put descriptor {number} in its place"), error))?;
    }
    Ok(())
}

/// Joins one with its stream.
pub(crate) fn serve(end: AgentPreserved, stream: FdStream, pumps: &Pumps) -> io::Result<()> {
    match end {
        AgentPreserved::Input(pipe) => pumps.spawn_input(pump::input(stream, FdStream::new(pipe)?)),
        AgentPreserved::Output(pipe) => {
            let pipe = FdStream::new(pipe)?;
            pumps.spawn_output(|drain| pump::output(pipe, stream, drain));
        }
        AgentPreserved::Connection(socket) => {
            let (socket, stream) = (Arc::new(FdStream::new(socket)?), Arc::new(stream));
            pumps.spawn_input(pump::received(Arc::clone(&stream), Arc::clone(&socket)));
            pumps.spawn_output(|drain| pump::sent(socket, stream, drain));
        }
    }
    Ok(())
}
