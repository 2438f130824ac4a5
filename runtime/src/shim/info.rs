// SPDX-License-Identifier: Apache-2.0
//! `-info`: what containerd shows of a runtime, and asks for before it uses a newer feature of the specification.

use containerd_shim_protos::types::introspection::{RuntimeInfo, RuntimeVersion};
use protobuf::well_known_types::any::Any;
use protobuf::{Message, MessageField};

use super::RUNTIME;
use crate::commands::features;

/// The type of the specification's features, which are JSON, as containerd names it.
const FEATURES: &str = "types.containerd.io/opencontainers/runtime-spec/1/features/Features";

/// The answer.
pub(super) fn encode() -> Result<Vec<u8>, protobuf::Error> {
    let version = RuntimeVersion {
        version: env!("CARGO_PKG_VERSION").to_owned(),
        revision: env!("BULKHEAD_COMMIT").to_owned(),
        ..RuntimeVersion::default()
    };
    let features =
        Any { type_url: FEATURES.to_owned(), value: features::features().to_string().into(), ..Any::default() };
    let info = RuntimeInfo {
        name: RUNTIME.to_owned(),
        version: MessageField::some(version),
        features: MessageField::some(features),
        ..RuntimeInfo::default()
    };
    info.write_to_bytes()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_features_are_those_of_the_command_line() {
        let info = RuntimeInfo::parse_from_bytes(&encode().unwrap()).unwrap();

        assert_eq!(info.name, "io.containerd.bulkhead.v2");
        assert_eq!(info.version.version, env!("CARGO_PKG_VERSION"));
        assert_eq!(info.features.type_url, FEATURES);
        assert_eq!(serde_json::from_slice::<serde_json::Value>(&info.features.value).unwrap(), features::features());
    }
}
