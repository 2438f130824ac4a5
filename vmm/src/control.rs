// SPDX-License-Identifier: Apache-2.0
//! What the supervisor asks of a machine that runs.
//!
//! Each request is one packet on the control socket (`SOCK_SEQPACKET`): JSON, and the descriptors that belong to it. Its
//! answer is an [`Answer`](crate::report::Report::Answer) of its sequence number on the report descriptor. Both sides
//! bound what they read.

use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::io::Errno;
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, SocketFlags, SocketType, recvmsg, sendmsg, socketpair,
};
use serde::{Deserialize, Serialize};

use crate::config::{Limits, MAX_NET_PAIRS, MacAddress};

/// Longest request.
pub const MAX_REQUEST_LEN: usize = 4096;

/// Most descriptors of a request.
pub const MAX_DESCRIPTORS: usize = 2 * MAX_NET_PAIRS;

/// A request.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Request {
    /// By which the answer is known; not 0, which answers requests that cannot be understood.
    pub sequence: u64,
    /// What is to be done.
    pub order: Order,
}

/// What is to be done.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "do", rename_all = "kebab-case", deny_unknown_fields)]
pub enum Order {
    /// Shares a further tree. With one descriptor: the tree's top, a mount that is mounted nowhere, with the attributes
    /// that it is to have (see [`crate::tree`]).
    AddTree {
        /// Through which device.
        device: ShareDevice,
        /// By which name; one that no tree of the device has or had.
        name: String,
    },
    /// Takes back a tree that was added, whatever the guest still does with it.
    RemoveTree {
        /// The device.
        device: ShareDevice,
        /// The tree.
        name: String,
    },
    /// Has a mount of the host's seen in a tree of the shared device. With two descriptors: what it covers there, and its top, as that
    /// of a tree.
    AddMount {
        /// The tree.
        tree: String,
        /// The mount in which it lies, if that was added so.
        parent: Option<String>,
        /// By which it is known; as a tree's.
        name: String,
    },
    /// Takes back a mount that was added, whatever the guest still does with it. Those in it go before.
    RemoveMount {
        /// The mount.
        name: String,
    },
    /// Adds a network device, where the machine has room for one more (see [`crate::config::MachineConfig::spare_nets`]).
    /// With descriptors as [`crate::config::NetLink::Tap`] has them: the tap's, and then vhost-net's, if there are any.
    AttachNet {
        /// By which it is known from then on.
        id: u32,
        /// The guest's address, by which the agent knows the device.
        mac: MacAddress,
        /// How many pairs of queues it has, 1 to [`MAX_NET_PAIRS`].
        pairs: u16,
        /// How much may go; not with vhost-net.
        limits: Limits,
    },
    /// Adds a block device, where the machine has room for one more (see [`crate::config::MachineConfig::spare_disks`]). With
    /// one descriptor, as [`crate::config::DiskConfig`] has it.
    AttachDisk {
        /// By which the agent knows it; one that no other device of the machine has.
        serial: String,
        /// Whether the guest may not write to it.
        read_only: bool,
    },
    /// Takes a block device back that was added, whatever the guest still does with it. The answer comes when it is closed, after those
    /// of later requests where it has something under way.
    DetachDisk {
        /// Its serial number.
        serial: String,
        /// Whether the guest has let go of it, so that another one can be put in its place.
        is_released: bool,
    },
    /// Takes the guest's link of a network device up or down, as that of what it hangs on is.
    SetCarrier {
        /// The device.
        id: u32,
        /// Whether it is up.
        on: bool,
    },
    /// Grants the guest a part of what its memory may become, at the addresses that [`crate::config::ReserveLayout`] tells. It
    /// is the agent's to use it. Given again, it changes nothing.
    GrantMemory {
        /// How much it is to have of that in all, in whole blocks.
        total_mib: u64,
    },
}

/// A share device.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ShareDevice {
    /// [`crate::config::PRIVATE_TAG`].
    Private,
    /// [`crate::config::SHARED_TAG`].
    Shared,
}

/// What came.
#[derive(Debug)]
pub enum Received {
    /// A request, and its descriptors.
    Request(Request, Vec<OwnedFd>),
    /// Something that is none: the sequence number, or 0 where not even that can be read, and what is wrong.
    Bad(u64, String),
    /// Nothing more will come.
    Closed,
}

/// A control socket: the supervisor's end, which does not block, and the VMM's.
///
/// # Errors
///
/// When no descriptor is left.
pub fn pair() -> io::Result<(OwnedFd, OwnedFd)> {
    Ok(socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)?)
}

/// Sends a request, without waiting.
///
/// # Errors
///
/// `EMSGSIZE` if it is too long or has too many descriptors, `EAGAIN` if the VMM does not read, `EPIPE` if it is gone.
pub fn send(socket: impl AsFd, request: &Request, descriptors: &[BorrowedFd<'_>]) -> io::Result<()> {
    let packet = serde_json::to_vec(request)?;
    if packet.len() > MAX_REQUEST_LEN || descriptors.len() > MAX_DESCRIPTORS {
        return Err(Errno::MSGSIZE.into());
    }
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_DESCRIPTORS))];
    let mut ancillary = SendAncillaryBuffer::new(&mut space);
    if !descriptors.is_empty() {
        ancillary.push(SendAncillaryMessage::ScmRights(descriptors));
    }
    sendmsg(socket, &[IoSlice::new(&packet)], &mut ancillary, SendFlags::NOSIGNAL | SendFlags::DONTWAIT)?;
    Ok(())
}

/// Takes the next packet, without waiting.
///
/// # Errors
///
/// `EAGAIN` if there is none, and as recvmsg(2).
pub fn receive(socket: impl AsFd) -> io::Result<Received> {
    let mut packet = [0; MAX_REQUEST_LEN];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_DESCRIPTORS))];
    let mut ancillary = RecvAncillaryBuffer::new(&mut space);
    let flags = RecvFlags::CMSG_CLOEXEC | RecvFlags::DONTWAIT;
    let received = recvmsg(socket, &mut [IoSliceMut::new(&mut packet)], &mut ancillary, flags)?;
    let mut descriptors = Vec::new();
    for message in ancillary.drain() {
        if let RecvAncillaryMessage::ScmRights(rights) = message {
            descriptors.extend(rights);
        }
    }
    let packet = packet.get(..received.bytes).unwrap_or_default();
    if packet.is_empty() {
        return Ok(Received::Closed);
    }
    // The space for descriptors may have room for some more, for its alignment.
    let is_cut = received.flags.intersects(ReturnFlags::TRUNC | ReturnFlags::CTRUNC);
    if is_cut || descriptors.len() > MAX_DESCRIPTORS {
        let message = format!("it has more than {MAX_REQUEST_LEN} bytes or {MAX_DESCRIPTORS} descriptors");
        return Ok(Received::Bad(sequence_of(packet), message));
    }
    Ok(match serde_json::from_slice(packet) {
        Ok(request) => Received::Request(request, descriptors),
        Err(error) => Received::Bad(sequence_of(packet), error.to_string()),
    })
}

/// The sequence number of a packet that is no request, if it has one.
fn sequence_of(packet: &[u8]) -> u64 {
    #[derive(Deserialize)]
    struct Numbered {
        sequence: u64,
    }
    serde_json::from_slice(packet).map_or(0, |Numbered { sequence }| sequence)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn add(name: &str) -> Request {
        Request { sequence: 7, order: Order::AddTree { device: ShareDevice::Private, name: name.to_owned() } }
    }

    fn send_raw(socket: &OwnedFd, packet: &[u8], descriptors: &[BorrowedFd<'_>]) {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_DESCRIPTORS + 2))];
        let mut ancillary = SendAncillaryBuffer::new(&mut space);
        ancillary.push(SendAncillaryMessage::ScmRights(descriptors));
        sendmsg(socket, &[IoSlice::new(packet)], &mut ancillary, SendFlags::empty()).unwrap();
    }

    #[test]
    fn requests_arrive_whole_with_their_descriptors() {
        let (ours, theirs) = pair().unwrap();
        let (first, second) = rustix::pipe::pipe().unwrap();

        send(&ours, &add("c1"), &[first.as_fd()]).unwrap();
        send(&ours, &add("c2"), &[first.as_fd(), second.as_fd()]).unwrap();
        drop(ours);

        let (one, two) = (receive(&theirs).unwrap(), receive(&theirs).unwrap());
        assert!(matches!(one, Received::Request(request, fds) if request == add("c1") && fds.len() == 1));
        assert!(matches!(two, Received::Request(request, fds) if request == add("c2") && fds.len() == 2));
        assert!(matches!(receive(&theirs).unwrap(), Received::Closed));
    }

    #[test]
    fn nothing_to_read_is_no_end() {
        let (_ours, theirs) = pair().unwrap();
        assert_eq!(receive(&theirs).unwrap_err().kind(), io::ErrorKind::WouldBlock);
    }

    #[test]
    fn what_is_too_much_is_not_sent() {
        let (ours, _theirs) = pair().unwrap();
        let (pipe, _other) = rustix::pipe::pipe().unwrap();

        assert!(send(&ours, &add(&"x".repeat(MAX_REQUEST_LEN)), &[]).is_err());
        assert!(send(&ours, &add("c1"), &[pipe.as_fd(); MAX_DESCRIPTORS + 1]).is_err());
    }

    #[test]
    fn what_is_no_request_is_told_by_its_number() {
        let (ours, theirs) = pair().unwrap();
        let bad = |packet: &[u8]| {
            send_raw(&ours, packet, &[]);
            match receive(&theirs).unwrap() {
                Received::Bad(sequence, _) => sequence,
                other => panic!("{other:?}"),
            }
        };

        assert_eq!(bad(b"{\"sequence\":5,\"order\":{\"do\":\"dance\"}}"), 5);
        assert_eq!(bad(b"{\"sequence\":6,\"order\":{\"do\":\"remove-tree\",\"device\":\"usb\",\"name\":\"x\"}}"), 6);
        assert_eq!(bad(b"\xff"), 0);
        assert_eq!(bad(&[b' '; MAX_REQUEST_LEN + 1]), 0);
    }

    #[test]
    fn descriptors_too_many_are_closed_and_told() {
        let (ours, theirs) = pair().unwrap();
        let (reader, writer) = rustix::pipe::pipe().unwrap();
        let packet = serde_json::to_vec(&add("c1")).unwrap();

        send_raw(&ours, &packet, &[writer.as_fd(); MAX_DESCRIPTORS + 2]);
        drop(writer);

        assert!(matches!(receive(&theirs).unwrap(), Received::Bad(7, _)));
        // No writer is left: the pipe has ended.
        assert_eq!(rustix::io::read(&reader, &mut [0; 1]).unwrap(), 0);
    }
}
