// SPDX-License-Identifier: Apache-2.0
//! The files of a container's processes in /proc (proc_pid_stat(5), proc_pid_status(5), proc_pid_cmdline(5)), with the pids
//! that the container's own namespace has. Its own /proc would have them too; but that is the container's to change.

use std::collections::HashMap;
use std::fmt::Write;
use std::fs::File;
use std::io::Read;
use std::path::Path;

use bulkhead_protocol::agent as wire;

use super::files::read_bounded;
use super::listing::{BATCH, MAX_COMMAND_LEN, MAX_PROCESSES, boot_time};

/// Bytes of all files together. The answer must fit into one message of 4 MiB; processes beyond are left out.
const MAX_FILES_LEN: usize = 3 << 20;

/// The fields of `stat` that are pids of processes, groups or sessions, as the manual counts them.
const PID_FIELDS: [usize; 5] = [1, 4, 5, 6, 8];

/// The lines of `status` with one pid.
const PID_LINES: [&str; 4] = ["Tgid", "Pid", "PPid", "TracerPid"];

/// The lines of `status` with a pid for each namespace, the outermost first.
const NAMESPACE_LINES: [&str; 4] = ["NStgid", "NSpid", "NSpgid", "NSsid"];

/// Reads the files of those of the processes that there still are.
pub(super) async fn read(pids: &[i32]) -> wire::ReadProcessesResponse {
    let mut found = Vec::new();
    let mut len = 0;
    'all: for batch in pids[..pids.len().min(MAX_PROCESSES)].chunks(BATCH) {
        for pid in batch {
            let Some(process) = Raw::read(Path::new(&format!("/proc/{pid}"))) else { continue };
            len += process.stat.len() + process.status.len() + process.cmdline.len();
            if len > MAX_FILES_LEN {
                break 'all;
            }
            found.push((*pid, process));
        }
        tokio::task::yield_now().await;
    }
    let inside: HashMap<i32, i32> = found.iter().map(|(pid, process)| (*pid, process.pid_inside)).collect();
    let processes = found.into_iter().filter_map(|(_, process)| process.translate(&inside)).collect();
    wire::ReadProcessesResponse { booted_s: boot_time(), processes, ..Default::default() }
}

/// The files as the agent sees them.
#[derive(Debug)]
struct Raw {
    /// In the container's pid namespace.
    pid_inside: i32,
    stat: String,
    status: String,
    cmdline: Vec<u8>,
}

impl Raw {
    fn read(folder: &Path) -> Option<Self> {
        let (stat, status) = (read_bounded(&folder.join("stat"))?, read_bounded(&folder.join("status"))?);
        let pids = status.lines().find_map(|line| line.strip_prefix("NSpid:"))?;
        // In the agent's pid namespace, the container's, and those that the container has made.
        let pid_inside = pids.split_ascii_whitespace().take(2).last()?.parse().ok()?;
        let mut cmdline = Vec::new();
        File::open(folder.join("cmdline")).ok()?.take(MAX_COMMAND_LEN).read_to_end(&mut cmdline).ok()?;
        Some(Self { pid_inside, stat, status, cmdline })
    }

    fn translate(self, inside: &HashMap<i32, i32>) -> Option<wire::ProcessFiles> {
        Some(wire::ProcessFiles {
            pid: self.pid_inside,
            stat: stat(&self.stat, inside)?.into_bytes(),
            status: status(&self.status, inside).into_bytes(),
            cmdline: self.cmdline,
            ..Default::default()
        })
    }
}

/// A pid's text in the container's namespace. None is negative there, but for the group of no terminal.
fn translated(pid: &str, inside: &HashMap<i32, i32>) -> String {
    match pid.parse::<i32>() {
        Ok(pid) if pid > 0 => inside.get(&pid).copied().unwrap_or(0).to_string(),
        _ => pid.to_owned(),
    }
}

fn stat(text: &str, inside: &HashMap<i32, i32>) -> Option<String> {
    // The name is the second field, in parentheses, and may have spaces and parentheses in it.
    let (pid, rest) = text.split_once(' ')?;
    let (name, rest) = rest.rsplit_once(") ")?;
    let mut line = format!("{} {name})", translated(pid, inside));
    for (index, field) in rest.split_ascii_whitespace().enumerate() {
        let is_pid = PID_FIELDS.contains(&(index + 3));
        let field = if is_pid { translated(field, inside) } else { field.to_owned() };
        let _ = write!(line, " {field}");
    }
    line.push('\n');
    Some(line)
}

fn status(text: &str, inside: &HashMap<i32, i32>) -> String {
    let mut lines = String::with_capacity(text.len());
    for line in text.lines() {
        let (key, values) = line.split_once(':').unwrap_or((line, ""));
        let _ = match () {
            () if PID_LINES.contains(&key) => writeln!(lines, "{key}:\t{}", translated(values.trim(), inside)),
            () if NAMESPACE_LINES.contains(&key) => {
                let all = values.trim();
                // A container that shares the agent's namespace has no other.
                writeln!(lines, "{key}:\t{}", all.split_once('\t').map_or(all, |(_, inner)| inner))
            }
            () => writeln!(lines, "{line}"),
        };
    }
    lines
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pids_are_those_of_the_container() {
        let inside = HashMap::from([(71, 1), (80, 9)]);

        let line = stat("80 (a) b (c) S 71 80 60 34817 -1 4194304 71\n", &inside).unwrap();
        assert_eq!(line, "9 (a) b (c) S 1 9 0 34817 -1 4194304 71\n");
        assert!(stat("80", &inside).is_none());

        let text = "Name:\tPid: 80\nTgid:\t80\nPid:\t80\nPPid:\t71\nTracerPid:\t0\nNSpid:\t80\t9\nNSsid:\t60\t0\nUid:\t80\t80\n";
        let expected =
            "Name:\tPid: 80\nTgid:\t9\nPid:\t9\nPPid:\t1\nTracerPid:\t0\nNSpid:\t9\nNSsid:\t0\nUid:\t80\t80\n";
        assert_eq!(status(text, &inside), expected);
    }

    #[tokio::test(flavor = "current_thread")]
    async fn this_process_is_read_and_a_missing_one_left_out() {
        let pid = i32::try_from(std::process::id()).unwrap();
        let answer = read(&[pid, i32::MAX]).await;
        let [process] = answer.processes.as_slice() else { panic!("{answer:?}") };
        assert!(process.stat.starts_with(format!("{} (", process.pid).as_bytes()), "{process:?}");
        assert!(!process.cmdline.is_empty());
    }
}
