// SPDX-License-Identifier: Apache-2.0
//! The cgroups that may be left.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

/// Where all hierarchies are.
const TOP: &str = "/sys/fs/cgroup";

/// Digits of an id that an engine gives to a container, or a pod.
const ENGINES_ID: usize = 64;

/// All that are named as engines name those of their containers.
pub(super) fn of_engines() -> BTreeSet<PathBuf> {
    all().into_iter().filter(|(_, name)| has_engines_id(name)).map(|(path, _)| path).collect()
}

/// Those whose name holds an id of a case, and those of engines' containers that have come since `before` and that nobody is in:
/// what runs in one may be another case's, and what is left of this one's processes is told by itself.
pub(super) fn left(id_prefix: &str, before: &BTreeSet<PathBuf>) -> Vec<PathBuf> {
    let is_left = |path: &Path, name: &str| {
        name.contains(id_prefix) || has_engines_id(name) && !before.contains(path) && is_empty(path)
    };
    all().into_iter().filter(|(path, name)| is_left(path, name)).map(|(path, _)| path).collect()
}

/// All cgroups, with their names.
fn all() -> Vec<(PathBuf, String)> {
    let mut found = Vec::new();
    let mut folders = vec![PathBuf::from(TOP)];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(&folder).into_iter().flatten().flatten() {
            if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
                found.push((entry.path(), entry.file_name().to_string_lossy().into_owned()));
                folders.push(entry.path());
            }
        }
    }
    found
}

/// Whether a name holds an engine's id, as in `docker-ID.scope`, `libpod-ID`, or `ID`.
fn has_engines_id(name: &str) -> bool {
    name.split(|letter: char| !letter.is_ascii_hexdigit()).any(|part| part.len() == ENGINES_ID)
}

/// Whether nobody is in a cgroup, or below it.
fn is_empty(cgroup: &Path) -> bool {
    match fs::read_to_string(cgroup.join("cgroup.events")) {
        Ok(events) => events.lines().any(|line| line == "populated 0"),
        // One of version 1.
        Err(_) => fs::read_to_string(cgroup.join("cgroup.procs")).is_ok_and(|processes| processes.is_empty()),
    }
}
