// SPDX-License-Identifier: Apache-2.0
//! Out-of-memory kills, told to clients of a container's socket as they happen. The Task API has no call for them, so that the
//! agent's own is served beside it, and handed on.

use std::collections::HashMap;
use std::sync::Arc;

use async_trait::async_trait;
use bulkhead_protocol::agent::{WaitOomRequest, WaitOomResponse};
use bulkhead_protocol::agent_ttrpc::{Agent, create_agent};
use ttrpc::asynchronous::{Service, TtrpcContext};

use super::container::{CallError, Container};
use super::task_service::{Calls, status};

/// The one call of the agent's that is served.
struct OomService {
    container: Arc<Container>,
    calls: Calls,
}

/// The service of a container.
pub(super) fn service(container: &Arc<Container>, calls: &Calls) -> HashMap<String, Service> {
    create_agent(Arc::new(OomService { container: Arc::clone(container), calls: calls.clone() }))
}

#[async_trait]
impl Agent for OomService {
    async fn wait_oom(&self, _: &TtrpcContext, request: WaitOomRequest) -> ttrpc::Result<WaitOomResponse> {
        // Not in a task of its own: that a caller no longer waits is to be noticed.
        let _under_way = self.calls.enter().await;
        let kills = async {
            if request.container_id != self.container.id() {
                return Err(CallError::NoSuchContainer(request.container_id));
            }
            self.container.require_alive()?;
            Ok(self.container.agent.wait_oom(request.seen).await?)
        };
        kills.await.map_err(status)
    }
}
