// SPDX-License-Identifier: Apache-2.0
//! Bulkhead's agent: pid 1 of the guest, and the container engine that it drives.
//!
//! | module | what it does |
//! | --- | --- |
//! | [`init`] | brings the guest up: mounts, log, connection to the host, fate of errors |
//! | [`rpc`] | the service that the host calls: decodes, delegates, maps errors |
//! | [`container`] | the engine: makes, starts, signals and deletes containers |
//! | [`process`] | a container's process: stdio, credentials, limits, program, reaping |
//! | [`storage`] | shared trees, mounts, safe destinations, hidden paths |
//! | [`network`] | the guest's network interfaces |
//! | [`disks`] | block devices of the host that the machine has |
//! | [`cpus`] | processors that the machine has, and the kernel does not use yet |
//! | [`memory`] | memory that the machine is given while it runs |
//!
//! The engine works without a VM as well: give it directories for the shared trees and run it as root.

pub mod container;
pub mod cpus;
pub mod disks;
pub mod init;
pub mod log;
pub mod memory;
pub mod network;
pub mod process;
pub mod rpc;
pub mod storage;
pub mod trace;

mod late;
mod sys;
