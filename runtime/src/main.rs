// SPDX-License-Identifier: Apache-2.0
//! The `bulkhead` program.

use std::process::ExitCode;

fn main() -> ExitCode {
    bulkhead::main()
}
