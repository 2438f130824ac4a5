// SPDX-License-Identifier: Apache-2.0
//! Programs of eBPF, as they are put together here: a list of instructions (`struct bpf_insn` of <linux/bpf.h>), which jump
//! forward only.

#[cfg(test)]
pub(crate) mod interpreter;

/// Registers: what a program, or a function that it calls, answers; what they are given, of which a call leaves nothing; those
/// that outlast a call; and the end of the stack.
pub(crate) const R0: u8 = 0;
pub(crate) const R1: u8 = 1;
pub(crate) const R2: u8 = 2;
pub(crate) const R3: u8 = 3;
pub(crate) const R4: u8 = 4;
pub(crate) const R5: u8 = 5;
pub(crate) const R6: u8 = 6;
pub(crate) const R7: u8 = 7;
pub(crate) const R8: u8 = 8;
pub(crate) const STACK: u8 = 10;

/// Operation codes: class, source or size, operation.
pub(crate) const LOAD_WORD: u8 = 0x61;
pub(crate) const LOAD_HALF: u8 = 0x69;
pub(crate) const LOAD_BYTE: u8 = 0x71;
pub(crate) const STORE_WORD: u8 = 0x62;
pub(crate) const LOAD_LONG: u8 = 0x18;
pub(crate) const MOVE: u8 = 0xb7;
pub(crate) const MOVE_REGISTER: u8 = 0xbf;
pub(crate) const ADD: u8 = 0x07;
pub(crate) const AND: u8 = 0x57;
pub(crate) const SHIFT_RIGHT: u8 = 0x77;
pub(crate) const JUMP: u8 = 0x05;
pub(crate) const JUMP_IF_EQUAL: u8 = 0x15;
pub(crate) const JUMP_IF_NOT_EQUAL: u8 = 0x55;
pub(crate) const JUMP_IF_ANY_SET: u8 = 0x45;
pub(crate) const CALL: u8 = 0x85;
pub(crate) const EXIT: u8 = 0x95;

/// In the place of the source register of `LOAD_LONG`: the number is a map's descriptor.
pub(crate) const MAP_DESCRIPTOR: u8 = 1;

/// `struct bpf_insn`.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Instruction {
    code: u8,
    to: u8,
    from: u8,
    /// Of a jump: over how many instructions it leads.
    pub(crate) offset: i16,
    value: i32,
}

impl Instruction {
    pub(crate) fn new(code: u8, to: u8, offset: i16, value: i32) -> Self {
        Self { code, to, from: 0, offset, value }
    }

    pub(crate) fn from_register(code: u8, to: u8, from: u8, offset: i16) -> Self {
        Self { code, to, from, offset, value: 0 }
    }

    /// Calls one of the kernel's functions, by its number.
    pub(crate) fn call(function: i32) -> Self {
        Self::new(CALL, 0, 0, function)
    }

    /// Has a register point to a map. It is two instructions long.
    pub(crate) fn load_map(to: u8, descriptor: i32) -> [Self; 2] {
        let low = Self { code: LOAD_LONG, to, from: MAP_DESCRIPTOR, offset: 0, value: descriptor };
        [low, Self::new(0, 0, 0, 0)]
    }

    fn bytes(self) -> [u8; 8] {
        let [offset_low, offset_high] = self.offset.to_le_bytes();
        let [a, b, c, d] = self.value.to_le_bytes();
        [self.code, self.from << 4 | self.to, offset_low, offset_high, a, b, c, d]
    }
}

/// The program, as it is in memory.
pub(crate) fn encode(program: Vec<Instruction>) -> Vec<u8> {
    program.into_iter().flat_map(Instruction::bytes).collect()
}
