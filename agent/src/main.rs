// SPDX-License-Identifier: Apache-2.0
//! The guest's first program.

use std::process::ExitCode;

fn main() -> ExitCode {
    bulkhead_agent::init::run()
}
