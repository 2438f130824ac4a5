// SPDX-License-Identifier: Apache-2.0
//! Brings the guest up: the few mounts that the agent needs, the connection to the host, the service on it.
//!
//! Every sandbox waits for this, so there is nothing in it that could be done later or not at all.

mod fatal;
mod mounts;
mod vsock;

use std::io;
use std::process::ExitCode;
use std::sync::Arc;

use bulkhead_protocol::{AGENT_PORT, STREAM_PORT};

use crate::container::{Engine, EngineConfig};
use crate::log::{self, Level};
use crate::process::{FdStream, Reaper, StreamTable};
use crate::rpc::{self, AgentService};
use crate::storage::ShareRoots;
use crate::trace::{Trace, now};

pub(crate) use fatal::enter_child;

/// Where the agent keeps what is its own.
const PRIVATE: &str = "/run/bulkhead/private";
const SHARED: &str = "/run/bulkhead/shared";
const CGROUP: &str = "/run/bulkhead/cgroup";
const ROOTFS: &str = "/run/bulkhead/rootfs";
const DEVICES: &str = "/run/bulkhead/devices";
pub(crate) const SYS: &str = "/run/bulkhead/sys";
const TMPFS: &str = "/run/bulkhead/tmpfs";
const SOCKETS: &str = "/run/bulkhead/sockets";

/// The virtio-fs tags of the two share devices.
const PRIVATE_TAG: &str = "private";
const SHARED_TAG: &str = "shared";

/// The host's vsock context id.
const HOST_CID: u32 = libc::VMADDR_CID_HOST;

/// Why the guest could not be brought up.
#[derive(Debug, thiserror::Error)]
enum InitError {
    #[error(transparent)]
    Mount(#[from] mounts::MountError),
    #[error("cannot start the runtime")]
    Runtime(#[source] io::Error),
    #[error("cannot listen on vsock port {STREAM_PORT}")]
    Listen(#[source] io::Error),
    #[error("cannot connect to the host's vsock port {AGENT_PORT}")]
    Connect(#[source] io::Error),
    #[error("cannot wait for child processes")]
    Reaper(#[source] io::Error),
    #[error("cannot serve the host's connection")]
    Serve(#[source] ttrpc::Error),
    #[error("the host has closed its connection")]
    HostGone,
}

/// Runs the agent. As pid 1 it never returns: the guest ends with it.
pub fn run() -> ExitCode {
    if std::process::id() != 1 {
        not_a_guest();
        return ExitCode::FAILURE;
    }
    fatal::install_panic_hook();
    match bring_up() {
        Err(error) => fatal::end_guest(&rpc::error_chain(&error)),
        Ok(never) => match never {},
    }
}

#[expect(clippy::print_stderr, reason = "said to somebody who runs the agent by hand")]
fn not_a_guest() {
    eprintln!(
        "bulkhead-agent {} is the first program of Bulkhead's guests, and does nothing elsewhere",
        env!("CARGO_PKG_VERSION")
    );
}

fn bring_up() -> Result<std::convert::Infallible, InitError> {
    let mut trace = Trace::default();
    let begin = now();
    mounts::mount_kernel_file_systems()?;
    let cgroup = mounts::mount_cgroup(CGROUP.as_ref())?;
    trace.add("agent mounts", begin);
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(InitError::Runtime)?;
    let config = EngineConfig {
        shares: ShareRoots { private: PRIVATE.into(), shared: SHARED.into() },
        cgroup_parent: Some(cgroup),
        rootfs_mount_point: ROOTFS.into(),
        device_scratch: DEVICES.into(),
        sysfs: SYS.into(),
        sandbox_tmpfs: TMPFS.into(),
        sockets: SOCKETS.into(),
    };
    runtime.block_on(serve(config, trace))
}

async fn serve(config: EngineConfig, mut trace: Trace) -> Result<std::convert::Infallible, InitError> {
    let begin = now();
    let listener = vsock::listen(STREAM_PORT).map_err(InitError::Listen)?;
    let connection = vsock::connect(HOST_CID, AGENT_PORT).and_then(FdStream::new).map_err(InitError::Connect)?;
    let begin = trace.add("agent connect", begin);
    // The host sends its first request as soon as it sees the connection, so this goes on beside it.
    mounts::mount_share(PRIVATE_TAG, PRIVATE.as_ref())?;
    if let Err(error) = mounts::let_write_back_grow(PRIVATE.as_ref()) {
        // Files are slower then, and right all the same.
        log::write(Level::Warning, &format!("cannot tune the write-back of {PRIVATE}: {error}"));
    }
    let begin = trace.add("agent share", begin);
    let reaper = Reaper::start().map_err(InitError::Reaper)?;
    let streams = Arc::new(StreamTable::default());
    let engine = Engine::new(config, reaper, Arc::clone(&streams));
    tokio::spawn(vsock::accept_streams(listener, Arc::clone(&streams)));
    trace.add("agent ready", begin);
    let service = AgentService::new(engine, streams, trace).with_shared_device(|| {
        mounts::mount_share(SHARED_TAG, SHARED.as_ref()).map_err(|error| rpc::error_chain(&error))
    });
    log::write(Level::Info, "ready");
    rpc::serve_until_closed(connection, service).await.map_err(InitError::Serve)?;
    Err(InitError::HostGone)
}
