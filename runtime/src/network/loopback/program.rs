// SPDX-License-Identifier: Apache-2.0
//! The program of type `BPF_PROG_TYPE_SK_LOOKUP` (<linux/bpf.h>) that leads connections to a listener: those over TCP to
//! 127.0.0.1 or ::1, whatever their port. The kernel asks it for each packet that belongs to no connection yet.
//!
//! Other addresses in 127.0.0.0/8 are left to processes of the host: docker's resolver listens at one.

use std::net::{Ipv4Addr, Ipv6Addr};
use std::os::fd::RawFd;

use crate::bpf::{
    ADD, EXIT, Instruction, JUMP, JUMP_IF_EQUAL, JUMP_IF_NOT_EQUAL, LOAD_WORD, MOVE, MOVE_REGISTER, R0, R1, R2, R3, R6,
    R7, STACK, STORE_WORD, encode,
};

/// The listener's place in the map.
pub(super) const PLACE: u32 = 0;

/// What outlasts calls: the context, and the listener.
const CONTEXT: u8 = R6;
const LISTENER: u8 = R7;

/// Offsets in `struct bpf_sk_lookup`. Addresses are in network order.
const FAMILY_AT: i16 = 8;
const PROTOCOL_AT: i16 = 12;
const LOCAL_IP4_AT: i16 = 40;
const LOCAL_IP6_AT: i16 = 44;

/// The kernel's functions: `bpf_map_lookup_elem`, which makes the program hold the socket that it finds, `bpf_sk_assign`, and
/// `bpf_sk_release`.
const MAP_LOOKUP: i32 = 1;
const SK_ASSIGN: i32 = 124;
const SK_RELEASE: i32 = 86;

/// `SK_PASS`: the kernel goes on, with the socket that was assigned, or else looks for one itself.
const SK_PASS: i32 = 1;

/// A jump of this length is one to the end, which is not known yet when the jump is written.
const TO_END: i16 = i16::MAX;

/// The program, for the listener in that map.
pub(super) fn assemble(map: RawFd) -> Vec<u8> {
    let mut program = vec![
        Instruction::from_register(MOVE_REGISTER, CONTEXT, R1, 0),
        load(PROTOCOL_AT),
        end_unless(libc::IPPROTO_TCP),
        load(FAMILY_AT),
    ];
    let address = i32::from_le_bytes(Ipv4Addr::LOCALHOST.octets());
    let is_ipv4 = [load(LOCAL_IP4_AT), end_unless(address)];
    let mut is_ipv6 = vec![end_unless(libc::AF_INET6)];
    let address = Ipv6Addr::LOCALHOST.octets();
    for (at, word) in (LOCAL_IP6_AT..).step_by(4).zip(address.as_chunks().0) {
        is_ipv6.extend([load(at), end_unless(i32::from_le_bytes(*word))]);
    }
    // Both lengths are small.
    let (over_ipv4, over_ipv6) = (is_ipv4.len() as i16 + 1, is_ipv6.len() as i16);
    program.push(Instruction::new(JUMP_IF_NOT_EQUAL, R2, over_ipv4, libc::AF_INET));
    program.extend(is_ipv4);
    program.push(Instruction::new(JUMP, 0, over_ipv6, 0));
    program.extend(is_ipv6);
    program.extend(assign(map));
    let end = program.len();
    program.extend([Instruction::new(MOVE, R0, 0, SK_PASS), Instruction::new(EXIT, 0, 0, 0)]);
    for (at, instruction) in program.iter_mut().enumerate().filter(|(_, instruction)| instruction.offset == TO_END) {
        instruction.offset = (end - at - 1) as i16;
    }
    encode(program)
}

/// Loads a word of the context.
fn load(at: i16) -> Instruction {
    Instruction::from_register(LOAD_WORD, R2, CONTEXT, at)
}

/// Goes on if the part that was loaded has this value.
fn end_unless(value: i32) -> Instruction {
    Instruction::new(JUMP_IF_NOT_EQUAL, R2, TO_END, value)
}

/// Gives the connection to the listener, as long as that is there.
fn assign(map: RawFd) -> Vec<Instruction> {
    let copy = |to, from| Instruction::from_register(MOVE_REGISTER, to, from, 0);
    let mut program = vec![Instruction::new(STORE_WORD, STACK, -4, PLACE.cast_signed())];
    program.extend(Instruction::load_map(R1, map));
    program.extend([
        copy(R2, STACK),
        Instruction::new(ADD, R2, 0, -4),
        Instruction::call(MAP_LOOKUP),
        Instruction::new(JUMP_IF_EQUAL, R0, TO_END, 0),
        copy(LISTENER, R0),
        copy(R1, CONTEXT),
        copy(R2, LISTENER),
        Instruction::new(MOVE, R3, 0, 0),
        Instruction::call(SK_ASSIGN),
        copy(R1, LISTENER),
        Instruction::call(SK_RELEASE),
    ]);
    program
}

#[cfg(test)]
mod tests {
    use std::net::IpAddr;

    use super::*;
    use crate::bpf::interpreter::{self, CONTEXT_AT};

    /// What the map is known by, and what a socket in it is known by to the program.
    const MAP: i32 = 9;
    const SOCKET: u64 = 0x5000;

    /// The context that the kernel gives. What is of no interest is 0xee.
    fn context(protocol: i32, local: IpAddr) -> Vec<u8> {
        let mut context = vec![0xee; 68];
        let mut put = |at: i16, bytes: &[u8]| {
            let at = usize::try_from(at).unwrap();
            context[at..at + bytes.len()].copy_from_slice(bytes);
        };
        put(PROTOCOL_AT, &protocol.to_le_bytes());
        match local {
            IpAddr::V4(address) => {
                put(FAMILY_AT, &libc::AF_INET.to_le_bytes());
                put(LOCAL_IP4_AT, &address.octets());
                put(LOCAL_IP6_AT, &[0; 16]);
            }
            IpAddr::V6(address) => {
                put(FAMILY_AT, &libc::AF_INET6.to_le_bytes());
                put(LOCAL_IP4_AT, &[0; 4]);
                put(LOCAL_IP6_AT, &address.octets());
            }
        }
        context
    }

    /// Whether a connection is led to the listener, if there is one.
    fn is_led(context: &[u8], listener: u64) -> bool {
        let (mut assigned, mut held) = (false, 0);
        let answer = interpreter::run(&assemble(MAP), context, |call| match call.function {
            MAP_LOOKUP => {
                assert_eq!((call.arguments[0], call.on_stack), (9, Some(PLACE)));
                held += u32::from(listener != 0);
                listener
            }
            SK_ASSIGN => {
                assert_eq!(call.arguments[..3], [CONTEXT_AT, SOCKET, 0]);
                assigned = true;
                0
            }
            SK_RELEASE => {
                assert_eq!(call.arguments[0], SOCKET);
                held -= 1;
                0
            }
            other => panic!("the function {other}"),
        });
        assert_eq!((answer, held), (SK_PASS as u64, 0));
        assigned
    }

    #[test]
    fn connections_to_loopback_addresses_are_led_to_the_listener() {
        for address in ["127.0.0.1", "::1"].map(|text| text.parse().unwrap()) {
            assert!(is_led(&context(libc::IPPROTO_TCP, address), SOCKET), "{address}");
            assert!(!is_led(&context(libc::IPPROTO_TCP, address), 0), "{address}, without a listener");
            assert!(!is_led(&context(libc::IPPROTO_UDP, address), SOCKET), "{address}, over UDP");
        }
    }

    #[test]
    fn no_other_address_is_led_anywhere() {
        let addresses = ["127.0.0.11", "1.0.0.127", "10.0.0.1", "0.0.0.0", "::", "::2", "100::", "::ffff:127.0.0.1"];
        for address in addresses.map(|text| text.parse().unwrap()) {
            assert!(!is_led(&context(libc::IPPROTO_TCP, address), SOCKET), "{address}");
        }
        // Each bit counts.
        for bit in 0..32 {
            let address = Ipv4Addr::from_bits(Ipv4Addr::LOCALHOST.to_bits() ^ 1 << bit);
            assert!(!is_led(&context(libc::IPPROTO_TCP, address.into()), SOCKET), "{address}");
        }
        for bit in 0..128 {
            let address = Ipv6Addr::from_bits(1 ^ 1 << bit);
            assert!(!is_led(&context(libc::IPPROTO_TCP, address.into()), SOCKET), "{address}");
        }
        for family in [0, libc::AF_UNIX, libc::AF_PACKET, libc::AF_INET | 0x100] {
            let mut context = context(libc::IPPROTO_TCP, Ipv6Addr::LOCALHOST.into());
            context[8..12].copy_from_slice(&family.to_le_bytes());
            assert!(!is_led(&context, SOCKET), "the family {family}");
        }
    }
}
