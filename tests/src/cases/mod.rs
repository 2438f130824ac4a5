// SPDX-License-Identifier: Apache-2.0
//! The cases, by topic.

mod bad_config;
mod bad_host;
mod cleanup;
mod command_line;
mod containerd;
mod control;
mod crash;
mod debian;
mod devices;
mod docker;
mod engine;
mod exec;
mod exit;
mod files;
mod guest_failure;
mod jail;
mod lifecycle;
mod machine;
mod mounts;
mod namespaces;
mod net_device;
mod network;
mod network_guest;
mod network_kinds;
mod network_later;
mod network_load;
mod podman;
mod pods;
mod process;
mod sandbox;
mod shim;
mod signals;
mod stdio;
mod streams;
mod terminal;
mod tree;
mod user_namespace;
mod verbs;

use std::time::Duration;

use crate::env::Env;
use crate::failure::Result;

/// One case.
#[derive(Debug)]
pub(crate) struct Case {
    path: &'static str,
    pub(crate) run: fn(&Env) -> Result,
    /// After which it is killed.
    pub(crate) limit: Duration,
    /// It takes minutes.
    pub(crate) slow: bool,
}

impl Case {
    const fn new(path: &'static str, run: fn(&Env) -> Result) -> Self {
        Self { path, run, limit: Duration::from_secs(300), slow: false }
    }

    /// Another time limit.
    const fn limit(mut self, seconds: u64) -> Self {
        self.limit = Duration::from_secs(seconds);
        self
    }

    /// It takes minutes, at most so many seconds.
    const fn slow(mut self, seconds: u64) -> Self {
        self.slow = true;
        self.limit(seconds)
    }

    /// `topic::title`.
    pub(crate) fn name(&self) -> &'static str {
        self.path.split_once("cases::").map_or(self.path, |(_, name)| name)
    }
}

/// A case named after its function.
macro_rules! case {
    ($function:ident) => {
        $crate::cases::Case::new(concat!(module_path!(), "::", stringify!($function)), $function)
    };
}
use case;

/// All cases, in the order of running.
pub(crate) fn all() -> impl Iterator<Item = &'static Case> {
    [
        command_line::CASES,
        exit::CASES,
        lifecycle::CASES,
        exec::CASES,
        control::CASES,
        verbs::CASES,
        stdio::CASES,
        streams::CASES,
        terminal::CASES,
        signals::CASES,
        process::CASES,
        namespaces::CASES,
        user_namespace::CASES,
        network::CASES,
        net_device::CASES,
        network_later::CASES,
        network_kinds::CASES,
        network_guest::CASES,
        network_load::CASES,
        mounts::CASES,
        devices::CASES,
        machine::CASES,
        engine::CASES,
        files::CASES,
        tree::CASES,
        bad_config::CASES,
        bad_host::CASES,
        guest_failure::CASES,
        jail::CASES,
        cleanup::CASES,
        crash::CASES,
        debian::CASES,
        podman::CASES,
        docker::CASES,
        shim::CASES,
        sandbox::CASES,
        containerd::CASES,
        pods::CASES,
    ]
    .into_iter()
    .flatten()
}
