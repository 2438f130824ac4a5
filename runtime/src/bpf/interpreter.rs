// SPDX-License-Identifier: Apache-2.0
//! Runs programs as the kernel would, as far as those of this crate go. What the kernel's verifier refuses is a panic here, or
//! a wrong answer.

use super::{
    ADD, AND, CALL, EXIT, JUMP, JUMP_IF_ANY_SET, JUMP_IF_EQUAL, JUMP_IF_NOT_EQUAL, LOAD_BYTE, LOAD_HALF, LOAD_LONG,
    LOAD_WORD, MAP_DESCRIPTOR, MOVE, MOVE_REGISTER, R0, R1, SHIFT_RIGHT, STACK, STORE_WORD,
};

/// Where the context begins, and a socket that a call has found; and where the stack ends.
pub(crate) const CONTEXT_AT: u64 = 0x1000;
pub(crate) const SOCKET_AT: u64 = 0x5000;
pub(crate) const STACK_AT: u64 = 0x8000;
const STACK_LEN: u64 = 512;

/// What registers hold that a program has not set, or that a call has spoilt.
const NOTHING: u64 = 0xdead_dead_dead_dead;

/// A call of the kernel's: its number, what it is given, and the four bytes at the address in its second argument, if that is one
/// on the stack.
pub(crate) struct Call<'a> {
    pub(crate) function: i32,
    pub(crate) arguments: [u64; 5],
    pub(crate) on_stack: Option<u32>,
    stack: &'a mut [u8],
}

impl Call<'_> {
    /// So many bytes of the stack, at the address in an argument.
    pub(crate) fn memory(&mut self, argument: usize, len: usize) -> &mut [u8] {
        let begin = usize::try_from(self.arguments[argument] - (STACK_AT - STACK_LEN)).unwrap();
        &mut self.stack[begin..begin + len]
    }
}

/// Runs a program with its context, and answers its calls by `call`.
pub(crate) fn run(program: &[u8], context: &[u8], call: impl FnMut(Call<'_>) -> u64) -> u64 {
    run_with(program, context, &[], call)
}

/// The same, where calls may find a socket.
pub(crate) fn run_with(program: &[u8], context: &[u8], socket: &[u8], mut call: impl FnMut(Call<'_>) -> u64) -> u64 {
    let mut stack = [0xee; STACK_LEN as usize];
    let mut registers = [NOTHING; 11];
    registers[usize::from(R1)] = CONTEXT_AT;
    registers[usize::from(STACK)] = STACK_AT;
    let on_stack = |address: u64| usize::try_from(address.checked_sub(STACK_AT - STACK_LEN)?).ok();
    let mut at = 0_usize;
    loop {
        let bytes: [u8; 8] = program[at * 8..at * 8 + 8].try_into().unwrap();
        let (to, from) = (usize::from(bytes[1] & 15), usize::from(bytes[1] >> 4));
        let offset = i16::from_le_bytes([bytes[2], bytes[3]]);
        let number = i32::from_le_bytes(bytes[4..].try_into().unwrap());
        let value = i64::from(number).cast_unsigned();
        let address = |register: usize| registers[register].wrapping_add_signed(offset.into());
        let mut jumps = false;
        match bytes[0] {
            LOAD_WORD | LOAD_HALF | LOAD_BYTE => {
                let len = [4, 2, 1][usize::from(bytes[0] - LOAD_WORD) / 8];
                let places = [(CONTEXT_AT, context), (SOCKET_AT, socket), (STACK_AT - STACK_LEN, &stack)];
                let loaded = places.into_iter().find_map(|(begin, memory)| {
                    let begin = usize::try_from(address(from).checked_sub(begin)?).ok()?;
                    memory.get(begin..begin + len)
                });
                let mut number = [0; 8];
                number[..len].copy_from_slice(loaded.unwrap());
                registers[to] = u64::from_le_bytes(number);
            }
            STORE_WORD => {
                let begin = on_stack(address(to)).unwrap();
                stack[begin..begin + 4].copy_from_slice(&number.to_le_bytes());
            }
            LOAD_LONG => {
                assert_eq!(from, usize::from(MAP_DESCRIPTOR));
                assert_eq!(program[at * 8 + 8..at * 8 + 16], [0; 8]);
                registers[to] = value;
                at += 1;
            }
            MOVE => registers[to] = value,
            MOVE_REGISTER => registers[to] = registers[from],
            ADD => registers[to] = registers[to].wrapping_add(value),
            AND => registers[to] &= value,
            SHIFT_RIGHT => registers[to] >>= value,
            JUMP => jumps = true,
            JUMP_IF_EQUAL => jumps = registers[to] == value,
            JUMP_IF_NOT_EQUAL => jumps = registers[to] != value,
            JUMP_IF_ANY_SET => jumps = registers[to] & value != 0,
            CALL => {
                let arguments: [u64; 5] = registers[1..6].try_into().unwrap();
                let pointed = on_stack(arguments[1]).and_then(|begin| stack.get(begin..begin + 4));
                let on_stack = pointed.map(|bytes| u32::from_le_bytes(bytes.try_into().unwrap()));
                let stack = &mut stack;
                registers[usize::from(R0)] = call(Call { function: number, arguments, on_stack, stack });
                registers[1..6].fill(NOTHING);
            }
            EXIT => return registers[usize::from(R0)],
            other => panic!("operation {other:#x}"),
        }
        at += 1 + if jumps { usize::try_from(offset).unwrap() } else { 0 };
    }
}
