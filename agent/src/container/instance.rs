// SPDX-License-Identifier: Apache-2.0
//! One container, from its making to its end.
//!
//! ```text
//! created ──start──> running ──exit──> stopped
//!    └─────────────exit──────────────────┘
//! ```
//!
//! Its state is that of its init. Processes can be exec'd into it until init has ended, which ends them as well.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::cgroup::{Cgroup, CgroupError};
use super::error::NoSuchProcess;
use super::id_map::IdMappings;
use super::process::Process;
use super::sockets::HostSockets;
use super::spec::Namespaces;
use super::trees::UsedTrees;

/// A container that the engine knows.
#[derive(Debug)]
pub(crate) struct Instance {
    pub(crate) id: String,
    pub(crate) init: Process,
    pub(crate) namespaces: Namespaces,
    /// Those of its user namespace, if it has one.
    pub(crate) id_mappings: Option<IdMappings>,
    pub(crate) trees: UsedTrees,
    pub(crate) sockets: HostSockets,
    pub(crate) cgroup: Option<Arc<Cgroup>>,
    /// The exec'd processes by their ids; `None` for one that is being made.
    pub(crate) execs: Mutex<HashMap<String, Option<Arc<Process>>>>,
    /// Held while its limits are changed: what one change takes back is not to be what another one has set.
    pub(crate) changing: tokio::sync::Mutex<()>,
}

impl Instance {
    /// The exec'd processes by their ids.
    pub(crate) fn execs(&self) -> MutexGuard<'_, HashMap<String, Option<Arc<Process>>>> {
        // Nothing panics while the lock is held.
        self.execs.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The exec'd process of this id.
    pub(crate) fn exec(&self, exec_id: &str) -> Result<Arc<Process>, NoSuchProcess> {
        let process = self.execs().get(exec_id).cloned().flatten();
        process.ok_or_else(|| NoSuchProcess { exec_id: exec_id.to_owned(), id: self.id.clone() })
    }

    /// The container's cgroup, where what is to be done cannot be done without.
    pub(crate) fn needs_cgroup(&self) -> Result<&Arc<Cgroup>, CgroupError> {
        self.cgroup.as_ref().ok_or_else(|| CgroupError::None(self.id.clone()))
    }
}
