// SPDX-License-Identifier: Apache-2.0
//! Tells the program which commit it is built from.

use std::path::Path;
use std::process::Command;

fn main() {
    // A build from an archive, or one by a packager, names its commit itself.
    println!("cargo:rerun-if-env-changed=BULKHEAD_COMMIT");
    for path in ["../.git/HEAD", "../.git/logs/HEAD"] {
        if Path::new(path).exists() {
            println!("cargo:rerun-if-changed={path}");
        }
    }
    let commit = std::env::var("BULKHEAD_COMMIT").ok().or_else(from_git).unwrap_or_else(|| "unknown".to_owned());
    println!("cargo:rustc-env=BULKHEAD_COMMIT={commit}");
}

fn from_git() -> Option<String> {
    let output = Command::new("git").args(["rev-parse", "--short=12", "HEAD"]).output().ok()?;
    let commit = String::from_utf8(output.stdout).ok()?;
    output.status.success().then(|| commit.trim().to_owned()).filter(|commit| !commit.is_empty())
}
