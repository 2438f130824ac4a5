// SPDX-License-Identifier: Apache-2.0
//! Generates the messages that the cases exchange with containerd and shims from `proto/`, without `protoc`.

use protobuf_codegen::{Codegen, Customize};

const FILES: [&str; 2] = ["cri", "shim"];

fn main() -> Result<(), Box<dyn std::error::Error>> {
    println!("cargo:rerun-if-changed=proto");
    let out = std::env::var("OUT_DIR")?;
    Codegen::new()
        .pure()
        .out_dir(&out)
        .include("proto")
        .inputs(FILES.map(|name| format!("proto/{name}.proto")))
        .customize(Customize::default().gen_mod_rs(false))
        .run()?;
    // The generated files begin with inner attributes, so they cannot be included: they are named as modules instead.
    let modules: String =
        FILES.iter().map(|name| format!("#[path = {:?}]\npub mod {name};\n", format!("{out}/{name}.rs"))).collect();
    Ok(std::fs::write(format!("{out}/modules.rs"), modules)?)
}
