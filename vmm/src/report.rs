// SPDX-License-Identifier: Apache-2.0
//! What the VMM tells the supervisor: one JSON object a line on the report descriptor.

use std::fs::File;
use std::io::Write;
use std::sync::Mutex;

use nix::time::{ClockId, clock_gettime};
use serde::{Deserialize, Serialize};

use crate::config::MacAddress;

/// One line of the report.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "report", rename_all = "kebab-case")]
pub enum Report {
    /// A phase of the start, in the host's `CLOCK_MONOTONIC`; only sent when tracing.
    Trace {
        /// The phase.
        name: String,
        /// When it began.
        begin_ns: u64,
        /// When it ended.
        end_ns: u64,
    },
    /// A request of the supervisor has been carried out, or not.
    Answer {
        /// The request's; 0 for something that could not be understood as one.
        sequence: u64,
        /// Why it was not carried out.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        failure: Option<String>,
        /// The window that a device has been put into: the N in the guest's name for it, `virtio-mmio.N`.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        window: Option<u32>,
    },
    /// A network device that vhost-net was to serve is served by the VMM. Sent once, for the first one.
    NoVhost {
        /// Why.
        reason: String,
    },
    /// A network device hangs on nothing any more: its link is down. Sent once for each device.
    LinkDown {
        /// The device's address.
        mac: MacAddress,
        /// Why.
        reason: String,
    },
    /// The machine has ended, or never began; the last line. The process exits after it.
    End(End),
}

/// Why a machine ended.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "reason", rename_all = "kebab-case")]
pub enum End {
    /// The guest asked for a reset, without a panic: its agent ended the machine.
    Shutdown,
    /// The guest's kernel panicked; the text is its own and not to be trusted.
    GuestPanic {
        /// The panic's line of the console, at most 256 bytes, control characters replaced.
        message: String,
    },
    /// The guest's CPU could not deliver an exception (triple fault).
    TripleFault,
    /// KVM could not go on running the guest.
    KvmError {
        /// What KVM said: the exit, its suberror, the registers that matter.
        message: String,
    },
    /// The VMM could not set the machine up, or its own device emulation failed.
    VmmError {
        /// What was being done and why it failed.
        message: String,
    },
    /// The supervisor's end of the report descriptor closed.
    Abandoned,
}

/// The VMM's end of the report descriptor.
#[derive(Debug)]
pub struct Reporter {
    file: Mutex<File>,
    trace: bool,
}

impl Reporter {
    /// Reports to `file`; trace points only if `trace`.
    #[must_use]
    pub fn new(file: File, trace: bool) -> Self {
        Self { file: Mutex::new(file), trace }
    }

    /// Sends one line. A supervisor that does not listen any more is found out by the main thread.
    pub fn send(&self, report: &Report) {
        if let (Ok(mut line), Ok(mut file)) = (serde_json::to_vec(report), self.file.lock()) {
            line.push(b'\n');
            let _ = file.write_all(&line);
        }
    }

    /// Does a phase of the start, and reports how long it took if tracing.
    pub fn phase<T>(&self, name: &str, work: impl FnOnce() -> T) -> T {
        if !self.trace {
            return work();
        }
        let begin_ns = now_ns();
        let result = work();
        self.send(&Report::Trace { name: name.to_owned(), begin_ns, end_ns: now_ns() });
        result
    }
}

/// The host's `CLOCK_MONOTONIC`.
fn now_ns() -> u64 {
    clock_gettime(ClockId::CLOCK_MONOTONIC)
        .map_or(0, |time| time.tv_sec().cast_unsigned() * 1_000_000_000 + time.tv_nsec().cast_unsigned())
}
