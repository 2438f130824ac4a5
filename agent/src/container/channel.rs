// SPDX-License-Identifier: Apache-2.0
//! How the agent and a process that it is setting up talk, until the process executes its program.
//!
//! The channel is a pair of SOCK_SEQPACKET sockets; each message is a letter and what belongs to it. It closes when the
//! program is executed, which is how success shows.
//!
//! | letter | from | with | meaning |
//! | --- | --- | --- | --- |
//! | `M` | its maker | a pidfd, and the pid | an exec'd process has been made |
//! | `U` | agent | | the user namespace that the process is in has its mappings |
//! | `T` | process | a descriptor | the agent's end of the terminal |
//! | `R` | process | | set up, and waiting |
//! | `S` | agent | | execute the program |
//! | `F` | process | a [`Failure`] | could not be done; the process ends |

use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage,
    SendFlags, SocketFlags, SocketType, recv, recvmsg, sendmsg, socketpair,
};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

use super::{Failure, Stage};
use crate::process::preserved;
use crate::sys::{self, Child};

/// Longest message: a failure with a long subject.
const MAX_MESSAGE_LEN: usize = 16 << 10;

/// What the process tells the agent.
#[derive(Debug)]
pub(crate) enum Report {
    /// The process has been made, by another one than the agent.
    Made(Child),
    /// The agent's end of the terminal.
    Terminal(OwnedFd),
    /// Set up, and waiting to be started.
    Ready,
    /// Could not be done.
    Failed(Failure),
    /// The process has executed its program, or is gone.
    Closed,
}

/// The agent's end.
#[derive(Debug)]
pub(crate) struct AgentEnd {
    socket: AsyncFd<OwnedFd>,
}

/// The process's end. It closes on exec.
#[derive(Debug)]
pub(crate) struct ChildEnd {
    socket: OwnedFd,
}

/// A new channel.
pub(crate) fn pair() -> io::Result<(AgentEnd, ChildEnd)> {
    let (agent, child) = socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)?;
    // A failure is told by it after the process's descriptors have been put in their places.
    let child = preserved::beyond(child)?;
    Ok((AgentEnd { socket: sys::watch_descriptor(agent, Interest::READABLE)? }, ChildEnd { socket: child }))
}

impl AgentEnd {
    /// The next report.
    pub(crate) async fn receive(&self) -> io::Result<Report> {
        loop {
            let mut ready = self.socket.readable().await?;
            if let Ok(result) = ready.try_io(|socket| receive_now(socket.as_fd())) {
                return result;
            }
        }
    }

    /// Lets the process execute its program.
    pub(crate) fn start(&self) -> io::Result<()> {
        rustix::net::send(self.socket.get_ref(), b"S", SendFlags::NOSIGNAL)?;
        Ok(())
    }

    /// Tells the process that its user namespace has its mappings.
    pub(crate) fn mapped(&self) -> io::Result<()> {
        rustix::net::send(self.socket.get_ref(), b"U", SendFlags::NOSIGNAL)?;
        Ok(())
    }
}

fn receive_now(socket: BorrowedFd<'_>) -> io::Result<Report> {
    let mut bytes = vec![0; MAX_MESSAGE_LEN];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let flags = RecvFlags::CMSG_CLOEXEC | RecvFlags::DONTWAIT;
    let received = recvmsg(socket, &mut [IoSliceMut::new(&mut bytes)], &mut control, flags)?;
    let mut descriptor = None;
    for message in control.drain() {
        if let RecvAncillaryMessage::ScmRights(descriptors) = message {
            descriptor = descriptors.last();
        }
    }
    report(&bytes[..received.bytes], descriptor)
        .ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, "unknown message from the process being set up"))
}

fn report(message: &[u8], descriptor: Option<OwnedFd>) -> Option<Report> {
    match (message.split_first(), descriptor) {
        (None, None) => Some(Report::Closed),
        (Some((b'M', pid)), Some(pidfd)) => {
            let pid = i32::from_le_bytes(pid.try_into().ok()?);
            Some(Report::Made(Child { pid, pidfd }))
        }
        (Some((b'T', [])), Some(descriptor)) => Some(Report::Terminal(descriptor)),
        (Some((b'R', [])), None) => Some(Report::Ready),
        (Some((b'F', failure)), None) => Failure::decode(failure).map(Report::Failed),
        _ => None,
    }
}

impl ChildEnd {
    /// Says that the process is set up, and waits to be started.
    pub(crate) fn ready(&self) -> Result<(), Failure> {
        let failed = |error: rustix::io::Errno| Failure::new(Stage::Process, "wait to be started", error);
        rustix::net::send(&self.socket, b"R", SendFlags::NOSIGNAL).map_err(failed)?;
        self.hear().map_err(failed)
    }

    /// Waits until the user namespace that the process is in has its mappings.
    pub(crate) fn wait_for_mappings(&self) -> Result<(), Failure> {
        self.hear().map_err(|error| Failure::new(Stage::Namespace, "user, whose mappings are waited for", error))
    }

    /// Waits for the agent's next message: there is but one that it can be.
    fn hear(&self) -> rustix::io::Result<()> {
        let mut message = [MaybeUninit::uninit(); 1];
        loop {
            match recv(&self.socket, &mut message, RecvFlags::empty()) {
                Ok((_, 1)) => return Ok(()),
                Ok(_) => return Err(rustix::io::Errno::CONNRESET),
                Err(rustix::io::Errno::INTR) => {}
                Err(error) => return Err(error),
            }
        }
    }

    /// Hands the agent's end of the terminal over.
    pub(crate) fn send_terminal(&self, controller: BorrowedFd<'_>) -> Result<(), Failure> {
        self.send_descriptor(b"T", controller)
            .map_err(|error| Failure::new(Stage::Terminal, "hand it to the agent", error))
    }

    /// Tells that a process has been made for the agent.
    pub(crate) fn made(&self, child: &Child) -> Result<(), Failure> {
        let message = [b"M".as_slice(), &child.pid.to_le_bytes()].concat();
        self.send_descriptor(&message, child.pidfd.as_fd())
            .map_err(|error| Failure::new(Stage::Process, "hand it to the agent", error))
    }

    fn send_descriptor(&self, message: &[u8], descriptor: BorrowedFd<'_>) -> rustix::io::Result<()> {
        let descriptors = [descriptor];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        control.push(SendAncillaryMessage::ScmRights(&descriptors));
        sendmsg(&self.socket, &[IoSlice::new(message)], &mut control, SendFlags::NOSIGNAL).map(drop)
    }

    /// Tells why the process could not be set up.
    pub(crate) fn fail(&self, failure: &Failure) {
        let message = [b"F", failure.encode().as_slice()].concat();
        // If the agent is not there any more, there is nobody to tell.
        let _ = rustix::net::send(&self.socket, &message, SendFlags::NOSIGNAL);
    }
}

impl AsFd for ChildEnd {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(flavor = "current_thread")]
    async fn reports_arrive_in_order_and_end() {
        let (agent, child) = pair().unwrap();
        let failure = Failure::explained(Stage::Mount, "proc at /proc");
        let (terminal, _other) = rustix::pipe::pipe().unwrap();

        child.send_terminal(terminal.as_fd()).unwrap();
        child.fail(&failure);
        drop(child);

        assert!(matches!(agent.receive().await.unwrap(), Report::Terminal(_)));
        assert!(matches!(agent.receive().await.unwrap(), Report::Failed(received) if received == failure));
        assert!(matches!(agent.receive().await.unwrap(), Report::Closed));
    }

    #[tokio::test(flavor = "current_thread")]
    async fn made_process_is_told_with_its_descriptor() {
        let (agent, child) = pair().unwrap();
        let (pidfd, _other) = rustix::pipe::pipe().unwrap();
        child.made(&Child { pid: 4711, pidfd }).unwrap();
        assert!(matches!(agent.receive().await.unwrap(), Report::Made(Child { pid: 4711, .. })));
    }

    #[tokio::test(flavor = "current_thread")]
    async fn process_waits_to_be_started() {
        let (agent, child) = pair().unwrap();
        agent.start().unwrap();
        child.ready().unwrap();
        assert!(matches!(agent.receive().await.unwrap(), Report::Ready));
    }

    #[tokio::test(flavor = "current_thread")]
    async fn process_whose_agent_is_gone_does_not_start() {
        let (agent, child) = pair().unwrap();
        drop(agent);
        assert!(child.ready().is_err());
    }

    #[test]
    fn nonsense_is_no_report() {
        for message in [&b"X"[..], b"R1", b"F", b"T", b"M1234"] {
            assert!(report(message, None).is_none());
        }
    }
}
