// SPDX-License-Identifier: Apache-2.0
//! `bulkhead create`: makes a container and its sandbox; its program waits for `start`.

use std::path::PathBuf;

use clap::Args;

use super::{Failure, Global, Outcome};
use crate::supervisor::{self, Mode, Options};

/// Create a container from a bundle; its program is executed by `start`
#[derive(Debug, PartialEq, Eq, Args)]
pub(crate) struct Arguments {
    #[command(flatten)]
    pub(super) common: Common,
}

/// What `create` and `run` have in common.
#[derive(Debug, PartialEq, Eq, Args)]
pub(crate) struct Common {
    /// Name of the container, unique under --root
    #[arg(value_name = "ID")]
    pub(crate) id: String,

    /// Folder with config.json and the root file system
    #[arg(long, short, value_name = "DIR", default_value = ".")]
    pub(super) bundle: PathBuf,

    /// Send the master side of the container's terminal to this Unix socket
    #[arg(long, value_name = "SOCKET")]
    pub(super) console_socket: Option<PathBuf>,

    /// Write the process id that stands for the container to FILE
    #[arg(long, value_name = "FILE")]
    pub(super) pid_file: Option<PathBuf>,

    /// Accepted for runc's sake: a guest's root is never a ramdisk that cannot be pivoted from
    #[arg(long, hide = true)]
    no_pivot: bool,

    /// Accepted for runc's sake: no host key ring is shared with a guest
    #[arg(long, hide = true)]
    no_new_keyring: bool,

    /// Give the container this process' descriptors 3 to N+2: pipes, connections, files to read or to write
    #[arg(long, value_name = "N", default_value = "0", hide_default_value = true)]
    preserve_fds: u32,
}

impl Common {
    /// The options of a container, made in that mode.
    pub(super) fn options(self, global: &Global, mode: Mode) -> Options {
        Options {
            id: self.id,
            bundle: self.bundle,
            root: global.root.clone(),
            pid_file: self.pid_file,
            console_socket: self.console_socket,
            trace: global.trace.clone(),
            preserve_fds: self.preserve_fds,
            mode,
        }
    }
}

/// Creates the container.
pub(crate) fn run(global: &Global, arguments: Arguments) -> Outcome {
    create(arguments.common.options(global, Mode::Detached { start: false }))
}

/// Makes a container that lives on; its status is 0, whatever the container's will be.
pub(super) fn create(options: Options) -> Outcome {
    match supervisor::create(options) {
        Ok(()) => Ok(0),
        Err(error) => Err(Failure { status: error.exit_status(), error: Box::new(error) }),
    }
}
