// SPDX-License-Identifier: Apache-2.0
//! `bulkhead run`: creates a container, starts it, waits for it, and removes it.

use std::path::PathBuf;

use clap::Args;
use thiserror::Error;

use super::{Failure, Global, Outcome};
use crate::supervisor::{self, Options};

/// Create a container from a bundle, start it, and wait for its end
#[derive(Debug, PartialEq, Eq, Args)]
pub(crate) struct Arguments {
    /// Name of the container, unique under --root
    #[arg(value_name = "ID")]
    pub(crate) id: String,

    /// Folder with config.json and the root file system
    #[arg(long, short, value_name = "DIR", default_value = ".")]
    bundle: PathBuf,

    /// Write the process id that stands for the container to FILE
    #[arg(long, value_name = "FILE")]
    pid_file: Option<PathBuf>,

    /// Accepted for runc's sake: a guest's root is never a ramdisk that cannot be pivoted from
    #[arg(long, hide = true)]
    no_pivot: bool,

    /// Accepted for runc's sake: no host key ring is shared with a guest
    #[arg(long, hide = true)]
    no_new_keyring: bool,

    /// Not supported yet
    #[arg(long, short, hide = true)]
    detach: bool,

    /// Not supported yet
    #[arg(long, hide = true, value_name = "SOCKET")]
    console_socket: Option<PathBuf>,

    /// Not supported yet
    #[arg(long, hide = true, value_name = "N")]
    preserve_fds: Option<u32>,

    /// Not supported yet
    #[arg(long, hide = true)]
    keep: bool,
}

#[derive(Debug, Error)]
#[error("run: {0} is not supported yet")]
struct NotSupported(&'static str);

/// Runs the container in the foreground; the status is the container's.
pub(crate) fn run(global: &Global, arguments: Arguments) -> Outcome {
    let unsupported = [
        (arguments.detach, "--detach"),
        (arguments.console_socket.is_some(), "--console-socket"),
        (arguments.preserve_fds.is_some_and(|count| count > 0), "--preserve-fds"),
        (arguments.keep, "--keep"),
    ];
    if let Some((_, option)) = unsupported.iter().find(|(given, _)| *given) {
        return Err(NotSupported(option).into());
    }
    let options = Options {
        id: arguments.id,
        bundle: arguments.bundle,
        root: global.root.clone(),
        pid_file: arguments.pid_file,
        trace: global.trace.clone(),
    };
    supervisor::run(options).map_err(|error| Failure { status: error.exit_status(), error: Box::new(error) })
}
