// SPDX-License-Identifier: Apache-2.0
//! A sandbox's life on the host, from `run` or `create` to its exit.
//!
//! | module | what it knows |
//! | --- | --- |
//! | `launch`, `groundwork`, `daemon`, `console` | the way to a booting sandbox, in this process or in one that lives on |
//! | `sandbox` | the loop that supervises it: the states below |
//! | `pod` | the same for a machine in which several containers come and go |
//! | `container`, `execs`, `task_service` | what the loop shares with the calls that come in, and those calls |
//! | `caller` | who has asked for the container, and is told |
//! | `client`, `delete`, `proxy` | the other side: commands that call a supervisor |
//! | `state` | what lies under `--root` |
//! | `network` | what changes in its network on the host, passed on |
//! | `forward` | connections to the loopback addresses of that, passed on |
//! | `connections` | what it connects to on the host |
//! | `questions` | what it asks a resolver on the host |
//! | `machine_memory` | what its containers may use of its memory together, and giving it more |
//! | `disks` | the host's block devices that it has, by the guest's numbers |
//! | `agent`, `vmm`, `vmm_control`, `streams`, `terminal`, `signals`, `pid_file` | one thing each |
//!
//! ```text
//!  checked ──> booting ──> starting ──> running ──> draining ──> gone
//!     │           │            │           │            │
//!     └───────────┴────────────┴───────────┴────────────┴──> failed
//! ```
//!
//! | state | what happens | what ends it early |
//! | --- | --- | --- |
//! | checked | configuration, parts and terminal are looked at; nothing exists yet | any fault of theirs |
//! | booting | state directory and VMM exist, the guest boots; the request to create the container is on its way | a signal, the VMM's end, the deadline |
//! | starting | the agent has answered; streams are opened, the container is created and its program executed | as above |
//! | running | bytes are pumped, signals and sizes forwarded; or the program waits for `start` | the VMM's end, an agent that does not answer |
//! | draining | init has ended; its output is delivered, its files written back | as above, and a second of the ending signals |
//! | gone, failed | everything is undone, in reverse | |
//!
//! Each step of the set-up is undone by the drop of the value that stands for it, so that a failure, a panic, and the
//! ordinary end take the same way: the terminal's mode comes back, the VMM is killed, the state directory is removed. It
//! stays only if it is kept for those who created the container.

pub(crate) mod agent;
mod agent_service;
mod caller;
mod claims;
pub(crate) mod client;
mod connections;
mod console;
pub(crate) mod container;
pub(crate) mod daemon;
mod delete;
mod disks;
mod error;
pub(crate) mod execs;
mod face;
mod forward;
mod groundwork;
mod launch;
mod machine_cpus;
mod machine_memory;
mod network;
pub(crate) mod oom_score;
mod pid_file;
pub(crate) mod pod;
mod pod_cpus;
mod proc_view;
mod proxy;
mod questions;
mod ready;
mod sandbox;
mod signals;
pub(crate) mod state;
pub(crate) mod streams;
mod submounts;
pub(crate) mod task_service;
pub(crate) mod terminal;
mod vmm;
mod vmm_control;

pub(crate) use self::caller::Caller;
pub(crate) use self::container::CallError;
pub(crate) use self::delete::{DeleteError, delete, run_poststop_hooks};
pub(crate) use self::launch::{Mode, Options, create, run, serve};
pub(crate) use self::proxy::{ExecError, ExecOptions, exec};
pub(crate) use self::state::{StateDir, sweep};
