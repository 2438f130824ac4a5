// SPDX-License-Identifier: Apache-2.0
//! `bulkhead features`: what of the specification is honoured, in the specification's own form (features.md).

use std::io::{self, Write};

use clap::Args;
use serde_json::{Value, json};

use super::{OCI_VERSION, Outcome};
use crate::spec;

/// Print which features of the specification there are
#[derive(Debug, Args)]
pub(crate) struct Arguments {}

/// Prints the features.
pub(crate) fn run(_: &Arguments) -> Outcome {
    writeln!(io::stdout().lock(), "{:#}", features())?;
    Ok(0)
}

fn features() -> Value {
    json!({
        "ociVersionMin": "1.0.0",
        "ociVersionMax": OCI_VERSION,
        "mountOptions": spec::mount_option_names(),
        "linux": {
            "namespaces": ["cgroup", "ipc", "mount", "network", "pid", "uts"],
            "capabilities": spec::capability_names(),
            "cgroup": { "v1": false, "v2": true, "systemd": false, "systemdUser": false, "rdma": false },
            "seccomp": { "enabled": false },
            "apparmor": { "enabled": false },
            "selinux": { "enabled": false },
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
