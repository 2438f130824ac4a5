// SPDX-License-Identifier: Apache-2.0
//! Moments in the guest, collected for the host's trace.

use std::time::Duration;

use rustix::time::{ClockId, clock_gettime};

/// How many points one trace holds; later ones are dropped.
const MAX_POINTS: usize = 64;

/// The guest's CLOCK_MONOTONIC.
pub fn now() -> Duration {
    let time = clock_gettime(ClockId::Monotonic);
    let seconds = u64::try_from(time.tv_sec).unwrap_or(0);
    let nanoseconds = u32::try_from(time.tv_nsec).unwrap_or(0);
    Duration::new(seconds, nanoseconds)
}

/// A duration in nanoseconds, as the protocol carries it; saturates after 584 years.
pub fn nanoseconds(duration: Duration) -> u64 {
    u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)
}

/// A named span of time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TracePoint {
    /// What happened.
    pub name: &'static str,
    /// When it began, on CLOCK_MONOTONIC.
    pub begin: Duration,
    /// When it ended, on CLOCK_MONOTONIC.
    pub end: Duration,
}

/// A bounded list of spans, in the order in which they ended.
#[derive(Clone, Debug, Default)]
pub struct Trace {
    points: Vec<TracePoint>,
}

impl Trace {
    /// Adds the span from `begin` to now, and returns now: the begin of what follows.
    pub fn add(&mut self, name: &'static str, begin: Duration) -> Duration {
        let end = now();
        if self.points.len() < MAX_POINTS {
            self.points.push(TracePoint { name, begin, end });
        }
        end
    }

    /// The spans so far.
    pub fn points(&self) -> &[TracePoint] {
        &self.points
    }

    /// Takes the spans out, leaving none.
    pub fn take(&mut self) -> Vec<TracePoint> {
        std::mem::take(&mut self.points)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn spans_follow_each_other() {
        let mut trace = Trace::default();
        let start = now();
        let middle = trace.add("first", start);
        trace.add("second", middle);

        let points = trace.points();

        assert_eq!(points[0].end, points[1].begin);
        assert!(points[0].begin <= points[0].end);
    }

    #[test]
    fn list_is_bounded() {
        let mut trace = Trace::default();
        for _ in 0..2 * MAX_POINTS {
            trace.add("point", now());
        }
        assert_eq!(trace.take().len(), MAX_POINTS);
        assert!(trace.points().is_empty());
    }
}
