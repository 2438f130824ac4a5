// SPDX-License-Identifier: Apache-2.0
//! Statistics as runc's `events` has them.

use std::collections::{BTreeMap, HashMap};

use bulkhead_protocol::agent::{GetStatsResponse, HugePageStat, IoStat};
use serde_json::{Map, Value, json};

/// In the shape of runc's events. Times are nanoseconds there; cgroup v2 has microseconds.
pub(super) fn data(stats: &GetStatsResponse) -> Value {
    let cpu = |key: &str| stats.cpu.get(key).copied().unwrap_or(0);
    let nanoseconds = |key: &str| cpu(key).saturating_mul(1000);
    let raw: BTreeMap<_, _> = stats.memory.iter().collect();
    json!({
        "cpu": {
            "usage": {
                "total": nanoseconds("usage_usec"),
                "kernel": nanoseconds("system_usec"),
                "user": nanoseconds("user_usec"),
            },
            "throttling": {
                "periods": cpu("nr_periods"),
                "throttledPeriods": cpu("nr_throttled"),
                "throttledTime": nanoseconds("throttled_usec"),
            },
            "psi": pressure(&stats.pressure, "cpu"),
        },
        "cpuset": cpuset(),
        "memory": {
            "cache": stats.memory.get("file").copied().unwrap_or(0),
            "usage": {
                "limit": stats.memory_max.unwrap_or(u64::MAX),
                "usage": stats.memory_current.unwrap_or(0),
                "max": stats.memory_peak.unwrap_or(0),
                "failcnt": stats.memory_events.get("max").copied().unwrap_or(0),
            },
            "swap": {
                "limit": stats.memory_swap_max.unwrap_or(u64::MAX),
                "usage": stats.memory_swap_current.unwrap_or(0),
                "failcnt": 0,
            },
            "kernel": { "limit": 0, "failcnt": 0 },
            "kernelTCP": { "limit": 0, "failcnt": 0 },
            "raw": raw,
            "psi": pressure(&stats.pressure, "memory"),
            "event_count": events(&stats.memory_events),
        },
        "pids": { "current": stats.pids_current.unwrap_or(0), "limit": stats.pids_max.unwrap_or(0) },
        "blkio": {
            "ioServiceBytesRecursive": block_io(&stats.io, [("Read", "rbytes"), ("Write", "wbytes")]),
            "ioServicedRecursive": block_io(&stats.io, [("Read", "rios"), ("Write", "wios")]),
            "psi": pressure(&stats.pressure, "io"),
        },
        "hugetlb": huge_pages(&stats.huge_pages),
        "intel_rdt": {},
        // runc, too, has none of a network that others have made.
        "network_interfaces": null,
    })
}

/// What version 1 of cgroups tells of CPUs and nodes, and runc has as zeros with version 2.
fn cpuset() -> Value {
    let names = [
        "cpu_exclusive",
        "mem_hardwall",
        "mem_exclusive",
        "memory_migrate",
        "memory_spread_page",
        "memory_spread_slab",
        "memory_pressure",
        "sched_load_balance",
        "sched_relax_domain_level",
    ];
    names.into_iter().map(|name| (name.to_owned(), json!(0))).collect::<Map<_, _>>().into()
}

fn events(events: &HashMap<String, u64>) -> Value {
    let names = ["low", "high", "max", "oom", "oom_kill"];
    let count = |name: &str| json!(events.get(name).copied().unwrap_or(0));
    names.into_iter().map(|name| (name.to_owned(), count(name))).collect::<Map<_, _>>().into()
}

/// What a file such as `cpu.pressure` tells: lines like `some avg10=0.12 avg60=0.00 avg300=0.00 total=5`. Null where there is none.
fn pressure(pressure: &HashMap<String, String>, resource: &str) -> Value {
    let field = |field: &str| {
        let (name, value) = field.split_once('=')?;
        let value = if name == "total" { json!(value.parse::<u64>().ok()?) } else { json!(value.parse::<f64>().ok()?) };
        Some((name.to_owned(), value))
    };
    let line = |line: &str| {
        let mut words = line.split_ascii_whitespace();
        let name = words.next()?.to_owned();
        Some((name, Value::from(words.filter_map(field).collect::<Map<_, _>>())))
    };
    pressure.get(resource).map_or(Value::Null, |text| text.lines().filter_map(line).collect::<Map<_, _>>().into())
}

/// By the sizes of the pages. Without a controller there is none.
fn huge_pages(sizes: &[HugePageStat]) -> Value {
    let of_size = |stat: &HugePageStat| {
        let failures = stat.failures.unwrap_or(0);
        (stat.size.clone(), json!({ "usage": stat.current.unwrap_or(0), "failcnt": failures }))
    };
    sizes.iter().map(of_size).collect::<Map<_, _>>().into()
}

fn block_io(devices: &[IoStat], operations: [(&str, &str); 2]) -> Vec<Value> {
    let of_device = |device: &IoStat| {
        let (major, minor, values) = (device.major, device.minor, device.values.clone());
        operations.map(move |(op, key)| {
            json!({ "major": major, "minor": minor, "op": op, "value": values.get(key).copied().unwrap_or(0) })
        })
    };
    devices.iter().flat_map(of_device).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn statistics_have_runcs_shape() {
        let stats = GetStatsResponse {
            cpu: [("usage_usec".to_owned(), 7)].into(),
            memory_current: Some(4096),
            pids_current: Some(2),
            io: vec![IoStat { major: 8, values: [("rbytes".to_owned(), 5)].into(), ..IoStat::default() }],
            memory_events: [("oom_kill".to_owned(), 3)].into(),
            pressure: [(
                "cpu".to_owned(),
                "some avg10=1.50 avg60=0.00 avg300=0.00 total=7\nfull avg10=0.00\n".to_owned(),
            )]
            .into(),
            huge_pages: vec![HugePageStat { size: "2MB".into(), current: Some(4 << 20), ..HugePageStat::default() }],
            ..GetStatsResponse::default()
        };

        let data = data(&stats);

        assert_eq!(data["cpu"]["usage"]["total"], 7000);
        assert_eq!(data["memory"]["usage"], json!({ "limit": u64::MAX, "usage": 4096, "max": 0, "failcnt": 0 }));
        assert_eq!(data["pids"]["current"], 2);
        assert_eq!(data["hugetlb"], json!({ "2MB": { "usage": 4 << 20, "failcnt": 0 } }));
        assert_eq!(data["memory"]["event_count"], json!({ "low": 0, "high": 0, "max": 0, "oom": 0, "oom_kill": 3 }));
        let some = json!({ "avg10": 1.5, "avg60": 0.0, "avg300": 0.0, "total": 7 });
        assert_eq!(data["cpu"]["psi"], json!({ "some": some, "full": { "avg10": 0.0 } }));
        assert!(data["memory"]["psi"].is_null() && data["network_interfaces"].is_null());
        assert_eq!(data["cpuset"]["sched_load_balance"], 0);
        let read = json!({ "major": 8, "minor": 0, "op": "Read", "value": 5 });
        assert_eq!(data["blkio"]["ioServiceBytesRecursive"][0], read);
    }
}
