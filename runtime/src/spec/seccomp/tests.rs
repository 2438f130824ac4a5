// SPDX-License-Identifier: Apache-2.0
//! Programs are run by a small interpreter, and what they answer is compared with the rules read one by one.

use oci_spec::runtime::{LinuxSeccomp, LinuxSeccompAction, LinuxSeccompArg, LinuxSeccompOperator};
use serde_json::{Value, json};

use super::arch::{Interface, X32_BIT};
use super::compile::{AUDIT_ARCH_I386, AUDIT_ARCH_X86_64, OTHER_INTERFACE};
use super::*;

const ALLOW: u32 = libc::SECCOMP_RET_ALLOW;
const ERRNO: u32 = libc::SECCOMP_RET_ERRNO;
const EPERM: u32 = ERRNO | libc::EPERM as u32;
const ENOSYS: u32 = ERRNO | libc::ENOSYS as u32;

/// A system call as a filter sees it.
#[derive(Debug, Clone, Copy)]
struct Call {
    arch: u32,
    number: u32,
    args: [u64; 6],
}

/// What the program answers, run as the kernel runs it, with each jump checked.
fn run(program: &[u8], call: Call) -> u32 {
    let mut data = [0; 64];
    data[0..4].copy_from_slice(&call.number.to_le_bytes());
    data[4..8].copy_from_slice(&call.arch.to_le_bytes());
    for (index, arg) in call.args.iter().enumerate() {
        data[16 + 8 * index..24 + 8 * index].copy_from_slice(&arg.to_le_bytes());
    }
    let (mut accumulator, mut at) = (0_u32, 0);
    loop {
        let instruction = &program[at * 8..at * 8 + 8];
        let code = u32::from(u16::from_le_bytes([instruction[0], instruction[1]]));
        let operand = u32::from_le_bytes(instruction[4..].try_into().unwrap());
        at += 1;
        let mut branch = |holds| at += usize::from(if holds { instruction[2] } else { instruction[3] });
        match code {
            0x20 => {
                assert!(operand.is_multiple_of(4) && operand < 64);
                accumulator = u32::from_le_bytes(data[operand as usize..operand as usize + 4].try_into().unwrap());
            }
            0x54 => accumulator &= operand,
            0x05 => at += operand as usize,
            0x15 => branch(accumulator == operand),
            0x25 => branch(accumulator > operand),
            0x35 => branch(accumulator >= operand),
            0x06 => return operand,
            other => panic!("instruction {other:#x}"),
        }
    }
}

fn parse(value: Value) -> LinuxSeccomp {
    serde_json::from_value(value).unwrap()
}

fn compiled(value: Value) -> Vec<u8> {
    translate(&parse(value)).unwrap().filter
}

fn refused(value: Value) -> String {
    translate(&parse(value)).unwrap_err().to_string()
}

fn native(name: &str, args: &[u64]) -> Call {
    let mut all = [0; 6];
    all[..args.len()].copy_from_slice(args);
    Call { arch: AUDIT_ARCH_X86_64, number: Interface::X86_64.number(name).unwrap(), args: all }
}

#[test]
fn listed_calls_pass_and_the_rest_gets_the_default() {
    let program = compiled(json!({
        "defaultAction": "SCMP_ACT_ERRNO",
        "syscalls": [
            {"names": ["read", "write", "no_such_call", "close_range"], "action": "SCMP_ACT_ALLOW"},
            {"names": ["reboot"], "action": "SCMP_ACT_KILL_PROCESS"},
            {"names": ["mount"], "action": "SCMP_ACT_ERRNO", "errnoRet": 38},
            {"names": ["ptrace"], "action": "SCMP_ACT_TRACE", "errnoRet": 7},
            {"names": ["acct"], "action": "SCMP_ACT_TRAP"},
            {"names": ["swapon"], "action": "SCMP_ACT_KILL"},
            {"names": ["swapoff"], "action": "SCMP_ACT_LOG"},
        ],
    }));

    for (name, answer) in [
        ("read", ALLOW),
        ("close_range", ALLOW),
        ("open", EPERM),
        ("reboot", libc::SECCOMP_RET_KILL_PROCESS),
        ("mount", ENOSYS),
        ("ptrace", libc::SECCOMP_RET_TRACE | 7),
        ("acct", libc::SECCOMP_RET_TRAP),
        ("swapon", libc::SECCOMP_RET_KILL_THREAD),
        ("swapoff", libc::SECCOMP_RET_LOG),
        ("clone3", EPERM),
        // Newer than close_range, the newest that is named.
        ("openat2", ENOSYS),
        ("landlock_create_ruleset", ENOSYS),
    ] {
        assert_eq!(run(&program, native(name, &[])), answer, "{name}");
    }
}

#[test]
fn a_default_that_lets_pass_has_no_newest_call() {
    let program = compiled(json!({
        "defaultAction": "SCMP_ACT_ALLOW",
        "syscalls": [{"names": ["mkdir"], "action": "SCMP_ACT_ERRNO"}],
    }));

    assert_eq!(run(&program, native("mkdir", &[])), EPERM);
    assert_eq!(run(&program, native("openat2", &[])), ALLOW);
}

#[test]
fn each_operator_compares_all_64_bits() {
    let (low, high) = (5_u64, 5_u64 << 32);
    let values = [0, 4, low, 6, high, high | 4, high | low, high | 6, 6 << 32, u64::MAX, 1 << 63];
    for op in ["NE", "LT", "LE", "EQ", "GE", "GT"] {
        for value in values {
            let program = compiled(json!({
                "defaultAction": "SCMP_ACT_ERRNO",
                "syscalls": [{"names": ["lseek"], "action": "SCMP_ACT_ALLOW",
                    "args": [{"index": 3, "value": value, "op": format!("SCMP_CMP_{op}")}]}],
            }));
            for argument in values {
                let met = match op {
                    "NE" => argument != value,
                    "LT" => argument < value,
                    "LE" => argument <= value,
                    "EQ" => argument == value,
                    "GE" => argument >= value,
                    _ => argument > value,
                };
                let answer = run(&program, native("lseek", &[0, 0, 0, argument]));
                assert_eq!(answer == ALLOW, met, "{argument:#x} {op} {value:#x}");
            }
        }
    }
}

#[test]
fn a_mask_comes_before_the_value() {
    let program = compiled(json!({
        "defaultAction": "SCMP_ACT_ERRNO",
        "syscalls": [{"names": ["clone"], "action": "SCMP_ACT_ALLOW",
            "args": [{"index": 0, "value": 0x7e02_0000, "valueTwo": 0, "op": "SCMP_CMP_MASKED_EQ"}]}],
    }));

    assert_eq!(run(&program, native("clone", &[17])), ALLOW);
    assert_eq!(run(&program, native("clone", &[u64::MAX << 32 | 17])), ALLOW);
    assert_eq!(run(&program, native("clone", &[0x1000_0000])), EPERM);
}

#[test]
fn conditions_on_one_argument_are_alternatives_and_on_several_are_together() {
    let arg = |index: usize, value: u64| json!({"index": index, "value": value, "op": "SCMP_CMP_EQ"});
    let program = compiled(json!({
        "defaultAction": "SCMP_ACT_ERRNO",
        "syscalls": [
            {"names": ["personality"], "action": "SCMP_ACT_ALLOW", "args": [arg(0, 0), arg(0, 8)]},
            {"names": ["socket"], "action": "SCMP_ACT_ALLOW", "args": [arg(0, 16), arg(2, 9)]},
        ],
    }));

    for (name, args, answer) in [
        ("personality", [8, 0, 0], ALLOW),
        ("personality", [1, 0, 0], EPERM),
        ("socket", [16, 3, 9], ALLOW),
        ("socket", [16, 3, 0], EPERM),
        ("socket", [2, 3, 9], EPERM),
    ] {
        assert_eq!(run(&program, native(name, &args)), answer, "{name} {args:?}");
    }
}

#[test]
fn other_interfaces_are_closed_unless_they_are_listed() {
    let policy = |architectures: &[&str]| {
        compiled(json!({
            "defaultAction": "SCMP_ACT_ERRNO",
            "architectures": architectures,
            "syscalls": [{"names": ["read", "socket", "shmat", "ioctl"], "action": "SCMP_ACT_ALLOW"}],
        }))
    };
    let (only, all) = (policy(&[]), policy(&["SCMP_ARCH_X86_64", "SCMP_ARCH_X86", "SCMP_ARCH_X32"]));
    let call = |arch, number, first| Call { arch, number, args: [first, 0, 0, 0, 0, 0] };
    let cases = [
        // x86: read, socketcall(SOCKET), socketcall(BIND), ipc(SHMAT, version 1), write
        (call(AUDIT_ARCH_I386, 3, 0), ALLOW),
        (call(AUDIT_ARCH_I386, 102, 1), ALLOW),
        (call(AUDIT_ARCH_I386, 102, 2), EPERM),
        (call(AUDIT_ARCH_I386, 117, 1 << 16 | 21), ALLOW),
        (call(AUDIT_ARCH_I386, 4, 0), EPERM),
        // x32: read, and ioctl under its own number, not under its 64-bit one
        (call(AUDIT_ARCH_X86_64, X32_BIT, 0), ALLOW),
        (call(AUDIT_ARCH_X86_64, X32_BIT | 514, 0), ALLOW),
        (call(AUDIT_ARCH_X86_64, X32_BIT | 16, 0), EPERM),
    ];
    for (call, answer) in cases {
        assert_eq!(run(&all, call), answer, "{call:x?}");
        assert_eq!(run(&only, call), OTHER_INTERFACE, "{call:x?}");
    }
    for program in [&only, &all] {
        assert_eq!(run(program, call(0xc000_00b7, 63, 0)), OTHER_INTERFACE);
        assert_eq!(run(program, call(AUDIT_ARCH_X86_64, u32::MAX, 0)), ENOSYS);
    }
}

#[test]
fn a_rule_without_conditions_wins() {
    let args = json!([{"index": 0, "value": 1, "op": "SCMP_CMP_EQ"}]);
    let program = compiled(json!({
        "defaultAction": "SCMP_ACT_ALLOW",
        "syscalls": [
            {"names": ["kill"], "action": "SCMP_ACT_LOG", "args": args},
            {"names": ["kill"], "action": "SCMP_ACT_ERRNO"},
            {"names": ["kill"], "action": "SCMP_ACT_TRAP"},
        ],
    }));

    assert_eq!(run(&program, native("kill", &[1])), EPERM);
}

/// Numbers without a pattern to fall into; the same at each run.
struct Numbers(u64);

impl Numbers {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    fn below(&mut self, bound: u64) -> u64 {
        self.next() % bound
    }

    fn pick<'a, T>(&mut self, list: &'a [T]) -> &'a T {
        &list[usize::try_from(self.below(list.len() as u64)).unwrap()]
    }

    fn argument(&mut self) -> u64 {
        let values = [0, 1, 2, 3, 1 << 32, 1 << 32 | 1, u64::MAX, u64::MAX - 1, 0x7fff_ffff, 0x8000_0000];
        *self.pick(&values)
    }
}

const NAMES: [&str; 14] = [
    "read",
    "write",
    "open",
    "close",
    "stat",
    "ioctl",
    "socket",
    "clone",
    "personality",
    "mount",
    "kexec_load",
    "close_range",
    "openat2",
    "no_such_call",
];

const ACTIONS: [&str; 6] = ["ALLOW", "ERRNO", "KILL_PROCESS", "TRAP", "LOG", "TRACE"];

fn random_policy(numbers: &mut Numbers) -> Value {
    let operators = ["NE", "LT", "LE", "EQ", "GE", "GT", "MASKED_EQ"];
    let rules: Vec<Value> = (0..numbers.below(20))
        .map(|_| {
            let names: Vec<&str> = (0..=numbers.below(3)).map(|_| *numbers.pick(&NAMES)).collect();
            let args: Vec<Value> = (0..numbers.below(4))
                .map(|_| {
                    json!({"index": numbers.below(6), "value": numbers.argument(), "valueTwo": numbers.argument(),
                        "op": format!("SCMP_CMP_{}", numbers.pick(&operators))})
                })
                .collect();
            json!({"names": names, "action": format!("SCMP_ACT_{}", numbers.pick(&ACTIONS)), "args": args})
        })
        .collect();
    json!({
        "defaultAction": format!("SCMP_ACT_{}", numbers.pick(&ACTIONS)),
        "architectures": ["SCMP_ARCH_X86_64", "SCMP_ARCH_X86", "SCMP_ARCH_X32"],
        "syscalls": rules,
    })
}

fn action_of(action: LinuxSeccompAction) -> u32 {
    match action {
        LinuxSeccompAction::ScmpActAllow => ALLOW,
        LinuxSeccompAction::ScmpActErrno => EPERM,
        LinuxSeccompAction::ScmpActKillProcess => libc::SECCOMP_RET_KILL_PROCESS,
        LinuxSeccompAction::ScmpActTrap => libc::SECCOMP_RET_TRAP,
        LinuxSeccompAction::ScmpActLog => libc::SECCOMP_RET_LOG,
        LinuxSeccompAction::ScmpActTrace => libc::SECCOMP_RET_TRACE | 1,
        other => panic!("{other:?}"),
    }
}

fn is_met(arg: &LinuxSeccompArg, call: &Call) -> bool {
    let cut = |value: u64| {
        let wide = call.arch == AUDIT_ARCH_X86_64 && call.number & X32_BIT == 0;
        if wide { value } else { value & 0xffff_ffff }
    };
    let (actual, value) = (cut(call.args[arg.index()]), cut(arg.value()));
    match arg.op() {
        LinuxSeccompOperator::ScmpCmpNe => actual != value,
        LinuxSeccompOperator::ScmpCmpLt => actual < value,
        LinuxSeccompOperator::ScmpCmpLe => actual <= value,
        LinuxSeccompOperator::ScmpCmpEq => actual == value,
        LinuxSeccompOperator::ScmpCmpGe => actual >= value,
        LinuxSeccompOperator::ScmpCmpGt => actual > value,
        LinuxSeccompOperator::ScmpCmpMaskedEq => actual & value == cut(arg.value_two().unwrap()),
    }
}

/// What the rules say, read one by one.
fn expected(policy: &LinuxSeccomp, interface: Interface, name: &str, call: &Call) -> u32 {
    let default = action_of(policy.default_action());
    let rules = policy.syscalls().as_ref().unwrap();
    let mine: Vec<_> = rules
        .iter()
        .filter(|rule| rule.names().iter().any(|known| known == name) && action_of(rule.action()) != default)
        .collect();
    let newest = rules.iter().flat_map(|rule| rule.names()).filter_map(|name| interface.number(name)).max();
    if newest.is_some_and(|newest| call.number > newest)
        && ![ALLOW, libc::SECCOMP_RET_LOG, libc::SECCOMP_RET_TRACE | 1].contains(&default)
    {
        return ENOSYS;
    }
    if let Some(rule) = mine.iter().find(|rule| rule.args().as_ref().is_none_or(Vec::is_empty)) {
        return action_of(rule.action());
    }
    let matches = mine.iter().find(|rule| {
        let args = rule.args().as_ref().unwrap();
        let twice = args.iter().any(|one| args.iter().filter(|other| other.index() == one.index()).count() > 1);
        if twice { args.iter().any(|arg| is_met(arg, call)) } else { args.iter().all(|arg| is_met(arg, call)) }
    });
    matches.map_or(default, |rule| action_of(rule.action()))
}

#[test]
fn programs_answer_what_the_rules_say() {
    let mut numbers = Numbers(0x9e37_79b9_7f4a_7c15);
    for _ in 0..400 {
        let value = random_policy(&mut numbers);
        let (policy, program) = (parse(value.clone()), compiled(value.clone()));
        for _ in 0..200 {
            let name = *numbers.pick(&NAMES);
            let interface = *numbers.pick(&[Interface::X86_64, Interface::X32, Interface::X86]);
            let Some(number) = interface.number(name) else { continue };
            let arch = if interface == Interface::X86 { AUDIT_ARCH_I386 } else { AUDIT_ARCH_X86_64 };
            let call = Call { arch, number, args: std::array::from_fn(|_| numbers.argument()) };
            assert_eq!(
                run(&program, call),
                expected(&policy, interface, name, &call),
                "{name} {interface:?} {call:x?} {value}"
            );
        }
    }
}

/// Engines write every call there is, several hundred, with some conditions.
#[test]
fn an_engines_profile_is_short_and_finds_each_call_quickly() {
    let names: Vec<&str> = syscalls::x86_64::Sysno::iter().map(|call| call.name()).collect();
    let every_other: Vec<&str> = names.iter().copied().step_by(2).collect();
    let filter = compiled(json!({
        "defaultAction": "SCMP_ACT_ERRNO",
        "architectures": ["SCMP_ARCH_X86_64", "SCMP_ARCH_X86", "SCMP_ARCH_X32"],
        "syscalls": [{"names": every_other, "action": "SCMP_ACT_ALLOW"}],
    }));

    // No worse can come: each call is a range of its own.
    assert!(filter.len() / 8 < 3500, "{} instructions", filter.len() / 8);
    for (index, name) in names.iter().enumerate() {
        let listed = index % 2 == 0;
        assert_eq!(run(&filter, native(name, &[])) == ALLOW, listed, "{name}");
    }
}

/// The profile that podman uses, where its package is installed.
#[test]
fn the_profile_of_podman_compiles() {
    let Ok(text) = std::fs::read_to_string("/usr/share/containers/seccomp.json") else { return };
    let mut profile: Value = serde_json::from_str(&text).unwrap();
    // The engine decides by these; what is left is what a runtime gets, and then some.
    for rule in profile["syscalls"].as_array_mut().unwrap() {
        rule.as_object_mut().unwrap().retain(|key, value| match key.as_str() {
            "names" | "action" | "args" | "errnoRet" => !value.is_null(),
            _ => false,
        });
    }
    profile["architectures"] = json!(["SCMP_ARCH_X86_64", "SCMP_ARCH_X86", "SCMP_ARCH_X32"]);

    let filter = compiled(profile);

    assert!(filter.len() / 8 < MAX_INSTRUCTIONS / 2, "{} instructions", filter.len() / 8);
    assert_eq!(run(&filter, native("execve", &[])), ALLOW);
}

#[test]
fn what_cannot_be_honoured_is_refused_by_name() {
    let rule = |rule: Value| json!({"defaultAction": "SCMP_ACT_ALLOW", "syscalls": [rule]});
    let cases = [
        (json!({"defaultAction": "SCMP_ACT_NOTIFY"}), "linux.seccomp.defaultAction: not supported: SCMP_ACT_NOTIFY"),
        (
            json!({"defaultAction": "SCMP_ACT_ALLOW", "listenerPath": "/run/agent.sock"}),
            "linux.seccomp.listenerPath: not supported",
        ),
        (
            json!({"defaultAction": "SCMP_ACT_ALLOW", "flags": ["SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV"]}),
            "linux.seccomp.flags[0]: not supported",
        ),
        (
            json!({"defaultAction": "SCMP_ACT_ERRNO", "defaultErrnoRet": 4096}),
            "linux.seccomp.defaultErrnoRet: \"4096\" is not from 0 to 4095",
        ),
        (
            rule(json!({"names": ["read"], "action": "SCMP_ACT_NOTIFY"})),
            "linux.seccomp.syscalls[0].action: not supported",
        ),
        (
            rule(json!({"names": ["read"], "action": "SCMP_ACT_KILL", "errnoRet": 1})),
            "linux.seccomp.syscalls[0].errnoRet: \"1\" is not possible",
        ),
        (rule(json!({"names": [], "action": "SCMP_ACT_KILL"})), "linux.seccomp.syscalls[0].names: missing"),
        (
            rule(json!({"names": ["read"], "action": "SCMP_ACT_KILL",
                "args": [{"index": 6, "value": 0, "op": "SCMP_CMP_EQ"}]})),
            "linux.seccomp.syscalls[0].args[0].index: \"6\" is not from 0 to 5",
        ),
    ];
    for (value, expected) in cases {
        let error = refused(value);
        assert!(error.starts_with(expected), "{error}");
    }
}

#[test]
fn flags_without_a_list_leave_speculation_alone() {
    let flags = |value: Value| translate(&parse(value)).unwrap().flags;

    assert_eq!(flags(json!({"defaultAction": "SCMP_ACT_ALLOW"})), 4);
    assert_eq!(flags(json!({"defaultAction": "SCMP_ACT_ALLOW", "flags": []})), 0);
    let list = json!(["SECCOMP_FILTER_FLAG_LOG", "SECCOMP_FILTER_FLAG_TSYNC", "SECCOMP_FILTER_FLAG_SPEC_ALLOW"]);
    assert_eq!(flags(json!({"defaultAction": "SCMP_ACT_ALLOW", "flags": list})), 6);
}

#[test]
fn a_filter_that_is_too_long_is_refused() {
    let rules: Vec<Value> = (0..1000)
        .map(|value| {
            json!({"names": ["read"], "action": "SCMP_ACT_KILL",
                "args": [{"index": 0, "value": value, "op": "SCMP_CMP_EQ"}]})
        })
        .collect();

    let error = refused(json!({"defaultAction": "SCMP_ACT_ALLOW", "syscalls": rules}));

    assert!(error.starts_with("linux.seccomp.syscalls: "), "{error}");
}
