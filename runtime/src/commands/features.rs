// SPDX-License-Identifier: Apache-2.0
//! `bulkhead features`: what of the specification is honoured, in the specification's own form (features.md).

use std::io::{self, Write};

use clap::Args;
use serde_json::{Value, json};

use super::{OCI_VERSION, Outcome};
use crate::spec;

/// What a filter of system calls can be made of.
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
    json!({
        "ociVersionMin": "1.0.0",
        "ociVersionMax": OCI_VERSION,
        "mountOptions": spec::mount_option_names(),
        "linux": {
            "namespaces": ["cgroup", "ipc", "mount", "network", "pid", "time", "user", "uts"],
            "capabilities": spec::capability_names(),
            "cgroup": { "v1": false, "v2": true, "systemd": false, "systemdUser": false, "rdma": false },
            "seccomp": {
                "enabled": true,
                "actions": SECCOMP_ACTIONS,
                "operators": SECCOMP_OPERATORS,
                "archs": ["SCMP_ARCH_X32", "SCMP_ARCH_X86", "SCMP_ARCH_X86_64"],
                "knownFlags": SECCOMP_FLAGS,
                "supportedFlags": SECCOMP_FLAGS,
            },
            "apparmor": { "enabled": false },
            "selinux": { "enabled": false },
            "intelRdt": { "enabled": false },
            "mountExtensions": { "idmap": { "enabled": true } },
        },
        "annotations": { "io.bulkhead.version": env!("CARGO_PKG_VERSION") },
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
}
