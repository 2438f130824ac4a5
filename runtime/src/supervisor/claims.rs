// SPDX-License-Identifier: Apache-2.0
//! What the containers in a machine may use of it: a limit for each that has one.

use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard, PoisonError};

/// The limits, by numbers that stand for the containers.
#[derive(Debug)]
pub(super) struct Claims<T>(Mutex<Noted<T>>);

#[derive(Debug)]
struct Noted<T> {
    last: u64,
    limits: HashMap<u64, T>,
}

impl<T: Copy> Claims<T> {
    pub(super) fn new() -> Self {
        Self(Mutex::new(Noted { last: 0, limits: HashMap::new() }))
    }

    fn noted(&self) -> MutexGuard<'_, Noted<T>> {
        // Nothing panics while the lock is held.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The number of a further container, which has no limit.
    pub(super) fn add(&self) -> u64 {
        let mut noted = self.noted();
        noted.last += 1;
        noted.last
    }

    pub(super) fn get(&self, number: u64) -> Option<T> {
        self.noted().limits.get(&number).copied()
    }

    pub(super) fn set(&self, number: u64, limit: Option<T>) {
        let mut noted = self.noted();
        match limit {
            Some(limit) => noted.limits.insert(number, limit),
            None => noted.limits.remove(&number),
        };
    }

    /// All limits that there are.
    pub(super) fn all(&self) -> Vec<T> {
        self.noted().limits.values().copied().collect()
    }
}
