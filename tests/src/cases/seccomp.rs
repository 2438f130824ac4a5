// SPDX-License-Identifier: Apache-2.0
//! Filters of system calls: each action, each operator, each interface; for further processes as well.

use serde_json::{Value, json};

use super::{Case, case};
use crate::bundle::Bundle;
use crate::detached::Detached;
use crate::env::{Env, Kind};
use crate::failure::{Result, ensure_eq};
use crate::images;

pub(super) const CASES: &[Case] = &[case!(actions_and_operators), case!(calls_of_32_bit_programs), case!(interfaces)];

/// `getppid` by the 32-bit interface; exits with the negated answer: `mov eax, 64; int 0x80; neg eax; mov ebx, eax;
/// mov eax, 1; int 0x80`.
const BY_INT_80: &[u8] = &[0xb8, 0x40, 0, 0, 0, 0xcd, 0x80, 0xf7, 0xd8, 0x89, 0xc3, 0xb8, 0x01, 0, 0, 0, 0xcd, 0x80];

/// The same by x32's number for it: `mov eax, 0x40000000 + 110; syscall; neg eax; mov edi, eax; mov eax, 60; syscall`.
const BY_X32: &[u8] = &[0xb8, 0x6e, 0, 0, 0x40, 0x0f, 0x05, 0xf7, 0xd8, 0x89, 0xc7, 0xb8, 0x3c, 0, 0, 0, 0x0f, 0x05];

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
