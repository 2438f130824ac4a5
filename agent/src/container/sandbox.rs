// SPDX-License-Identifier: Apache-2.0
//! What the containers of a pod share: the agent's own UTS, IPC and network namespaces.

use bulkhead_protocol::agent as wire;

use super::{Failure, SpecError, Stage, sysctl};
use crate::{network, sys};

/// A pod's share of the guest, checked.
#[derive(Debug)]
pub struct SandboxSpec {
    hostname: String,
    domainname: String,
    /// Path under /proc/sys, value.
    sysctls: Vec<(String, String)>,
}

impl SandboxSpec {
    /// What a request describes, checked.
    pub fn from_wire(request: wire::ConfigureSandboxRequest) -> Result<Self, SpecError> {
        Ok(Self {
            hostname: request.hostname,
            domainname: request.domainname,
            sysctls: request.sysctls.into_iter().map(sysctl::check).collect::<Result<_, _>>()?,
        })
    }

    /// Sets the calling process' own namespaces up.
    pub fn apply(&self) -> Result<(), Failure> {
        set_names(&self.hostname, &self.domainname)?;
        network::bring_loopback_up()?;
        sysctl::apply(&self.sysctls)
    }
}

/// Sets the names of the calling process' UTS namespace; empty ones stay.
pub(super) fn set_names(hostname: &str, domainname: &str) -> Result<(), Failure> {
    for (what, value, set) in [
        ("hostname", hostname, set_host_name as fn(&str) -> std::io::Result<()>),
        ("domainname", domainname, sys::set_domain_name),
    ] {
        if !value.is_empty() {
            set(value).map_err(|error| Failure::new(Stage::Hostname, format!("{what} {value:?}"), error))?;
        }
    }
    Ok(())
}

fn set_host_name(name: &str) -> std::io::Result<()> {
    Ok(nix::unistd::sethostname(name)?)
}
