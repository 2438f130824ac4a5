// SPDX-License-Identifier: Apache-2.0
//! `bulkhead update`: changes the limits of a container.

use std::fs::File;
use std::io::{self, Read};
use std::path::{Path, PathBuf};

use clap::Args;
use containerd_shim_protos::api::UpdateTaskRequest;
use protobuf::MessageField;
use protobuf::well_known_types::any::Any;
use serde_json::{Value, json};
use thiserror::Error;
use ttrpc::context::Context;

use super::{Global, Outcome};
use crate::logging;
use crate::supervisor::state::Found;
use crate::supervisor::{CallError, client};

/// The type by which containerd calls limits of the specification.
const RESOURCES_TYPE: &str = "types.containerd.io/opencontainers/runtime-spec/1/LinuxResources";

/// Longest file of limits.
const MAX_SIZE: u64 = 1 << 20;

/// Change the limits of a container
#[derive(Debug, Default, Args)]
pub(crate) struct Arguments {
    /// Name of the container
    #[arg(value_name = "ID")]
    id: String,

    /// Take the limits from a JSON file, as in config.json's `linux.resources`, or from stdin (-); the other options are
    /// ignored then
    #[arg(long, short, value_name = "FILE")]
    resources: Option<PathBuf>,

    /// Microseconds of a CPU period
    #[arg(long, value_name = "US")]
    cpu_period: Option<u64>,

    /// Microseconds of CPU time in a period; -1 for no limit
    #[arg(long, value_name = "US", allow_negative_numbers = true)]
    cpu_quota: Option<i64>,

    /// Share of the CPU time, relative to others
    #[arg(long, visible_alias = "cpu-shares", value_name = "N")]
    cpu_share: Option<u64>,

    /// Microseconds that it may save up of its quota
    #[arg(long, value_name = "US")]
    cpu_burst: Option<u64>,

    /// 1 to run only where no other wants the CPU, else 0
    #[arg(long, value_name = "0|1", allow_negative_numbers = true)]
    cpu_idle: Option<i64>,

    /// Real-time periods and run times, which cgroup v2 does not have: refused unless 0
    #[arg(long, hide = true, value_name = "US")]
    cpu_rt_period: Option<u64>,
    #[arg(long, hide = true, value_name = "US", allow_negative_numbers = true)]
    cpu_rt_runtime: Option<i64>,

    /// CPUs to use
    #[arg(long, value_name = "LIST")]
    cpuset_cpus: Option<String>,

    /// NUMA nodes to use
    #[arg(long, value_name = "LIST")]
    cpuset_mems: Option<String>,

    /// Most memory, in bytes or with k, m, g; -1 for no limit
    #[arg(long, value_name = "SIZE", allow_negative_numbers = true)]
    memory: Option<String>,

    /// Memory that is not taken away when it is short
    #[arg(long, value_name = "SIZE", allow_negative_numbers = true)]
    memory_reservation: Option<String>,

    /// Most memory and swap
    #[arg(long, value_name = "SIZE", allow_negative_numbers = true)]
    memory_swap: Option<String>,

    /// Limits of the kernel's own memory, which are no more: a warning
    #[arg(long, hide = true, value_name = "SIZE", allow_negative_numbers = true)]
    kernel_memory: Option<String>,
    #[arg(long, hide = true, value_name = "SIZE", allow_negative_numbers = true)]
    kernel_memory_tcp: Option<String>,

    /// Schemas of Intel's resource director, which is the host's: refused
    #[arg(long, hide = true, value_name = "SCHEMA")]
    l3_cache_schema: Option<String>,
    #[arg(long, hide = true, value_name = "SCHEMA")]
    mem_bw_schema: Option<String>,

    /// Most processes; -1 for no limit
    #[arg(long, value_name = "N", allow_negative_numbers = true)]
    pids_limit: Option<i64>,

    /// Weight of its block I/O
    #[arg(long, value_name = "N")]
    blkio_weight: Option<u16>,
}

#[derive(Debug, Error)]
enum ResourcesError {
    #[error("cannot read the limits from {}", .0.display())]
    Read(PathBuf, #[source] io::Error),
    #[error("the limits in {} are not JSON", .0.display())]
    Parse(PathBuf, #[source] serde_json::Error),
    #[error("--{option} {value:?} is not a size in bytes, or with k, m or g")]
    Size { option: &'static str, value: String },
    #[error("--{0} is not supported: a guest has no control over the host's caches and memory bandwidth")]
    IntelRdt(&'static str),
}

/// Changes the limits.
pub(crate) fn run(global: &Global, arguments: &Arguments) -> Outcome {
    let found = Found::open(&global.root, &arguments.id)?;
    let resources = match &arguments.resources {
        Some(path) => read(path)?,
        None => arguments.resources()?,
    };
    let resources = Any { type_url: RESOURCES_TYPE.to_owned(), value: resources.to_string().into(), ..Any::default() };
    client::call(&found, CallError::NotRunning, async |task, id| {
        let resources = MessageField::some(resources);
        task.update(Context::default(), &UpdateTaskRequest { id, resources, ..Default::default() }).await
    })?;
    Ok(0)
}

fn read(path: &Path) -> Result<Value, ResourcesError> {
    let read = |source: &mut dyn Read| {
        let mut text = Vec::new();
        source.take(MAX_SIZE).read_to_end(&mut text).map(|_| text)
    };
    let text = if path == Path::new("-") {
        read(&mut io::stdin())
    } else {
        File::open(path).and_then(|mut file| read(&mut file))
    };
    let text = text.map_err(|error| ResourcesError::Read(path.to_owned(), error))?;
    serde_json::from_slice(&text).map_err(|error| ResourcesError::Parse(path.to_owned(), error))
}

impl Arguments {
    /// The options as the specification writes them; what is not given is absent.
    fn resources(&self) -> Result<Value, ResourcesError> {
        let intel_rdt = [("l3-cache-schema", &self.l3_cache_schema), ("mem-bw-schema", &self.mem_bw_schema)];
        if let Some((option, _)) = intel_rdt.iter().find(|(_, schema)| schema.as_ref().is_some_and(|s| !s.is_empty())) {
            return Err(ResourcesError::IntelRdt(option));
        }
        if self.kernel_memory.is_some() || self.kernel_memory_tcp.is_some() {
            // In runc's words.
            logging::warn(format_args!("Kernel memory settings are ignored and will be removed"));
        }
        let size = |option, value: &Option<String>| {
            let parse =
                |value: &String| parse_size(value).ok_or_else(|| ResourcesError::Size { option, value: value.clone() });
            value.as_ref().map(parse).transpose()
        };
        let mut resources = json!({
            "cpu": {
                "period": self.cpu_period,
                "quota": self.cpu_quota,
                "shares": self.cpu_share,
                "burst": self.cpu_burst,
                "idle": self.cpu_idle,
                "realtimePeriod": self.cpu_rt_period,
                "realtimeRuntime": self.cpu_rt_runtime,
                "cpus": self.cpuset_cpus,
                "mems": self.cpuset_mems,
            },
            "memory": {
                "limit": size("memory", &self.memory)?,
                "reservation": size("memory-reservation", &self.memory_reservation)?,
                "swap": size("memory-swap", &self.memory_swap)?,
            },
        });
        if let Some(limit) = self.pids_limit {
            resources["pids"] = json!({ "limit": limit });
        }
        if let Some(weight) = self.blkio_weight {
            resources["blockIO"] = json!({ "weight": weight });
        }
        Ok(resources)
    }
}

/// Bytes, or kibi, mebi, gibibytes.
fn parse_size(text: &str) -> Option<i64> {
    let lower = text.to_ascii_lowercase();
    let number = lower.strip_suffix('b').unwrap_or(&lower);
    let (number, factor) = match number.char_indices().last()? {
        (at, 'k') => (&number[..at], 1 << 10),
        (at, 'm') => (&number[..at], 1 << 20),
        (at, 'g') => (&number[..at], 1 << 30),
        _ => (number, 1),
    };
    number.parse::<i64>().ok()?.checked_mul(factor)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_may_have_units() {
        let cases = [
            ("1024", Some(1024)),
            ("64m", Some(64 << 20)),
            ("1Gb", Some(1 << 30)),
            ("-1", Some(-1)),
            ("2k", Some(2048)),
        ];
        for (text, expected) in cases {
            assert_eq!(parse_size(text), expected, "{text}");
        }
        for text in ["", "b", "m", "1x", "9999999999g", "1.5m"] {
            assert_eq!(parse_size(text), None, "{text}");
        }
    }

    #[test]
    fn options_become_the_specifications_limits() {
        let arguments = Arguments {
            memory: Some("64m".into()),
            pids_limit: Some(20),
            cpu_quota: Some(50_000),
            ..Arguments::default()
        };

        let resources = arguments.resources().unwrap().to_string();

        let limits = crate::spec::new_limits_from_json(resources.as_bytes()).unwrap();
        let settings = limits.cgroup_settings;
        let settings: Vec<_> = settings.iter().map(|setting| (setting.file.as_str(), setting.value.as_str())).collect();
        assert_eq!(settings, [("memory.max", "67108864"), ("cpu.max", "50000"), ("pids.max", "20")]);
    }
}
