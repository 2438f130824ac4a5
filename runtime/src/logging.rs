// SPDX-License-Identifier: Apache-2.0
//! The log: `--log FILE` in the two formats that engines know from runc, and stderr for the person at the terminal.
//!
//! Errors always go to stderr as `bulkhead: …`, and to the log file where there is one. Warnings and debug lines go to
//! the log file, or, without one, to stderr.

use std::fmt;
use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::path::Path;
use std::sync::OnceLock;
use std::time::{SystemTime, UNIX_EPOCH};

use clap::ValueEnum;

/// How a line of the log file looks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum LogFormat {
    /// `time="…" level=… msg="…"`.
    Text,
    /// `{"level":"…","msg":"…","time":"…"}`.
    Json,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Level {
    Error,
    Warning,
    Debug,
}

impl Level {
    fn name(self) -> &'static str {
        match self {
            Self::Error => "error",
            Self::Warning => "warning",
            Self::Debug => "debug",
        }
    }
}

struct Log {
    file: Option<File>,
    format: LogFormat,
    debug: bool,
}

static LOG: OnceLock<Log> = OnceLock::new();

/// Opens the log; later calls change nothing.
///
/// # Errors
///
/// The file cannot be opened for appending.
pub(crate) fn init(file: Option<&Path>, format: LogFormat, debug: bool) -> io::Result<()> {
    let file = file.map(|path| OpenOptions::new().append(true).create(true).open(path)).transpose()?;
    init_with(file, format, debug);
    Ok(())
}

/// Takes an open file for the log; later calls change nothing.
pub(crate) fn init_with(file: Option<File>, format: LogFormat, debug: bool) {
    let _ = LOG.set(Log { file, format, debug });
}

/// Tells the user what has failed.
pub(crate) fn error(message: fmt::Arguments<'_>) {
    to_stderr(format_args!("bulkhead: {message}"));
    to_file(Level::Error, message);
}

/// Tells the user something that needs attention but stops nothing.
pub(crate) fn warn(message: fmt::Arguments<'_>) {
    if !to_file(Level::Warning, message) {
        to_stderr(format_args!("bulkhead: warning: {message}"));
    }
}

/// Tells something that is not about what the caller has asked for: in the log file, or, under `--debug`, on stderr.
pub(crate) fn aside(message: fmt::Arguments<'_>) {
    if !to_file(Level::Warning, message) && debug_enabled() {
        to_stderr(format_args!("bulkhead: warning: {message}"));
    }
}

/// One of these ways to tell something.
pub(crate) type Tell = fn(fmt::Arguments<'_>);

/// Whether [`debug`] writes anything.
pub(crate) fn debug_enabled() -> bool {
    LOG.get().is_some_and(|log| log.debug)
}

/// Tells, under `--debug`, what is being done.
pub(crate) fn debug(message: fmt::Arguments<'_>) {
    if debug_enabled() && !to_file(Level::Debug, message) {
        to_stderr(format_args!("bulkhead: debug: {message}"));
    }
}

/// A line on stderr in one write; that stderr is gone is nobody's concern.
fn to_stderr(message: fmt::Arguments<'_>) {
    let _ = io::stderr().write_all(format!("{message}\n").as_bytes());
}

/// Whether there is a log file. A line that cannot be written (a full disk) is lost: the run matters more.
fn to_file(level: Level, message: fmt::Arguments<'_>) -> bool {
    let Some(Log { file: Some(file), format, .. }) = LOG.get() else {
        return false;
    };
    let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs());
    let line = render(*format, level, &message.to_string(), now);
    let mut file = file;
    let _ = file.write_all(line.as_bytes());
    true
}

fn render(format: LogFormat, level: Level, message: &str, unix_time: u64) -> String {
    let (level, time) = (level.name(), rfc3339(unix_time));
    let message = serde_json::Value::from(message);
    match format {
        // A JSON string is also a Go one, which is what logrus writes.
        LogFormat::Text => format!("time=\"{time}\" level={level} msg={message}\n"),
        LogFormat::Json => format!("{{\"level\":\"{level}\",\"msg\":{message},\"time\":\"{time}\"}}\n"),
    }
}

/// Seconds since 1970 as RFC 3339, in UTC. The date is found by counting days from 1 March of year 0, in eras of
/// 400 years.
pub(crate) fn rfc3339(unix_time: u64) -> String {
    const DAYS_FROM_YEAR_0_TO_1970: u64 = 719_468;
    const DAYS_PER_ERA: u64 = 146_097;
    let days = unix_time / 86_400 + DAYS_FROM_YEAR_0_TO_1970;
    let (era, day_of_era) = (days / DAYS_PER_ERA, days % DAYS_PER_ERA);
    let year_of_era = (day_of_era - day_of_era / 1_460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let month_from_march = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * month_from_march + 2) / 5 + 1;
    let month = if month_from_march < 10 { month_from_march + 3 } else { month_from_march - 9 };
    let year = era * 400 + year_of_era + u64::from(month <= 2);
    let (hour, minute, second) = (unix_time / 3600 % 24, unix_time / 60 % 60, unix_time % 60);
    format!("{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}Z")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rfc3339_knows_leap_days_and_century_ends() {
        assert_eq!(rfc3339(0), "1970-01-01T00:00:00Z");
        assert_eq!(rfc3339(951_782_400), "2000-02-29T00:00:00Z");
        assert_eq!(rfc3339(1_709_251_199), "2024-02-29T23:59:59Z");
        assert_eq!(rfc3339(4_102_444_799), "2099-12-31T23:59:59Z");
    }

    #[test]
    fn text_lines_have_the_shape_of_logrus() {
        let line = render(LogFormat::Text, Level::Error, "no \"x\"\n", 0);

        assert_eq!(line, "time=\"1970-01-01T00:00:00Z\" level=error msg=\"no \\\"x\\\"\\n\"\n");
    }

    #[test]
    fn json_lines_are_json() {
        let line = render(LogFormat::Json, Level::Warning, "a \"b\"", 0);

        let value: serde_json::Value = serde_json::from_str(&line).unwrap();
        assert_eq!(value, serde_json::json!({"level": "warning", "msg": "a \"b\"", "time": "1970-01-01T00:00:00Z"}));
    }
}
