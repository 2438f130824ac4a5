// SPDX-License-Identifier: Apache-2.0
//! The rounds: each case once a round, so that whatever changes on the machine meanwhile concerns all of them.

use std::hint;
use std::time::{Duration, Instant};

use crate::cases::{Case, Programs};
use crate::error::BenchError;
use crate::exec::Target;
use crate::report::CaseResult;
use crate::start::{self, Sample};
use crate::{say, stage};

/// How long the kernel may finish before each start what the last one left behind.
const SETTLE: Duration = Duration::from_millis(100);

/// How long a CPU is idle during a start at most, unless the clock jumped: a start waits for nothing but short timers of the
/// kernel.
const IDLE_MAX: Duration = Duration::from_millis(60);

/// How often a start is repeated in which the clock jumped.
const REPEATS_MAX: usize = 5;

/// Starts each case once for nothing, then `runs` times. A case that failed is not tried again. With `counted`, the clock
/// counts instructions: it jumps when the CPU idles until something comes from outside the emulated machine, so a start
/// with more idle time than [`IDLE_MAX`] is repeated. Gives the results, and how many starts were repeated.
pub(crate) fn measure(programs: &Programs, cases: Vec<Case>, runs: usize, counted: bool) -> (Vec<CaseResult>, usize) {
    let mut results: Vec<CaseResult> =
        cases.into_iter().map(|case| CaseResult { case, samples: Vec::new(), failure: None }).collect();
    let mut targets = Vec::new();
    for result in &mut results {
        match Target::start(programs, result.case.kind) {
            Ok(target) => targets.extend(target),
            Err(error) => result.failure = Some(error.to_string()),
        }
    }
    let mut repeated = 0;
    for round in 0..=runs {
        say(&format!("bench: round {round} of {runs}\n"));
        for result in results.iter_mut().filter(|result| result.failure.is_none()) {
            let outcome = loop {
                let id = format!("bench-{}-{round}-{repeated}", result.case.name);
                let (outcome, idle) = measure_once(programs, &result.case, &id);
                if !counted || idle <= IDLE_MAX || repeated >= REPEATS_MAX * (runs + 1) {
                    break outcome;
                }
                repeated += 1;
            };
            match outcome {
                Ok(sample) if round > 0 => result.samples.push(sample),
                Ok(_) => {}
                Err(error) => result.failure = Some(error.to_string()),
            }
        }
    }
    (results, repeated)
}

/// One start, and how long the CPUs were idle during it.
fn measure_once(programs: &Programs, case: &Case, id: &str) -> (Result<Sample, BenchError>, Duration) {
    settle();
    let before = idle_time();
    let outcome = start::measure(case.name, &programs.invocation(case.kind, id, &[]), case.output);
    (outcome, idle_time().saturating_sub(before))
}

/// Lets the kernel finish what the last start left to it, without leaving the CPU idle: where instructions are counted, the
/// clock of an idle CPU may jump.
pub(crate) fn settle() {
    let began = Instant::now();
    while began.elapsed() < SETTLE {
        hint::spin_loop();
    }
}

/// How long the CPUs have been idle altogether; zero where the kernel does not tell.
fn idle_time() -> Duration {
    stage::read("/proc/uptime").map(|text| parse_idle(&text)).unwrap_or_default()
}

/// The second number of /proc/uptime, in seconds.
fn parse_idle(uptime: &str) -> Duration {
    let seconds = uptime.split_whitespace().nth(1).and_then(|word| word.parse().ok()).unwrap_or(0.0);
    Duration::try_from_secs_f64(seconds).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn idle_time_is_the_second_number() {
        assert_eq!(parse_idle("350735.47 234388.90\n"), Duration::from_millis(234_388_900));
        assert_eq!(parse_idle("350735.47"), Duration::ZERO);
    }
}
