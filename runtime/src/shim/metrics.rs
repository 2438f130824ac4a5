// SPDX-License-Identifier: Apache-2.0
//! Statistics in the form that containerd and its clients know: cgroup v2's, of the container in its guest, or of a pod's
//! sandbox on the host.

use std::collections::HashMap;

use bulkhead_protocol::agent::{GetStatsResponse, IoStat};
use containerd_shim_protos::cgroups_v2::metrics::{
    CPUStat, IOEntry, IOStat, MemoryEvents, MemoryStat, Metrics, PidsStat,
};

/// The type by which containerd calls them.
pub(super) const TYPE: &str = "io.containerd.cgroups.v2.Metrics";

/// What stands for the absence of a limit.
const UNLIMITED: u64 = u64::MAX;

/// The agent's statistics in containerd's words. What is not known is 0.
pub(super) fn translate(stats: &GetStatsResponse) -> Metrics {
    let pids = PidsStat {
        current: stats.pids_current.unwrap_or(0),
        limit: stats.pids_max.unwrap_or(0),
        ..PidsStat::default()
    };
    Metrics {
        pids: Some(pids).into(),
        cpu: Some(cpu(&stats.cpu)).into(),
        memory: Some(memory(stats)).into(),
        memory_events: Some(memory_events(&stats.memory_events)).into(),
        io: Some(IOStat { usage: stats.io.iter().map(io).collect(), ..IOStat::default() }).into(),
        ..Metrics::default()
    }
}

fn get(values: &HashMap<String, u64>, key: &str) -> u64 {
    values.get(key).copied().unwrap_or(0)
}

fn cpu(values: &HashMap<String, u64>) -> CPUStat {
    let get = |key| get(values, key);
    CPUStat {
        usage_usec: get("usage_usec"),
        user_usec: get("user_usec"),
        system_usec: get("system_usec"),
        nr_periods: get("nr_periods"),
        nr_throttled: get("nr_throttled"),
        throttled_usec: get("throttled_usec"),
        ..CPUStat::default()
    }
}

fn memory(stats: &GetStatsResponse) -> MemoryStat {
    let get = |key| get(&stats.memory, key);
    MemoryStat {
        anon: get("anon"),
        file: get("file"),
        kernel_stack: get("kernel_stack"),
        slab: get("slab"),
        sock: get("sock"),
        shmem: get("shmem"),
        file_mapped: get("file_mapped"),
        file_dirty: get("file_dirty"),
        file_writeback: get("file_writeback"),
        anon_thp: get("anon_thp"),
        inactive_anon: get("inactive_anon"),
        active_anon: get("active_anon"),
        inactive_file: get("inactive_file"),
        active_file: get("active_file"),
        unevictable: get("unevictable"),
        slab_reclaimable: get("slab_reclaimable"),
        slab_unreclaimable: get("slab_unreclaimable"),
        pgfault: get("pgfault"),
        pgmajfault: get("pgmajfault"),
        workingset_refault: get("workingset_refault_anon").saturating_add(get("workingset_refault_file")),
        workingset_activate: get("workingset_activate_anon").saturating_add(get("workingset_activate_file")),
        workingset_nodereclaim: get("workingset_nodereclaim"),
        pgrefill: get("pgrefill"),
        pgscan: get("pgscan"),
        pgsteal: get("pgsteal"),
        pgactivate: get("pgactivate"),
        pgdeactivate: get("pgdeactivate"),
        pglazyfree: get("pglazyfree"),
        pglazyfreed: get("pglazyfreed"),
        thp_fault_alloc: get("thp_fault_alloc"),
        thp_collapse_alloc: get("thp_collapse_alloc"),
        usage: stats.memory_current.unwrap_or(0),
        usage_limit: stats.memory_max.unwrap_or(UNLIMITED),
        swap_usage: stats.memory_swap_current.unwrap_or(0),
        swap_limit: stats.memory_swap_max.unwrap_or(UNLIMITED),
        max_usage: stats.memory_peak.unwrap_or(0),
        ..MemoryStat::default()
    }
}

fn memory_events(values: &HashMap<String, u64>) -> MemoryEvents {
    let get = |key| get(values, key);
    MemoryEvents {
        low: get("low"),
        high: get("high"),
        max: get("max"),
        oom: get("oom"),
        oom_kill: get("oom_kill"),
        ..MemoryEvents::default()
    }
}

fn io(device: &IoStat) -> IOEntry {
    let get = |key| get(&device.values, key);
    IOEntry {
        major: device.major,
        minor: device.minor,
        rbytes: get("rbytes"),
        wbytes: get("wbytes"),
        rios: get("rios"),
        wios: get("wios"),
        ..IOEntry::default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_find_their_fields_and_no_limit_is_the_highest() {
        let stats = GetStatsResponse {
            cpu: [("usage_usec".to_owned(), 7)].into(),
            memory: [("anon".to_owned(), 8), ("workingset_refault_file".to_owned(), 9)].into(),
            memory_current: Some(4096),
            pids_current: Some(2),
            io: vec![IoStat { major: 8, values: [("rbytes".to_owned(), 5)].into(), ..IoStat::default() }],
            ..GetStatsResponse::default()
        };

        let metrics = translate(&stats);

        assert_eq!(metrics.cpu.usage_usec, 7);
        assert_eq!((metrics.memory.anon, metrics.memory.workingset_refault), (8, 9));
        assert_eq!((metrics.memory.usage, metrics.memory.usage_limit), (4096, UNLIMITED));
        assert_eq!(metrics.pids.current, 2);
        assert_eq!((metrics.io.usage[0].major, metrics.io.usage[0].rbytes), (8, 5));
    }
}
