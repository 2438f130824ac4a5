// SPDX-License-Identifier: Apache-2.0
//! Tells the program which commit it is built from, and generates the messages of `proto/`, without `protoc`.

use std::path::Path;
use std::process::Command;

use protobuf_codegen::{Codegen, Customize};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    // A build from an archive, or one by a packager, names its commit itself.
    println!("cargo:rerun-if-env-changed=BULKHEAD_COMMIT");
    for path in ["../.git/HEAD", "../.git/logs/HEAD"] {
        if Path::new(path).exists() {
            println!("cargo:rerun-if-changed={path}");
        }
    }
    let commit = std::env::var("BULKHEAD_COMMIT").ok().or_else(from_git).unwrap_or_else(|| "unknown".to_owned());
    println!("cargo:rustc-env=BULKHEAD_COMMIT={commit}");
    generate()
}

fn generate() -> Result<(), Box<dyn std::error::Error>> {
    println!("cargo:rerun-if-changed=proto");
    let out = std::env::var("OUT_DIR")?;
    Codegen::new()
        .pure()
        .out_dir(&out)
        .include("proto")
        .input("proto/cri.proto")
        .customize(Customize::default().gen_mod_rs(false))
        .run()?;
    // The generated file begins with inner attributes, so it cannot be included: it is named as a module instead.
    let module = format!("#[path = {:?}]\npub mod cri;\n", format!("{out}/cri.rs"));
    Ok(std::fs::write(format!("{out}/modules.rs"), module)?)
}

fn from_git() -> Option<String> {
    let output = Command::new("git").args(["rev-parse", "--short=12", "HEAD"]).output().ok()?;
    let commit = String::from_utf8(output.stdout).ok()?;
    output.status.success().then(|| commit.trim().to_owned()).filter(|commit| !commit.is_empty())
}
