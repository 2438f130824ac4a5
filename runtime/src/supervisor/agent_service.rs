// SPDX-License-Identifier: Apache-2.0
//! What is told to clients of a container's socket as it happens: out-of-memory kills, and that the container is ready. The Task API
//! has no calls for them, so that the agent's own are served beside it, and handed on.

use std::collections::HashMap;
use std::sync::Arc;

use async_trait::async_trait;
use bulkhead_protocol::agent::{WaitOomRequest, WaitOomResponse, WaitReadyRequest, WaitReadyResponse};
use bulkhead_protocol::agent_ttrpc::{Agent, create_agent};
use ttrpc::asynchronous::{Service, TtrpcContext};

use super::container::{CallError, Container};
use super::task_service::{Calls, status};

/// The calls of the agent's that are served.
struct AgentService {
    container: Arc<Container>,
    calls: Calls,
}

/// The service of a container.
pub(super) fn service(container: &Arc<Container>, calls: &Calls) -> HashMap<String, Service> {
    create_agent(Arc::new(AgentService { container: Arc::clone(container), calls: calls.clone() }))
}

impl AgentService {
    /// The container, if a call is for this one, and it has not ended.
    fn alive(&self, id: String) -> Result<&Container, CallError> {
        if id != self.container.id() {
            return Err(CallError::NoSuchContainer(id));
        }
        self.container.require_alive().map(|()| &*self.container)
    }
}

#[async_trait]
impl Agent for AgentService {
    async fn wait_oom(&self, _: &TtrpcContext, request: WaitOomRequest) -> ttrpc::Result<WaitOomResponse> {
        // Not in a task of its own: that a caller no longer waits is to be noticed.
        let _under_way = self.calls.enter().await;
        let kills = async { Ok(self.alive(request.container_id)?.agent.wait_oom(request.seen).await?) };
        kills.await.map_err(status)
    }

    async fn wait_ready(&self, _: &TtrpcContext, request: WaitReadyRequest) -> ttrpc::Result<WaitReadyResponse> {
        let _under_way = self.calls.enter().await;
        let line = async { Ok(self.alive(request.container_id)?.agent.wait_ready().await?) };
        let line = line.await.map_err(status)?.unwrap_or_default();
        Ok(WaitReadyResponse { line, ..WaitReadyResponse::default() })
    }
}
