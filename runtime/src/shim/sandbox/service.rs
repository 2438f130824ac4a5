// SPDX-License-Identifier: Apache-2.0
//! The calls of the Sandbox service: each is done to its end whether its caller waits or not, and never waits for another.

use std::collections::HashMap;
use std::sync::Arc;

use async_trait::async_trait;
use containerd_shim_protos::sandbox_api::{
    CreateSandboxRequest, CreateSandboxResponse, PingRequest, PingResponse, PlatformRequest, PlatformResponse,
    SandboxMetricsRequest, SandboxMetricsResponse, SandboxStatusRequest, SandboxStatusResponse, ShutdownSandboxRequest,
    ShutdownSandboxResponse, StartSandboxRequest, StartSandboxResponse, StopSandboxRequest, StopSandboxResponse,
    WaitSandboxRequest, WaitSandboxResponse,
};
use containerd_shim_protos::sandbox_async::{Sandbox as SandboxApi, create_sandbox};
use containerd_shim_protos::types::platform::Platform;
use protobuf::MessageField;
use ttrpc::asynchronous::{Service, TtrpcContext};

use super::super::metrics;
use super::super::service::Shared;
use super::Sandbox;
use crate::supervisor::container::{CallError, Ended};
use crate::supervisor::state::Status;
use crate::supervisor::task_service::{Calls, any, status, timestamp, timestamp_of};

/// The states of a sandbox, in CRI's words, which containerd passes on.
const READY: &str = "SANDBOX_READY";
const NOT_READY: &str = "SANDBOX_NOTREADY";

/// The service by its name, for a server.
pub(in super::super) fn services(shared: Arc<Shared>, calls: Calls) -> HashMap<String, Service> {
    create_sandbox(Arc::new(SandboxService { shared, calls }))
}

/// The calls.
#[derive(Debug, Clone)]
struct SandboxService {
    shared: Arc<Shared>,
    calls: Calls,
}

impl SandboxService {
    /// Does what a call asks of the sandbox.
    async fn call<T, F>(&self, id: &str, work: impl FnOnce(Arc<Sandbox>) -> F) -> ttrpc::Result<T>
    where
        T: Send + 'static,
        F: Future<Output = Result<T, CallError>> + Send + 'static,
    {
        let sandbox = self.shared.sandbox(id).map_err(status)?;
        self.calls.finish(work(sandbox)).await
    }
}

#[async_trait]
impl SandboxApi for SandboxService {
    async fn create_sandbox(
        &self,
        _: &TtrpcContext,
        request: CreateSandboxRequest,
    ) -> ttrpc::Result<CreateSandboxResponse> {
        let shared = Arc::clone(&self.shared);
        self.calls
            .finish(async move { shared.create_sandbox(request).await.map(|()| CreateSandboxResponse::default()) })
            .await
    }

    async fn start_sandbox(
        &self,
        _: &TtrpcContext,
        request: StartSandboxRequest,
    ) -> ttrpc::Result<StartSandboxResponse> {
        self.call(&request.sandbox_id, |sandbox| async move {
            sandbox.container.start().await?;
            let (pid, created_at) = (sandbox.container.record().pid, timestamp_of(sandbox.created));
            Ok(StartSandboxResponse { pid, created_at, ..StartSandboxResponse::default() })
        })
        .await
    }

    async fn platform(&self, _: &TtrpcContext, request: PlatformRequest) -> ttrpc::Result<PlatformResponse> {
        self.shared.sandbox(&request.sandbox_id).map_err(status)?;
        let platform = Platform { os: "linux".to_owned(), architecture: "amd64".to_owned(), ..Platform::default() };
        Ok(PlatformResponse { platform: MessageField::some(platform), ..PlatformResponse::default() })
    }

    async fn stop_sandbox(&self, _: &TtrpcContext, request: StopSandboxRequest) -> ttrpc::Result<StopSandboxResponse> {
        // The time that it may take is not waited for: whoever had to end in good order has been asked before.
        self.call(&request.sandbox_id, |sandbox| async move {
            sandbox.stop().await.map(|()| StopSandboxResponse::default())
        })
        .await
    }

    async fn wait_sandbox(&self, _: &TtrpcContext, request: WaitSandboxRequest) -> ttrpc::Result<WaitSandboxResponse> {
        self.call(&request.sandbox_id, |sandbox| async move {
            let ended = sandbox.wait().await?;
            let (exit_status, exited_at) = (u32::from(ended.status), timestamp(&ended));
            Ok(WaitSandboxResponse { exit_status, exited_at, ..WaitSandboxResponse::default() })
        })
        .await
    }

    async fn sandbox_status(
        &self,
        _: &TtrpcContext,
        request: SandboxStatusRequest,
    ) -> ttrpc::Result<SandboxStatusResponse> {
        let sandbox = self.shared.sandbox(&request.sandbox_id).map_err(status)?;
        let (container, ended) = (&sandbox.container, sandbox.container.ended());
        let is_ready = container.status() == Status::Running;
        Ok(SandboxStatusResponse {
            sandbox_id: request.sandbox_id,
            pid: container.record().pid,
            state: if is_ready { READY } else { NOT_READY }.to_owned(),
            created_at: timestamp_of(sandbox.created),
            exited_at: ended.as_ref().map(timestamp).unwrap_or_default(),
            ..SandboxStatusResponse::default()
        })
    }

    async fn ping_sandbox(&self, _: &TtrpcContext, request: PingRequest) -> ttrpc::Result<PingResponse> {
        let sandbox = self.shared.sandbox(&request.sandbox_id).map_err(status)?;
        sandbox.container.require_alive().map(|()| PingResponse::default()).map_err(status)
    }

    async fn shutdown_sandbox(
        &self,
        _: &TtrpcContext,
        request: ShutdownSandboxRequest,
    ) -> ttrpc::Result<ShutdownSandboxResponse> {
        // Also of a sandbox that could not be made: the server has nothing else to do.
        let ended = match self.shared.sandbox(&request.sandbox_id) {
            Ok(sandbox) => self.calls.finish(async move { sandbox.stop().await }).await,
            Err(error) if self.shared.serves_other_than(&request.sandbox_id) => return Err(status(error)),
            Err(_) => Ok(()),
        };
        self.shared.end();
        ended.map(|()| ShutdownSandboxResponse::default())
    }

    async fn sandbox_metrics(
        &self,
        _: &TtrpcContext,
        request: SandboxMetricsRequest,
    ) -> ttrpc::Result<SandboxMetricsResponse> {
        let container = self.shared.holder_of_machine(&request.sandbox_id).map_err(status)?;
        self.calls
            .finish(async move {
                let metrics = metrics::translate(&container.host_usage()?);
                let mut answer = SandboxMetricsResponse::default();
                let metric = answer.metrics.mut_or_insert_default();
                metric.timestamp = timestamp(&Ended::now(0));
                metric.id = container.id().to_owned();
                metric.data = MessageField::some(any(metrics::TYPE, &metrics)?);
                Ok(answer)
            })
            .await
    }
}
