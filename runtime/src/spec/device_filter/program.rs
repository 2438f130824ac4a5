// SPDX-License-Identifier: Apache-2.0
//! Rules as a program of type `BPF_PROG_TYPE_CGROUP_DEVICE` (<linux/bpf.h>), which the kernel asks at each access: it
//! answers 1 to allow it, 0 to deny it.
//!
//! The program goes through the rules from the last to the first. A register holds the accesses that no rule has decided
//! yet: a rule that allows takes its own out, and when none is left the answer is 1; a rule that denies one of them makes
//! it 0, and so does the end.

use super::{ALL, Kind, Rule};

/// Registers: the answer, the context, kind and access of what is tried, its numbers.
const R0: u8 = 0;
const CONTEXT: u8 = 1;
const KIND: u8 = 2;
const ACCESS: u8 = 3;
const MAJOR: u8 = 4;
const MINOR: u8 = 5;

/// Offsets in `struct bpf_cgroup_dev_ctx`; the first field has the kind in its low half and the access in its high one.
const ACCESS_TYPE_AT: i16 = 0;
const MAJOR_AT: i16 = 4;
const MINOR_AT: i16 = 8;

/// Operation codes: class, source or size, operation.
const LOAD_WORD: u8 = 0x61;
const MOVE: u8 = 0xb7;
const MOVE_REGISTER: u8 = 0xbf;
const AND: u8 = 0x57;
const SHIFT_RIGHT: u8 = 0x77;
const JUMP: u8 = 0x05;
const JUMP_IF_NOT_EQUAL: u8 = 0x55;
const JUMP_IF_ANY_SET: u8 = 0x45;
const EXIT: u8 = 0x95;

/// `struct bpf_insn`.
#[derive(Clone, Copy, Debug)]
struct Instruction {
    code: u8,
    to: u8,
    from: u8,
    offset: i16,
    value: i32,
}

impl Instruction {
    fn new(code: u8, to: u8, offset: i16, value: i32) -> Self {
        Self { code, to, from: 0, offset, value }
    }

    fn from_register(code: u8, to: u8, from: u8, offset: i16) -> Self {
        Self { code, to, from, offset, value: 0 }
    }

    fn bytes(self) -> [u8; 8] {
        let [offset_low, offset_high] = self.offset.to_le_bytes();
        let [a, b, c, d] = self.value.to_le_bytes();
        [self.code, self.from << 4 | self.to, offset_low, offset_high, a, b, c, d]
    }
}

/// Compiles the rules, of which later ones go before earlier ones.
pub(super) fn compile(rules: &[Rule]) -> Vec<u8> {
    let mut program = vec![
        Instruction::new(MOVE, R0, 0, 0),
        Instruction::from_register(LOAD_WORD, KIND, CONTEXT, ACCESS_TYPE_AT),
        Instruction::from_register(MOVE_REGISTER, ACCESS, KIND, 0),
        Instruction::new(SHIFT_RIGHT, ACCESS, 0, 16),
        Instruction::new(AND, KIND, 0, 0xffff),
        Instruction::from_register(LOAD_WORD, MAJOR, CONTEXT, MAJOR_AT),
        Instruction::from_register(LOAD_WORD, MINOR, CONTEXT, MINOR_AT),
    ];
    // What comes before a rule for everything is never asked.
    let last_for_all =
        rules.iter().rposition(|rule| rule.kind == Kind::Any && rule.access == ALL && numbers(rule) == [None; 2]);
    for rule in rules[last_for_all.unwrap_or(0)..].iter().rev() {
        append(&mut program, rule);
    }
    program.push(Instruction::new(EXIT, 0, 0, 0));
    program.into_iter().flat_map(Instruction::bytes).collect()
}

fn numbers(rule: &Rule) -> [Option<u32>; 2] {
    [rule.major, rule.minor]
}

fn append(program: &mut Vec<Instruction>, rule: &Rule) {
    let action = action(rule);
    let kind = match rule.kind {
        Kind::Any => None,
        Kind::Block => Some(1),
        Kind::Character => Some(2),
    };
    let conditions = [(KIND, kind), (MAJOR, rule.major), (MINOR, rule.minor)];
    let mut conditions: Vec<_> =
        conditions.into_iter().filter_map(|(register, value)| Some((register, value?))).collect();
    // Each condition that fails leads over those after it and over the action.
    let mut over = action.len() + conditions.len();
    for (register, value) in conditions.drain(..) {
        over -= 1;
        // At most seven instructions, and numbers of at most twenty bits.
        program.push(Instruction::new(JUMP_IF_NOT_EQUAL, register, over as i16, value as i32));
    }
    program.extend(action);
}

/// What a rule does with the accesses that are still open.
fn action(rule: &Rule) -> Vec<Instruction> {
    let access = i32::from(rule.access);
    if rule.allow {
        vec![
            Instruction::new(AND, ACCESS, 0, !access),
            Instruction::new(JUMP_IF_NOT_EQUAL, ACCESS, 2, 0),
            Instruction::new(MOVE, R0, 0, 1),
            Instruction::new(EXIT, 0, 0, 0),
        ]
    } else {
        vec![
            Instruction::new(JUMP_IF_ANY_SET, ACCESS, 1, access),
            Instruction::new(JUMP, 0, 1, 0),
            Instruction::new(EXIT, 0, 0, 0),
        ]
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    /// Runs a program as the kernel would.
    pub(in super::super) fn run(program: &[u8], kind: u32, access: u8, major: u32, minor: u32) -> bool {
        let context = [u32::from(access) << 16 | kind, major, minor];
        let mut registers = [0_u64; 11];
        let mut at = 0_usize;
        loop {
            let bytes: [u8; 8] = program[at * 8..at * 8 + 8].try_into().unwrap();
            let (to, from) = (usize::from(bytes[1] & 15), usize::from(bytes[1] >> 4));
            let offset = i16::from_le_bytes([bytes[2], bytes[3]]);
            let value = i64::from(i32::from_le_bytes(bytes[4..].try_into().unwrap())).cast_unsigned();
            let jump = match bytes[0] {
                LOAD_WORD => {
                    registers[to] = u64::from(context[usize::try_from(offset).unwrap() / 4]);
                    false
                }
                MOVE => {
                    registers[to] = value;
                    false
                }
                MOVE_REGISTER => {
                    registers[to] = registers[from];
                    false
                }
                AND => {
                    registers[to] &= value;
                    false
                }
                SHIFT_RIGHT => {
                    registers[to] >>= value;
                    false
                }
                JUMP => true,
                JUMP_IF_NOT_EQUAL => registers[to] != value,
                JUMP_IF_ANY_SET => registers[to] & value != 0,
                EXIT => return registers[0] == 1,
                other => panic!("operation {other:#x}"),
            };
            at += 1 + if jump { usize::try_from(offset).unwrap() } else { 0 };
        }
    }

    /// The last rule that speaks of an access decides it.
    fn expected(rules: &[Rule], kind: Kind, access: u8, major: u32, minor: u32) -> bool {
        [1, 2, 4].into_iter().filter(|bit| access & bit != 0).all(|bit| {
            let speaks = |rule: &&Rule| {
                (rule.kind == Kind::Any || rule.kind == kind)
                    && rule.major.is_none_or(|number| number == major)
                    && rule.minor.is_none_or(|number| number == minor)
                    && rule.access & bit != 0
            };
            rules.iter().rev().find(speaks).is_some_and(|rule| rule.allow)
        })
    }

    #[test]
    fn programs_decide_as_their_rules_do() {
        // Every list of two rules out of these, before one for a single device.
        let mut rules = Vec::new();
        for allow in [false, true] {
            for kind in [Kind::Any, Kind::Block, Kind::Character] {
                for (major, minor) in [(None, None), (Some(1), None), (None, Some(3)), (Some(1), Some(3))] {
                    rules.extend([1, 3, 6, ALL].map(|access| Rule { allow, kind, major, minor, access }));
                }
            }
        }
        let last = Rule { allow: true, kind: Kind::Character, major: Some(5), minor: None, access: ALL };
        for first in &rules {
            for second in &rules {
                let list = [*first, *second, last];
                let program = compile(&list);
                for (number, kind) in [(1, Kind::Block), (2, Kind::Character)] {
                    for access in 1..=ALL {
                        for (major, minor) in [(1, 3), (1, 4), (2, 3), (5, 3)] {
                            let allowed = run(&program, number, access, major, minor);
                            let wanted = expected(&list, kind, access, major, minor);
                            assert_eq!(allowed, wanted, "{list:?}: {kind:?} {access} {major}:{minor}");
                        }
                    }
                }
            }
        }
    }

    #[test]
    fn rules_before_one_for_everything_cost_nothing() {
        let one = Rule { allow: true, kind: Kind::Character, major: Some(1), minor: Some(2), access: ALL };
        let all = Rule { allow: false, kind: Kind::Any, major: None, minor: None, access: ALL };

        assert_eq!(compile(&[one, one, all, one]).len(), compile(&[all, one]).len());
    }
}
