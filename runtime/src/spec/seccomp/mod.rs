// SPDX-License-Identifier: Apache-2.0
//! `linux.seccomp`: from the configuration's rules to the classic BPF program that the guest's kernel runs at each system
//! call.
//!
//! | module | what it knows |
//! | --- | --- |
//! | `policy` | the configuration, checked: actions, rules, conditions |
//! | `arch` | the three ways into an x86-64 kernel, and the numbers of system calls in each |
//! | `compile` | policy to program: which action for which number, found by binary search |
//! | `program` | instructions and their encoding |
//!
//! # Which rule holds
//!
//! As with libseccomp, which other runtimes use:
//!
//! - A rule without conditions holds for its system call whatever rules with conditions say; the first such rule wins.
//! - Of rules with conditions, the first that matches wins; if none does, the default action is taken.
//! - The conditions of a rule are all to be met; if two of them look at the same argument, each is a rule of its own.
//! - A rule whose action is the default action says nothing, and is left out.
//! - Names that an architecture does not have are left out there.
//!
//! A system call newer than all that the rules name answers `ENOSYS` instead of the default action, unless that lets it
//! pass: a C library falls back on what the profile's author knew.

mod arch;
mod compile;
mod policy;
mod program;
#[cfg(test)]
mod tests;

use bulkhead_protocol::agent::Seccomp;
use oci_spec::runtime::LinuxSeccomp;

use self::policy::Policy;
use super::error::FieldError;
use crate::logging;

/// Most instructions that the kernel takes (`BPF_MAXINSNS`).
const MAX_INSTRUCTIONS: usize = 4096;

/// Checks the filter and compiles it.
pub(crate) fn translate(seccomp: &LinuxSeccomp) -> Result<Seccomp, FieldError> {
    let policy = Policy::translate(seccomp)?;
    if logging::debug_enabled() {
        for name in policy.unknown_names() {
            let name = crate::text::one_line(name);
            logging::debug(format_args!("linux.seccomp: the unknown system call {name} is left out"));
        }
    }
    let program = compile::compile(&policy);
    if program.len() > MAX_INSTRUCTIONS {
        let expected = format!("a filter that fits into {MAX_INSTRUCTIONS} instructions");
        return Err(FieldError::invalid("linux.seccomp.syscalls", format!("{} instructions", program.len()), expected));
    }
    Ok(Seccomp { filter: program::encode(&program), flags: policy.flags, ..Seccomp::default() })
}
