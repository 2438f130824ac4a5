// SPDX-License-Identifier: Apache-2.0
//! Why a case did not pass.

use std::error::Error;

/// A case that did not pass.
#[derive(Debug)]
pub(crate) enum Failure {
    /// Something was not as it has to be, or the case could not be set up.
    Failed(String),
    /// It cannot be run here; the reason.
    Skipped(String),
}

/// What a case gives back.
pub(crate) type Result<T = ()> = std::result::Result<T, Failure>;

impl<E: Error> From<E> for Failure {
    fn from(error: E) -> Self {
        Self::Failed(error.to_string())
    }
}

/// Adds what was being done to an error.
pub(crate) trait Context<T> {
    fn context(self, doing: impl FnOnce() -> String) -> Result<T>;
}

impl<T, E: Error> Context<T> for std::result::Result<T, E> {
    fn context(self, doing: impl FnOnce() -> String) -> Result<T> {
        self.map_err(|error| Failure::Failed(format!("{}: {error}", doing())))
    }
}

/// Fails the case with the formatted text.
macro_rules! fail {
    ($($text:tt)+) => {
        return Err($crate::failure::Failure::Failed(format!($($text)+)))
    };
}

/// Skips the case with the formatted reason.
macro_rules! skip {
    ($($text:tt)+) => {
        return Err($crate::failure::Failure::Skipped(format!($($text)+)))
    };
}

/// Fails the case with the formatted text unless the condition holds.
macro_rules! ensure {
    ($condition:expr, $($text:tt)+) => {
        if !$condition {
            $crate::failure::fail!($($text)+);
        }
    };
}

/// Fails the case unless both values are equal; the text says what they are.
macro_rules! ensure_eq {
    ($seen:expr, $expected:expr, $($text:tt)+) => {
        match (&$seen, &$expected) {
            (seen, expected) => {
                if seen != expected {
                    $crate::failure::fail!("{}: {seen:?} instead of {expected:?}", format_args!($($text)+));
                }
            }
        }
    };
}

pub(crate) use {ensure, ensure_eq, fail, skip};
