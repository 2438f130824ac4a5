// SPDX-License-Identifier: Apache-2.0
//! The figures, for people and for programs.

use std::fmt::Write;
use std::time::Duration;

use serde_json::{Value, json};

use crate::cases::{Case, Kind};
use crate::idle::Idle;
use crate::start::Sample;
use crate::stats::{Summary, millis};

/// All that was measured of one case.
#[derive(Clone, Debug)]
pub(crate) struct CaseResult {
    pub(crate) case: Case,
    pub(crate) samples: Vec<Sample>,
    /// Why it has no samples, or fewer.
    pub(crate) failure: Option<String>,
}

impl CaseResult {
    fn first_output(&self) -> Option<Summary> {
        Summary::of(&self.samples.iter().filter_map(|sample| sample.first_output).collect::<Vec<_>>())
    }

    fn exit(&self) -> Option<Summary> {
        Summary::of(&self.samples.iter().map(|sample| sample.exit).collect::<Vec<_>>())
    }
}

/// The whole result.
#[derive(Debug)]
pub(crate) struct Report {
    /// What a millisecond is, and where it was measured.
    pub(crate) machine: String,
    pub(crate) cases: Vec<CaseResult>,
    /// Starts that were repeated because the clock jumped.
    pub(crate) repeated: usize,
    pub(crate) idle: Vec<Idle>,
    /// The agent's resident memory.
    pub(crate) agent_rss_kib: Option<u64>,
    /// What could not be measured, and why.
    pub(crate) notes: Vec<String>,
}

impl Report {
    fn find(&self, name: &str) -> Option<&CaseResult> {
        self.cases.iter().find(|result| result.case.name == name)
    }

    /// Bulkhead's median to the first output, that the others are compared with.
    fn own_output(&self) -> Option<Duration> {
        Some(self.find("bulkhead-echo")?.first_output()?.median)
    }

    /// The same of the exit, for cases of a kind.
    fn own_exit(&self, result: &CaseResult) -> Option<Duration> {
        let own = match result.case.kind {
            Kind::Exec(_) => "bulkhead-exec",
            Kind::Qemu => "bulkhead-true",
            _ if result.first_output().is_none() => "bulkhead-true",
            _ => return None,
        };
        Some(self.find(own)?.exit()?.median)
    }

    /// The tables, as Markdown.
    pub(crate) fn tables(&self) -> String {
        let mut text = format!("{}\n", self.machine);
        self.start_table(&mut text);
        if self.repeated > 0 {
            line(
                &mut text,
                format_args!("\n{} more starts were repeated, since the clock jumped in them.", self.repeated),
            );
        }
        if !self.idle.is_empty() {
            self.memory_tables(&mut text);
        }
        for note in &self.notes {
            line(&mut text, format_args!("\nnot measured: {note}"));
        }
        text
    }

    fn start_table(&self, text: &mut String) {
        let runs = self.cases.iter().map(|result| result.samples.len()).max().unwrap_or(0);
        line(text, format_args!("\nStart in ms, median (lowest to highest) of {runs}:\n"));
        line(text, format_args!("| case | to first output | Bulkhead / this | to exit | Bulkhead / this |"));
        line(text, format_args!("| --- | --- | --- | --- | --- |"));
        for result in &self.cases {
            if let Some(why) = &result.failure {
                line(text, format_args!("| {} | failed: {why} | | | |", result.case.name));
                continue;
            }
            line(
                text,
                format_args!(
                    "| {} | {} | {} | {} | {} |",
                    result.case.name,
                    spread(result.first_output()),
                    ratio(self.own_output(), result.first_output()),
                    spread(result.exit()),
                    ratio(self.own_exit(result), result.exit()),
                ),
            );
        }
    }

    fn memory_tables(&self, text: &mut String) {
        line(text, format_args!("\nMemory of an idle container on the host, in MB (10^6 bytes), guest of 128 MiB:\n"));
        line(text, format_args!("| process | resident beside guest RAM | proportional | guest RAM touched |"));
        line(text, format_args!("| --- | --- | --- | --- |"));
        for idle in &self.idle {
            for process in &idle.processes {
                let guest = if process.guest_size_kib == 0 { "-".to_owned() } else { mb(process.guest_rss_kib) };
                let (rss, pss) = (mb(process.rss_kib), mb(process.pss_kib));
                line(text, format_args!("| {}: {} | {rss} | {pss} | {guest} |", idle.name, process.name));
            }
        }
        line(text, format_args!("\n| everything charged to its control group | memory | files | kernel | total |"));
        line(text, format_args!("| --- | --- | --- | --- | --- |"));
        for (idle, group) in self.idle.iter().filter_map(|idle| Some((idle, idle.group?))) {
            let [anon, files, kernel] = [group.anon_kib, group.file_kib, group.kernel_kib].map(mb);
            line(text, format_args!("| {} | {anon} | {files} | {kernel} | {} |", idle.name, mb(group.total_kib())));
        }
        let in_guest: Vec<_> = self.idle.iter().filter_map(|idle| Some((idle.name, idle.guest_used_kib?))).collect();
        if in_guest.is_empty() && self.agent_rss_kib.is_none() {
            return;
        }
        line(text, format_args!("\n| in the guest | |\n| --- | --- |"));
        for (name, used) in in_guest {
            line(text, format_args!("| {}: memory that is not available to the container | {} |", name, mb(used)));
        }
        if let Some(rss) = self.agent_rss_kib {
            line(text, format_args!("| agent, resident | {} |", mb(rss)));
        }
    }

    /// The same for programs; durations in nanoseconds.
    pub(crate) fn json(&self) -> Value {
        let cases: Vec<_> = self.cases.iter().map(case_json).collect();
        let idle: Vec<_> = self.idle.iter().map(idle_json).collect();
        json!({
            "machine": self.machine, "cases": cases, "repeated": self.repeated, "idle": idle, "agent_rss_kib": self.agent_rss_kib,
            "notes": self.notes,
        })
    }
}

/// Adds a line of text; writing to a String cannot fail.
fn line(text: &mut String, arguments: std::fmt::Arguments<'_>) {
    let _ = writeln!(text, "{arguments}");
}

fn spread(summary: Option<Summary>) -> String {
    summary.map_or_else(
        || "-".to_owned(),
        |s| format!("{:.1} ({:.1} to {:.1})", millis(s.median), millis(s.min), millis(s.max)),
    )
}

fn ratio(own: Option<Duration>, other: Option<Summary>) -> String {
    match (own, other) {
        (Some(own), Some(other)) if !other.median.is_zero() => {
            format!("{:.2}", own.as_secs_f64() / other.median.as_secs_f64())
        }
        _ => "-".to_owned(),
    }
}

#[expect(clippy::cast_precision_loss, reason = "sizes are far below 2^53")]
fn mb(kib: u64) -> String {
    format!("{:.1}", kib as f64 * 1024.0 / 1e6)
}

fn case_json(result: &CaseResult) -> Value {
    let nanos = |duration: Duration| u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX);
    let summary = |summary: Option<Summary>| {
        summary.map(|s| json!({"median_ns": nanos(s.median), "min_ns": nanos(s.min), "max_ns": nanos(s.max)}))
    };
    let runs: Vec<_> = result
        .samples
        .iter()
        .map(|sample| json!({"first_output_ns": sample.first_output.map(nanos), "exit_ns": nanos(sample.exit)}))
        .collect();
    json!({
        "name": result.case.name, "first_output": summary(result.first_output()), "exit": summary(result.exit()),
        "runs": runs, "failure": result.failure,
    })
}

fn idle_json(idle: &Idle) -> Value {
    let processes: Vec<_> = idle
        .processes
        .iter()
        .map(|process| {
            json!({
                "name": process.name, "rss_kib": process.rss_kib, "pss_kib": process.pss_kib,
                "guest_size_kib": process.guest_size_kib, "guest_rss_kib": process.guest_rss_kib,
            })
        })
        .collect();
    let group = idle.group.map(|group| {
        json!({
            "anon_kib": group.anon_kib, "file_kib": group.file_kib, "kernel_kib": group.kernel_kib,
            "total_kib": group.total_kib(),
        })
    });
    json!({"name": idle.name, "processes": processes, "group": group, "guest_used_kib": idle.guest_used_kib})
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cases::CASES;

    fn result(name: &str, first_ms: Option<u64>, exit_ms: u64) -> CaseResult {
        let case = CASES.iter().find(|case| case.name == name).unwrap().clone();
        let sample = Sample {
            began_ns: 0,
            first_output: first_ms.map(Duration::from_millis),
            exit: Duration::from_millis(exit_ms),
        };
        CaseResult { case, samples: vec![sample; 3], failure: None }
    }

    #[test]
    fn ratios_compare_the_same_moments() {
        let cases = vec![
            result("bulkhead-echo", Some(50), 70),
            result("bulkhead-true", None, 60),
            result("qemu-microvm", Some(100), 120),
            result("bulkhead-exec", None, 10),
            result("runc-exec", None, 40),
        ];
        let report =
            Report { machine: "m".into(), cases, repeated: 0, idle: vec![], agent_rss_kib: None, notes: vec![] };

        let text = report.tables();

        let qemu = text.lines().find(|line| line.contains("qemu")).unwrap();
        assert_eq!(qemu, "| qemu-microvm | 100.0 (100.0 to 100.0) | 0.50 | 120.0 (120.0 to 120.0) | 0.50 |");
        let exec = text.lines().find(|line| line.contains("runc-exec")).unwrap();
        assert_eq!(exec, "| runc-exec | - | - | 40.0 (40.0 to 40.0) | 0.25 |");
    }

    #[test]
    fn failure_is_told_in_its_place() {
        let mut failed = result("runc-true", None, 1);
        failed.failure = Some("no such file".into());
        let report = Report {
            machine: "m".into(),
            cases: vec![failed],
            repeated: 0,
            idle: vec![],
            agent_rss_kib: None,
            notes: vec![],
        };

        assert!(report.tables().contains("| runc-true | failed: no such file |"));
        assert_eq!(report.json()["cases"][0]["failure"], "no such file");
    }
}
