// SPDX-License-Identifier: Apache-2.0
//! The cases.

mod filesystem;
mod program;
mod stdio;

use std::future::Future;
use std::pin::Pin;

/// A case: what it is called, and how it is run.
type Case = (&'static str, fn() -> Pin<Box<dyn Future<Output = ()>>>);

macro_rules! cases {
    ($($module:ident::$name:ident),* $(,)?) => {
        /// All cases.
        pub(crate) const CASES: &[Case] =
            &[$((concat!(stringify!($module), "::", stringify!($name)), || Box::pin($module::$name()))),*];
    };
}

cases![program::echo, program::exit_codes,];
