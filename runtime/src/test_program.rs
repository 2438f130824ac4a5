// SPDX-License-Identifier: Apache-2.0
//! Programs for tests.

use std::path::Path;
use std::process::Command;

/// Makes a program of a script, by another process: what this one has open for writing, a process that another test is just
/// starting may have too, and then it cannot be executed.
pub(crate) fn write(path: &Path, script: &str) {
    let writing = r#"printf %s "$1" >"$2" && chmod 755 "$2""#;
    let written = Command::new("/bin/sh").args(["-c", writing, "sh", script]).arg(path).status().unwrap();
    assert!(written.success(), "{written}");
}
