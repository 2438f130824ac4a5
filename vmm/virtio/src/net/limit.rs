// SPDX-License-Identifier: Apache-2.0
//! Bytes and frames per second, for each direction of a device: all of its pairs of queues share them.
//!
//! A token bucket, kept as the moment at which everything so far is paid for: a frame may go once that has come, and puts it
//! off by its own cost. Frames that may not go wait where they are, in the tap or in the guest's ring.

use std::num::NonZeroU64;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

/// For how long nothing may have gone before, to be made up for in one burst.
const BURST: Duration = Duration::from_millis(100);
const SECOND_NS: u64 = 1_000_000_000;

/// How much may go in one direction; `None` is without bound.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Rate {
    /// Bytes of frames a second.
    pub bytes_per_second: Option<NonZeroU64>,
    /// Frames a second, each of up to 64 KiB where segmentation is left to the receiver.
    pub packets_per_second: Option<NonZeroU64>,
}

/// How much may go in each direction.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Limits {
    /// What the guest receives.
    pub rx: Rate,
    /// What it sends.
    pub tx: Rate,
}

impl Limits {
    /// Whether there is any.
    #[must_use]
    pub fn are_set(&self) -> bool {
        *self != Self::default()
    }
}

/// The limits of a running device.
#[derive(Debug)]
pub(super) struct Limiter {
    pub(super) rx: Pace,
    pub(super) tx: Pace,
}

impl Limiter {
    pub(super) fn new(limits: &Limits) -> Self {
        Self { rx: Pace::new(limits.rx), tx: Pace::new(limits.tx) }
    }
}

/// The pace of one direction.
#[derive(Debug)]
pub(super) struct Pace(Mutex<[Option<Clock>; 2]>);

/// When all that has gone so far is paid for at a rate.
#[derive(Debug, Clone, Copy)]
struct Clock {
    per_second: NonZeroU64,
    paid: Instant,
}

impl Pace {
    fn new(rate: Rate) -> Self {
        let paid = Instant::now();
        let clock = |rate: Option<NonZeroU64>| rate.map(|per_second| Clock { per_second, paid });
        Self(Mutex::new([clock(rate.bytes_per_second), clock(rate.packets_per_second)]))
    }

    /// How long the next frame has to wait; `None` if it may go.
    pub(super) fn wait(&self, now: Instant) -> Option<Duration> {
        let clocks = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let waits = clocks.iter().flatten().map(|clock| clock.paid.saturating_duration_since(now));
        waits.max().filter(|wait| !wait.is_zero())
    }

    /// A frame of `len` bytes goes.
    pub(super) fn pay(&self, now: Instant, len: usize) {
        let mut clocks = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        for (clock, count) in clocks.iter_mut().zip([len as u64, 1]) {
            let Some(clock) = clock else { continue };
            let oldest = now.checked_sub(BURST).unwrap_or(now);
            let cost = Duration::from_nanos(count.saturating_mul(SECOND_NS) / clock.per_second);
            clock.paid = clock.paid.max(oldest) + cost;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pace(bytes: Option<u64>, packets: Option<u64>) -> Pace {
        let (bytes_per_second, packets_per_second) =
            (bytes.and_then(NonZeroU64::new), packets.and_then(NonZeroU64::new));
        Pace::new(Rate { bytes_per_second, packets_per_second })
    }

    /// How many frames of `len` bytes may go from `from` on, for as long as `time`.
    fn count(pace: &Pace, from: Instant, time: Duration, len: usize) -> usize {
        let (mut now, mut count) = (from, 0);
        while now < from + time {
            match pace.wait(now) {
                None => {
                    pace.pay(now, len);
                    count += 1;
                }
                Some(wait) => now += wait,
            }
        }
        count
    }

    #[test]
    fn as_many_go_as_may_and_a_burst() {
        let start = Instant::now() + Duration::from_secs(5);
        let second = Duration::from_secs(1);

        assert!((1100..=1102).contains(&count(&pace(Some(100_000), None), start, second, 100)));
        assert!((55..=57).contains(&count(&pace(None, Some(50)), start, second, 1500)));
        assert!((55..=57).contains(&count(&pace(Some(1_000_000), Some(50)), start, second, 100)));
    }

    #[test]
    fn a_frame_larger_than_a_burst_goes_and_is_paid_for() {
        let (start, pace) = (Instant::now() + Duration::from_secs(1), pace(Some(1000), None));
        assert_eq!(pace.wait(start), None);

        pace.pay(start, 60_000);

        assert_eq!(pace.wait(start), Some(Duration::from_secs(60) - BURST));
        assert_eq!(pace.wait(start + Duration::from_secs(60)), None);
    }

    #[test]
    fn without_a_rate_nothing_waits() {
        let (start, pace) = (Instant::now(), pace(None, None));
        pace.pay(start, usize::MAX);
        assert_eq!(pace.wait(start), None);
        assert!(!Limits::default().are_set());
    }
}
