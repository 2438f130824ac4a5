// SPDX-License-Identifier: Apache-2.0
//! `bulkhead kill`: sends a signal to a container.

use clap::Args;
use containerd_shim_protos::api::KillRequest;
use nix::sys::signal::Signal;
use thiserror::Error;
use ttrpc::context::Context;

use super::{Global, Outcome};
use crate::supervisor::client::ClientError;
use crate::supervisor::state::Found;
use crate::supervisor::{CallError, client};

/// Send a signal to a container's init
#[derive(Debug, Args)]
pub(crate) struct Arguments {
    /// Name of the container
    #[arg(value_name = "ID")]
    id: String,

    /// Number or name of the signal, with or without SIG
    #[arg(value_name = "SIGNAL", default_value = "SIGTERM")]
    signal: String,

    /// Send it to every process of the container
    #[arg(long, short)]
    all: bool,
}

#[derive(Debug, Error)]
#[error("unknown signal {0:?}")]
struct UnknownSignal(String);

/// The highest signal of Linux.
const MAX_SIGNAL: u32 = 64;

/// The real-time signals that a C library leaves to programs.
const RTMIN: u32 = 34;

/// Sends the signal.
pub(crate) fn run(global: &Global, arguments: &Arguments) -> Outcome {
    let found = Found::open(&global.root, &arguments.id)?;
    let all = arguments.all;
    let signal = number(&arguments.signal).ok_or_else(|| UnknownSignal(arguments.signal.clone()))?;
    let killed = client::call(&found, CallError::NotRunning, async |task, id| {
        task.kill(Context::default(), &KillRequest { id, signal, all, ..Default::default() }).await
    });
    match killed {
        // Nothing is left of it, so everything has had the signal.
        Err(ClientError::State(CallError::NotRunning)) if all => Ok(0),
        result => Ok(result.map(|_| 0)?),
    }
}

/// A signal's number.
fn number(text: &str) -> Option<u32> {
    if let Ok(number) = text.parse() {
        // 0 only asks whether there is somebody to send it to.
        return (number <= MAX_SIGNAL).then_some(number);
    }
    let name = text.to_ascii_uppercase();
    let name = name.strip_prefix("SIG").unwrap_or(&name);
    let offset = |rest: &str| if rest.is_empty() { Some(0) } else { rest[1..].parse::<u32>().ok() };
    let number = if let Some(rest) = name.strip_prefix("RTMIN").filter(|rest| rest.is_empty() || rest.starts_with('+'))
    {
        RTMIN.checked_add(offset(rest)?)?
    } else if let Some(rest) = name.strip_prefix("RTMAX").filter(|rest| rest.is_empty() || rest.starts_with('-')) {
        MAX_SIGNAL.checked_sub(offset(rest)?)?
    } else {
        return format!("SIG{name}").parse::<Signal>().ok().map(|signal| (signal as i32).unsigned_abs());
    };
    (RTMIN..=MAX_SIGNAL).contains(&number).then_some(number)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn signals_have_numbers_and_names() {
        for (text, expected) in [
            ("0", 0),
            ("9", 9),
            ("KILL", 9),
            ("SIGKILL", 9),
            ("sigterm", 15),
            ("RTMIN", 34),
            ("SIGRTMIN+3", 37),
            ("RTMAX-1", 63),
        ] {
            assert_eq!(number(text), Some(expected), "{text}");
        }
        for text in ["", "65", "-1", "FOO", "SIG", "RTMIN+x", "RTMIN+31", "RTMAX-31", "RTMIN-1", "RTMIN+é"] {
            assert_eq!(number(text), None, "{text}");
        }
    }
}
