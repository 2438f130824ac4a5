// SPDX-License-Identifier: Apache-2.0
//! The messages of `proto/`.

#![allow(
    dead_code,
    missing_docs,
    missing_debug_implementations,
    unreachable_pub,
    unused_results,
    clippy::all,
    clippy::pedantic,
    clippy::restriction,
    reason = "generated code"
)]

mod generated {
    include!(concat!(env!("OUT_DIR"), "/modules.rs"));
}

pub(crate) use generated::{cri, shim};
