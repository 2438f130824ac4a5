// SPDX-License-Identifier: Apache-2.0
//! A container's state, as the specification has hooks get it on stdin.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use serde::Serialize;

use crate::commands::OCI_VERSION;

/// How far a container has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Status {
    Creating,
    Created,
    Running,
    Stopped,
}

/// The state.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct State {
    oci_version: &'static str,
    id: String,
    status: Status,
    /// The process that lives as long as the container; not of one that is stopped.
    #[serde(skip_serializing_if = "Option::is_none")]
    pid: Option<u32>,
    bundle: PathBuf,
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    annotations: BTreeMap<String, String>,
}

impl State {
    /// A container that is being created.
    pub(crate) fn new(id: &str, bundle: &Path, annotations: BTreeMap<String, String>) -> Self {
        let (id, bundle) = (id.to_owned(), bundle.to_owned());
        Self { oci_version: OCI_VERSION, id, status: Status::Creating, pid: None, bundle, annotations }
    }

    /// The same container at another point of its life.
    pub(crate) fn at(&self, status: Status, pid: Option<u32>) -> Self {
        Self { status, pid, ..self.clone() }
    }

    pub(crate) fn bundle(&self) -> &Path {
        &self.bundle
    }

    /// The state as JSON.
    pub(crate) fn to_text(&self) -> String {
        // Strings and a number always have a form in JSON, but for a bundle whose path is no text: a hook is then told
        // nothing, rather than something wrong.
        serde_json::to_string(self).unwrap_or_default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};

    #[test]
    fn the_state_has_the_specifications_form() {
        let annotations = BTreeMap::from([("a".to_owned(), "b".to_owned())]);
        let state = State::new("x", Path::new("/b"), annotations).at(Status::Running, Some(5));

        let told: Value = serde_json::from_str(&state.to_text()).unwrap();

        let expected = json!({"ociVersion": OCI_VERSION, "id": "x", "status": "running", "pid": 5, "bundle": "/b",
            "annotations": {"a": "b"}});
        assert_eq!(told, expected);
        let stopped: Value = serde_json::from_str(&state.at(Status::Stopped, None).to_text()).unwrap();
        assert_eq!((stopped["status"].as_str(), stopped.get("pid")), (Some("stopped"), None));
    }
}
