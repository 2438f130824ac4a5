// SPDX-License-Identifier: Apache-2.0
//! The process that serves containerd: its surroundings, and the loop that supervises the machine.

use std::fs::File;
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::process;
use std::sync::Arc;

use rustix::stdio::{dup2_stderr, dup2_stdin, dup2_stdout};
use thiserror::Error;
use tokio::sync::{mpsc, watch};

use super::arguments::Arguments;
use super::events::{self, Publisher};
use super::service::{Order, OrderKind, Shared, ShimService};
use super::start::{self, PID, StartError};
use super::{root, rootfs, sandbox};
use crate::event_loop;
use crate::logging::{self, LogFormat};
use crate::supervisor;
use crate::supervisor::daemon::Reporter;
use crate::supervisor::oom_score;
use crate::supervisor::streams::Ends;
use crate::supervisor::task_service::{Calls, TaskServer};
use crate::text;

/// In the bundle: a named pipe that containerd reads log lines from.
const LOG: &str = "log";

/// A server that could not be set up.
#[derive(Debug, Error)]
enum ServerError {
    #[error("cannot leave the caller's standard streams")]
    Streams(#[source] io::Error),
    #[error("cannot make a mount namespace")]
    Namespace(#[source] io::Error),
    #[error(transparent)]
    File(#[from] StartError),
    #[error("cannot set up the event loop")]
    EventLoop(#[source] io::Error),
}

/// Serves until containerd ends it; the process' exit status. The reporter is told once calls are taken.
pub(super) fn run(arguments: &Arguments, socket: &Path, listener: UnixListener, reporter: Reporter) -> u8 {
    let mut reporter = Some(reporter);
    let socket = SocketFile(socket);
    let served = set_up(arguments).and_then(|()| {
        let runtime = event_loop::new().map_err(ServerError::EventLoop)?;
        runtime.block_on(serve(arguments, socket, listener, &mut reporter))
    });
    let Err(error) = served else {
        return 0;
    };
    let message = text::chain(&error);
    match reporter {
        Some(reporter) => reporter.failed(message, 1),
        None => logging::error(format_args!("{message}")),
    }
    1
}

/// The file of the socket, which is removed once: a later server of the same container may have made another.
struct SocketFile<'a>(&'a Path);

impl Drop for SocketFile<'_> {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(self.0);
    }
}

/// Leaves the caller, but for containerd's log.
fn set_up(arguments: &Arguments) -> Result<(), ServerError> {
    // Containerd waits for the end of what `start` writes.
    let null = File::options().read(true).write(true).open("/dev/null").map_err(ServerError::Streams)?;
    for replaced in [dup2_stdin(&null), dup2_stdout(&null), dup2_stderr(&null)] {
        replaced.map_err(|error| ServerError::Streams(error.into()))?;
    }
    logging::init_with(open_log(&arguments.bundle), LogFormat::Text, arguments.debug);
    oom_score::raise_own();
    rootfs::separate().map_err(ServerError::Namespace)?;
    start::write(&arguments.bundle, PID, &start::pid_record(process::id()))?;
    Ok(())
}

/// The pipe that containerd reads, with both ends: a line that containerd does not take is lost, and stops nothing.
fn open_log(bundle: &Path) -> Option<File> {
    File::options().read(true).write(true).custom_flags(libc::O_NONBLOCK).open(bundle.join(LOG)).ok()
}

async fn serve(
    arguments: &Arguments,
    socket: SocketFile<'_>,
    listener: UnixListener,
    reporter: &mut Option<Reporter>,
) -> Result<(), ServerError> {
    let events = Arc::new(Publisher::new(events::address(arguments), &arguments.namespace));
    let (orders, mut received) = mpsc::channel(1);
    let (end, mut is_ending) = watch::channel(false);
    let shared = Shared::new(root(&arguments.namespace), Arc::clone(&events), orders, end);
    let calls = Calls::default();
    let shared = Arc::new(shared);
    let others = sandbox::services(Arc::clone(&shared), calls.clone());
    let service = Arc::new(ShimService::new(shared, calls.clone()));
    let server = TaskServer::start_with(listener, service, others, calls).await.map_err(ServerError::EventLoop)?;
    if let Some(reporter) = reporter.take() {
        reporter.succeeded();
    }
    let supervising = async {
        while let Some(Order { options, kind, gone }) = received.recv().await {
            match kind {
                OrderKind::Container { ends, caller } => {
                    let _ = supervisor::serve(&options, Ends::Given(ends), caller).await;
                }
                OrderKind::Pod { ready } => supervisor::pod::serve(&options, ready).await,
            }
            gone.send_replace(true);
        }
    };
    tokio::select! {
        () = supervising => {}
        // Whatever runs still ends here: its supervision is dropped.
        _ = is_ending.wait_for(|ending| *ending) => {}
    }
    // Who connects from here on learns that nobody is there, and a `start` makes a new server.
    drop(socket);
    // Containerd's first: when its connection ends, it calls `delete`, which ends what is still there.
    events.flush().await;
    server.stop().await;
    Ok(())
}
