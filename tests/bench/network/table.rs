// SPDX-License-Identifier: Apache-2.0
//! The figures, for people and for programs.

use std::fmt::Write;

use serde_json::{Value, json};

use super::measurement::Measurement;
use super::peer::Kind;
use crate::stats::Spread;

/// All that was measured of one peer.
#[derive(Debug)]
pub(super) struct PeerResult {
    pub(super) kind: Kind,
    /// In the order of [`Measurement::ALL`].
    pub(super) figures: [Vec<f64>; Measurement::ALL.len()],
    /// Why it has no figures, or fewer.
    pub(super) failure: Option<String>,
}

impl PeerResult {
    pub(super) fn new(kind: Kind) -> Self {
        Self { kind, figures: [const { Vec::new() }; Measurement::ALL.len()], failure: None }
    }
}

/// The table, as Markdown.
pub(super) fn table(machine: &str, results: &[PeerResult], rounds: usize, seconds: u32) -> String {
    let mut text = format!("{machine}\n\nMedian (lowest to highest) of {rounds}, {seconds} s each:\n\n");
    text.push_str("| measured | peer | figure | bulkhead-vhost / this | bulkhead / this |\n");
    text.push_str("| --- | --- | --- | --- | --- |\n");
    for (row, measurement) in Measurement::ALL.into_iter().enumerate() {
        let median = |vhost| {
            let own = results.iter().find(|result| result.kind == Kind::Bulkhead { vhost })?;
            Some(Spread::of(&own.figures[row])?.median)
        };
        for result in results {
            let Some(spread) = Spread::of(&result.figures[row]) else { continue };
            let Spread { median: middle, min, max } = spread;
            let ratios = [true, false].map(|vhost| median(vhost).map_or("-".to_owned(), |own| ratio(own, middle)));
            let [with, without] = ratios;
            let (what, peer) = (measurement.name(), result.kind.name());
            let _ = writeln!(text, "| {what} | {peer} | {middle:.0} ({min:.0} to {max:.0}) | {with} | {without} |");
        }
    }
    for result in results {
        if let Some(why) = &result.failure {
            let _ = writeln!(text, "\nfailed: {why}");
        }
    }
    text
}

fn ratio(own: f64, other: f64) -> String {
    if other > 0.0 { format!("{:.2}", own / other) } else { "-".to_owned() }
}

/// The same for programs.
pub(super) fn json(machine: &str, results: &[PeerResult], seconds: u32) -> Value {
    let peers: Vec<_> = results
        .iter()
        .map(|result| {
            let figures: serde_json::Map<_, _> = Measurement::ALL
                .into_iter()
                .zip(&result.figures)
                .map(|(measurement, figures)| (measurement.name(), json!(figures)))
                .collect();
            json!({"name": result.kind.name(), "figures": figures, "failure": result.failure})
        })
        .collect();
    json!({"machine": machine, "seconds": seconds, "peers": peers})
}

#[cfg(test)]
mod tests {
    use super::*;

    fn result(kind: Kind, figures: &[f64]) -> PeerResult {
        PeerResult { figures: [const { Vec::new() }; 5].map(|_: Vec<f64>| figures.to_vec()), ..PeerResult::new(kind) }
    }

    #[test]
    fn both_of_bulkhead_are_compared_with_each() {
        let results = [
            result(Kind::Bulkhead { vhost: true }, &[300.0, 100.0, 200.0]),
            result(Kind::Bulkhead { vhost: false }, &[100.0]),
            result(Kind::Runc, &[400.0]),
        ];

        let text = table("m", &results, 3, 2);

        assert!(
            text.contains("| sends, 4 streams, Mbit/s | bulkhead-vhost | 200 (100 to 300) | 1.00 | 0.50 |"),
            "{text}"
        );
        assert!(text.contains("| round trip of a byte, µs | runc | 400 (400 to 400) | 0.50 | 0.25 |"), "{text}");
    }

    #[test]
    fn what_is_missing_has_no_ratio() {
        let mut failed = PeerResult::new(Kind::Bulkhead { vhost: true });
        failed.failure = Some("no such file".into());

        let text = table("m", &[failed, result(Kind::Runc, &[1.0])], 3, 2);

        assert!(text.contains("| runc | 1 (1 to 1) | - | - |"), "{text}");
        assert!(text.contains("failed: no such file"), "{text}");
    }
}
