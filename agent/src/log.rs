// SPDX-License-Identifier: Apache-2.0
//! The agent's diagnostics: lines in the guest kernel's log, which the host keeps with the console.

use std::fs::File;
use std::io::Write;
use std::sync::OnceLock;

/// The kernel's log device.
const KMSG: &str = "/dev/kmsg";

/// The kernel cuts a record at about 1,000 bytes; longer messages are cut here, where the end can be marked.
const MAX_MESSAGE_LEN: usize = 900;

static KERNEL_LOG: OnceLock<File> = OnceLock::new();

/// The kernel's log levels (KERN_*) that the agent uses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Level {
    /// The sandbox ends because of it. Shown on the console.
    Critical = 2,
    /// Something could not be done. Shown on the console.
    Error = 3,
    /// Something is odd.
    Warning = 4,
    /// Something happened.
    Info = 6,
}

/// Opens the kernel's log. Until then, and where there is none, messages are dropped.
pub fn open() -> std::io::Result<()> {
    let file = File::options().write(true).open(KMSG)?;
    // A second call keeps the first file: they are the same device.
    let _ = KERNEL_LOG.set(file);
    Ok(())
}

/// Writes one line to the kernel's log.
pub fn write(level: Level, message: &str) {
    if let Some(mut file) = KERNEL_LOG.get() {
        // There is nobody to tell that the log cannot be written.
        let _ = file.write_all(record(level, message).as_bytes());
    }
}

fn record(level: Level, message: &str) -> String {
    let line = message.replace('\n', " / ");
    let mut end = line.len().min(MAX_MESSAGE_LEN);
    while !line.is_char_boundary(end) {
        end -= 1;
    }
    let cut = if end < line.len() { "..." } else { "" };
    format!("<{}>bulkhead-agent: {}{cut}\n", level as u8, &line[..end])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn message_becomes_one_record() {
        assert_eq!(record(Level::Error, "first\nsecond"), "<3>bulkhead-agent: first / second\n");
    }

    #[test]
    fn long_message_is_cut_between_characters() {
        let text = record(Level::Info, &"ä".repeat(MAX_MESSAGE_LEN));
        assert!(text.len() < 1000 && text.ends_with("...\n"));
    }
}
