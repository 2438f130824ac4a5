// SPDX-License-Identifier: Apache-2.0
//! From a policy to a program.
//!
//! The numbers of an interface are cut into ranges with one decision each; neighbours with the same decision are one
//! range. The program finds the range by binary search: some ten comparisons at each system call, whatever the policy.

use std::collections::BTreeMap;

use super::arch::{Interface, X32_BIT};
use super::policy::{Condition, Policy, Test};
use super::program::{ARCH_OFFSET, Compare, Instruction, NUMBER_OFFSET, either};

/// `AUDIT_ARCH_*` of <linux/audit.h>: what the kernel tells a filter about the interface; x32 is told by a number's bit.
pub(crate) const AUDIT_ARCH_X86_64: u32 = 0xc000_003e;
pub(crate) const AUDIT_ARCH_I386: u32 = 0x4000_0003;

/// What a call through an interface gets that the policy does not list.
pub(crate) const OTHER_INTERFACE: u32 = libc::SECCOMP_RET_KILL_THREAD;

/// What is done at a system call.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Decision {
    Answer(u32),
    /// The first case whose conditions are all met; if there is none, the default action.
    Check {
        cases: Vec<(Vec<Condition>, u32)>,
        wide: bool,
    },
}

/// From this number to the next range's.
#[derive(Debug)]
struct Range {
    first: u32,
    decision: Decision,
}

/// The program for a policy.
pub(crate) fn compile(policy: &Policy) -> Vec<Instruction> {
    let has = |interface| policy.interfaces.contains(&interface);
    let mut ranges = ranges(policy, Interface::X86_64, 0);
    if has(Interface::X32) {
        ranges.extend(self::ranges(policy, Interface::X32, X32_BIT));
    } else {
        ranges.push(Range { first: X32_BIT, decision: Decision::Answer(OTHER_INTERFACE) });
    }
    // -1 is how "no such system call" looks, in a tracer's hands for one; it is not an x32 number.
    let none = policy.newer_action.unwrap_or(policy.default_action);
    ranges.push(Range { first: u32::MAX, decision: Decision::Answer(none) });
    let x86_64 = by_number(ranges, policy.default_action);
    let mut others = vec![Instruction::answer(OTHER_INTERFACE)];
    if has(Interface::X86) {
        let x86 = by_number(self::ranges(policy, Interface::X86, 0), policy.default_action);
        others = either(Compare::Equal, AUDIT_ARCH_I386, x86, others);
    }
    let mut program = vec![Instruction::load(ARCH_OFFSET)];
    program.extend(either(Compare::Equal, AUDIT_ARCH_X86_64, x86_64, others));
    program
}

/// The ranges of an interface whose numbers begin with `first`.
fn ranges(policy: &Policy, interface: Interface, first: u32) -> Vec<Range> {
    let decisions = decisions(policy, interface);
    let default = || Decision::Answer(policy.default_action);
    let mut ranges = Vec::new();
    let mut next = first;
    for (number, decision) in decisions {
        if number > next {
            ranges.push(Range { first: next, decision: default() });
        }
        ranges.push(Range { first: number, decision });
        next = number + 1;
    }
    let newest = policy.rules.iter().flat_map(|rule| &rule.names).filter_map(|name| interface.number(name)).max();
    if let (Some(action), Some(newest)) = (policy.newer_action, newest) {
        if newest >= next {
            ranges.push(Range { first: next, decision: default() });
        }
        ranges.push(Range { first: newest + 1, decision: Decision::Answer(action) });
    } else {
        ranges.push(Range { first: next, decision: default() });
    }
    ranges
}

/// What is not the default, by number.
fn decisions(policy: &Policy, interface: Interface) -> BTreeMap<u32, Decision> {
    let mut decisions = BTreeMap::new();
    for rule in policy.rules.iter().filter(|rule| rule.action != policy.default_action) {
        for name in &rule.names {
            if let Some(number) = interface.number(name) {
                add(&mut decisions, interface, number, &rule.alternatives, rule.action);
            }
            // What conditions look at is in memory on this way, where a filter cannot see it.
            if let Some(second) = interface.multiplexed(name).filter(|_| rule.alternatives.is_empty()) {
                let condition = Condition {
                    argument: 0,
                    test: Test::Equal,
                    negated: false,
                    value: second.call.into(),
                    mask: second.mask.into(),
                };
                add(&mut decisions, interface, second.number, &[vec![condition]], rule.action);
            }
        }
    }
    decisions
}

fn add(
    decisions: &mut BTreeMap<u32, Decision>,
    interface: Interface,
    number: u32,
    alternatives: &[Vec<Condition>],
    action: u32,
) {
    let wide = interface.is_wide();
    let decision = decisions.entry(number).or_insert(Decision::Check { cases: Vec::new(), wide });
    match decision {
        Decision::Answer(_) => {}
        Decision::Check { .. } if alternatives.is_empty() => *decision = Decision::Answer(action),
        Decision::Check { cases, .. } => cases.extend(alternatives.iter().map(|all| (all.clone(), action))),
    }
}

/// Finds the range of the number, and does what it says.
fn by_number(mut ranges: Vec<Range>, default_action: u32) -> Vec<Instruction> {
    ranges.dedup_by(|later, earlier| later.decision == earlier.decision);
    let mut program = vec![Instruction::load(NUMBER_OFFSET)];
    program.extend(search(&ranges, default_action));
    program
}

fn search(ranges: &[Range], default_action: u32) -> Vec<Instruction> {
    match ranges {
        [] => vec![Instruction::answer(default_action)],
        [range] => decide(&range.decision, default_action),
        _ => {
            let (low, high) = ranges.split_at(ranges.len() / 2);
            let first_high = high.first().map_or(0, |range| range.first);
            let (low, high) = (search(low, default_action), search(high, default_action));
            either(Compare::GreaterOrEqual, first_high, high, low)
        }
    }
}

fn decide(decision: &Decision, default_action: u32) -> Vec<Instruction> {
    let (cases, wide) = match decision {
        Decision::Answer(action) => return vec![Instruction::answer(*action)],
        Decision::Check { cases, wide } => (cases, *wide),
    };
    let mut program = Vec::new();
    for (conditions, action) in cases {
        // From the last to the first, so that each knows how much is to be skipped if it is not met.
        let mut case = vec![Instruction::answer(*action)];
        for condition in conditions.iter().rev() {
            let mut longer = test(condition, wide, case.len());
            longer.append(&mut case);
            case = longer;
        }
        program.append(&mut case);
    }
    program.push(Instruction::answer(default_action));
    program
}

/// Where a branch of a test leads.
#[derive(Clone, Copy, PartialEq, Eq)]
enum To {
    /// The next instruction.
    Next,
    /// The end of the test.
    Met,
    /// Behind what follows the test.
    NotMet,
}

/// Goes on if the condition is met, else skips `rest` instructions. A rule has at most six conditions, one an argument,
/// and a condition at most seven instructions, so that all jumps are short.
fn test(condition: &Condition, wide: bool, rest: usize) -> Vec<Instruction> {
    let (met, not_met) = if condition.negated { (To::NotMet, To::Met) } else { (To::Met, To::NotMet) };
    let (value_high, value_low) = ((condition.value >> 32) as u32, condition.value as u32);
    let (mask_high, mask_low) = ((condition.mask >> 32) as u32, condition.mask as u32);
    let mut steps: Vec<(Instruction, To, To)> = Vec::new();
    let plain = |instruction| (instruction, To::Next, To::Next);
    let branch = |compare, operand| Instruction::branch(compare, operand, 0, 0);
    if wide {
        steps.push(plain(Instruction::load_high(condition.argument)));
        if mask_high != u32::MAX {
            steps.push(plain(Instruction::and(mask_high)));
        }
        if condition.test != Test::Equal {
            steps.push((branch(Compare::Greater, value_high), met, To::Next));
        }
        steps.push((branch(Compare::Equal, value_high), To::Next, not_met));
    }
    steps.push(plain(Instruction::load_low(condition.argument)));
    if mask_low != u32::MAX {
        steps.push(plain(Instruction::and(mask_low)));
    }
    let last = match condition.test {
        Test::Equal => Compare::Equal,
        Test::Greater => Compare::Greater,
        Test::GreaterOrEqual => Compare::GreaterOrEqual,
    };
    steps.push((branch(last, value_low), met, not_met));
    let length = steps.len();
    let place = |(index, (instruction, if_true, if_false)): (usize, (Instruction, To, To))| {
        let skip = |to| match to {
            To::Next => 0,
            To::Met => (length - index - 1) as u8,
            To::NotMet => (length - index - 1 + rest) as u8,
        };
        Instruction { if_true: skip(if_true), if_false: skip(if_false), ..instruction }
    };
    steps.into_iter().enumerate().map(place).collect()
}
