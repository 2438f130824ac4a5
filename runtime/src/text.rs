// SPDX-License-Identifier: Apache-2.0
//! Text of others, made fit for one line of a terminal or a log.

use std::error::Error;

/// Most bytes of foreign text in one message.
const MAX_FOREIGN: usize = 1024;

/// `text` as one line: control characters (escape sequences with them) replaced, line ends by ` | `, at most
/// 1 KiB (1024 bytes), of which the end is kept.
#[must_use]
pub(crate) fn one_line(text: &str) -> String {
    let mut line = String::with_capacity(text.len().min(MAX_FOREIGN));
    for part in tail(text, MAX_FOREIGN).split(['\n', '\r']).map(str::trim).filter(|part| !part.is_empty()) {
        if !line.is_empty() {
            line.push_str(" | ");
        }
        line.extend(part.chars().map(|c| if c.is_control() { '\u{fffd}' } else { c }));
    }
    line
}

/// The last `max` bytes of `text` at most, cut at a character.
fn tail(text: &str, max: usize) -> &str {
    let mut start = text.len().saturating_sub(max);
    while !text.is_char_boundary(start) {
        start += 1;
    }
    &text[start..]
}

/// An error and its causes in one line, joined by `: `.
#[must_use]
pub(crate) fn chain(error: &dyn Error) -> String {
    let mut line = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        line.push_str(": ");
        line.push_str(&error.to_string());
        cause = error.source();
    }
    line
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_line_joins_lines_and_replaces_control_characters() {
        assert_eq!(one_line("a\r\n\n b\x1b[2Jc\n"), "a | b\u{fffd}[2Jc");
    }

    #[test]
    fn one_line_keeps_the_end_of_long_text() {
        let text = format!("{}é{}", "x".repeat(2000), "y".repeat(MAX_FOREIGN - 1));

        let line = one_line(&text);

        assert_eq!(line, "y".repeat(MAX_FOREIGN - 1));
    }

    #[test]
    fn chain_says_each_cause_once() {
        #[derive(Debug, thiserror::Error)]
        #[error("cannot open x")]
        struct Outer(#[source] std::io::Error);

        assert_eq!(chain(&Outer(std::io::Error::other("no"))), "cannot open x: no");
    }
}
