// SPDX-License-Identifier: Apache-2.0
//! `bulkhead events`: what a container uses, a line of JSON each time.

use std::future::pending;
use std::io::{self, Write};
use std::path::Path;
use std::pin::pin;
use std::time::Duration;

use bulkhead_protocol::agent::{GetStatsResponse, WaitOomRequest};
use bulkhead_protocol::agent_ttrpc::AgentClient;
use clap::Args;
use containerd_shim_protos::api::StatsRequest;
use containerd_shim_protos::shim_async::TaskClient;
use protobuf::Message;
use serde_json::json;
use thiserror::Error;
use tokio::time::{Instant, MissedTickBehavior, interval_at, timeout};
use ttrpc::context::Context;

use super::{Global, Outcome, stats_shape};
use crate::supervisor::CallError;
use crate::supervisor::client::{self, ClientError};
use crate::supervisor::state::{Found, LookupError, Status};

/// Most lines for what a guest tells at once: its word is a number.
const MOST_KILLS: u64 = 1024;

/// How long the guest's last word may take.
const LAST_KILLS: Duration = Duration::from_secs(1);

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

/// Prints statistics, and a line for each process that the guest's kernel kills for want of memory.
pub(crate) fn run(global: &Global, arguments: &Arguments) -> Outcome {
    let id = &arguments.id;
    let found = Found::open(&global.root, id)?;
    match found.status() {
        Status::Stopped => return Err(NotRunning(id.clone()).into()),
        Status::Creating => return Err(CallError::Creating.into()),
        Status::Created | Status::Running | Status::Paused => {}
    }
    client::event_loop()?.block_on(async {
        let (task, agent) = client::connect_with_agent(&found, CallError::NotRunning)?;
        let watched = Watched { root: &global.root, id, task, agent };
        watched.print(arguments).await
    })
}

/// A container that is looked at.
struct Watched<'a> {
    root: &'a Path,
    id: &'a str,
    task: TaskClient,
    agent: AgentClient,
}

impl Watched<'_> {
    async fn print(&self, arguments: &Arguments) -> Outcome {
        let Some(stats) = self.look().await? else { return Ok(0) };
        let mut seen = stats.memory_events.get("oom_kill").copied().unwrap_or(0);
        self.print_stats(&stats)?;
        if arguments.stats {
            return Ok(0);
        }
        let mut ticks = interval_at(Instant::now() + arguments.interval, arguments.interval);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut kills = pin!(self.next_kills(seen));
        loop {
            let (told, is_over) = tokio::select! {
                kills = &mut kills => (kills, kills.ended),
                _ = ticks.tick() => match self.look().await? {
                    Some(stats) => {
                        self.print_stats(&stats)?;
                        continue;
                    }
                    // What has ended it may be on its way.
                    None => match timeout(LAST_KILLS, &mut kills).await {
                        Ok(kills) => (kills, true),
                        Err(_) => return Ok(0),
                    },
                },
            };
            self.print_kills(told.count.saturating_sub(seen))?;
            if is_over {
                return Ok(0);
            }
            seen = told.count;
            kills.set(self.next_kills(seen));
        }
    }

    /// The statistics of this moment; `None` once the container has ended.
    async fn look(&self) -> Result<Option<GetStatsResponse>, ClientError> {
        let request = StatsRequest { id: self.id.to_owned(), ..StatsRequest::default() };
        match self.task.stats(Context::default(), &request).await.map_err(ClientError::from) {
            Ok(answer) => {
                GetStatsResponse::parse_from_bytes(&answer.stats.value).map(Some).map_err(|_| ClientError::Answer)
            }
            Err(ClientError::Lost) => Ok(None),
            Err(ClientError::Refused(reason)) if reason == CallError::NotRunning.to_string() => Ok(None),
            // Its end may have come between the call and the answer, which then says so in one way or another.
            Err(error) => match Found::open(self.root, self.id) {
                Err(LookupError::NotFound(_)) => Ok(None),
                Ok(found) if found.status() == Status::Stopped => Ok(None),
                _ => Err(error),
            },
        }
    }

    /// How many there have been, once there are more than `seen`, or the container has ended.
    async fn next_kills(&self, seen: u64) -> Kills {
        let request = WaitOomRequest { container_id: self.id.to_owned(), seen, ..WaitOomRequest::default() };
        match self.agent.wait_oom(Context::default(), &request).await {
            Ok(kills) if kills.ended || kills.count > seen => Kills { count: kills.count, ended: kills.ended },
            // A guest that does not keep to the question is asked no more, and what counts none tells of none.
            Ok(_) | Err(ttrpc::Error::RpcStatus(_)) => pending().await,
            Err(_) => Kills { count: seen, ended: true },
        }
    }

    fn print_stats(&self, stats: &GetStatsResponse) -> io::Result<()> {
        let mut out = io::stdout().lock();
        writeln!(out, "{}", json!({ "type": "stats", "id": self.id, "data": stats_shape::data(stats) }))?;
        out.flush()
    }

    fn print_kills(&self, count: u64) -> io::Result<()> {
        let mut out = io::stdout().lock();
        for _ in 0..count.min(MOST_KILLS) {
            writeln!(out, "{}", json!({ "type": "oom", "id": self.id }))?;
        }
        out.flush()
    }
}

/// What the guest tells of out-of-memory kills.
#[derive(Debug, Clone, Copy)]
struct Kills {
    /// So far.
    count: u64,
    /// There will be no more.
    ended: bool,
}

/// The longest duration that Go has, some 292 years.
const LONGEST_INTERVAL: Duration = Duration::from_nanos(i64::MAX.cast_unsigned());

/// Seconds, or what Go takes for a duration, as runc does: numbers with units, one after the other.
fn parse_interval(text: &str) -> Result<Duration, String> {
    let seconds = text.parse::<u32>().map(f64::from).ok().or_else(|| seconds_with_units(text));
    let interval = seconds.and_then(|seconds| Duration::try_from_secs_f64(seconds).ok());
    let is_possible = |interval: &Duration| !interval.is_zero() && *interval <= LONGEST_INTERVAL;
    interval.filter(is_possible).ok_or_else(|| "not a time such as 5s, 500ms or 1m30s".to_owned())
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
        for (text, ms) in given.into_iter().chain([
            ("1m30s", 90_000),
            ("1h.5m", 3_630_000),
            ("2000µs", 2),
            ("9200000000s", 9_200_000_000_000),
        ]) {
            assert_eq!(parse_interval(text), Ok(Duration::from_millis(ms)), "{text}");
        }
        for text in ["", "0", "0s", "s", "-1s", "1d", "1.s.5", "1..5s", ".s", "9999999999999999999999h", "9300000000s"]
        {
            assert!(parse_interval(text).is_err(), "{text}");
        }
    }
}
