// SPDX-License-Identifier: Apache-2.0
//! The cases, by topic.

mod bad_config;
mod bad_host;
mod block_devices;
mod cgroup_v1;
mod cleanup;
mod command_line;
mod containerd;
mod control;
mod crash;
mod creating;
mod cri_o;
mod debian;
mod devices;
mod docker;
mod engine;
mod exec;
mod exit;
mod files;
mod growth;
mod guest_failure;
mod hanging_disk;
mod hooks;
mod host_cost;
mod host_limits;
mod host_sockets;
mod install_containerd;
mod jail;
mod lifecycle;
mod machine;
mod mount_options;
mod mounts;
mod namespaces;
mod net_device;
mod network;
mod network_addresses;
mod network_bridge;
mod network_changes;
mod network_cni;
mod network_guest;
mod network_kinds;
mod network_later;
mod network_limits;
mod network_load;
mod network_names;
mod network_offloads;
mod network_queues;
mod network_settings;
mod network_shared;
mod network_user;
mod network_user_ends;
mod notify;
mod pod_containers;
mod pod_creates;
mod pod_events;
mod pod_volumes;
mod podman;
mod podman_networks;
mod pods;
mod port_forward;
mod preserved;
mod process;
mod propagation;
mod random;
mod refused;
mod resources;
mod rootless;
mod sandbox;
mod seccomp;
mod shim;
mod signals;
mod stdio;
mod streams;
mod surroundings;
mod task;
mod task_calls;
mod task_input;
mod terminal;
mod tree;
mod user_namespace;
mod vcpus;
mod verb_options;
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
    /// It does something else each time: what it draws, or what a race makes of it. That it passes does not take back that it
    /// has failed.
    pub(crate) varies: bool,
}

impl Case {
    const fn new(path: &'static str, run: fn(&Env) -> Result) -> Self {
        Self { path, run, limit: Duration::from_secs(300), slow: false, varies: false }
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

    /// It does something else each time.
    const fn varies(mut self) -> Self {
        self.varies = true;
        self
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
        bad_config::CASES,
        bad_host::CASES,
        block_devices::CASES,
        cgroup_v1::CASES,
        cleanup::CASES,
        command_line::CASES,
        containerd::CASES,
        control::CASES,
        crash::CASES,
        creating::CASES,
        cri_o::CASES,
        debian::CASES,
        devices::CASES,
        docker::CASES,
        engine::CASES,
        exec::CASES,
        exit::CASES,
        files::CASES,
        growth::CASES,
        guest_failure::CASES,
        hooks::CASES,
        host_cost::CASES,
        hanging_disk::CASES,
        host_limits::CASES,
        host_sockets::CASES,
        install_containerd::CASES,
        jail::CASES,
        lifecycle::CASES,
        machine::CASES,
        mount_options::CASES,
        mounts::CASES,
        namespaces::CASES,
        net_device::CASES,
        network::CASES,
        network_addresses::CASES,
        network_bridge::CASES,
        network_changes::CASES,
        network_cni::CASES,
        network_guest::CASES,
        network_kinds::CASES,
        network_later::CASES,
        network_limits::CASES,
        network_load::CASES,
        network_names::CASES,
        network_offloads::CASES,
        network_queues::CASES,
        network_settings::CASES,
        network_shared::CASES,
        network_user::CASES,
        network_user_ends::CASES,
        notify::CASES,
        podman::CASES,
        podman_networks::CASES,
        pod_containers::CASES,
        pod_creates::CASES,
        pod_events::CASES,
        pod_volumes::CASES,
        pods::CASES,
        port_forward::CASES,
        preserved::CASES,
        process::CASES,
        propagation::CASES,
        random::CASES,
        refused::CASES,
        resources::CASES,
        rootless::CASES,
        sandbox::CASES,
        seccomp::CASES,
        shim::CASES,
        signals::CASES,
        stdio::CASES,
        streams::CASES,
        task::CASES,
        task_calls::CASES,
        task_input::CASES,
        terminal::CASES,
        tree::CASES,
        user_namespace::CASES,
        vcpus::CASES,
        verb_options::CASES,
        verbs::CASES,
    ]
    .into_iter()
    .flatten()
}
