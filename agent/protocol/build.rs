// SPDX-License-Identifier: Apache-2.0
//! Generates the message types and the ttrpc service from `proto/agent.proto`.

use ttrpc_codegen::{Codegen, Customize, ProtobufCustomize};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    println!("cargo:rerun-if-changed=proto/agent.proto");
    let out = std::env::var("OUT_DIR")?;
    Codegen::new()
        .out_dir(&out)
        .include("proto")
        .input("proto/agent.proto")
        .rust_protobuf()
        .customize(Customize { async_all: true, ..Default::default() })
        .rust_protobuf_customize(ProtobufCustomize::default().gen_mod_rs(false))
        .run()?;
    // The generated files start with inner attributes, so they cannot be included: name them as modules instead.
    let modules: String = ["agent", "agent_ttrpc"]
        .iter()
        .map(|name| format!("#[path = {:?}]\npub mod {name};\n", format!("{out}/{name}.rs")))
        .collect();
    std::fs::write(format!("{out}/modules.rs"), modules)?;
    Ok(())
}
