// SPDX-License-Identifier: Apache-2.0
//! Waits for a container to tell that it is ready, and hands that on: to a service manager or an engine, or to the process that this
//! one was forked from. All that is taken from the guest is one line, once.

use std::mem;
use std::sync::Arc;
use std::time::Duration;

use tokio::task::JoinSet;
use tokio::time::timeout;

use super::agent::AgentError;
use super::caller::Caller;
use super::container::Container;
use crate::logging;
use crate::notify::Manager;
use crate::text;

/// How long, after the container's end, what it has told may take to be handed on.
const FAREWELL: Duration = Duration::from_secs(5);

/// Tells a manager, once the container is ready.
pub(super) async fn tell(container: Arc<Container>, manager: Manager, with_pid: bool) {
    let Some(line) = wait(&container).await else { return };
    let pid = with_pid.then(|| container.record().pid);
    if let Err(error) = manager.tell(&line, pid).await {
        logging::warn(format_args!("{}", text::chain(&error)));
    }
}

/// Tells a caller who waits for it once the container is ready, or has ended.
pub(super) async fn report(container: Arc<Container>, caller: Caller) {
    // The container runs: this is no failure, however it ends.
    let mut waiting = Waiting { caller: Some(caller), container, ready: None };
    waiting.ready = wait(&waiting.container).await;
}

/// A caller who is told when this is dropped.
struct Waiting {
    caller: Option<Caller>,
    container: Arc<Container>,
    ready: Option<String>,
}

impl Drop for Waiting {
    fn drop(&mut self) {
        if let Some(caller) = self.caller.take() {
            caller.succeeded_and(mem::take(&mut self.ready), &self.container);
        }
    }
}

async fn wait(container: &Container) -> Option<String> {
    match container.agent.wait_ready().await {
        Ok(line) => line,
        // The machine's end is told of elsewhere.
        Err(AgentError::Lost) => None,
        Err(error) => {
            let (id, why) = (container.id(), text::chain(&error));
            logging::warn(format_args!("{id}: nobody is told whether the container is ready: {why}"));
            None
        }
    }
}

/// After the container's end: returns when what it has told is handed on, or has had the time to be.
pub(super) async fn finish(notices: &mut JoinSet<()>) {
    let _ = timeout(FAREWELL, async { while notices.join_next().await.is_some() {} }).await;
}
