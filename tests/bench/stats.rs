// SPDX-License-Identifier: Apache-2.0
//! What a handful of durations amount to.

use std::time::Duration;

/// The middle and the ends of a set of durations.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Summary {
    pub(crate) median: Duration,
    pub(crate) min: Duration,
    pub(crate) max: Duration,
}

impl Summary {
    /// `None` of no durations. The median of an even number of them is the mean of the middle two.
    pub(crate) fn of(durations: &[Duration]) -> Option<Self> {
        let mut sorted = durations.to_vec();
        sorted.sort_unstable();
        let (min, max) = (*sorted.first()?, *sorted.last()?);
        let upper = sorted[sorted.len() / 2];
        let lower = sorted[(sorted.len() - 1) / 2];
        Some(Self { median: (lower + upper) / 2, min, max })
    }
}

/// The same of other figures.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Spread {
    pub(crate) median: f64,
    pub(crate) min: f64,
    pub(crate) max: f64,
}

impl Spread {
    /// As [`Summary::of`].
    pub(crate) fn of(figures: &[f64]) -> Option<Self> {
        let mut sorted = figures.to_vec();
        sorted.sort_unstable_by(f64::total_cmp);
        let (min, max) = (*sorted.first()?, *sorted.last()?);
        let upper = sorted[sorted.len() / 2];
        let lower = sorted[(sorted.len() - 1) / 2];
        Some(Self { median: lower.midpoint(upper), min, max })
    }
}

/// Milliseconds, for people.
pub(crate) fn millis(duration: Duration) -> f64 {
    duration.as_secs_f64() * 1000.0
}

#[cfg(test)]
mod tests {
    use super::*;

    fn summary(values_ms: &[u64]) -> Option<[u128; 3]> {
        let durations: Vec<_> = values_ms.iter().copied().map(Duration::from_millis).collect();
        Summary::of(&durations).map(|s| [s.min.as_millis(), s.median.as_millis(), s.max.as_millis()])
    }

    #[test]
    fn nothing_has_no_median() {
        assert_eq!(summary(&[]), None);
    }

    #[test]
    fn odd_number_has_a_middle() {
        assert_eq!(summary(&[9, 1, 5]), Some([1, 5, 9]));
    }

    #[test]
    fn even_number_takes_the_mean_of_two() {
        assert_eq!(summary(&[8, 1, 4, 2]), Some([1, 3, 8]));
    }
}
