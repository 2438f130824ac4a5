// SPDX-License-Identifier: Apache-2.0
//! What a container's cgroup has used, out of the files of cgroup v2 (Documentation/admin-guide/cgroup-v2.rst).

use std::collections::HashMap;
use std::path::Path;

use bulkhead_protocol::agent as wire;

use super::cgroup::{Cgroup, MEMORY_EVENTS};
use super::files::{key_values, read_bounded, value_of};

/// Lines of a file that are passed on. The kernel's files have fewer.
const MAX_LINES: usize = 256;

/// Huge pages that an x86-64 kernel can have.
const HUGE_PAGE_SIZES: [&str; 2] = ["2MB", "1GB"];

/// Resources whose pressure is measured.
const RESOURCES: [&str; 3] = ["cpu", "memory", "io"];

/// Reads everything there is. What is not there, or has no limit, stays unset.
pub(super) fn collect(cgroup: &Cgroup) -> wire::GetStatsResponse {
    let map = |file| cgroup.read(file).map(|text| to_map(&text)).unwrap_or_default();
    // `max`, for no limit, is no number.
    let number = |file| cgroup.read(file).and_then(|text| text.trim().parse().ok());
    let pressure = |resource: &str| Some((resource.to_owned(), cgroup.read(&format!("{resource}.pressure"))?));
    let guest = read_bounded(Path::new("/proc/meminfo")).unwrap_or_default();
    wire::GetStatsResponse {
        cpu: map("cpu.stat"),
        memory: map("memory.stat"),
        memory_current: number("memory.current"),
        memory_peak: number("memory.peak"),
        memory_max: number("memory.max"),
        memory_swap_current: number("memory.swap.current"),
        memory_swap_max: number("memory.swap.max"),
        memory_events: map(MEMORY_EVENTS),
        pids_current: number("pids.current"),
        pids_max: number("pids.max"),
        huge_pages: HUGE_PAGE_SIZES.into_iter().filter_map(|size| huge_pages(cgroup, size)).collect(),
        io: cgroup.read("io.stat").map(|text| io(&text)).unwrap_or_default(),
        pressure: RESOURCES.into_iter().filter_map(pressure).collect(),
        guest_memory_total: memory(&guest, "MemTotal:"),
        guest_memory_available: memory(&guest, "MemAvailable:"),
        ..Default::default()
    }
}

/// What is used of pages of a size; `None` where the kernel has none of it.
fn huge_pages(cgroup: &Cgroup, size: &str) -> Option<wire::HugePageStat> {
    let current = cgroup.read(&format!("hugetlb.{size}.current"))?.trim().parse().ok();
    let failures = cgroup.read(&format!("hugetlb.{size}.events")).and_then(|events| value_of(&events, "max"));
    Some(wire::HugePageStat { size: size.to_owned(), current, failures, ..Default::default() })
}

fn to_map(text: &str) -> HashMap<String, u64> {
    key_values(text).take(MAX_LINES).map(|(key, value)| (key.to_owned(), value)).collect()
}

/// Lines like `8:0 rbytes=1 wbytes=2 …`.
fn io(text: &str) -> Vec<wire::IoStat> {
    let device = |line: &str| {
        let (device, rest) = line.split_once(' ')?;
        let (major, minor) = device.split_once(':')?;
        let value = |field: &str| {
            let (key, value) = field.split_once('=')?;
            Some((key.to_owned(), value.parse().ok()?))
        };
        Some(wire::IoStat {
            major: major.parse().ok()?,
            minor: minor.parse().ok()?,
            values: rest.split_ascii_whitespace().filter_map(value).collect(),
            ..Default::default()
        })
    };
    text.lines().take(MAX_LINES).filter_map(device).collect()
}

/// A size of /proc/meminfo in bytes; its lines are like `MemTotal:  1024 kB`.
fn memory(meminfo: &str, key: &str) -> u64 {
    let line = meminfo.lines().find_map(|line| line.strip_prefix(key));
    let kib = line.and_then(|rest| rest.split_ascii_whitespace().next()?.parse::<u64>().ok());
    kib.unwrap_or(0).saturating_mul(1024)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_become_fields_and_absent_ones_stay_unset() {
        let parent = tempfile::tempdir().unwrap();
        let cgroup = Cgroup::create(parent.path(), "one", &[], &[]).unwrap();
        let write = |name: &str, text: &str| std::fs::write(cgroup.path().join(name), text).unwrap();
        write("cpu.stat", "usage_usec 1200\nuser_usec 700\n");
        write("memory.current", "4096\n");
        write("memory.max", "max\n");
        write("io.stat", "8:0 rbytes=10 wios=2\nnonsense\n253:1 \n");
        write("cpu.pressure", "some avg10=0.00\n");
        write("hugetlb.2MB.current", "2097152\n");
        write("hugetlb.2MB.events", "max 3\n");

        let stats = collect(&cgroup);

        assert_eq!(stats.cpu["usage_usec"], 1200);
        assert_eq!((stats.memory_current, stats.memory_max, stats.pids_max), (Some(4096), None, None));
        assert_eq!((stats.io.len(), stats.io[0].values["rbytes"], stats.io[1].major), (2, 10, 253));
        assert_eq!(stats.pressure.len(), 1);
        assert_eq!((stats.huge_pages.len(), stats.huge_pages[0].failures), (1, Some(3)));
        assert!(stats.guest_memory_total > stats.guest_memory_available && stats.guest_memory_available > 0);
    }

    #[test]
    fn number_of_lines_is_bounded() {
        let text: String = (0..1000).map(|number| format!("key{number} 1\n")).collect();
        assert_eq!(to_map(&text).len(), MAX_LINES);
    }
}
