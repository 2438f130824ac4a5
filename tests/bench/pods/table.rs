// SPDX-License-Identifier: Apache-2.0
//! The figures, for people and for programs.

use std::fmt::Write;

use serde_json::{Map, Value, json};

use super::Sample;
use super::stats::{Spread, millis};

/// What is measured, in the order of [`RuntimeResult::figures`].
const ROWS: [&str; 6] = [
    "RunPodSandbox, ms",
    "CreateContainer to Started, ms",
    "stop and remove, ms",
    "memory of all processes, MB",
    "memory beside guest RAM, MB",
    "guest RAM touched, MB",
];

/// All that was measured of one runtime.
#[derive(Debug)]
pub(super) struct RuntimeResult {
    /// Its name in containerd's configuration.
    pub(super) name: &'static str,
    figures: [Vec<f64>; ROWS.len()],
}

impl RuntimeResult {
    pub(super) fn new(name: &'static str) -> Self {
        Self { name, figures: [const { Vec::new() }; ROWS.len()] }
    }

    pub(super) fn add(&mut self, sample: &Sample) {
        let Sample { sandbox, container, removal, memory } = *sample;
        let [sandbox, container, removal] = [sandbox, container, removal].map(millis);
        let [all, processes, guest] = [memory.processes + memory.guest, memory.processes, memory.guest].map(megabytes);
        for (figures, figure) in self.figures.iter_mut().zip([sandbox, container, removal, all, processes, guest]) {
            figures.push(figure);
        }
    }
}

#[allow(clippy::cast_precision_loss, reason = "figures for people")]
fn megabytes(kib: u64) -> f64 {
    kib as f64 * 1024.0 / 1e6
}

/// The table, as Markdown: a column for each runtime, and the first one's median by the last one's.
pub(super) fn table(machine: &str, results: &[RuntimeResult; 2], rounds: usize) -> String {
    let [own, other] = results;
    let mut text = format!("{machine}\n\nMedian (lowest to highest) of {rounds}:\n\n");
    let _ = writeln!(text, "| measured | {0} | {1} | {0} / {1} |\n| --- | --- | --- | --- |", own.name, other.name);
    for (row, name) in ROWS.into_iter().enumerate() {
        let spreads = [own, other].map(|result| Spread::of(&result.figures[row]));
        let [first, last] = spreads.map(|spread| spread.map_or("-".to_owned(), figure));
        let ratio = match spreads {
            [Some(own), Some(other)] if other.median > 0.0 => format!("{:.2}", own.median / other.median),
            _ => "-".to_owned(),
        };
        let _ = writeln!(text, "| {name} | {first} | {last} | {ratio} |");
    }
    text
}

fn figure(Spread { median, min, max }: Spread) -> String {
    format!("{median:.1} ({min:.1} to {max:.1})")
}

/// The same for programs, every single figure of it.
pub(super) fn json(machine: &str, results: &[RuntimeResult]) -> Value {
    let runtimes = results.iter().map(|result| {
        let figures: Map<_, _> =
            ROWS.into_iter().map(str::to_owned).zip(result.figures.iter().map(|f| json!(f))).collect();
        json!({"name": result.name, "figures": figures})
    });
    json!({"machine": machine, "runtimes": runtimes.collect::<Vec<_>>()})
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::super::memory::PodMemory;
    use super::*;

    #[test]
    fn both_are_compared() {
        let sample = |ms, guest| Sample {
            sandbox: Duration::from_millis(ms),
            container: Duration::from_millis(2 * ms),
            removal: Duration::from_millis(3 * ms),
            memory: PodMemory { processes: 15625, guest },
        };
        let mut results = ["bulkhead", "runc"].map(RuntimeResult::new);
        for ms in [100, 300, 200] {
            results[0].add(&sample(ms, 31250));
        }
        results[1].add(&sample(400, 0));

        let text = table("m", &results, 3);

        assert!(
            text.contains("| RunPodSandbox, ms | 200.0 (100.0 to 300.0) | 400.0 (400.0 to 400.0) | 0.50 |"),
            "{text}"
        );
        assert!(
            text.contains("| memory of all processes, MB | 48.0 (48.0 to 48.0) | 16.0 (16.0 to 16.0) | 3.00 |"),
            "{text}"
        );
        assert!(text.contains("| guest RAM touched, MB | 32.0 (32.0 to 32.0) | 0.0 (0.0 to 0.0) | - |"), "{text}");
    }
}
