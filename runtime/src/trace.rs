// SPDX-License-Identifier: Apache-2.0
//! `--trace FILE`: the phases of a run in Chrome's trace format (`chrome://tracing`, Perfetto).
//!
//! Three processes appear in a trace: `bulkhead`, `vmm`, and `guest`. All times are the host's `CLOCK_MONOTONIC`; the
//! guest's are brought to it by the difference that its first answer shows, so they may appear late by up to the time
//! that answer took.

use std::fs::File;
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use bulkhead_protocol::agent::TracePoint;
use rustix::time::{ClockId, clock_gettime};
use serde_json::{Value, json};

/// Most points kept from one source that is not this process.
const MAX_FOREIGN_POINTS: usize = 256;

/// Whose time it was.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Track {
    /// This process.
    Supervisor = 1,
    /// The VMM.
    Vmm = 2,
    /// The guest: its agent and its processes.
    Guest = 3,
}

#[derive(Debug)]
struct Point {
    track: Track,
    name: String,
    begin_ns: u64,
    end_ns: u64,
}

/// The points of one run; records nothing without a file to write them to.
#[derive(Debug)]
pub(crate) struct Trace {
    file: Option<(PathBuf, File)>,
    points: Vec<Point>,
    /// What to add to the guest's clock for the host's.
    guest_offset_ns: i64,
}

/// The host's `CLOCK_MONOTONIC` in nanoseconds.
#[must_use]
pub(crate) fn now_ns() -> u64 {
    let now = clock_gettime(ClockId::Monotonic);
    u64::try_from(now.tv_sec).unwrap_or(0) * 1_000_000_000 + u64::try_from(now.tv_nsec).unwrap_or(0)
}

impl Trace {
    /// A trace that ends up in `file`, or nowhere. The file is made now, so that one that cannot be is told before
    /// anything runs.
    ///
    /// # Errors
    ///
    /// The file cannot be made.
    pub(crate) fn create(file: Option<PathBuf>) -> io::Result<Self> {
        let file = file.map(|path| File::create(&path).map(|file| (path, file))).transpose()?;
        Ok(Self { file, points: Vec::new(), guest_offset_ns: 0 })
    }

    /// Whether anything is recorded.
    #[must_use]
    pub(crate) fn enabled(&self) -> bool {
        self.file.is_some()
    }

    /// Records a phase of this process that began at `begin_ns` and ends now.
    pub(crate) fn since(&mut self, name: &str, begin_ns: u64) {
        self.add(Track::Supervisor, name, begin_ns, now_ns());
    }

    /// Records a phase.
    pub(crate) fn add(&mut self, track: Track, name: &str, begin_ns: u64, end_ns: u64) {
        let foreign = track != Track::Supervisor;
        if !self.enabled() || (foreign && self.points.iter().filter(|p| p.track == track).count() >= MAX_FOREIGN_POINTS)
        {
            return;
        }
        let name = if foreign { crate::text::one_line(name) } else { name.to_owned() };
        self.points.push(Point { track, name, begin_ns, end_ns: end_ns.max(begin_ns) });
    }

    /// Learns the guest's clock: it showed `guest_now_ns` when the host's showed `host_now_ns`, or a little earlier.
    pub(crate) fn set_guest_clock(&mut self, guest_now_ns: u64, host_now_ns: u64) {
        self.guest_offset_ns = host_now_ns.wrapping_sub(guest_now_ns).cast_signed();
    }

    /// Records the guest's phases.
    pub(crate) fn add_guest(&mut self, points: &[TracePoint]) {
        for point in points {
            let (begin_ns, end_ns) = (self.guest_to_host(point.begin_ns), self.guest_to_host(point.end_ns));
            self.add(Track::Guest, &point.name, begin_ns, end_ns);
        }
    }

    /// A time of the guest's clock on the host's.
    #[must_use]
    pub(crate) fn guest_to_host(&self, guest_ns: u64) -> u64 {
        guest_ns.wrapping_add_signed(self.guest_offset_ns)
    }

    /// Writes the file.
    ///
    /// # Errors
    ///
    /// The file's path and why it could not be written.
    pub(crate) fn write(&self) -> Result<(), (&Path, io::Error)> {
        let Some((path, file)) = &self.file else {
            return Ok(());
        };
        let mut file: &File = file;
        file.write_all(self.to_json().to_string().as_bytes()).map_err(|error| (path.as_path(), error))
    }

    fn to_json(&self) -> Value {
        let names = [(Track::Supervisor, "bulkhead"), (Track::Vmm, "vmm"), (Track::Guest, "guest")];
        let names = names.iter().map(|(track, name)| {
            json!({"name": "process_name", "ph": "M", "pid": *track as u32, "tid": *track as u32, "args": {"name": name}})
        });
        let points = self.points.iter().map(|point| {
            json!({
                "name": point.name,
                "cat": "bulkhead",
                "ph": "X",
                "pid": point.track as u32,
                "tid": point.track as u32,
                "ts": micros(point.begin_ns),
                "dur": micros(point.end_ns - point.begin_ns),
            })
        });
        json!({"displayTimeUnit": "ms", "traceEvents": names.chain(points).collect::<Vec<_>>()})
    }
}

/// Microseconds, the format's unit, to the nanosecond.
#[allow(clippy::cast_precision_loss, reason = "a clock of less than 104 days is exact, and later ones to 2 ns")]
fn micros(ns: u64) -> f64 {
    ns as f64 / 1000.0
}

#[cfg(test)]
mod tests {
    use super::*;

    fn recording() -> Trace {
        Trace::create(Some("/dev/null".into())).unwrap()
    }

    fn events(trace: &Trace) -> Vec<Value> {
        let events = trace.to_json()["traceEvents"].as_array().unwrap().clone();
        events.into_iter().filter(|event| event["ph"] == "X").collect()
    }

    #[test]
    fn a_trace_without_a_file_records_nothing() {
        let mut trace = Trace::create(None).unwrap();

        trace.add(Track::Vmm, "x", 1, 2);

        assert!(events(&trace).is_empty());
        assert!(trace.write().is_ok());
    }

    #[test]
    fn what_is_recorded_is_in_the_file_that_was_made_first() {
        let folder = tempfile::tempdir().unwrap();
        let (path, moved) = (folder.path().join("trace"), folder.path().join("moved"));
        let mut trace = Trace::create(Some(path.clone())).unwrap();
        trace.add(Track::Vmm, "x", 1, 2);

        std::fs::rename(&path, &moved).unwrap();
        trace.write().unwrap();

        assert!(!path.exists() && std::fs::read_to_string(moved).unwrap().contains("\"x\""));
    }

    #[test]
    fn guest_times_are_brought_to_the_hosts_clock() {
        let mut trace = recording();
        let point = TracePoint { name: "exec\n".into(), begin_ns: 2_000, end_ns: 3_500, ..Default::default() };

        trace.set_guest_clock(5_000, 1_005_000);
        trace.add_guest(&[point]);

        let event = &events(&trace)[0];
        assert_eq!(event["name"], "exec");
        assert_eq!(event["ts"], 1002.0);
        assert_eq!(event["dur"], 1.5);
    }

    #[test]
    fn a_guest_cannot_fill_the_trace() {
        let mut trace = recording();
        let points = vec![TracePoint::default(); 10 * MAX_FOREIGN_POINTS];

        trace.add_guest(&points);

        assert_eq!(events(&trace).len(), MAX_FOREIGN_POINTS);
    }

    #[test]
    fn an_end_before_the_begin_is_no_negative_duration() {
        let mut trace = recording();

        trace.add(Track::Vmm, "x", 10, 5);

        assert_eq!(events(&trace)[0]["dur"], 0.0);
    }
}
