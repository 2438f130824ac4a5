// SPDX-License-Identifier: Apache-2.0
//! Finds which field of a JSON text a parser stopped at.

/// The field that the byte before `line` and `column` (both from 1, columns in bytes, as `serde_json` counts) belongs
/// to, as in `process.args[0]`; empty for the top.
///
/// The text need only be well-formed up to there.
#[must_use]
pub(crate) fn field_at(text: &[u8], line: usize, column: usize) -> String {
    let line_start: usize =
        text.split_inclusive(|byte| *byte == b'\n').take(line.saturating_sub(1)).map(<[u8]>::len).sum();
    let end = (line_start + column).saturating_sub(1).min(text.len());
    render(&walk(&text[..end]))
}

/// Where the walk is in one object or array.
enum Level {
    Object { key: String },
    Array { index: usize },
}

fn walk(text: &[u8]) -> Vec<Level> {
    let mut levels = Vec::new();
    // The last string that ended, and whether it can be a key.
    let mut string = String::new();
    let mut position = 0;
    while position < text.len() {
        match text[position] {
            b'{' => levels.push(Level::Object { key: String::new() }),
            b'[' => levels.push(Level::Array { index: 0 }),
            b'}' | b']' => {
                levels.pop();
            }
            b',' => match levels.last_mut() {
                Some(Level::Array { index }) => *index += 1,
                Some(Level::Object { key }) => key.clear(),
                None => {}
            },
            b':' => {
                if let Some(Level::Object { key }) = levels.last_mut() {
                    *key = std::mem::take(&mut string);
                }
            }
            b'"' => {
                let length = string_length(&text[position + 1..]);
                string = String::from_utf8_lossy(&text[position + 1..position + 1 + length]).into_owned();
                position += length + 1;
            }
            _ => {}
        }
        position += 1;
    }
    levels
}

/// Bytes up to the closing quote, or to the end.
fn string_length(text: &[u8]) -> usize {
    let mut position = 0;
    while position < text.len() && text[position] != b'"' {
        position += if text[position] == b'\\' { 2 } else { 1 };
    }
    position.min(text.len())
}

fn render(levels: &[Level]) -> String {
    let mut field = String::new();
    for level in levels {
        match level {
            Level::Object { key } if key.is_empty() => {}
            Level::Object { key } => {
                if !field.is_empty() {
                    field.push('.');
                }
                field.push_str(key);
            }
            Level::Array { index } => field.push_str(&format!("[{index}]")),
        }
    }
    crate::text::one_line(&field)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn field_of_error(text: &str) -> String {
        let error = serde_json::from_str::<oci_spec::runtime::Spec>(text).unwrap_err();
        field_at(text.as_bytes(), error.line(), error.column())
    }

    #[test]
    fn names_nested_fields_and_indexes() {
        let text = "{\n \"ociVersion\": \"1.0.0\",\n \"process\": {\"cwd\": \"/\", \"user\": {\"uid\": 4294967296}}\n}";
        assert_eq!(field_of_error(text), "process.user.uid");

        let text = r#"{"mounts": [{"destination": "/a"}, {"destination": "/b", "options": ["ro", 3]}]}"#;
        assert_eq!(field_of_error(text), "mounts[1].options[1]");
    }

    #[test]
    fn is_not_misled_by_strings_with_brackets_and_escapes() {
        let text = r#"{"hostname": "}]\"{[", "annotations": {"a\"b": "x"}, "root": {"path": 1}}"#;

        assert_eq!(field_of_error(text), "root.path");
    }

    #[test]
    fn a_missing_field_is_named_by_its_object() {
        let text = r#"{"process": {"user": {"uid": 0}}}"#;

        // At its end, so by its last field: what is missing has no place.
        assert_eq!(field_of_error(text), "process.user");
    }

    #[test]
    fn survives_any_position() {
        for line in 0..4 {
            for column in 0..9 {
                let _ = field_at(b"{\"a\": [\"\\", line, column);
            }
        }
    }
}
