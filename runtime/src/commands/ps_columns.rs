// SPDX-License-Identifier: Apache-2.0
//! What `ps` prints of a process, by the options of ps(1) that make sense for processes of another machine.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use bulkhead_protocol::agent::ProcessInfo;
use thiserror::Error;

use crate::logging;
use crate::text;

/// Options that ask for the table that there is.
const FULL: [&str; 7] = ["-ef", "-e", "-f", "-A", "-eF", "ax", "-efww"];

/// A word of ps(1) that cannot be honoured.
#[derive(Debug, Error)]
pub(super) enum OptionError {
    #[error(
        "the option {0:?} of ps is not supported: the processes are a guest's (there are -ef, and -o with columns)"
    )]
    Unknown(String),
    #[error("ps has no column {0:?} for a guest's processes (there are {names})", names = NAMES.map(|(name, _)| name).join(", "))]
    Column(String),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Column {
    User,
    Pid,
    Parent,
    Usage,
    Started,
    Terminal,
    Time,
    State,
    Command,
}

/// A column, and what stands above it.
pub(super) type Titled = (&'static str, Column);

/// The columns by ps(1)'s names for them.
const NAMES: [(&str, Titled); 15] = [
    ("user", ("USER", Column::User)),
    ("uid", ("UID", Column::User)),
    ("euser", ("EUSER", Column::User)),
    ("pid", ("PID", Column::Pid)),
    ("ppid", ("PPID", Column::Parent)),
    ("c", ("C", Column::Usage)),
    ("stime", ("STIME", Column::Started)),
    ("tty", ("TT", Column::Terminal)),
    ("tname", ("TTY", Column::Terminal)),
    ("time", ("TIME", Column::Time)),
    ("s", ("S", Column::State)),
    ("state", ("S", Column::State)),
    ("cmd", ("CMD", Column::Command)),
    ("args", ("COMMAND", Column::Command)),
    ("command", ("COMMAND", Column::Command)),
];

/// Those of `ps -ef`.
const DEFAULT: [Titled; 8] = [
    ("UID", Column::User),
    ("PID", Column::Pid),
    ("PPID", Column::Parent),
    ("C", Column::Usage),
    ("STIME", Column::Started),
    ("TTY", Column::Terminal),
    ("TIME", Column::Time),
    ("CMD", Column::Command),
];

/// The columns that the options ask for.
pub(super) fn parse(options: &[String]) -> Result<Vec<Titled>, OptionError> {
    let mut columns = Vec::new();
    let mut rest = options.iter();
    while let Some(option) = rest.next() {
        if FULL.contains(&option.as_str()) {
            continue;
        }
        let list = match option.as_str() {
            "-o" | "o" | "--format" => rest.next().map(String::as_str),
            other => other.strip_prefix("-o").or_else(|| other.strip_prefix("--format=")),
        };
        let list = list.ok_or_else(|| OptionError::Unknown(option.clone()))?;
        for name in list.split([',', ' ']).filter(|name| !name.is_empty()) {
            let found = NAMES.iter().find(|(known, _)| *known == name);
            columns.push(found.ok_or_else(|| OptionError::Column(name.to_owned()))?.1);
        }
    }
    Ok(if columns.is_empty() { DEFAULT.to_vec() } else { columns })
}

/// The line of the columns' names.
pub(super) fn header(columns: &[Titled]) -> String {
    line(columns, |(title, _)| title.to_owned())
}

/// The line of a process. Users are numbers: the names are the container's own business.
pub(super) fn row(columns: &[Titled], process: &ProcessInfo, now: SystemTime) -> String {
    let now = now.duration_since(UNIX_EPOCH).unwrap_or(Duration::ZERO).as_secs();
    let cpu_seconds = process.cpu_ms / 1000;
    line(columns, |(_, column)| match column {
        Column::User => process.uid.to_string(),
        Column::Pid => process.pid.to_string(),
        Column::Parent => process.parent_pid.to_string(),
        Column::Usage => {
            let alive_seconds = now.saturating_sub(process.started_s).max(1);
            (cpu_seconds.saturating_mul(100) / alive_seconds).min(99).to_string()
        }
        Column::Started => started(process.started_s, now),
        Column::Terminal => text::one_line(&process.terminal),
        Column::Time => format!("{:02}:{:02}:{:02}", cpu_seconds / 3600, cpu_seconds / 60 % 60, cpu_seconds % 60),
        Column::State => text::one_line(&process.state),
        Column::Command => text::one_line(&process.command),
    })
}

/// Cells as wide as ps(1) makes them; the last one is open.
fn line(columns: &[Titled], cell: impl Fn(Titled) -> String) -> String {
    let mut line = String::new();
    for (index, titled) in columns.iter().enumerate() {
        let (text, (_, column)) = (cell(*titled), titled);
        if index > 0 {
            line.push(' ');
        }
        line.push_str(&match column {
            _ if index + 1 == columns.len() && matches!(column, Column::Command | Column::Terminal) => text,
            Column::Pid | Column::Parent => format!("{text:>7}"),
            Column::Usage => format!("{text:>2}"),
            Column::Time => format!("{text:>8}"),
            Column::State => format!("{text:<1}"),
            Column::Started => format!("{text:<5}"),
            Column::Command => format!("{text:<27}"),
            Column::User | Column::Terminal => format!("{text:<8}"),
        });
    }
    line
}

/// The time of the day in UTC, or, of an earlier day, month and day.
fn started(at: u64, now: u64) -> String {
    // The guest's word: a year beyond four digits has no shape to rely on.
    let (at, now) = (logging::rfc3339(at.min(u64::from(u32::MAX))), logging::rfc3339(now.min(u64::from(u32::MAX))));
    if at[..10] == now[..10] { at[11..16].to_owned() } else { at[5..10].to_owned() }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn words(text: &str) -> Vec<String> {
        text.split(' ').filter(|word| !word.is_empty()).map(str::to_owned).collect()
    }

    #[test]
    fn a_line_has_the_columns_of_ps() {
        let process = ProcessInfo {
            pid: 41,
            parent_pid: 1,
            uid: 1000,
            started_s: 1_709_251_199,
            cpu_ms: 3_723_000,
            terminal: "?".into(),
            command: "sleep\n9".into(),
            state: "S".into(),
            ..ProcessInfo::default()
        };
        let at = |seconds| UNIX_EPOCH + Duration::from_secs(seconds);
        let all = parse(&[]).unwrap();

        assert_eq!(header(&all), "UID          PID    PPID  C STIME TTY          TIME CMD");
        let same_day = row(&all, &process, at(1_709_251_199));
        assert_eq!(same_day, "1000          41       1 99 23:59 ?        01:02:03 sleep | 9");
        let later = row(&all, &process, at(1_709_251_199 + 86_400));
        assert_eq!(later, "1000          41       1  4 02-29 ?        01:02:03 sleep | 9");
        let some = parse(&words("-o pid,s -ocmd")).unwrap();
        assert_eq!(header(&some), "    PID S CMD");
        assert_eq!(row(&some, &process, at(0)), "     41 S sleep | 9");
        assert_eq!(header(&parse(&words("-o ppid,args")).unwrap()), "   PPID COMMAND");
    }

    #[test]
    fn what_cannot_be_shown_is_named() {
        assert!(matches!(parse(&words("aux")), Err(OptionError::Unknown(option)) if option == "aux"));
        assert!(matches!(parse(&words("-o")), Err(OptionError::Unknown(_))));
        assert!(matches!(parse(&words("-ef -o pid,rss")), Err(OptionError::Column(name)) if name == "rss"));
        assert_eq!(parse(&words("-ef")).unwrap(), DEFAULT);
    }

    #[test]
    fn no_time_of_a_guest_breaks_a_line() {
        assert_eq!(started(u64::MAX, 0), "02-07");
    }
}
