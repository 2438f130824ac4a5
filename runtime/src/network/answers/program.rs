// SPDX-License-Identifier: Apache-2.0
//! The program of type `BPF_PROG_TYPE_SCHED_CLS` (<linux/bpf.h>) that is asked for each frame that comes in at an interface.
//!
//! | frame | goes to |
//! | --- | --- |
//! | how a neighbour answers: a reply of ARP, a neighbour advertisement | the guest, and the namespace's own stack |
//! | of UDP or TCP, from port 53, to a socket of the namespace that is connected with its sender | the namespace's own stack |
//! | any other | the guest |
//!
//! Answers in several fragments, and those with options before the port, are not known for what they are. Numbers of the wire are
//! in network order, and read as they lie in memory.

use crate::bpf::{
    ADD, EXIT, Instruction, JUMP, JUMP_IF_ANY_SET, JUMP_IF_EQUAL, JUMP_IF_NOT_EQUAL, LOAD_BYTE, LOAD_HALF, LOAD_WORD,
    MOVE, MOVE_REGISTER, R0, R1, R2, R3, R4, R5, R6, R7, R8, STACK, encode,
};

/// What outlasts calls: the context, a socket, and the port that this is connected with.
const CONTEXT: u8 = R6;
const SOCKET: u8 = R7;
const PEER_PORT: u8 = R8;

/// Offsets in `struct __sk_buff`: the protocol, and whether the frame has had a tag of a VLAN, which is not in it any more.
const PROTOCOL_AT: i16 = 16;
const VLAN_AT: i16 = 20;

/// Offset in `struct bpf_sock`.
const PEER_PORT_AT: i16 = 48;

/// The kernel's functions: `bpf_skb_load_bytes`, `bpf_clone_redirect`, `bpf_sk_lookup_udp`, `bpf_skc_lookup_tcp`, whose sockets the
/// program holds, and `bpf_sk_release`. In the place of a namespace, -1 is that of the frame.
const LOAD_BYTES: i32 = 26;
const CLONE_REDIRECT: i32 = 13;
const LOOKUP_UDP: i32 = 85;
const LOOKUP_TCP: i32 = 99;
const RELEASE: i32 = 86;
const THIS_NAMESPACE: i32 = -1;

/// `TC_ACT_OK`: the namespace's stack gets the frame. `TC_ACT_UNSPEC`: the next filter is asked.
const KEEP: i32 = 0;
const NEXT: i32 = -1;

/// Where in a frame of Ethernet what it carries begins, and where in a message of ARP its operation is.
const CARRIED_AT: i32 = 14;
const ARP_OPERATION_AT: i32 = CARRIED_AT + 6;

/// Where headers are put: the longest is that of IPv6 with two ports.
const BUFFER: i16 = -48;
const IPV4_LEN: i16 = 20;
const IPV6_LEN: i16 = 40;
const PORTS_LEN: i16 = 4;

/// The addresses in both headers, which the ports follow: as `struct bpf_sock_tuple` has them.
const IPV4_ADDRESSES_AT: i16 = 12;
const IPV6_ADDRESSES_AT: i16 = 8;

/// Without options, a header of IPv4 begins with this.
const IPV4_PLAIN: i32 = 0x45;
const IPV4_PROTOCOL_AT: i16 = 9;
const IPV4_FRAGMENT_AT: i16 = 6;
/// That more fragments follow, or where in the packet this one belongs.
const IPV4_FRAGMENT: u16 = 0x3fff;
const IPV6_PROTOCOL_AT: i16 = 6;

const ARP_REPLY: u16 = 2;
const ICMPV6_NEIGHBOUR_ADVERTISEMENT: i32 = 136;
const NAME_SERVICE: u16 = 53;

/// Jumps of these lengths are such to the ends, which are not known yet when the jumps are written.
const TO_GUEST: i16 = i16::MAX;
const TO_BOTH: i16 = i16::MAX - 1;
const TO_NAMESPACE: i16 = i16::MAX - 2;

/// The program, for an interface that is joined to the tap of that number.
pub(super) fn assemble(tap: i32) -> Vec<u8> {
    let mut program = vec![
        copy(CONTEXT, R1),
        Instruction::from_register(LOAD_WORD, R2, CONTEXT, VLAN_AT),
        guests_unless(R2, 0),
        Instruction::from_register(LOAD_WORD, R2, CONTEXT, PROTOCOL_AT),
    ];
    program.extend(when(wire(libc::ETH_P_ARP as u16), of_arp()));
    program.extend(when(wire(libc::ETH_P_IP as u16), of_ipv4()));
    program.extend(when(wire(libc::ETH_P_IPV6 as u16), of_ipv6()));
    let guest = program.len();
    program.extend([Instruction::new(MOVE, R0, 0, NEXT), Instruction::new(EXIT, 0, 0, 0)]);
    let both = program.len();
    program.extend([
        copy(R1, CONTEXT),
        Instruction::new(MOVE, R2, 0, tap),
        Instruction::new(MOVE, R3, 0, 0),
        Instruction::call(CLONE_REDIRECT),
    ]);
    let namespace = program.len();
    program.extend([Instruction::new(MOVE, R0, 0, KEEP), Instruction::new(EXIT, 0, 0, 0)]);
    for (at, instruction) in program.iter_mut().enumerate() {
        let end = match instruction.offset {
            TO_GUEST => guest,
            TO_BOTH => both,
            TO_NAMESPACE => namespace,
            _ => continue,
        };
        instruction.offset = (end - at - 1) as i16;
    }
    encode(program)
}

/// A number as it is on the wire.
fn wire(number: u16) -> i32 {
    number.to_be().into()
}

fn copy(to: u8, from: u8) -> Instruction {
    Instruction::from_register(MOVE_REGISTER, to, from, 0)
}

/// The frame is the guest's unless the register has this value.
fn guests_unless(register: u8, value: i32) -> Instruction {
    Instruction::new(JUMP_IF_NOT_EQUAL, register, TO_GUEST, value)
}

fn to(end: i16) -> Instruction {
    Instruction::new(JUMP, 0, end, 0)
}

/// What is done if R2 has this value; it leaves R2 alone, or does not go on.
fn when(value: i32, then: Vec<Instruction>) -> Vec<Instruction> {
    // The length is small.
    let over = Instruction::new(JUMP_IF_NOT_EQUAL, R2, then.len() as i16, value);
    [vec![over], then].concat()
}

/// Puts so many bytes of the frame into the buffer; one that is shorter is the guest's.
fn read(at: i32, len: i16) -> Vec<Instruction> {
    vec![
        copy(R1, CONTEXT),
        Instruction::new(MOVE, R2, 0, at),
        copy(R3, STACK),
        Instruction::new(ADD, R3, 0, BUFFER.into()),
        Instruction::new(MOVE, R4, 0, len.into()),
        Instruction::call(LOAD_BYTES),
        guests_unless(R0, 0),
    ]
}

/// Loads a part of the buffer.
fn load(code: u8, register: u8, at: i16) -> Instruction {
    Instruction::from_register(code, register, STACK, BUFFER + at)
}

fn of_arp() -> Vec<Instruction> {
    let mut program = read(ARP_OPERATION_AT, 2);
    program.extend([load(LOAD_HALF, R2, 0), guests_unless(R2, wire(ARP_REPLY)), to(TO_BOTH)]);
    program
}

fn of_ipv4() -> Vec<Instruction> {
    let mut program = read(CARRIED_AT, IPV4_LEN + PORTS_LEN);
    program.extend([
        load(LOAD_BYTE, R2, 0),
        guests_unless(R2, IPV4_PLAIN),
        load(LOAD_HALF, R2, IPV4_FRAGMENT_AT),
        Instruction::new(JUMP_IF_ANY_SET, R2, TO_GUEST, wire(IPV4_FRAGMENT)),
        load(LOAD_HALF, R3, IPV4_LEN),
        guests_unless(R3, wire(NAME_SERVICE)),
        load(LOAD_BYTE, R2, IPV4_PROTOCOL_AT),
    ]);
    program.extend(of_a_socket(IPV4_ADDRESSES_AT, IPV4_LEN + PORTS_LEN));
    program
}

fn of_ipv6() -> Vec<Instruction> {
    let mut program = read(CARRIED_AT, IPV6_LEN + PORTS_LEN);
    program.push(load(LOAD_BYTE, R2, IPV6_PROTOCOL_AT));
    program.extend(when(
        libc::IPPROTO_ICMPV6,
        vec![load(LOAD_BYTE, R2, IPV6_LEN), guests_unless(R2, ICMPV6_NEIGHBOUR_ADVERTISEMENT), to(TO_BOTH)],
    ));
    program.extend([load(LOAD_HALF, R3, IPV6_LEN), guests_unless(R3, wire(NAME_SERVICE))]);
    program.extend(of_a_socket(IPV6_ADDRESSES_AT, IPV6_LEN + PORTS_LEN));
    program
}

/// Whose a packet is, whose protocol is in R2, and whose addresses and ports are in the buffer.
fn of_a_socket(begin: i16, end: i16) -> Vec<Instruction> {
    let mut program = when(libc::IPPROTO_UDP, look_up(LOOKUP_UDP, begin, end));
    program.extend(when(libc::IPPROTO_TCP, look_up(LOOKUP_TCP, begin, end)));
    program.push(to(TO_GUEST));
    program
}

/// One that is connected with another, or with nobody, such as a listener, has not asked.
fn look_up(function: i32, begin: i16, end: i16) -> Vec<Instruction> {
    vec![
        copy(R1, CONTEXT),
        copy(R2, STACK),
        Instruction::new(ADD, R2, 0, (BUFFER + begin).into()),
        Instruction::new(MOVE, R3, 0, (end - begin).into()),
        Instruction::new(MOVE, R4, 0, THIS_NAMESPACE),
        Instruction::new(MOVE, R5, 0, 0),
        Instruction::call(function),
        Instruction::new(JUMP_IF_EQUAL, R0, TO_GUEST, 0),
        copy(SOCKET, R0),
        Instruction::from_register(LOAD_HALF, PEER_PORT, SOCKET, PEER_PORT_AT),
        copy(R1, SOCKET),
        Instruction::call(RELEASE),
        guests_unless(PEER_PORT, wire(NAME_SERVICE)),
        to(TO_NAMESPACE),
    ]
}

#[cfg(test)]
mod tests {
    use std::io::ErrorKind;

    use bulkhead_bpf::{Kind, Program};

    use super::*;
    use crate::bpf::interpreter::{self, CONTEXT_AT, SOCKET_AT};

    const TAP: i32 = 7;

    /// Whose a frame is.
    #[derive(Debug, PartialEq)]
    enum Whose {
        Guests,
        Namespaces,
        Both,
    }
    use Whose::{Both, Guests, Namespaces};

    /// A socket that may be found, by the function, the tuple of addresses and ports, and the port that it is connected with.
    struct Found {
        function: i32,
        tuple: Vec<u8>,
        peer_port: u16,
    }

    fn whose(frame: &[u8], found: &Found) -> Whose {
        whose_with(frame, found, 0)
    }

    fn whose_with(frame: &[u8], found: &Found, vlan: u32) -> Whose {
        let mut context = vec![0xee; 192];
        let protocol = u16::from_le_bytes([frame[12], frame[13]]);
        context[16..20].copy_from_slice(&u32::from(protocol).to_le_bytes());
        context[20..24].copy_from_slice(&vlan.to_le_bytes());
        let mut socket = [0xee; 80];
        socket[48..50].copy_from_slice(&found.peer_port.to_be_bytes());
        let (mut held, mut cloned) = (0, false);
        let answer = interpreter::run_with(&assemble(TAP), &context, &socket, |mut call| {
            let given = call.arguments;
            match call.function {
                LOAD_BYTES => {
                    let (at, len) = (given[1] as usize, given[3] as usize);
                    let Some(bytes) = frame.get(at..at + len) else { return (-14_i64).cast_unsigned() };
                    call.memory(2, len).copy_from_slice(bytes);
                    0
                }
                LOOKUP_UDP | LOOKUP_TCP => {
                    assert_eq!((given[0], given[3], given[4]), (CONTEXT_AT, u64::MAX, 0));
                    let is_it = call.function == found.function && call.memory(1, given[2] as usize) == found.tuple;
                    held += u32::from(is_it);
                    if is_it { SOCKET_AT } else { 0 }
                }
                RELEASE => {
                    assert_eq!(given[0], SOCKET_AT);
                    held -= 1;
                    0
                }
                CLONE_REDIRECT => {
                    assert_eq!(given[..3], [CONTEXT_AT, TAP as u64, 0]);
                    cloned = true;
                    0
                }
                other => panic!("the function {other}"),
            }
        });
        assert_eq!(held, 0);
        match (answer.cast_signed(), cloned) {
            (-1, false) => Guests,
            (0, false) => Namespaces,
            (0, true) => Both,
            other => panic!("{other:?}"),
        }
    }

    fn ethernet(protocol: u16, carried: &[u8]) -> Vec<u8> {
        [&[2; 12][..], &protocol.to_be_bytes(), carried].concat()
    }

    /// What follows the headers: the ports, and more.
    fn ports(from: u16, to: u16) -> Vec<u8> {
        [&from.to_be_bytes()[..], &to.to_be_bytes(), &[0xee; 8]].concat()
    }

    fn ipv4(protocol: u8, from: u16) -> Vec<u8> {
        let header = [0x45, 0, 0, 32, 0, 0, 0x40, 0, 64, protocol, 0, 0, 10, 0, 0, 1, 10, 0, 0, 2];
        ethernet(0x0800, &[&header[..], &ports(from, 40_000)].concat())
    }

    fn ipv6(next: u8, carried: &[u8]) -> Vec<u8> {
        let header = [0x60, 0, 0, 0, 0, 12, next, 64];
        ethernet(0x86dd, &[&header[..], &[0xfd; 16], &[0xfc; 16], carried].concat())
    }

    /// What the frames above ask for.
    fn asked(frame: &[u8], function: i32) -> Found {
        let len = if frame[12] == 0x08 { 12 } else { 36 };
        let end = if frame[12] == 0x08 { 14 + 24 } else { 14 + 44 };
        Found { function, tuple: frame[end - len..end].to_vec(), peer_port: 53 }
    }

    #[test]
    fn answers_to_a_socket_of_the_namespace_are_its_own() {
        for (protocol, function) in [(17, LOOKUP_UDP), (6, LOOKUP_TCP)] {
            for frame in [ipv4(protocol, 53), ipv6(protocol, &ports(53, 40_000))] {
                assert_eq!(whose(&frame, &asked(&frame, function)), Namespaces, "{frame:x?}");
                let others = Found { tuple: vec![9; 12], ..asked(&frame, function) };
                assert_eq!(whose(&frame, &others), Guests, "without a socket: {frame:x?}");
                for peer_port in [0, 54, 53_u16.swap_bytes()] {
                    let found = Found { peer_port, ..asked(&frame, function) };
                    assert_eq!(whose(&frame, &found), Guests, "connected with port {peer_port}: {frame:x?}");
                }
            }
        }
    }

    #[test]
    fn what_comes_from_another_port_is_the_guests() {
        for frame in [ipv4(17, 54), ipv4(6, 443), ipv6(17, &ports(54, 53)), ipv4(17, 53_u16.swap_bytes())] {
            for function in [LOOKUP_UDP, LOOKUP_TCP] {
                assert_eq!(whose(&frame, &asked(&frame, function)), Guests, "{frame:x?}");
            }
        }
    }

    #[test]
    fn what_is_not_plain_is_the_guests() {
        let plain = ipv4(17, 53);
        let found = asked(&plain, LOOKUP_UDP);
        let changed = |at: usize, value: u8| {
            let mut frame = plain.clone();
            frame[at] = value;
            frame
        };
        // With options; the first fragment, and a later one; another protocol; one that is cut.
        for frame in [changed(14, 0x46), changed(20, 0x20), changed(21, 1), changed(23, 132), plain[..37].to_vec()] {
            assert_eq!(whose(&frame, &found), Guests, "{frame:x?}");
        }
        assert_eq!(whose_with(&plain, &found, 1), Guests, "of a VLAN");
        assert_eq!(whose(&ethernet(0x8100, &plain[12..]), &found), Guests);
    }

    #[test]
    fn both_hear_how_neighbours_answer_and_the_guest_alone_what_they_ask() {
        let nobody = Found { function: 0, tuple: Vec::new(), peer_port: 0 };
        let arp = |operation| ethernet(0x0806, &[&[0, 1, 8, 0, 6, 4, 0, operation][..], &[2; 20]].concat());
        let icmp = |kind: u8| ipv6(58, &[&[kind, 0][..], &[0; 22]].concat());

        assert_eq!([whose(&arp(2), &nobody), whose(&arp(1), &nobody)], [Both, Guests]);
        assert_eq!([136, 135, 134, 128].map(|kind| whose(&icmp(kind), &nobody)), [Both, Guests, Guests, Guests]);
        assert_eq!(whose(&arp(2)[..20], &nobody), Guests);
    }

    /// As far as this process may.
    #[test]
    fn the_kernel_takes_it() {
        if let Err(error) = Program::load(Kind::TrafficFilter, "answers", &assemble(TAP)) {
            assert_eq!(error.kind(), ErrorKind::PermissionDenied, "{error}");
        }
    }
}
