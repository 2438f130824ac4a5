// SPDX-License-Identifier: Apache-2.0
//! Filters of system calls: each action, each operator, each interface, each flag; for further processes as well.

use serde_json::{Value, json};

use super::{Case, case};
use crate::bundle::Bundle;
use crate::detached::Detached;
use crate::env::{Env, Kind};
use crate::failure::{Result, ensure_eq};
use crate::images;

pub(super) const CASES: &[Case] = &[
    case!(actions_and_operators),
    case!(threads_and_processes_are_killed),
    case!(flags),
    case!(calls_of_32_bit_programs),
    case!(interfaces),
];

/// `getppid` by the 32-bit interface; exits with the negated answer: `mov eax, 64; int 0x80; neg eax; mov ebx, eax;
/// mov eax, 1; int 0x80`.
const BY_INT_80: &[u8] = &[0xb8, 0x40, 0, 0, 0, 0xcd, 0x80, 0xf7, 0xd8, 0x89, 0xc3, 0xb8, 0x01, 0, 0, 0, 0xcd, 0x80];

/// The same by x32's number for it: `mov eax, 0x40000000 + 110; syscall; neg eax; mov edi, eax; mov eax, 60; syscall`.
const BY_X32: &[u8] = &[0xb8, 0x6e, 0, 0, 0x40, 0x0f, 0x05, 0xf7, 0xd8, 0x89, 0xc7, 0xb8, 0x3c, 0, 0, 0, 0x0f, 0x05];

/// A program whose second thread makes a system call, and then ends the process with status 9. The first one waits for the end of
/// the second, and then ends the process with 7.
///
/// ```text
///         lea r10, [rsp - 64]          ; cleared when the thread has ended
///         mov dword ptr [r10], 1
///         mov eax, 56                  ; clone
///         mov edi, 0x250f00            ; VM, FS, FILES, SIGHAND, THREAD, SYSVSEM, CHILD_CLEARTID
///         lea rsi, [rsp - 4096]
///         xor edx, edx
///         xor r8d, r8d
///         syscall
///         test eax, eax
///         jz second
/// wait:   mov eax, 24                  ; sched_yield
///         syscall
///         cmp dword ptr [rsp - 64], 0
///         jne wait
///         mov edi, 7
///         mov eax, 231                 ; exit_group
///         syscall
/// second: lea rdi, [rip + empty]
///         mov rsi, rdi
///         mov eax, CALL
///         syscall
///         mov edi, 9
///         mov eax, 231
///         syscall
/// empty:  .byte 0
/// ```
fn two_threads(call: u8) -> Vec<u8> {
    let before: &[u8] = &[
        0x4c, 0x8d, 0x54, 0x24, 0xc0, 0x41, 0xc7, 0x02, 0x01, 0, 0, 0, 0xb8, 0x38, 0, 0, 0, 0xbf, 0x00, 0x0f, 0x25, 0,
        0x48, 0x8d, 0xb4, 0x24, 0x00, 0xf0, 0xff, 0xff, 0x31, 0xd2, 0x45, 0x31, 0xc0, 0x0f, 0x05, 0x85, 0xc0, 0x74,
        0x1a, 0xb8, 0x18, 0, 0, 0, 0x0f, 0x05, 0x83, 0x7c, 0x24, 0xc0, 0x00, 0x75, 0xf2, 0xbf, 0x07, 0, 0, 0, 0xb8,
        0xe7, 0, 0, 0, 0x0f, 0x05, 0x48, 0x8d, 0x3d, 0x16, 0, 0, 0, 0x48, 0x89, 0xfe, 0xb8,
    ];
    let after: &[u8] = &[0, 0, 0, 0x0f, 0x05, 0xbf, 0x09, 0, 0, 0, 0xb8, 0xe7, 0, 0, 0, 0x0f, 0x05, 0];
    [before, &[call], after].concat()
}

fn rule(names: &[&str], action: &str) -> Value {
    json!({ "names": names, "action": action })
}

/// Answers EXDEV, which nothing here does by itself, where the conditions are met.
fn refused(name: &str, conditions: &[(u32, &str, u64, u64)]) -> Value {
    let args: Vec<Value> = conditions
        .iter()
        .map(|(index, op, value, two)| json!({ "index": index, "op": op, "value": value, "valueTwo": two }))
        .collect();
    json!({ "names": [name], "action": "SCMP_ACT_ERRNO", "errnoRet": 18, "args": args })
}

fn actions_and_operators(env: &Env) -> Result {
    let mut bundle = Bundle::busybox(env)?;
    let mut filter = json!({
        "defaultAction": "SCMP_ACT_ALLOW",
        "architectures": ["SCMP_ARCH_X86_64"],
        "syscalls": [
            rule(&["symlink", "symlinkat"], "SCMP_ACT_LOG"),
            rule(&["rmdir"], "SCMP_ACT_KILL_PROCESS"),
            rule(&["link", "linkat"], "SCMP_ACT_KILL"),
            rule(&["mknod", "mknodat"], "SCMP_ACT_TRAP"),
            rule(&["sethostname"], "SCMP_ACT_TRACE"),
            refused("chmod", &[(1, "SCMP_CMP_LT", 0o100, 0)]),
            refused("chmod", &[(1, "SCMP_CMP_MASKED_EQ", 0o4000, 0o4000)]),
            refused("ftruncate", &[(1, "SCMP_CMP_GT", 100, 0)]),
            refused("setpriority", &[(2, "SCMP_CMP_GE", 10, 0)]),
            refused("ioprio_set", &[(2, "SCMP_CMP_LE", 2 << 13 | 3, 0)]),
            refused("kill", &[(1, "SCMP_CMP_NE", 0, 0)]),
            refused("chown", &[(1, "SCMP_CMP_EQ", 5, 0), (2, "SCMP_CMP_EQ", 6, 0)]),
        ],
    });
    if env.kind == Kind::Bulkhead {
        filter["flags"] = json!(["SECCOMP_FILTER_FLAG_LOG", "SECCOMP_FILTER_FLAG_TSYNC"]);
    }
    bundle.args(&["sleep", "1000"]).set("/linux/seccomp", filter);
    bundle.add_file("opt/program", images::elf(BY_INT_80), 0o755)?;
    let container = Detached::run(env, &bundle)?;

    // A call that kills ends its process by SIGSYS (31); one that a tracer should see, where there is none, is not there.
    // The shell may run such a program in itself, so each is in a subshell.
    let actions = container.exec(
        "cd /tmp; ln -s there l && readlink l; mkdir d; (rmdir d); echo $?; echo x >f; (ln f g); echo $?; (mkfifo p); echo $?; \
         (hostname x) 2>&1 | grep -o 'Function not implemented'; /opt/program; echo $?",
    );
    ensure_eq!(actions.output()?.stdout(), "there\n159\n159\n159\nFunction not implemented\n159\n", "the actions");

    let operators = [
        ("chmod 7 f", false),
        ("chmod 4755 f", false),
        ("chmod 644 f", true),
        ("truncate -s 101 f", false),
        ("truncate -s 100 f", true),
        ("renice 10 -p $$", false),
        ("renice 5 -p $$", true),
        ("ionice -c 2 -n 3 -p $$", false),
        ("ionice -c 2 -n 7 -p $$", true),
        ("kill -WINCH $$", false),
        ("kill -0 $$", true),
        ("chown 5:6 f", false),
        ("chown 5:7 f", true),
    ];
    let tries: String =
        operators.iter().map(|(command, _)| format!("printf '%s: ' '{command}'; try {command}; ")).collect();
    let answer = |passes: bool| if passes { "passes" } else { "Invalid cross-device link" };
    let expected: String =
        operators.iter().map(|(command, passes)| format!("{command}: {}\n", answer(*passes))).collect();
    let script =
        format!("cd /tmp; try() {{ \"$@\" 2>&1 | grep -o 'Invalid cross-device link' || echo passes; }}; {tries}");
    ensure_eq!(container.exec(&script).output()?.stdout(), expected, "the operators");
    Ok(())
}

/// What is killed: the thread that makes the call, or its process.
fn threads_and_processes_are_killed(env: &Env) -> Result {
    const CALLS: [(&str, u8, &str, i32); 4] = [
        ("rmdir", 84, "SCMP_ACT_KILL_PROCESS", 159),
        ("link", 86, "SCMP_ACT_KILL", 7),
        ("unlink", 87, "SCMP_ACT_KILL_THREAD", 7),
        ("getppid", 110, "SCMP_ACT_ALLOW", 9),
    ];
    let mut bundle = Bundle::busybox(env)?;
    let rules: Vec<Value> = CALLS[..3].iter().map(|(name, _, action, _)| rule(&[*name], action)).collect();
    bundle.args(&["sleep", "1000"]);
    bundle.set("/linux/seccomp", json!({ "defaultAction": "SCMP_ACT_ALLOW", "syscalls": rules }));
    for (name, call, _, _) in CALLS {
        bundle.add_file(&format!("opt/{name}"), images::elf(&two_threads(call)), 0o755)?;
    }
    let container = Detached::run(env, &bundle)?;

    for (name, _, action, status) in CALLS {
        let output = container.verb_with(&["exec"], &[&format!("/opt/{name}")]).output()?;
        ensure_eq!(
            output.status.code(),
            Some(status),
            "the end of a program whose second thread calls {name}, {action}"
        );
    }
    Ok(())
}

/// Each list is taken, and leaves the filter in force. What more they do a guest does not show: its kernel has no audit log, and
/// the processor of an emulated host no speculation.
fn flags(env: &Env) -> Result {
    env.only_bulkhead()?; // An older runc knows none.
    let all = ["SECCOMP_FILTER_FLAG_LOG", "SECCOMP_FILTER_FLAG_SPEC_ALLOW", "SECCOMP_FILTER_FLAG_TSYNC"];
    let mut bundle = Bundle::busybox(env)?;
    bundle.sh("ln -s there /tmp/l 2>&1 | grep -o 'Invalid cross-device link'; grep Seccomp: /proc/self/status");
    let mut filter =
        json!({ "defaultAction": "SCMP_ACT_ALLOW", "syscalls": [refused("symlink", &[]), refused("symlinkat", &[])] });
    for flags in [&all[..], &all[1..2], &[]] {
        filter["flags"] = json!(flags);
        bundle.set("/linux/seccomp", filter.clone());
        let output = env.run(&bundle)?.output()?;
        let (expected, seen) = ("Invalid cross-device link\nSeccomp:\t2\n", output.describe());
        ensure_eq!(output.stdout(), expected, "what is said under {flags:?} ({seen})");
    }
    filter["flags"] = json!(["SECCOMP_FILTER_FLAG_NO_SUCH"]);
    bundle.set("/linux/seccomp", filter);
    env.run(&bundle)?.output()?.expect_error(&["SECCOMP_FILTER_FLAG_NO_SUCH"])
}

/// Their calls are allowed where the interface is listed, by the same names under other numbers.
fn calls_of_32_bit_programs(env: &Env) -> Result {
    let mut bundle = Bundle::busybox(env)?;
    bundle.add_file("opt/program", images::elf(BY_INT_80), 0o755)?;
    bundle.args(&["/opt/program"]);
    bundle.set(
        "/linux/seccomp",
        json!({
            "defaultAction": "SCMP_ACT_ALLOW",
            "architectures": ["SCMP_ARCH_X86_64", "SCMP_ARCH_X86", "SCMP_ARCH_AARCH64"],
            "syscalls": [{ "names": ["getppid"], "action": "SCMP_ACT_ERRNO", "errnoRet": 9 }],
        }),
    );

    env.run(&bundle)?.output()?.expect_code(9)
}

/// A call by each of a processor's other interfaces: a rule for its name holds for it where the interface is listed, and a call
/// through one that is not listed kills.
fn interfaces(env: &Env) -> Result {
    let mut bundle = Bundle::busybox(env)?;
    bundle.add_file("opt/x86", images::elf(BY_INT_80), 0o755)?;
    bundle.add_file("opt/x32", images::elf(BY_X32), 0o755)?;
    bundle.sh("/opt/x86; echo $?; /opt/x32; echo $?");
    let listed = ["SCMP_ARCH_X86_64", "SCMP_ARCH_X86", "SCMP_ARCH_X32"];
    for (architectures, refused, expected) in [
        (&listed[..], "getppid", "9\n9\n"),
        // The shell is process 1, and kernels are mostly made without the calls of x32: ENOSYS.
        (&listed[..], "symlink", "255\n38\n"),
        (&listed[..2], "getppid", "9\n159\n"),
        (&listed[..1], "symlink", "159\n159\n"),
    ] {
        let rules = json!([{ "names": [refused], "action": "SCMP_ACT_ERRNO", "errnoRet": 9 }]);
        let filter = json!({ "defaultAction": "SCMP_ACT_ALLOW", "architectures": architectures, "syscalls": rules });
        bundle.set("/linux/seccomp", filter);
        let seen = env.run(&bundle)?.output()?;
        ensure_eq!(seen.stdout(), expected, "the answers with {architectures:?} and {refused} refused");
    }
    Ok(())
}
