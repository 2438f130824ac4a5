// SPDX-License-Identifier: Apache-2.0
//! Classic BPF as seccomp(2) takes it: the few instructions that a filter needs.

use libc::{BPF_ABS, BPF_ALU, BPF_AND, BPF_JA, BPF_JEQ, BPF_JGE, BPF_JGT, BPF_JMP, BPF_K, BPF_LD, BPF_RET, BPF_W};

/// Where `struct seccomp_data` has the system call's number, the architecture, and the first argument.
pub(crate) const NUMBER_OFFSET: u32 = 0;
pub(crate) const ARCH_OFFSET: u32 = 4;
const ARGS_OFFSET: u32 = 16;

/// One instruction: `struct sock_filter` of <linux/filter.h>. Jumps are relative to the next instruction.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Instruction {
    pub(crate) code: u16,
    pub(crate) if_true: u8,
    pub(crate) if_false: u8,
    pub(crate) operand: u32,
}

/// How the accumulator is compared with a number.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Compare {
    Equal,
    Greater,
    GreaterOrEqual,
}

impl Instruction {
    fn plain(code: u32, operand: u32) -> Self {
        // All codes are made of constants below 256.
        Self { code: code as u16, if_true: 0, if_false: 0, operand }
    }

    /// Loads the 32 bits at an offset of `struct seccomp_data`.
    pub(crate) fn load(offset: u32) -> Self {
        Self::plain(BPF_LD | BPF_W | BPF_ABS, offset)
    }

    /// Loads the lower half of an argument.
    pub(crate) fn load_low(argument: u8) -> Self {
        Self::load(ARGS_OFFSET + 8 * u32::from(argument))
    }

    /// Loads the upper half of an argument.
    pub(crate) fn load_high(argument: u8) -> Self {
        Self::load(ARGS_OFFSET + 8 * u32::from(argument) + 4)
    }

    /// Keeps the bits of `mask`.
    pub(crate) fn and(mask: u32) -> Self {
        Self::plain(BPF_ALU | BPF_AND | BPF_K, mask)
    }

    /// Skips `if_true` instructions if the comparison holds, else `if_false`.
    pub(crate) fn branch(compare: Compare, operand: u32, if_true: u8, if_false: u8) -> Self {
        let compare = match compare {
            Compare::Equal => BPF_JEQ,
            Compare::Greater => BPF_JGT,
            Compare::GreaterOrEqual => BPF_JGE,
        };
        Self { if_true, if_false, ..Self::plain(BPF_JMP | compare | BPF_K, operand) }
    }

    /// Skips any number of instructions.
    pub(crate) fn skip(count: u32) -> Self {
        Self::plain(BPF_JMP | BPF_JA, count)
    }

    /// Ends the program with an action.
    pub(crate) fn answer(action: u32) -> Self {
        Self::plain(BPF_RET | BPF_K, action)
    }
}

/// The instructions as the guest, which is an x86-64 machine, has them in memory.
pub(crate) fn encode(program: &[Instruction]) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(program.len() * 8);
    for instruction in program {
        bytes.extend(instruction.code.to_le_bytes());
        bytes.extend([instruction.if_true, instruction.if_false]);
        bytes.extend(instruction.operand.to_le_bytes());
    }
    bytes
}

/// `if compare then high else low`, however long `low` is.
pub(crate) fn either(
    compare: Compare,
    operand: u32,
    high: Vec<Instruction>,
    low: Vec<Instruction>,
) -> Vec<Instruction> {
    let mut program = Vec::with_capacity(low.len() + high.len() + 2);
    match u8::try_from(low.len()) {
        Ok(length) => program.push(Instruction::branch(compare, operand, length, 0)),
        Err(_) => {
            program.push(Instruction::branch(compare, operand, 0, 1));
            // A program is far from 2^32 instructions: the configuration it comes from has at most 16 MiB.
            program.push(Instruction::skip(low.len() as u32));
        }
    }
    program.extend(low);
    program.extend(high);
    program
}
