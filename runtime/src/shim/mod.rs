// SPDX-License-Identifier: Apache-2.0
//! Containerd's side: `containerd-shim-bulkhead-v2`, which is this program under that name.
//!
//! | module | what it knows |
//! | --- | --- |
//! | `arguments` | the command line that containerd gives |
//! | `start`, `socket` | `start`: a server in a process of its own, or a pod's, and the address of its socket |
//! | `bootstrap` | what containerd writes to `start`, and how it is answered |
//! | `info` | `-info`: the runtime's features |
//! | `cleanup` | `delete`: what is left when a server was killed |
//! | `server` | the process that serves containerd, and supervises the machine |
//! | `service`, `task`, `exec` | the Task API's calls; a container and its further processes as those see them |
//! | `sandbox` | the Sandbox service's calls; a pod's sandbox as those see it |
//! | `rootfs`, `stdio`, `uri`, `logger`, `pod`, `metrics`, `events` | one thing each that containerd has its own way of |
//!
//! The container itself is the supervisor's, as for the command line: `bulkhead --root /run/containerd/bulkhead/NAMESPACE`
//! lists, executes in, and logs containerd's containers too.

mod arguments;
mod bootstrap;
mod cleanup;
mod events;
mod exec;
mod info;
mod logger;
mod loop_device;
mod metrics;
mod pod;
mod rootfs;
mod sandbox;
mod server;
mod service;
mod socket;
mod start;
mod stdio;
mod task;
mod uri;

use std::env;
use std::ffi::OsStr;
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use thiserror::Error;

use self::arguments::{ArgumentError, Arguments, Verb};
use crate::logging;
use crate::text;

/// The name by which containerd looks for the runtime `io.containerd.bulkhead.v2`.
pub(crate) const PROGRAM: &str = "containerd-shim-bulkhead-v2";

/// That runtime.
const RUNTIME: &str = "io.containerd.bulkhead.v2";

/// Where the state of containerd's containers is kept, a folder a namespace, unless `BULKHEAD_ROOT` names another place.
const DEFAULT_ROOT: &str = "/run/containerd/bulkhead";

/// A verb that failed.
#[derive(Debug, Error)]
enum ShimError {
    #[error(transparent)]
    Arguments(#[from] ArgumentError),
    #[error(transparent)]
    Bootstrap(#[from] bootstrap::BootstrapError),
    #[error(transparent)]
    Start(#[from] start::StartError),
    #[error(transparent)]
    Cleanup(#[from] cleanup::CleanupError),
    #[error("cannot encode the runtime's features")]
    Info(#[source] protobuf::Error),
    #[error("cannot write to stdout")]
    Stdout(#[source] io::Error),
}

/// Whether the program was called by the shim's name.
pub(crate) fn is_called() -> bool {
    env::args_os().next().is_some_and(|program| Path::new(&program).file_name() == Some(OsStr::new(PROGRAM)))
}

/// Parses the process' arguments, runs the verb, and tells what failed.
pub(crate) fn run() -> ExitCode {
    match call() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            logging::error(format_args!("{}", text::chain(&error)));
            ExitCode::FAILURE
        }
    }
}

fn call() -> Result<(), ShimError> {
    let mut arguments = Arguments::parse(env::args_os().skip(1))?;
    let answer = match arguments.verb {
        Verb::Start => {
            let form = bootstrap::read(&mut arguments)?;
            bootstrap::answer(form, start::start(&arguments)?)?
        }
        Verb::Delete => cleanup::delete(&arguments)?,
        Verb::Info => info::encode().map_err(ShimError::Info)?,
        Verb::Version => version().into_bytes(),
    };
    let mut stdout = io::stdout();
    stdout.write_all(&answer).and_then(|()| stdout.flush()).map_err(ShimError::Stdout)
}

fn version() -> String {
    let (version, commit) = (env!("CARGO_PKG_VERSION"), env!("BULKHEAD_COMMIT"));
    format!("{PROGRAM}:\n  Version:  {version}\n  Revision: {commit}\n")
}

/// Where the state of a namespace's containers is kept.
fn root(namespace: &str) -> PathBuf {
    let root = env::var_os("BULKHEAD_ROOT").filter(|root| !root.is_empty());
    root.map_or_else(|| DEFAULT_ROOT.into(), PathBuf::from).join(namespace)
}
