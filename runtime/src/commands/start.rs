// SPDX-License-Identifier: Apache-2.0
//! `bulkhead start`: lets a created container execute its program.

use clap::Args;
use containerd_shim_protos::api::StartRequest;
use ttrpc::context::Context;

use super::{Global, Outcome};
use crate::notify::{NotifyError, NotifySocket};
use crate::supervisor::state::{Found, Status};
use crate::supervisor::{CallError, client};

/// Execute the program of a created container
#[derive(Debug, Args)]
pub(crate) struct Arguments {
    /// Name of the container
    #[arg(value_name = "ID")]
    id: String,
}

/// Starts the container; returns once its program runs. Where the environment names a service manager's socket, returns once the
/// container has told that it is ready, and the manager has been told, or once the container has ended.
pub(crate) fn run(global: &Global, arguments: &Arguments) -> Outcome {
    let manager = NotifySocket::of_caller()?;
    let found = Found::open(&global.root, &arguments.id)?;
    let supervisor = client::process(&found);
    let started = match manager {
        Some(_) if found.status() == Status::Created && !found.record().notifies => {
            return Err(NotifyError::CreatedWithout(arguments.id.clone()).into());
        }
        Some(manager) => client::start_and_tell(&found, &manager),
        None => client::call(&found, CallError::StartStopped, async |task, id| {
            task.start(Context::default(), &StartRequest { id, ..Default::default() }).await.map(drop)
        }),
    };
    if let (Err(_), Some(supervisor)) = (&started, supervisor) {
        // An engine that hears of the failure takes the status of the process that stands for the container at once.
        client::see_end(&found, supervisor);
    }
    started?;
    Ok(0)
}
