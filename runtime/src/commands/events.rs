// SPDX-License-Identifier: Apache-2.0
//! `bulkhead events`: what a container uses, a line of JSON each time.

use std::collections::BTreeMap;
use std::io::{self, Write};
use std::thread;
use std::time::Duration;

use bulkhead_protocol::agent::{GetStatsResponse, HugePageStat, IoStat};
use clap::Args;
use containerd_shim_protos::api::StatsRequest;
use protobuf::Message;
use serde_json::{Map, Value, json};
use thiserror::Error;
use ttrpc::context::Context;

use super::{Global, Outcome};
use crate::supervisor::CallError;
use crate::supervisor::client::{self, ClientError};
use crate::supervisor::state::{Found, LookupError, Status};

/// Print what a container uses, again and again, until it ends
#[derive(Debug, Args)]
pub(crate) struct Arguments {
    /// Name of the container
    #[arg(value_name = "ID")]
    id: String,

    /// Print it once
    #[arg(long)]
    stats: bool,

    /// Time between two lines: seconds, or with ms, s, m, h
    #[arg(long, default_value = "5s", value_name = "TIME", value_parser = parse_interval)]
    interval: Duration,
}

#[derive(Debug, Error)]
#[error("container with id {0} is not running")]
struct NotRunning(String);

/// Prints statistics, and a line for each time that the guest's kernel killed a process for want of memory.
pub(crate) fn run(global: &Global, arguments: &Arguments) -> Outcome {
    let id = &arguments.id;
    let found = Found::open(&global.root, id)?;
    if found.status() == Status::Stopped {
        return Err(NotRunning(id.clone()).into());
    }
    let mut kills = None;
    loop {
        let stats = match look(global, id) {
            Ok(Some(stats)) => stats,
            Ok(None) => return Ok(0),
            Err(error) => return Err(error.into()),
        };
        let now = stats.memory_events.get("oom_kill").copied().unwrap_or(0);
        let mut out = io::stdout().lock();
        if kills.is_some_and(|before| now > before) {
            writeln!(out, "{}", json!({ "type": "oom", "id": id }))?;
        }
        kills = Some(now);
        writeln!(out, "{}", json!({ "type": "stats", "id": id, "data": data(&stats) }))?;
        out.flush()?;
        drop(out);
        if arguments.stats {
            return Ok(0);
        }
        thread::sleep(arguments.interval);
    }
}

/// The statistics of this moment; `None` once the container has ended.
fn look(global: &Global, id: &str) -> Result<Option<GetStatsResponse>, ClientError> {
    let found = match Found::open(&global.root, id) {
        Err(LookupError::NotFound(_)) => return Ok(None),
        found => found?,
    };
    let answer = client::call(&found, CallError::NotRunning, async |task, id| {
        task.stats(Context::default(), &StatsRequest { id, ..Default::default() }).await
    });
    match answer {
        Ok(answer) => {
            GetStatsResponse::parse_from_bytes(&answer.stats.value).map(Some).map_err(|_| ClientError::Answer)
        }
        Err(ClientError::State(CallError::NotRunning) | ClientError::Lost) => Ok(None),
        // Its end may have come between the call and the answer, which then says so in one way or another.
        Err(error) => match Found::open(&global.root, id) {
            Err(LookupError::NotFound(_)) => Ok(None),
            Ok(found) if found.status() == Status::Stopped => Ok(None),
            _ => Err(error),
        },
    }
}

/// In the shape of runc's events. Times are nanoseconds there; cgroup v2 has microseconds.
fn data(stats: &GetStatsResponse) -> Value {
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
        },
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
        },
        "pids": { "current": stats.pids_current.unwrap_or(0), "limit": stats.pids_max.unwrap_or(0) },
        "blkio": {
            "ioServiceBytesRecursive": block_io(&stats.io, [("Read", "rbytes"), ("Write", "wbytes")]),
            "ioServicedRecursive": block_io(&stats.io, [("Read", "rios"), ("Write", "wios")]),
        },
        "hugetlb": huge_pages(&stats.huge_pages),
        "intel_rdt": {},
    })
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

/// Seconds, or what Go takes for a duration, as runc does: numbers with units, one after the other.
fn parse_interval(text: &str) -> Result<Duration, String> {
    let seconds = text.parse::<u32>().map(f64::from).ok().or_else(|| seconds_with_units(text));
    let interval = seconds.and_then(|seconds| Duration::try_from_secs_f64(seconds).ok());
    interval.filter(|interval| !interval.is_zero()).ok_or_else(|| "not a time such as 5s, 500ms or 1m30s".to_owned())
}

fn seconds_with_units(text: &str) -> Option<f64> {
    const UNITS: [(&str, f64); 7] =
        [("h", 3600.0), ("m", 60.0), ("s", 1.0), ("ms", 1e-3), ("us", 1e-6), ("µs", 1e-6), ("ns", 1e-9)];
    let is_of_number = |symbol: char| symbol.is_ascii_digit() || symbol == '.';
    let mut seconds = 0.0;
    let mut rest = text;
    while !rest.is_empty() {
        let (number, behind) = rest.split_at(rest.find(|symbol| !is_of_number(symbol))?);
        let (name, behind) = behind.split_at(behind.find(is_of_number).unwrap_or(behind.len()));
        let (_, unit) = UNITS.iter().find(|(known, _)| *known == name)?;
        seconds += number.parse::<f64>().ok()? * unit;
        rest = behind;
    }
    Some(seconds)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn intervals_have_units() {
        let given = [("5", 5000), ("250ms", 250), ("2s", 2000), ("1m", 60_000), ("1h", 3_600_000), ("1.5s", 1500)];
        for (text, ms) in given.into_iter().chain([("1m30s", 90_000), ("1h.5m", 3_630_000), ("2000µs", 2)]) {
            assert_eq!(parse_interval(text), Ok(Duration::from_millis(ms)), "{text}");
        }
        for text in ["", "0", "0s", "s", "-1s", "1d", "1.s.5", "1..5s", ".s", "9999999999999999999999h"] {
            assert!(parse_interval(text).is_err(), "{text}");
        }
    }

    #[test]
    fn statistics_have_runcs_shape() {
        let stats = GetStatsResponse {
            cpu: [("usage_usec".to_owned(), 7)].into(),
            memory_current: Some(4096),
            pids_current: Some(2),
            io: vec![IoStat { major: 8, values: [("rbytes".to_owned(), 5)].into(), ..IoStat::default() }],
            huge_pages: vec![HugePageStat { size: "2MB".into(), current: Some(4 << 20), ..HugePageStat::default() }],
            ..GetStatsResponse::default()
        };

        let data = data(&stats);

        assert_eq!(data["cpu"]["usage"]["total"], 7000);
        assert_eq!(data["memory"]["usage"], json!({ "limit": u64::MAX, "usage": 4096, "max": 0, "failcnt": 0 }));
        assert_eq!(data["pids"]["current"], 2);
        assert_eq!(data["hugetlb"], json!({ "2MB": { "usage": 4 << 20, "failcnt": 0 } }));
        let read = json!({ "major": 8, "minor": 0, "op": "Read", "value": 5 });
        assert_eq!(data["blkio"]["ioServiceBytesRecursive"][0], read);
    }
}
