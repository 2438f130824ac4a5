// SPDX-License-Identifier: Apache-2.0
//! Pods: which container is a pod's sandbox, and which one belongs into another's.

use std::collections::BTreeMap;

/// The annotations by which containerd's CRI and CRI-O tell a sandbox from a container, and the sandbox of a container.
const KINDS: [&str; 2] = ["io.kubernetes.cri.container-type", "io.kubernetes.cri-o.ContainerType"];
const SANDBOXES: [&str; 2] = ["io.kubernetes.cri.sandbox-id", "io.kubernetes.cri-o.SandboxID"];

/// What a container is to its pod.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Role {
    /// It is in none.
    Alone,
    /// It is the sandbox.
    Sandbox,
    /// It belongs into the sandbox of that id.
    Member(String),
}

impl Role {
    /// The role that annotations give.
    pub(super) fn of(annotations: &BTreeMap<String, String>) -> Self {
        let first = |names: [&str; 2]| names.iter().find_map(|name| annotations.get(*name)).map(String::as_str);
        match (first(KINDS), first(SANDBOXES)) {
            (Some("container"), sandbox) => Self::Member(sandbox.unwrap_or_default().to_owned()),
            (Some("sandbox"), _) => Self::Sandbox,
            _ => Self::Alone,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn annotations_tell_a_containers_role() {
        let role = |kind: &str, value: &str, sandbox: &str| {
            let annotations = [(kind, value), (sandbox, "p1")];
            Role::of(&annotations.map(|(key, value)| (key.to_owned(), value.to_owned())).into())
        };

        assert_eq!(role(KINDS[0], "container", SANDBOXES[0]), Role::Member("p1".to_owned()));
        assert_eq!(role(KINDS[1], "container", SANDBOXES[1]), Role::Member("p1".to_owned()));
        assert_eq!(role(KINDS[0], "sandbox", SANDBOXES[0]), Role::Sandbox);
        // Alone it would not be what it was asked to be.
        assert_eq!(role(KINDS[0], "container", "other"), Role::Member(String::new()));
        assert_eq!(Role::of(&BTreeMap::new()), Role::Alone);
    }
}
