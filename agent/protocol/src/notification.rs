// SPDX-License-Identifier: Apache-2.0
//! What a container tells of itself by sd_notify(3), as far as it is told outside: that it is ready. The agent looks for it in what
//! the container sends, and the host, which does not trust the agent, looks again.

/// Most bytes of a message that are looked at, as service managers do.
pub const MAX_LEN: usize = 4096;

/// What a line begins with that says so.
const READY: &str = "READY=";

/// Whether it is one line that says so, and nothing that could be taken for another one or for a terminal's commands.
#[must_use]
pub fn is_ready_line(line: &str) -> bool {
    line.len() <= MAX_LEN && line.starts_with(READY) && line.bytes().all(|byte| matches!(byte, b' '..=b'~'))
}

/// The first line of a message that says so.
#[must_use]
pub fn ready_line(message: &[u8]) -> Option<&str> {
    let message = &message[..message.len().min(MAX_LEN)];
    let mut lines = message.split(|byte| *byte == b'\n').filter_map(|line| std::str::from_utf8(line).ok());
    lines.find(|line| is_ready_line(line))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_line_is_found_wherever_it_is() {
        for message in
            ["READY=1", "READY=1\n", "STATUS=a\nREADY=1\nSTATUS=b", "\n\nREADY=1\nREADY=2", "\u{e4}\nREADY=1"]
        {
            assert_eq!(ready_line(message.as_bytes()), Some("READY=1"), "{message:?}");
        }
        assert_eq!(ready_line(b"\xff\nREADY=1"), Some("READY=1"));
    }

    #[test]
    fn what_is_no_such_line_is_none() {
        for message in
            ["", "READY", " READY=1", "ALREADY=1", "STATUS=READY=1", "READY=\x1b[2J", "READY=1\r\n", "READY=\u{e4}"]
        {
            assert_eq!(ready_line(message.as_bytes()), None, "{message:?}");
        }
        assert!(is_ready_line("READY=1") && !is_ready_line("READY=1\nMAINPID=1") && !is_ready_line("READY=1\0"));
    }

    #[test]
    fn what_is_long_is_cut() {
        let mut message = b"READY=1\n".to_vec();
        message.resize(1 << 20, b'x');
        assert_eq!(ready_line(&message), Some("READY=1"));
        let mut late = vec![b'x'; MAX_LEN];
        late.extend(b"\nREADY=1");
        assert_eq!(ready_line(&late), None);
        let long = format!("READY={}", "x".repeat(2 * MAX_LEN));
        assert_eq!(ready_line(long.as_bytes()).map(str::len), Some(MAX_LEN));
        assert!(!is_ready_line(&long));
    }
}
