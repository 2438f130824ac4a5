// SPDX-License-Identifier: Apache-2.0
//! Joining two interfaces: all that comes in at one goes out at the other, before the host's own network sees it
//! (tc-mirred(8), tc-matchall(8)).

use std::io;
use std::os::fd::AsRawFd;

use bulkhead_bpf::Program;
use bulkhead_netlink::{Message, Socket, TrafficHeader};

/// Where filters for incoming frames hang (linux/pkt_sched.h): the queueing discipline, its number, and the place in it
/// that both of its kinds, `ingress` and `clsact`, have.
const TC_H_INGRESS: u32 = 0xffff_fff1;
const INGRESS_HANDLE: u32 = 0xffff_0000;
const INGRESS_FILTERS: u32 = 0xffff_fff2;

/// The filter's priority, by which it is found again.
const PRIORITY: u32 = 0x6268;

/// That of a program which is asked first.
const FIRST: u32 = PRIORITY - 1;

/// `TCA_BPF_FD`, `TCA_BPF_NAME`, `TCA_BPF_FLAGS`, and of the last that what the program answers is what is done with the frame
/// (linux/pkt_cls.h).
const TCA_BPF_FD: u16 = 6;
const TCA_BPF_NAME: u16 = 7;
const TCA_BPF_FLAGS: u16 = 8;
const TCA_BPF_FLAG_ACT_DIRECT: u32 = 1;

/// `TCA_MATCHALL_ACT` (linux/pkt_cls.h).
const TCA_MATCHALL_ACT: u16 = 2;
/// `TCA_ACT_KIND` and `TCA_ACT_OPTIONS` (linux/pkt_cls.h); actions are numbered from 1.
const TCA_ACT_KIND: u16 = 1;
const TCA_ACT_OPTIONS: u16 = 2;
const FIRST_ACTION: u16 = 1;
/// `TCA_MIRRED_PARMS` (linux/tc_act/tc_mirred.h).
const TCA_MIRRED_PARMS: u16 = 2;
/// `TC_ACT_STOLEN`: nobody else gets the frame.
const TC_ACT_STOLEN: u32 = 4;
/// `TCA_EGRESS_REDIR`: it goes out.
const TCA_EGRESS_REDIR: u32 = 1;

/// The numbers of the interfaces whose incoming frames can be filtered.
pub(super) fn prepared(socket: &mut Socket) -> io::Result<Vec<i32>> {
    let (mut prepared, request) = (Vec::new(), Message::new(libc::RTM_GETQDISC, 0, &TrafficHeader::default()));
    socket.dump(request, libc::RTM_NEWQDISC, |header: TrafficHeader, _| {
        prepared.extend((header.parent == TC_H_INGRESS).then_some(header.index));
    })?;
    Ok(prepared)
}

/// Makes an interface one whose incoming frames can be filtered, unless it is one already.
fn prepare(socket: &mut Socket, link: i32) -> io::Result<()> {
    let header = TrafficHeader { index: link, handle: INGRESS_HANDLE, parent: TC_H_INGRESS, info: 0 };
    let flags = libc::NLM_F_CREATE | libc::NLM_F_EXCL;
    match socket.request(Message::new(libc::RTM_NEWQDISC, flags, &header).with_text(libc::TCA_KIND, "ingress")) {
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(()),
        done => done,
    }
}

/// Undoes [`prepare`].
pub(super) fn unprepare(socket: &mut Socket, link: i32) -> io::Result<()> {
    let header = TrafficHeader { index: link, handle: INGRESS_HANDLE, parent: TC_H_INGRESS, info: 0 };
    socket.request(Message::new(libc::RTM_DELQDISC, 0, &header))
}

/// Joins two interfaces.
pub(super) fn join(socket: &mut Socket, one: i32, other: i32) -> io::Result<()> {
    prepare(socket, one)?;
    prepare(socket, other)?;
    add(socket, other, one)?;
    add(socket, one, other)
}

/// Sends what comes in at `from` out at `to`.
fn add(socket: &mut Socket, from: i32, to: i32) -> io::Result<()> {
    let mirred: Vec<u8> = [0, 0, TC_ACT_STOLEN, 0, 0, TCA_EGRESS_REDIR, to.cast_unsigned()]
        .into_iter()
        .flat_map(u32::to_ne_bytes)
        .collect();
    let flags = libc::NLM_F_CREATE | libc::NLM_F_EXCL;
    let message = Message::new(libc::RTM_NEWTFILTER, flags, &filter(from, PRIORITY))
        .with_text(libc::TCA_KIND, "matchall")
        .with_nested(libc::TCA_OPTIONS, |options| {
            options.with_nested(TCA_MATCHALL_ACT, |actions| {
                actions.with_nested(FIRST_ACTION, |action| {
                    action
                        .with_text(TCA_ACT_KIND, "mirred")
                        .with_nested(TCA_ACT_OPTIONS, |options| options.with(TCA_MIRRED_PARMS, &mirred))
                })
            })
        });
    socket.request(message)
}

/// Has a program asked first, which may keep a frame that comes in at `from` (`TC_ACT_OK`), or leave it to what [`add`] has
/// added (`TC_ACT_UNSPEC`).
pub(super) fn ask_first(socket: &mut Socket, from: i32, program: &Program, name: &str) -> io::Result<()> {
    let flags = libc::NLM_F_CREATE | libc::NLM_F_EXCL;
    let message = Message::new(libc::RTM_NEWTFILTER, flags, &filter(from, FIRST))
        .with_text(libc::TCA_KIND, "bpf")
        .with_nested(libc::TCA_OPTIONS, |options| {
            options
                .with_number(TCA_BPF_FD, program.as_raw_fd().cast_unsigned())
                .with_text(TCA_BPF_NAME, name)
                .with_number(TCA_BPF_FLAGS, TCA_BPF_FLAG_ACT_DIRECT)
        });
    socket.request(message)
}

/// Undoes [`add`] and [`ask_first`].
pub(super) fn remove(socket: &mut Socket, from: i32) -> io::Result<()> {
    // Mostly there is none.
    let _ = socket.request(Message::new(libc::RTM_DELTFILTER, 0, &filter(from, FIRST)));
    socket.request(Message::new(libc::RTM_DELTFILTER, 0, &filter(from, PRIORITY)))
}

/// The filter: of all protocols, in network order.
fn filter(link: i32, priority: u32) -> TrafficHeader {
    let every_protocol = (libc::ETH_P_ALL as u16).to_be();
    let info = priority << 16 | u32::from(every_protocol);
    TrafficHeader { index: link, handle: 0, parent: INGRESS_FILTERS, info }
}
