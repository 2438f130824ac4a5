// SPDX-License-Identifier: Apache-2.0
//! What a case must not leave behind on the host.

mod cgroups;
mod network;

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use crate::env::Env;
use crate::failure::{Result, fail};
use crate::processes::{self, Looks};

/// How long what was killed may take to go away: a VMM's end is not waited for by anyone.
const SETTLE: Duration = Duration::from_secs(10);

/// Places where a runtime may keep something by mistake.
const WATCHED: &[&str] = &["/run", "/run/bulkhead", "/tmp", "/var/tmp", "/dev/shm", "/dev/mqueue"];

/// The host as it was before a case.
#[derive(Debug)]
pub(crate) struct Before {
    mounts: BTreeSet<String>,
    entries: BTreeSet<PathBuf>,
    network: BTreeSet<String>,
    /// Those of engines' containers.
    cgroups: BTreeSet<PathBuf>,
}

impl Before {
    pub(crate) fn record() -> Self {
        Self { mounts: mounts(), entries: entries(), network: network::found(), cgroups: cgroups::of_engines() }
    }

    /// Fails if something is there that was not there before, once it had its time to go away.
    pub(crate) fn check(&self, env: &Env) -> Result {
        let end = Instant::now() + SETTLE;
        let mut looks = Looks::begin();
        loop {
            processes::reap_orphans(&[]);
            let found = self.find(env);
            if found.is_empty() {
                return Ok(());
            }
            if Instant::now() >= end {
                fail!("left over: {}", found.join("; "));
            }
            looks.pause();
        }
    }

    fn find(&self, env: &Env) -> Vec<String> {
        let mut found = Vec::new();
        // This process is the reaper of all that its runs start, so nothing gets away from below it.
        for process in processes::descendants(std::process::id().cast_signed()) {
            found.push(format!("process {} {} ({})", process.pid, process.name, process.command_line()));
        }
        found.extend(mounts().difference(&self.mounts).map(|mount| format!("mount {mount}")));
        found.extend(below(&env.root).iter().map(|path| format!("file {}", path.display())));
        found.extend(entries().difference(&self.entries).map(|path| format!("file {}", path.display())));
        found.extend(network::found().difference(&self.network).cloned());
        let cgroups = cgroups::left(&env.id_prefix(), &self.cgroups);
        found.extend(cgroups.iter().map(|path| format!("cgroup {}", path.display())));
        found
    }
}

/// The lines of this mount namespace, without what changes by itself.
fn mounts() -> BTreeSet<String> {
    // A mount's name need not be UTF-8.
    let table = fs::read("/proc/self/mountinfo").unwrap_or_default();
    String::from_utf8_lossy(&table)
        .lines()
        .map(|line| {
            let fields: Vec<&str> = line.split(' ').collect();
            format!("{} on {}", fields.get(3).unwrap_or(&""), fields.get(4).unwrap_or(&""))
        })
        .collect()
}

/// What lies in the watched places and has the runtime's name in its own.
fn entries() -> BTreeSet<PathBuf> {
    let listed = WATCHED.iter().filter_map(|place| fs::read_dir(place).ok()).flatten().flatten();
    listed
        .map(|entry| entry.path())
        .filter(|path| {
            let name = path.file_name().unwrap_or_default().to_string_lossy();
            // The suite's own folders come and go with their cases.
            name.contains("bulkhead") && !name.starts_with("bulkhead-e2e") || path.starts_with("/run/bulkhead")
        })
        .filter(|path| path != Path::new("/run/bulkhead"))
        .collect()
}

/// Every file and folder below a folder.
fn below(folder: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
        found.push(entry.path());
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            found.extend(below(&entry.path()));
        }
    }
    found
}
