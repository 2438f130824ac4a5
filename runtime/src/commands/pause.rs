// SPDX-License-Identifier: Apache-2.0
//! `bulkhead pause`: freezes the container.

use clap::Args;
use containerd_shim_protos::api::PauseRequest;
use ttrpc::context::Context;

use super::{Global, Outcome};
use crate::supervisor::state::Found;
use crate::supervisor::{CallError, client};

/// Freeze every process of a container
#[derive(Debug, Args)]
pub(crate) struct Arguments {
    /// Name of the container
    #[arg(value_name = "ID")]
    id: String,
}

/// Freezes the container.
pub(crate) fn run(global: &Global, arguments: &Arguments) -> Outcome {
    let found = Found::open(&global.root, &arguments.id)?;
    client::call(&found, CallError::NotRunning, async |task, id| {
        task.pause(Context::default(), &PauseRequest { id, ..Default::default() }).await
    })?;
    Ok(0)
}
