// SPDX-License-Identifier: Apache-2.0
//! What the VMM tells the supervisor: one JSON object a line on the report descriptor.

use serde::{Deserialize, Serialize};

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
