// SPDX-License-Identifier: Apache-2.0
//! `bulkhead features`: what of the specification is honoured, in the specification's own form (features.md).

use std::io::{self, Write};

use clap::Args;
use serde_json::{Value, json};

use super::{OCI_VERSION, Outcome};
use crate::spec;

/// What a filter may do at a system call, and how it compares.
const SECCOMP_ACTIONS: &[&str] = &[
    "SCMP_ACT_ALLOW",
    "SCMP_ACT_ERRNO",
    "SCMP_ACT_KILL",
    "SCMP_ACT_KILL_PROCESS",
    "SCMP_ACT_KILL_THREAD",
    "SCMP_ACT_LOG",
    "SCMP_ACT_TRACE",
    "SCMP_ACT_TRAP",
];
const SECCOMP_OPERATORS: &[&str] =
    &["SCMP_CMP_EQ", "SCMP_CMP_GE", "SCMP_CMP_GT", "SCMP_CMP_LE", "SCMP_CMP_LT", "SCMP_CMP_MASKED_EQ", "SCMP_CMP_NE"];
const SECCOMP_ARCHITECTURES: &[&str] = &["SCMP_ARCH_X32", "SCMP_ARCH_X86", "SCMP_ARCH_X86_64"];
const SECCOMP_FLAGS: &[&str] =
    &["SECCOMP_FILTER_FLAG_LOG", "SECCOMP_FILTER_FLAG_SPEC_ALLOW", "SECCOMP_FILTER_FLAG_TSYNC"];

/// Print which features of the specification there are
#[derive(Debug, Args)]
pub(crate) struct Arguments {}

/// Prints the features.
pub(crate) fn run(_: &Arguments) -> Outcome {
    writeln!(io::stdout().lock(), "{:#}", features())?;
    Ok(0)
}

/// The features, as the specification lays them out.
pub(crate) fn features() -> Value {
    let known_flags = [SECCOMP_FLAGS, &["SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV"]].concat();
    json!({
        "ociVersionMin": "1.0.0",
        "ociVersionMax": OCI_VERSION,
        "hooks": ["prestart", "createRuntime", "createContainer", "startContainer", "poststart", "poststop"],
        "mountOptions": spec::mount_option_names(),
        "linux": {
            "namespaces": ["cgroup", "ipc", "mount", "network", "pid", "time", "user", "uts"],
            "capabilities": spec::capability_names(),
            // Of the host; the guest's are of version 2.
            "cgroup": { "v1": true, "v2": true, "systemd": false, "systemdUser": false, "rdma": false },
            "seccomp": {
                "enabled": true,
                "actions": SECCOMP_ACTIONS,
                "operators": SECCOMP_OPERATORS,
                "archs": SECCOMP_ARCHITECTURES,
                "knownFlags": known_flags,
                "supportedFlags": SECCOMP_FLAGS,
            },
            "apparmor": { "enabled": false },
            "selinux": { "enabled": false },
            "intelRdt": { "enabled": true },
            "mountExtensions": { "idmap": { "enabled": true } },
        },
        "annotations": { "io.bulkhead.version": env!("CARGO_PKG_VERSION") },
        // They size the machine and speak to its kernel.
        "potentiallyUnsafeConfigAnnotations": ["io.bulkhead."],
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_sorted_and_whole() {
        let features = features();

        for (pointer, name) in [("/mountOptions", "rbind"), ("/linux/capabilities", "CAP_SYS_ADMIN")] {
            let names: Vec<_> =
                features.pointer(pointer).unwrap().as_array().unwrap().iter().map(|n| n.as_str().unwrap()).collect();
            assert!(names.is_sorted(), "{names:?}");
            assert!(names.contains(&name), "{names:?}");
        }
    }

    #[test]
    fn every_word_of_a_filter_that_is_told_is_taken() {
        let list = |pointer: &str| features().pointer(pointer).unwrap().as_array().unwrap().clone();
        for action in list("/linux/seccomp/actions") {
            for operator in list("/linux/seccomp/operators") {
                let args = json!([{ "index": 0, "value": 1, "op": operator }]);
                let filter = json!({
                    "defaultAction": "SCMP_ACT_ALLOW",
                    "architectures": list("/linux/seccomp/archs"),
                    "flags": list("/linux/seccomp/supportedFlags"),
                    "syscalls": [{ "names": ["kill"], "action": action, "args": args }],
                });
                assert!(spec::is_seccomp_filter(&filter), "{filter}");
            }
        }
    }
}
