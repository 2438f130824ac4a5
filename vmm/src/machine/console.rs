// SPDX-License-Identifier: Apache-2.0
//! The guest's console: the two registers of a serial port that the kernel's early console uses, and a log.
//!
//! The guest has no driver for it, so a quiet guest never touches it. What it prints goes to a file, bounded: the file's
//! beginning is what came first, and its last 4 KiB are what came last, since it is the end that says why a guest died.

use std::collections::VecDeque;
use std::fs::File;
use std::os::unix::fs::FileExt;

use crate::config::CONSOLE_LOG_MAX;

/// The first port of the serial port (COM1).
pub const SERIAL_PORT: u16 = 0x3f8;
/// How many ports it has.
pub const SERIAL_PORT_LEN: u16 = 8;

/// Transmit register, when the divisor is not selected.
const TRANSMIT: u16 = 0;
/// Line control register; bit 7 selects the divisor.
const LINE_CONTROL: u16 = 3;
const DIVISOR_SELECTED: u8 = 1 << 7;
/// Line status register: transmitter empty and ready.
const LINE_STATUS: u16 = 5;
const TRANSMITTER_READY: u8 = 0x60;

/// Longest line that is looked at.
const LINE_MAX: usize = 512;
/// How much of the end is always kept.
const TAIL_MAX: usize = 4096;
/// How much of a line beyond the beginning may be missing in the file, as each time the whole tail is written.
const UNWRITTEN_MAX: usize = 64;
/// How much of the beginning is kept; the tail comes behind it.
const HEAD_MAX: usize = CONSOLE_LOG_MAX - TAIL_MAX;
/// How a kernel begins the line that says why it died.
const PANIC_MARK: &[u8] = b"Kernel panic - not syncing: ";
/// Longest panic message that is reported.
const PANIC_MESSAGE_MAX: usize = 256;

/// The console of a machine.
#[derive(Debug)]
pub struct Console {
    log: File,
    logged: usize,
    line: Vec<u8>,
    tail: VecDeque<u8>,
    /// Bytes of the tail that are not in the file yet.
    unwritten: usize,
    panic: Option<String>,
    line_control: u8,
}

impl Console {
    /// A console that writes to `log`.
    #[must_use]
    pub fn new(log: File) -> Self {
        Self { log, logged: 0, line: Vec::new(), tail: VecDeque::new(), unwritten: 0, panic: None, line_control: 0 }
    }

    /// The guest reads the register at `offset` from [`SERIAL_PORT`].
    #[must_use]
    pub fn read(&self, offset: u16) -> u8 {
        match offset {
            LINE_CONTROL => self.line_control,
            LINE_STATUS => TRANSMITTER_READY,
            _ => 0,
        }
    }

    /// The guest writes the register at `offset`.
    pub fn write(&mut self, offset: u16, value: u8) {
        match offset {
            TRANSMIT if self.line_control & DIVISOR_SELECTED == 0 => self.transmit(value),
            LINE_CONTROL => self.line_control = value,
            _ => {}
        }
    }

    fn transmit(&mut self, byte: u8) {
        if byte == b'\r' {
            return;
        }
        // At once, since a guest may hang in the middle of a line.
        self.keep(byte);
        self.line.push(byte);
        if byte == b'\n' || self.line.len() == LINE_MAX {
            if self.panic.is_none() {
                self.panic = panic_message(&self.line);
            }
            self.line.clear();
        }
    }

    /// Adds a line of the VMM's own to what is kept: why the guest will not get on, for whoever reads how that ended.
    pub fn note(&mut self, text: &str) {
        format!("\nbulkhead-vmm: {text}\n").bytes().for_each(|byte| self.keep(byte));
    }

    fn keep(&mut self, byte: u8) {
        // A log that cannot be written (a full disk) is not worth a guest's life.
        if self.logged < HEAD_MAX {
            let _ = self.log.write_all_at(&[byte], self.logged as u64);
            self.logged += 1;
            return;
        }
        if self.tail.len() == TAIL_MAX {
            self.tail.pop_front();
        }
        self.tail.push_back(byte);
        self.unwritten += 1;
        if byte != b'\n' && self.unwritten < UNWRITTEN_MAX {
            return;
        }
        self.unwritten = 0;
        // All of it: whoever reads the file, after whatever end of this process, finds the end at its end.
        let (older, newer) = self.tail.as_slices();
        let _ = self.log.write_all_at(older, HEAD_MAX as u64);
        let _ = self.log.write_all_at(newer, (HEAD_MAX + older.len()) as u64);
    }

    /// What the guest's kernel said when it panicked, printable and at most 256 bytes.
    #[must_use]
    pub fn panic_message(&self) -> Option<&str> {
        self.panic.as_deref()
    }
}

fn panic_message(line: &[u8]) -> Option<String> {
    let start = line.windows(PANIC_MARK.len()).position(|window| window == PANIC_MARK)? + PANIC_MARK.len();
    let message = &line[start..line.len().min(start + PANIC_MESSAGE_MAX)];
    let printable = |byte: &u8| if matches!(byte, b' '..=b'~') { char::from(*byte) } else { ' ' };
    Some(message.iter().map(printable).collect::<String>().trim().to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read, Seek};

    fn console() -> (Console, File) {
        let file = tempfile::tempfile().unwrap();
        (Console::new(file.try_clone().unwrap()), file)
    }

    fn say(console: &mut Console, text: &[u8]) {
        for byte in text {
            console.write(TRANSMIT, *byte);
        }
    }

    fn content(mut file: File) -> Vec<u8> {
        let mut bytes = Vec::new();
        file.rewind().unwrap();
        file.read_to_end(&mut bytes).unwrap();
        bytes
    }

    #[test]
    fn lines_are_logged() {
        let (mut console, file) = console();
        say(&mut console, b"one\r\ntwo");
        assert_eq!(content(file), b"one\ntwo");
    }

    #[test]
    fn the_divisor_is_not_output() {
        let (mut console, file) = console();
        console.write(LINE_CONTROL, DIVISOR_SELECTED);
        console.write(TRANSMIT, b'x');
        console.write(LINE_CONTROL, 3);
        assert_eq!(content(file), b"");
        assert_eq!(console.read(LINE_STATUS), TRANSMITTER_READY);
    }

    #[test]
    fn what_the_vmm_notes_is_a_line_of_its_own_and_no_panic() {
        let (mut console, file) = console();
        say(&mut console, b"half a li");
        console.note("Kernel panic - not syncing: no");
        assert_eq!(content(file), b"half a li\nbulkhead-vmm: Kernel panic - not syncing: no\n");
        assert_eq!(console.panic_message(), None);
    }

    #[test]
    fn a_panic_is_recognised_and_cleaned() {
        let (mut console, _file) = console();
        say(&mut console, b"[    0.1] Kernel panic - not syncing: No \x1bworking init.\n");
        assert_eq!(console.panic_message(), Some("No  working init."));
    }

    #[test]
    fn a_flood_is_bounded_and_keeps_its_end() {
        let (mut console, file) = console();
        for _ in 0..10_000 {
            say(&mut console, b"0123456789012345678901234567890123456789012345678\n");
        }
        say(&mut console, b"the end\n");
        let bytes = content(file);
        assert_eq!(bytes.len(), CONSOLE_LOG_MAX);
        assert!(bytes.starts_with(b"0123456789"));
        assert!(bytes.ends_with(b"\nthe end\n"));
    }
}
