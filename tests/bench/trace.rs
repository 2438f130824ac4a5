// SPDX-License-Identifier: Apache-2.0
//! The trace of one run, as `bulkhead --trace` writes it: Chrome's trace events.

use std::collections::HashMap;

use serde_json::Value;

/// A phase of a start, in milliseconds from the moment of the command.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Phase {
    /// Whose it is: the name of the event's process.
    pub(crate) lane: String,
    pub(crate) name: String,
    pub(crate) begin_ms: f64,
    pub(crate) end_ms: f64,
}

/// Reads the complete events (`"ph": "X"`) of `trace`, a run that began at `began_ns` of the same clock. Sorted by begin; of
/// two that begin together the longer first.
///
/// # Errors
///
/// What is not as the format says.
pub(crate) fn phases(trace: &str, began_ns: u64) -> Result<Vec<Phase>, String> {
    let root: Value = serde_json::from_str(trace).map_err(|error| error.to_string())?;
    let events = root["traceEvents"].as_array().ok_or("no traceEvents")?;
    let lanes: HashMap<u64, &str> = events
        .iter()
        .filter(|event| event["ph"] == "M" && event["name"] == "process_name")
        .filter_map(|event| Some((event["pid"].as_u64()?, event["args"]["name"].as_str()?)))
        .collect();
    #[expect(clippy::cast_precision_loss, reason = "the trace's own times have no more digits")]
    let began_ms = began_ns as f64 / 1e6;
    let mut phases = Vec::new();
    for event in events.iter().filter(|event| event["ph"] == "X") {
        let number = |key: &str| event[key].as_f64().ok_or_else(|| format!("an event without {key}: {event}"));
        let begin_ms = number("ts")? / 1000.0 - began_ms;
        let end_ms = begin_ms + number("dur")? / 1000.0;
        let pid = event["pid"].as_u64().ok_or_else(|| format!("an event without pid: {event}"))?;
        let lane = lanes.get(&pid).map_or_else(|| format!("process {pid}"), |name| (*name).to_owned());
        let name = event["name"].as_str().ok_or_else(|| format!("an event without name: {event}"))?.to_owned();
        phases.push(Phase { lane, name, begin_ms, end_ms });
    }
    phases.sort_by(|a, b| a.begin_ms.total_cmp(&b.begin_ms).then(b.end_ms.total_cmp(&a.end_ms)));
    Ok(phases)
}

/// Adds what no program can report of itself: how each lane's program came to run. Of the first lane's that is since the
/// command; of the guest's, since the VMM's `kernel entry`, its kernel.
pub(crate) fn add_beginnings(phases: &mut Vec<Phase>) {
    let first = |lane: &str| phases.iter().find(|phase| phase.lane == lane).map(|phase| phase.begin_ms);
    let entry = phases.iter().find(|phase| phase.name == "kernel entry").map(|phase| phase.end_ms);
    let kernel = entry.zip(first("guest")).map(|(begin_ms, end_ms)| ("guest".to_owned(), "kernel", begin_ms, end_ms));
    let earliest = phases.first().map(|phase| (phase.lane.clone(), "exec of the program", 0.0, phase.begin_ms));
    for (lane, name, begin_ms, end_ms) in kernel.into_iter().chain(earliest) {
        let phase = Phase { lane, name: name.to_owned(), begin_ms, end_ms };
        let place = phases.partition_point(|other| other.begin_ms < begin_ms);
        phases.insert(place, phase);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn beginnings_are_what_precedes_the_first_phases() {
        let phase =
            |lane: &str, name: &str, begin_ms, end_ms| Phase { lane: lane.into(), name: name.into(), begin_ms, end_ms };
        let mut phases = vec![
            phase("bulkhead", "spec", 2.0, 3.0),
            phase("vmm", "kernel entry", 9.0, 9.5),
            phase("guest", "agent mounts", 20.0, 21.0),
        ];

        add_beginnings(&mut phases);

        assert_eq!(phases[0], phase("bulkhead", "exec of the program", 0.0, 2.0));
        assert_eq!(phases[3], phase("guest", "kernel", 9.5, 20.0));
    }

    #[test]
    fn events_become_phases_from_the_command_on() {
        let trace = r#"{"traceEvents": [
            {"name": "process_name", "ph": "M", "pid": 2, "args": {"name": "vmm"}},
            {"name": "late", "ph": "X", "pid": 2, "ts": 5000.0, "dur": 250.0},
            {"name": "early", "ph": "X", "pid": 7, "ts": 3000.0, "dur": 1000.0}]}"#;

        let phases = phases(trace, 2_000_000).unwrap();

        assert_eq!(phases[0], Phase { lane: "process 7".into(), name: "early".into(), begin_ms: 1.0, end_ms: 2.0 });
        assert_eq!(phases[1], Phase { lane: "vmm".into(), name: "late".into(), begin_ms: 3.0, end_ms: 3.25 });
    }

    #[test]
    fn what_is_no_trace_is_refused() {
        assert!(phases("[]", 0).is_err());
        assert!(phases(r#"{"traceEvents": [{"ph": "X", "name": "x", "pid": 1, "dur": 1}]}"#, 0).is_err());
    }
}
