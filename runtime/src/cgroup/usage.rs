// SPDX-License-Identifier: Apache-2.0
//! What a sandbox has used of the host, in the form in which the agent tells what a container has used of the guest.

use std::collections::HashMap;
use std::fs;
use std::path::Path;

use bulkhead_protocol::agent::GetStatsResponse;

use super::{Group, HostCgroup};

impl HostCgroup {
    /// What its processes use and have used; what the host does not tell stays unset.
    pub(crate) fn usage(&self) -> GetStatsResponse {
        let mut usage = GetStatsResponse::default();
        for Group { path, version_2, .. } in &self.groups {
            if *version_2 {
                read_version_2(path, &mut usage);
            } else {
                read_version_1(path, &mut usage);
            }
        }
        usage
    }
}

fn read_version_2(path: &Path, usage: &mut GetStatsResponse) {
    usage.cpu = map(path, "cpu.stat");
    usage.memory = map(path, "memory.stat");
    usage.memory_events = map(path, "memory.events");
    usage.memory_current = number(path, "memory.current");
    usage.memory_peak = number(path, "memory.peak");
    usage.memory_max = number(path, "memory.max");
    usage.memory_swap_current = number(path, "memory.swap.current");
    usage.memory_swap_max = number(path, "memory.swap.max");
    usage.pids_current = number(path, "pids.current");
    usage.pids_max = number(path, "pids.max");
}

/// In one of the hierarchies, which has the files of its own controllers alone.
fn read_version_1(path: &Path, usage: &mut GetStatsResponse) {
    if let Some(nanoseconds) = number(path, "cpuacct.usage") {
        usage.cpu.extend([("usage_usec".to_owned(), nanoseconds / 1000)]);
    }
    for (field, file) in [
        (&mut usage.memory_current, "memory.usage_in_bytes"),
        (&mut usage.memory_peak, "memory.max_usage_in_bytes"),
        (&mut usage.memory_max, "memory.limit_in_bytes"),
        (&mut usage.pids_current, "pids.current"),
        (&mut usage.pids_max, "pids.max"),
    ] {
        *field = field.or_else(|| number(path, file));
    }
}

/// The number in a file; `max`, for no limit, is none.
fn number(path: &Path, file: &str) -> Option<u64> {
    fs::read_to_string(path.join(file)).ok()?.trim().parse().ok()
}

/// Lines like `usage_usec 1200`.
fn map(path: &Path, file: &str) -> HashMap<String, u64> {
    let text = fs::read_to_string(path.join(file)).unwrap_or_default();
    let line = |line: &str| line.split_once(' ').and_then(|(key, value)| Some((key.to_owned(), value.parse().ok()?)));
    text.lines().filter_map(line).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cgroup(folders: &[(&Path, bool)]) -> HostCgroup {
        let groups =
            folders.iter().map(|(path, version_2)| Group { path: path.into(), origin: None, version_2: *version_2 });
        HostCgroup { groups: groups.collect() }
    }

    #[test]
    fn files_of_version_2_become_fields_and_absent_ones_stay_unset() {
        let folder = tempfile::tempdir().unwrap();
        let write = |name: &str, text: &str| fs::write(folder.path().join(name), text).unwrap();
        write("cpu.stat", "usage_usec 1200\nuser_usec 700\n");
        write("memory.current", "4096\n");
        write("memory.max", "max\n");
        write("pids.current", "2\n");

        let usage = cgroup(&[(folder.path(), true)]).usage();

        assert_eq!((usage.cpu["usage_usec"], usage.cpu["user_usec"]), (1200, 700));
        assert_eq!((usage.memory_current, usage.memory_max, usage.pids_current), (Some(4096), None, Some(2)));
        assert!(usage.memory.is_empty() && usage.memory_peak.is_none());
    }

    #[test]
    fn hierarchies_of_version_1_add_up() {
        let (memory, cpu) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        fs::write(memory.path().join("memory.usage_in_bytes"), "8192\n").unwrap();
        fs::write(cpu.path().join("cpuacct.usage"), "5000000\n").unwrap();

        let usage = cgroup(&[(memory.path(), false), (cpu.path(), false)]).usage();

        assert_eq!((usage.memory_current, usage.cpu["usage_usec"]), (Some(8192), 5000));
    }
}
