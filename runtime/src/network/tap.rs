// SPDX-License-Identifier: Apache-2.0
//! Taps: an interface on the host's side, a descriptor on the VMM's. A tap is gone with the last of its descriptors.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;

use bulkhead_netlink::{LinkHeader, Message, Socket};

use super::link::Link;
use super::node::Node;

/// What the names of Bulkhead's taps begin with.
const PREFIX: &str = "bh-";

/// Where taps are made.
const DEVICE: &str = "/dev/net/tun";

/// `IFLA_INET6_ADDR_GEN_MODE` (linux/if_link.h), and the mode in which an interface gets no address by itself.
const IFLA_INET6_ADDR_GEN_MODE: u16 = 8;
const IN6_ADDR_GEN_MODE_NONE: u8 = 1;

/// The name of the tap for the interface with that number: no other in the namespace has it.
pub(super) fn name(link: i32) -> String {
    format!("{PREFIX}{link}")
}

/// The name of a tap with that number whose interface has gone.
fn retired_name(tap: i32) -> String {
    format!("{PREFIX}x{tap}")
}

/// Whether an interface is such a tap.
pub(super) fn is_one(link: &Link) -> bool {
    link.kind == "tun" && link.name.starts_with(PREFIX)
}

/// The number of that tap in the calling thread's network namespace, if it is there.
pub(super) fn index(link: i32) -> Option<i32> {
    nix::net::if_::if_nametoindex(name(link).as_str()).ok().map(u32::cast_signed)
}

/// Makes a tap with `queues` queues in the calling thread's network namespace, which fails if there is an interface of that
/// name. Frames go to the first queue alone, until others are asked for (`TUNSETQUEUE`).
pub(super) fn make(name: &str, queues: usize) -> io::Result<Vec<OwnedFd>> {
    let kind = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR;
    let kind = if queues > 1 { kind | libc::IFF_MULTI_QUEUE } else { kind };
    let node = Node::find(DEVICE)?;
    let mut taps = vec![open(&node, name, kind | libc::IFF_TUN_EXCL)?];
    for _ in 1..queues {
        let tap = open(&node, name, kind)?;
        request(&tap, libc::TUNSETQUEUE, "", libc::IFF_DETACH_QUEUE)?;
        taps.push(tap);
    }
    node.seal()?;
    Ok(taps)
}

fn open(node: &Node, name: &str, flags: libc::c_int) -> io::Result<OwnedFd> {
    let device = node.open(File::options().read(true).write(true).custom_flags(libc::O_NONBLOCK))?;
    request(&device, libc::TUNSETIFF, name, flags)?;
    Ok(device.into())
}

/// Asks a tap's descriptor for something that an `ifreq` says.
fn request(device: &impl AsRawFd, number: libc::Ioctl, name: &str, flags: libc::c_int) -> io::Result<()> {
    // SAFETY: an all-zero `ifreq` is valid: it is plain data.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    // The last byte stays 0.
    for (to, from) in request.ifr_name.iter_mut().take(libc::IFNAMSIZ - 1).zip(name.bytes()) {
        *to = from.cast_signed();
    }
    request.ifr_ifru.ifru_flags = flags as libc::c_short;
    // SAFETY: both requests read, and may write, one `ifreq`, and `request` is one, live and initialised.
    let result = unsafe { libc::ioctl(device.as_raw_fd(), number, &raw mut request) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// Turns a tap on; the host's own network has no part in it.
pub(super) fn turn_on(socket: &mut Socket, index: i32, mtu: u32) -> io::Result<()> {
    let header = LinkHeader { index, ..Default::default() };
    let quiet = Message::new(libc::RTM_NEWLINK, 0, &header).with_nested(libc::IFLA_AF_SPEC, |spec| {
        spec.with_nested(libc::AF_INET6 as u16, |ipv6| ipv6.with(IFLA_INET6_ADDR_GEN_MODE, &[IN6_ADDR_GEN_MODE_NONE]))
    });
    // A host without IPv6 has nothing to keep quiet.
    let _ = socket.request(quiet);
    let up = libc::IFF_UP.cast_unsigned();
    let header = LinkHeader { index, flags: up, change: up, ..Default::default() };
    socket.request(Message::new(libc::RTM_NEWLINK, 0, &header).with_number(libc::IFLA_MTU, mtu))
}

/// Turns a tap off whose interface has gone, and gives its name away: an interface that comes may have that one's number.
pub(super) fn retire(socket: &mut Socket, index: i32) -> io::Result<()> {
    // Only what is off gets another name from older kernels.
    let header = LinkHeader { index, flags: 0, change: libc::IFF_UP.cast_unsigned(), ..Default::default() };
    socket.request(Message::new(libc::RTM_NEWLINK, 0, &header))?;
    let header = LinkHeader { index, ..Default::default() };
    socket.request(Message::new(libc::RTM_NEWLINK, 0, &header).with_text(libc::IFLA_IFNAME, &retired_name(index)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_tap_is_known_by_either_name() {
        for name in [name(i32::MAX), retired_name(i32::MAX)] {
            assert!(name.len() < libc::IFNAMSIZ, "{name}");
            assert!(is_one(&Link { name, kind: "tun".to_owned(), ..Link::default() }));
        }
        assert!(!is_one(&Link { name: name(2), kind: "veth".to_owned(), ..Link::default() }));
    }
}
