// SPDX-License-Identifier: Apache-2.0
//! `bulkhead resume`: lets the container go on.

use clap::Args;
use containerd_shim_protos::api::ResumeRequest;
use ttrpc::context::Context;

use super::{Global, Outcome};
use crate::supervisor::state::Found;
use crate::supervisor::{CallError, client};

/// Let a paused container go on
#[derive(Debug, Args)]
pub(crate) struct Arguments {
    /// Name of the container
    #[arg(value_name = "ID")]
    id: String,
}

/// Lets the container go on.
pub(crate) fn run(global: &Global, arguments: &Arguments) -> Outcome {
    let found = Found::open(&global.root, &arguments.id)?;
    client::call(&found, CallError::NotPaused, async |task, id| {
        task.resume(Context::default(), &ResumeRequest { id, ..Default::default() }).await
    })?;
    Ok(0)
}
