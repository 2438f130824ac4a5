// SPDX-License-Identifier: Apache-2.0
//! Rules as a program of type `BPF_PROG_TYPE_CGROUP_DEVICE` (<linux/bpf.h>), which the kernel asks at each access: it
//! answers 1 to allow it, 0 to deny it.
//!
//! The program goes through the rules from the last to the first. A register holds the accesses that no rule has decided
//! yet: a rule that allows takes its own out, and when none is left the answer is 1; a rule that denies one of them makes
//! it 0, and so does the end.

use super::{ALL, Kind, Rule};
use crate::bpf::{
    AND, EXIT, Instruction, JUMP, JUMP_IF_ANY_SET, JUMP_IF_NOT_EQUAL, LOAD_WORD, MOVE, MOVE_REGISTER, R0, R1, R2, R3,
    R4, R5, SHIFT_RIGHT, encode,
};

/// Registers: kind and access of what is tried, its numbers.
const CONTEXT: u8 = R1;
const KIND: u8 = R2;
const ACCESS: u8 = R3;
const MAJOR: u8 = R4;
const MINOR: u8 = R5;

/// Offsets in `struct bpf_cgroup_dev_ctx`; the first field has the kind in its low half and the access in its high one.
const ACCESS_TYPE_AT: i16 = 0;
const MAJOR_AT: i16 = 4;
const MINOR_AT: i16 = 8;

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
    encode(program)
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
    use crate::bpf::interpreter;

    /// Whether the kernel would allow an access.
    pub(in super::super) fn run(program: &[u8], kind: u32, access: u8, major: u32, minor: u32) -> bool {
        let context = [u32::from(access) << 16 | kind, major, minor].map(u32::to_le_bytes).concat();
        interpreter::run(program, &context, |call| panic!("it calls the function {}", call.function)) == 1
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
