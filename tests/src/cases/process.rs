// SPDX-License-Identifier: Apache-2.0
//! What the configuration says of the process.

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::MetadataExt;

use serde_json::json;

use super::{Case, case};
use crate::bundle::Bundle;
use crate::detached::Detached;
use crate::env::{Env, Kind};
use crate::failure::{Result, ensure, ensure_eq};

pub(super) const CASES: &[Case] = &[
    case!(environment_is_the_configured_one),
    case!(environment_holds_any_text),
    case!(home_is_that_of_the_user),
    case!(arguments_are_passed_unchanged),
    case!(long_arguments),
    case!(program_is_searched_in_the_containers_path),
    case!(working_folder),
    case!(absent_working_folder_is_made),
    case!(user_and_groups),
    case!(umask),
    case!(capabilities_of_root),
    case!(capabilities_of_a_user),
    case!(no_capabilities),
    case!(resource_limits),
    case!(no_new_privileges),
    case!(oom_score_adjustment),
    case!(descriptors_and_signals_are_clean),
    case!(sysctls),
    case!(memory_limit_is_enforced),
    case!(process_limit_is_enforced),
];

fn environment_is_the_configured_one(env: &Env) -> Result {
    let mut bundle = Bundle::busybox(env)?;
    bundle.args(&["env"]).set("/process/env", json!(["PATH=/bin", "ONE=1", "HOME=/somewhere"]));

    let output = env.run(&bundle)?.variable("SECRET_OF_THE_HOST", "1").output()?;

    output.expect_code(0)?;
    let text = output.stdout();
    let seen: BTreeSet<&str> = text.lines().collect();
    ensure_eq!(seen, BTreeSet::from(["HOME=/somewhere", "ONE=1", "PATH=/bin"]), "the environment");
    Ok(())
}

fn environment_holds_any_text(env: &Env) -> Result {
    let mut bundle = Bundle::busybox(env)?;
    let long = "x".repeat(100_000);
    let variables =
        json!(["PATH=/bin", "A=two words", "B=", "C=a=b=c", "D=grüße 'q' \"d\" $PATH `x` \\", format!("L={long}")]);
    bundle.sh("echo \"[$A] [${B-unset}] [$C] [$D] ${#L}\"").set("/process/env", variables);

    env.run(&bundle)?.output()?.expect_stdout("[two words] [] [a=b=c] [grüße 'q' \"d\" $PATH `x` \\] 100000\n")
}

fn home_is_that_of_the_user(env: &Env) -> Result {
    let mut bundle = Bundle::busybox(env)?;
    bundle.add_file("etc/passwd", "root:x:0:0::/root:/bin/sh\nuser:x:1000:1000::/home/user:/bin/sh\n", 0o644)?;
    bundle.sh("echo $HOME");
    env.run(&bundle)?.output()?.expect_stdout("/root\n")?;
    bundle.user(1000, 1000);
    env.run(&bundle)?.output()?.expect_stdout("/home/user\n")?;
    bundle.user(4242, 4242);
    env.run(&bundle)?.output()?.expect_stdout("/\n")
}

fn arguments_are_passed_unchanged(env: &Env) -> Result {
    let mut bundle = Bundle::busybox(env)?;
    bundle.args(&["printf", "<%s>", "two words", "", "a\nb", "$HOME `x` 'q' \"d\" \\", "grüße", "-n"]);

    env.run(&bundle)?.output()?.expect_stdout("<two words><><a\nb><$HOME `x` 'q' \"d\" \\><grüße><-n>")
}

fn long_arguments(env: &Env) -> Result {
    let mut bundle = Bundle::busybox(env)?;
    let long = "y".repeat(100_000);
    let mut args = vec!["sh", "-c", "echo $# ${#1}", "sh", long.as_str()];
    args.extend(std::iter::repeat_n("z", 2000));
    bundle.args(&args);

    env.run(&bundle)?.output()?.expect_stdout("2001 100000\n")
}

fn program_is_searched_in_the_containers_path(env: &Env) -> Result {
    let mut bundle = Bundle::busybox(env)?;
    bundle.add_file("opt/tools/tool", "#!/bin/sh\necho found\n", 0o755)?;
    bundle.args(&["tool"]).set("/process/env", json!(["PATH=/nowhere:/opt/tools"]));

    env.run(&bundle)?.output()?.expect_stdout("found\n")
}

fn working_folder(env: &Env) -> Result {
    let mut bundle = Bundle::busybox(env)?;
    bundle.add_file("srv/data/file", "here\n", 0o644)?;
    bundle.sh("pwd; cat file").set("/process/cwd", json!("/srv/data"));

    env.run(&bundle)?.output()?.expect_stdout("/srv/data\nhere\n")
}

fn absent_working_folder_is_made(env: &Env) -> Result {
    let mut bundle = Bundle::busybox(env)?;
    bundle.sh("pwd").set("/process/cwd", json!("/made/for/this"));

    env.run(&bundle)?.output()?.expect_stdout("/made/for/this\n")?;

    ensure!(bundle.path("made/for/this").is_dir(), "it is not in the root file system");
    Ok(())
}

fn user_and_groups(env: &Env) -> Result {
    let mut bundle = Bundle::busybox(env)?;
    bundle
        .sh("id -u; id -g; id -G")
        .set("/process/user", json!({ "uid": 1234, "gid": 2345, "additionalGids": [5, 77, 88888] }));

    env.run(&bundle)?.output()?.expect_stdout("1234\n2345\n2345 5 77 88888\n")
}

fn umask(env: &Env) -> Result {
    let mut bundle = Bundle::busybox(env)?;
    bundle.sh("umask; touch /file; mkdir /folder");
    env.run(&bundle)?.output()?.expect_stdout("0022\n")?;
    ensure_eq!(bundle.path("file").metadata()?.mode() & 0o7777, 0o644, "the file's mode");
    bundle.sh("umask; touch /file2; mkdir /folder2").set("/process/user", json!({ "uid": 0, "gid": 0, "umask": 0o27 }));
    env.run(&bundle)?.output()?.expect_stdout("0027\n")?;
    ensure_eq!(bundle.path("file2").metadata()?.mode() & 0o7777, 0o640, "the file's mode");
    ensure_eq!(bundle.path("folder2").metadata()?.mode() & 0o7777, 0o750, "the folder's mode");
    Ok(())
}

/// The lines of `/proc/self/status` that begin with `prefix`, without white space.
fn status_script(prefix: &str) -> String {
    format!("grep ^{prefix} /proc/self/status | tr -d '\\t '")
}

fn capabilities_of_root(env: &Env) -> Result {
    let mut bundle = Bundle::busybox(env)?;
    let some = json!(["CAP_CHOWN", "CAP_KILL", "CAP_NET_BIND_SERVICE"]);
    bundle.sh(&status_script("Cap"));
    bundle.set("/process/capabilities", json!({ "bounding": some, "effective": some, "permitted": some }));

    let expected = "CapInh:0000000000000000\nCapPrm:0000000000000421\nCapEff:0000000000000421\nCapBnd:0000000000000421\n\
                    CapAmb:0000000000000000\n";
    env.run(&bundle)?.output()?.expect_stdout(expected)
}

fn capabilities_of_a_user(env: &Env) -> Result {
    let mut bundle = Bundle::busybox(env)?;
    let some = json!(["CAP_NET_RAW"]);
    let sets = json!({ "bounding": some, "effective": some, "permitted": some, "inheritable": some, "ambient": some });
    bundle.sh(&status_script("Cap")).user(1000, 1000).set("/process/capabilities", sets);

    let expected = "CapInh:0000000000002000\nCapPrm:0000000000002000\nCapEff:0000000000002000\nCapBnd:0000000000002000\n\
                    CapAmb:0000000000002000\n";
    env.run(&bundle)?.output()?.expect_stdout(expected)
}

fn no_capabilities(env: &Env) -> Result {
    let mut bundle = Bundle::busybox(env)?;
    bundle.sh(&format!("{}; chown 5 /etc/passwd || hostname x || echo refused", status_script("CapEff")));
    bundle.set("/process/capabilities", json!({}));

    let output = env.run(&bundle)?.output()?;

    output.expect_code(0)?;
    ensure_eq!(output.stdout(), "CapEff:0000000000000000\nrefused\n", "stdout");
    Ok(())
}

fn resource_limits(env: &Env) -> Result {
    let mut bundle = Bundle::busybox(env)?;
    let limits = json!([
        { "type": "RLIMIT_NOFILE", "soft": 100, "hard": 200 },
        { "type": "RLIMIT_CORE", "soft": 0, "hard": 0 },
        { "type": "RLIMIT_FSIZE", "soft": 4096, "hard": 8192 },
    ]);
    bundle
        .sh("ulimit -n; ulimit -Hn; ulimit -c; head -c 9000 /dev/zero >/big; wc -c </big")
        .set("/process/rlimits", limits);

    let output = env.run(&bundle)?.output()?;

    ensure_eq!(output.stdout(), "100\n200\n0\n4096\n", "stdout");
    Ok(())
}

fn no_new_privileges(env: &Env) -> Result {
    let mut bundle = Bundle::busybox(env)?;
    bundle.sh(&status_script("NoNewPrivs"));
    env.run(&bundle)?.output()?.expect_stdout("NoNewPrivs:1\n")?;
    bundle.set("/process/noNewPrivileges", json!(false));
    env.run(&bundle)?.output()?.expect_stdout("NoNewPrivs:0\n")
}

fn oom_score_adjustment(env: &Env) -> Result {
    let mut bundle = Bundle::busybox(env)?;
    bundle.sh("cat /proc/self/oom_score_adj").set("/process/oomScoreAdj", json!(321));

    env.run(&bundle)?.output()?.expect_stdout("321\n")?;
    // So has the process that engines know it by.
    let container = Detached::run(env, bundle.sh("sleep 1000"))?;
    let on_host = fs::read_to_string(format!("/proc/{}/oom_score_adj", container.pid))?;
    ensure_eq!(on_host, "321\n", "the score on the host");
    container.must_with(&["kill"], &["KILL"])?;
    ensure_eq!(container.wait()?, 137, "the status");
    Ok(())
}

fn descriptors_and_signals_are_clean(env: &Env) -> Result {
    let mut bundle = Bundle::busybox(env)?;
    bundle.sh("cd /proc/self/fd; echo *; exec grep -E '^Sig(Blk|Ign)' /proc/self/status");

    let output = env.run(&bundle)?.output()?;

    // The shell opens the folder that it lists.
    output.expect_code(0)?;
    // Go's runtime may leave its own mark among the ignored ones.
    let text = output.stdout();
    let text = if env.kind == Kind::Other { text.replace("8", "0") } else { text };
    ensure_eq!(text, "0 1 2 3\nSigBlk:\t0000000000000000\nSigIgn:\t0000000000000000\n", "stdout");
    Ok(())
}

fn sysctls(env: &Env) -> Result {
    let mut bundle = Bundle::busybox(env)?;
    bundle.set(
        "/linux/sysctl",
        json!({ "net.ipv4.ip_forward": "1", "kernel.msgmax": "7777", "kernel.shm_rmid_forced": "1" }),
    );
    bundle.sh("cd /proc/sys; cat net/ipv4/ip_forward kernel/msgmax kernel/shm_rmid_forced");

    env.run(&bundle)?.output()?.expect_stdout("1\n7777\n1\n")
}

fn memory_limit_is_enforced(env: &Env) -> Result {
    let mut bundle = Bundle::busybox(env)?;
    bundle.set("/linux/resources", json!({ "memory": { "limit": 32 << 20, "swap": 32 << 20 } }));
    bundle.sh("tail /dev/zero; echo \"tail: $?\"");

    let output = env.run(&bundle)?.output()?;

    // It reads all into memory, and is killed for it; the shell is not.
    output.expect_code(0)?;
    ensure!(output.stdout().ends_with("tail: 137\n"), "{}", output.describe());
    Ok(())
}

fn process_limit_is_enforced(env: &Env) -> Result {
    let mut bundle = Bundle::busybox(env)?;
    bundle.set("/linux/resources", json!({ "pids": { "limit": 10 } }));
    bundle.sh("for n in 1 2 3 4 5 6 7 8 9 10 11 12; do sleep 5 & done; echo not reached");

    let output = env.run(&bundle)?.output()?;

    ensure!(
        output.status.code() != Some(0) && output.stderr().contains("fork"),
        "expected a failing fork, seen {}",
        output.describe()
    );
    Ok(())
}
