// SPDX-License-Identifier: Apache-2.0
//! `bulkhead state`: a container's state, as the specification describes it.

use std::collections::BTreeMap;
use std::io::{self, Write};
use std::path::PathBuf;

use clap::Args;
use serde::Serialize;

use super::{Global, OCI_VERSION, Outcome};
use crate::supervisor::state::{Found, Status};

/// The annotation that tells who moves the frames of the network devices.
const NET_BACKEND: &str = "io.bulkhead.net.backend";

/// Print the state of a container
#[derive(Debug, Args)]
pub(crate) struct Arguments {
    /// Name of the container
    #[arg(value_name = "ID")]
    id: String,
}

/// How a container has ended whose supervisor was killed before it could tell: the machine was killed with it (128 + SIGKILL).
const KILLED: u8 = 137;

/// A state in runc's order, with the properties that runc adds to the specification's.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct State {
    oci_version: &'static str,
    pub(super) id: String,
    /// 0 once the container has ended.
    pub(super) pid: u32,
    pub(super) status: Status,
    pub(super) bundle: PathBuf,
    rootfs: PathBuf,
    pub(super) created: String,
    /// Once the container has ended.
    #[serde(skip_serializing_if = "Option::is_none")]
    exit_status: Option<u8>,
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    annotations: BTreeMap<String, String>,
    /// Whoever may run sandboxes is root.
    pub(super) owner: &'static str,
}

impl State {
    pub(super) fn of(found: &Found) -> Self {
        let (mut record, status) = (found.record().clone(), found.status());
        if let Some(backend) = record.net_backend {
            record.annotations.insert(NET_BACKEND.to_owned(), backend);
        }
        Self {
            oci_version: OCI_VERSION,
            id: record.id,
            pid: if status == Status::Stopped { 0 } else { record.pid },
            status,
            bundle: record.bundle,
            rootfs: record.rootfs,
            created: record.created,
            exit_status: (status == Status::Stopped).then(|| record.exit_status.unwrap_or(KILLED)),
            annotations: record.annotations,
            owner: "root",
        }
    }
}

/// Prints the state.
pub(crate) fn run(global: &Global, arguments: &Arguments) -> Outcome {
    let state = State::of(&Found::open(&global.root, &arguments.id)?);
    let mut out = io::stdout().lock();
    serde_json::to_writer_pretty(&mut out, &state)?;
    writeln!(out)?;
    Ok(0)
}
