// SPDX-License-Identifier: Apache-2.0
//! Properties that the specification does not know: ignored, as it demands, but told under `--debug`.

use serde_json::Value;

/// The paths of properties that are in `given` but not in what was understood of it; nulls and empty lists count as
/// absent.
#[must_use]
pub(crate) fn unknown_properties(given: &Value, understood: &Value) -> Vec<String> {
    let mut unknown = Vec::new();
    compare("", given, understood, &mut unknown);
    unknown
}

fn compare(path: &str, given: &Value, understood: &Value, unknown: &mut Vec<String>) {
    match (given, understood) {
        (Value::Object(given), Value::Object(understood)) => {
            for (key, value) in given {
                let path = if path.is_empty() { key.clone() } else { format!("{path}.{key}") };
                match understood.get(key) {
                    Some(understood) => compare(&path, value, understood, unknown),
                    None if value.is_null() || value.as_array().is_some_and(Vec::is_empty) => {}
                    None => unknown.push(path),
                }
            }
        }
        (Value::Array(given), Value::Array(understood)) => {
            for (index, (given, understood)) in given.iter().zip(understood).enumerate() {
                compare(&format!("{path}[{index}]"), given, understood, unknown);
            }
        }
        _ => {}
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use oci_spec::runtime::Spec;
    use serde_json::json;

    #[test]
    fn unknown_properties_are_found_at_any_depth() {
        let given = json!({
            "ociVersion": "1.0.0", "future": 1, "gone": null,
            "root": {"path": "r", "color": "red"},
            "mounts": [{"destination": "/a"}, {"destination": "/b", "x": {}}],
        });
        let spec: Spec = serde_json::from_value(given.clone()).unwrap();

        let mut unknown = unknown_properties(&given, &serde_json::to_value(&spec).unwrap());

        unknown.sort();
        assert_eq!(unknown, ["future", "mounts[1].x", "root.color"]);
    }
}
