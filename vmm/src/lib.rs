// SPDX-License-Identifier: Apache-2.0
//! The virtual machine monitor: builds and runs the one KVM machine of a sandbox.

pub mod arch;
pub mod config;
pub mod control;
pub mod jail;
pub mod machine;
pub mod probe;
pub mod report;
pub mod tree;
