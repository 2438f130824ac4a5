// SPDX-License-Identifier: Apache-2.0
//! `checkpoint` and `restore`, which engines ask for by name: not supported, and said so, whatever the options.

use clap::Args;
use thiserror::Error;

use super::Outcome;

/// Not supported: the state of a virtual machine is not CRIU's to save
#[derive(Debug, Args)]
#[command(disable_help_flag = true)]
pub(crate) struct Arguments {
    /// Whatever runc takes; podman asks for `--help` to learn whether there is such a command, so that fails too.
    #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
    _arguments: Vec<String>,
}

#[derive(Debug, Error)]
#[error("{0} is not supported: a container in a virtual machine is not saved and restored by CRIU")]
struct NotSupported(&'static str);

/// Fails.
pub(crate) fn run(verb: &'static str) -> Outcome {
    Err(NotSupported(verb).into())
}
