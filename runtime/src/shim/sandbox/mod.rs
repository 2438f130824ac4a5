// SPDX-License-Identifier: Apache-2.0
//! The Sandbox service of containerd 2: a pod that containerd makes, and asks about, by calls of its own instead of those for a
//! container that runs a program which does nothing.
//!
//! | module | what it knows |
//! | --- | --- |
//! | this | a pod's sandbox, from its making to the server's end |
//! | `service` | the calls |
//! | `config` | what CRI says of a pod, in the words of an OCI configuration |
//!
//! It is for runtimes that containerd's configuration calls `sandboxer = "shim"`. The containers of such a pod are made by the
//! Task API, and are no different.

pub(super) mod config;
mod service;

use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use tokio::sync::watch;

pub(super) use self::service::services;
use crate::supervisor::container::{CallError, Container, Ended};
use crate::supervisor::state::Status;

/// SIGTERM, on which a sandbox ends well.
const SIGTERM: u32 = 15;

/// The sandbox.
#[derive(Debug)]
pub(super) struct Sandbox {
    container: Arc<Container>,
    /// When it was made, since 1970.
    created: Duration,
    /// Whether it is gone from the host.
    gone: watch::Receiver<bool>,
}

impl Sandbox {
    /// One whose machine runs. `gone` tells when that is gone from the host.
    pub(super) fn new(container: Arc<Container>, gone: watch::Receiver<bool>) -> Self {
        let created = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        Self { container, created, gone }
    }

    pub(super) fn id(&self) -> &str {
        self.container.id()
    }

    pub(super) fn container(&self) -> Arc<Container> {
        Arc::clone(&self.container)
    }

    /// Ends it if it has not ended, and its containers with it; returns when nothing of it is left on the host.
    async fn stop(&self) -> Result<(), CallError> {
        match self.container.kill(SIGTERM, false).await {
            Err(_) if self.container.status() == Status::Stopped => {}
            sent => sent?,
        }
        // Its sender lives as long as the server.
        let _ = self.gone.clone().wait_for(|gone| *gone).await;
        Ok(())
    }

    /// Waits for its end.
    async fn wait(&self) -> Result<Ended, CallError> {
        self.container.wait().await
    }
}
