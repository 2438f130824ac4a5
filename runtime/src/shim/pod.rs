// SPDX-License-Identifier: Apache-2.0
//! Pods: which container is a pod's sandbox, and which one belongs into another's.

use std::collections::BTreeMap;

use thiserror::Error;

/// The annotations by which containerd's CRI and CRI-O tell a sandbox from a container, and the sandbox of a container.
const KINDS: [&str; 2] = ["io.kubernetes.cri.container-type", "io.kubernetes.cri-o.ContainerType"];
const SANDBOXES: [&str; 2] = ["io.kubernetes.cri.sandbox-id", "io.kubernetes.cri-o.SandboxID"];

/// A container that cannot be put where it belongs.
#[derive(Debug, Error, PartialEq, Eq)]
#[error("the container belongs into the sandbox {0:?}, and several containers in a sandbox are not supported yet")]
pub(super) struct PodMember(String);

/// Refuses a container that has to share another's sandbox: alone in one it would not be what it was asked to be.
pub(super) fn check(annotations: &BTreeMap<String, String>) -> Result<(), PodMember> {
    let first = |names: [&str; 2]| names.iter().find_map(|name| annotations.get(*name)).map(String::as_str);
    match first(KINDS) {
        Some("container") => Err(PodMember(first(SANDBOXES).unwrap_or_default().to_owned())),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_container_of_a_pod_is_refused_and_its_sandbox_named() {
        let annotations = |kind: &str| {
            let kind = ("io.kubernetes.cri.container-type".to_owned(), kind.to_owned());
            BTreeMap::from([kind, ("io.kubernetes.cri.sandbox-id".to_owned(), "p1".to_owned())])
        };

        assert_eq!(check(&annotations("container")), Err(PodMember("p1".to_owned())));
        assert_eq!(check(&annotations("sandbox")), Ok(()));
        assert_eq!(check(&BTreeMap::new()), Ok(()));
    }
}
