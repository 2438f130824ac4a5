// SPDX-License-Identifier: Apache-2.0
//! What /proc says of a container's processes (proc_pid_stat(5), proc_pid_status(5), proc_pid_cmdline(5)).

use std::collections::HashMap;
use std::fs::File;
use std::io::Read;
use std::path::Path;

use bulkhead_protocol::agent as wire;
use rustix::time::{ClockId, clock_gettime};

use super::files::read_bounded;

/// Processes that are listed. The answer must fit into one message of 4 MiB.
pub(super) const MAX_PROCESSES: usize = 8192;

/// Bytes of a command line that are looked at.
pub(super) const MAX_COMMAND_LEN: u64 = 4096;

/// Bytes of all command lines together; of processes beyond, the name is given.
const MAX_COMMANDS_LEN: usize = 2 << 20;

/// Processes looked at in a row, after which others have their turn.
pub(super) const BATCH: usize = 64;

/// Clock ticks in a second, as /proc counts them: the same in every Linux on x86-64 (USER_HZ).
const TICKS_PER_SECOND: u64 = 100;

/// Describes those of the processes that there still are. `exec_ids` names the exec'd ones.
pub(super) async fn describe(pids: &[i32], exec_ids: &HashMap<i32, String>) -> Vec<wire::ProcessInfo> {
    let booted_s = boot_time();
    let mut commands_len = 0;
    let mut processes = Vec::new();
    for batch in pids[..pids.len().min(MAX_PROCESSES)].chunks(BATCH) {
        for pid in batch {
            let with_command = commands_len < MAX_COMMANDS_LEN;
            if let Some(mut process) = describe_one(Path::new(&format!("/proc/{pid}")), booted_s, with_command) {
                commands_len += process.command.len();
                process.exec_id = exec_ids.get(pid).cloned().unwrap_or_default();
                processes.push(process);
            }
        }
        tokio::task::yield_now().await;
    }
    processes
}

/// When the guest was booted, in seconds since 1970.
pub(super) fn boot_time() -> u64 {
    let since_boot = clock_gettime(ClockId::Boottime).tv_sec;
    u64::try_from(clock_gettime(ClockId::Realtime).tv_sec - since_boot).unwrap_or(0)
}

fn describe_one(folder: &Path, booted_s: u64, with_command: bool) -> Option<wire::ProcessInfo> {
    let stat = read_bounded(&folder.join("stat"))?;
    let status = read_bounded(&folder.join("status"))?;
    let mut process = from_stat(&stat, booted_s)?;
    let field = |name: &str| status.lines().find_map(|line| line.strip_prefix(name)).map(str::split_ascii_whitespace);
    // Real, effective, saved, file system.
    process.uid = field("Uid:")?.nth(1)?.parse().ok()?;
    // In the agent's pid namespace, the container's, and those that the container has made.
    process.container_pid = field("NSpid:")?.take(2).last()?.parse().ok()?;
    let command = if with_command { command(&folder.join("cmdline")) } else { None };
    process.command = command.unwrap_or_else(|| format!("[{}]", name(&stat)));
    Some(process)
}

/// The name in a `stat` file. It is in parentheses and may have some in it.
fn name(stat: &str) -> &str {
    stat.split_once('(').and_then(|(_, rest)| rest.rsplit_once(')')).map_or("", |(name, _)| name)
}

fn from_stat(stat: &str, booted_s: u64) -> Option<wire::ProcessInfo> {
    let pid = stat.split_ascii_whitespace().next()?.parse().ok()?;
    // The manual counts from 1, and the name is the second.
    let rest: Vec<&str> = stat.rsplit_once(')')?.1.split_ascii_whitespace().collect();
    let field = |number: usize| rest.get(number - 3).copied();
    let number = |index: usize| field(index)?.parse::<u64>().ok();
    let ticks_used = number(14)?.saturating_add(number(15)?);
    Some(wire::ProcessInfo {
        pid,
        parent_pid: field(4)?.parse().ok()?,
        started_s: booted_s.saturating_add(number(22)? / TICKS_PER_SECOND),
        cpu_ms: ticks_used.saturating_mul(1000 / TICKS_PER_SECOND),
        terminal: terminal_name(field(7)?.parse::<i32>().ok()?.cast_unsigned()),
        state: field(3)?.to_owned(),
        ..Default::default()
    })
}

/// The name of a terminal by its device number: minor in the bits 31 to 20 and 7 to 0, major in 15 to 8.
fn terminal_name(device: u32) -> String {
    let (major, minor) = (device >> 8 & 0xff, device >> 12 & 0xfff00 | device & 0xff);
    match (major, minor) {
        (136..=143, _) => format!("pts/{}", (major - 136) << 8 | minor),
        (4, 0..64) => format!("tty{minor}"),
        (4, 64..) => format!("ttyS{}", minor - 64),
        (5, 1) => "console".to_owned(),
        _ => "?".to_owned(),
    }
}

/// The arguments, separated by spaces; `None` if there are none.
fn command(path: &Path) -> Option<String> {
    let mut bytes = Vec::new();
    File::open(path).ok()?.take(MAX_COMMAND_LEN).read_to_end(&mut bytes).ok()?;
    while bytes.last() == Some(&0) {
        bytes.pop();
    }
    bytes.iter_mut().filter(|byte| **byte == 0).for_each(|byte| *byte = b' ');
    let mut text = String::from_utf8_lossy(&bytes).into_owned();
    // What is no text has become longer.
    text.truncate(text.floor_char_boundary(usize::try_from(MAX_COMMAND_LEN).unwrap_or(0)));
    (!text.is_empty()).then_some(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    const STAT: &str = "71 (a) b (c) S 1 71 71 34817 71 4194304 100 0 0 0 150 50 0 0 20 0 1 0 4200 1 1 1";

    #[test]
    fn fields_are_counted_behind_the_name() {
        let process = from_stat(STAT, 1000).unwrap();
        assert_eq!((process.pid, process.parent_pid, process.state.as_str()), (71, 1, "S"));
        assert_eq!((process.started_s, process.cpu_ms, process.terminal.as_str()), (1042, 2000, "pts/1"));
        assert_eq!(name(STAT), "a) b (c");
        assert!(from_stat("71 (a) S 1", 0).is_none());
    }

    #[test]
    fn terminals_have_their_names() {
        for (device, name) in
            [(0, "?"), (0x8803, "pts/3"), (0x0010_8803, "pts/259"), (0x0440, "ttyS0"), (0x0501, "console")]
        {
            assert_eq!(terminal_name(device), name, "{device:#x}");
        }
    }

    #[tokio::test(flavor = "current_thread")]
    async fn this_process_is_described_and_a_missing_one_left_out() {
        let pid = i32::try_from(std::process::id()).unwrap();
        let processes = describe(&[pid, i32::MAX], &HashMap::from([(pid, "one".to_owned())])).await;
        let [process] = processes.as_slice() else { panic!("{processes:?}") };
        assert_eq!((process.pid, process.exec_id.as_str()), (pid, "one"));
        assert_eq!(process.container_pid, pid);
        assert!(process.command.contains("bulkhead_agent"), "{}", process.command);
    }

    #[test]
    fn command_lines_are_bounded() {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), b"sh\0-c\0exit\0\0").unwrap();
        assert_eq!(command(file.path()).as_deref(), Some("sh -c exit"));
        std::fs::write(file.path(), vec![0xff; 10_000]).unwrap();
        assert!(command(file.path()).unwrap().len() <= 4096);
        std::fs::write(file.path(), b"").unwrap();
        assert_eq!(command(file.path()), None);
    }
}
