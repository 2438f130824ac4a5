// SPDX-License-Identifier: Apache-2.0
//! Processes below this one, as `/proc` shows them.

use std::fs;
use std::io;
use std::os::fd::OwnedFd;
use std::process::{Child, ExitStatus};
use std::thread;
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::sys::wait::{WaitPidFlag, waitpid};
use nix::unistd::Pid;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{PidfdFlags, pidfd_open};

/// One process.
#[derive(Debug, Clone)]
pub(crate) struct Process {
    pub(crate) pid: i32,
    pub(crate) parent: i32,
    /// The kernel's name of it, at most 15 bytes.
    pub(crate) name: String,
    pub(crate) state: char,
}

impl Process {
    /// Parses `/proc/PID/stat`.
    fn parse(stat: &str) -> Option<Self> {
        let (head, tail) = stat.rsplit_once(')')?;
        let (pid, name) = head.split_once(" (")?;
        let mut fields = tail.split_whitespace();
        Some(Self {
            pid: pid.parse().ok()?,
            name: name.to_owned(),
            state: fields.next()?.chars().next()?,
            parent: fields.next()?.parse().ok()?,
        })
    }

    /// The process of that number, if it is there.
    pub(crate) fn of(pid: i32) -> Option<Self> {
        Self::parse(&fs::read_to_string(format!("/proc/{pid}/stat")).ok()?)
    }

    /// Its command line, for messages.
    pub(crate) fn command_line(&self) -> String {
        let line = fs::read(format!("/proc/{}/cmdline", self.pid)).unwrap_or_default();
        String::from_utf8_lossy(&line).replace('\0', " ").trim_end().to_owned()
    }
}

/// Pauses between looks at something that is not told when it changes. A look takes long where the processor is emulated, and
/// what is waited for needs that processor as well: a third of it at most goes into looking.
#[derive(Debug)]
pub(crate) struct Looks {
    began: Instant,
}

impl Looks {
    const SHORTEST: Duration = Duration::from_millis(5);
    const LONGEST: Duration = Duration::from_millis(500);

    /// Begins the first look.
    pub(crate) fn begin() -> Self {
        Self { began: Instant::now() }
    }

    /// Ends a look, pauses, and begins the next one.
    pub(crate) fn pause(&mut self) {
        thread::sleep((self.began.elapsed() * 2).clamp(Self::SHORTEST, Self::LONGEST));
        self.began = Instant::now();
    }
}

/// Waits until one of these children has ended, which leaves it to be waited for, at most that long.
pub(crate) fn wait_for_any<'a>(children: impl IntoIterator<Item = &'a Child>, limit: Duration) -> io::Result<()> {
    let open = |child| pidfd_open(rustix::process::Pid::from_child(child), PidfdFlags::empty());
    let descriptors: Vec<OwnedFd> = children.into_iter().map(open).collect::<Result<_, _>>()?;
    let mut waited_for: Vec<PollFd<'_>> =
        descriptors.iter().map(|descriptor| PollFd::new(descriptor, PollFlags::IN)).collect();
    let limit = Timespec::try_from(limit).map_err(io::Error::other)?;
    match poll(&mut waited_for, Some(&limit)) {
        Ok(_) | Err(rustix::io::Errno::INTR) => Ok(()),
        Err(error) => Err(error.into()),
    }
}

/// Waits until a child has ended, at most that long; how it has ended, if it has.
pub(crate) fn wait_for_end(child: &mut Child, limit: Duration) -> io::Result<Option<ExitStatus>> {
    let end = Instant::now() + limit;
    loop {
        if let Some(status) = child.try_wait()? {
            return Ok(Some(status));
        }
        let left = end.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Ok(None);
        }
        wait_for_any([&*child], left)?;
    }
}

fn all() -> Vec<Process> {
    let Ok(entries) = fs::read_dir("/proc") else { return Vec::new() };
    entries.filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok()).filter_map(Process::of).collect()
}

/// Every process below `pid`, parents first, zombies among them.
pub(crate) fn descendants(pid: i32) -> Vec<Process> {
    let all = all();
    let mut found: Vec<Process> = Vec::new();
    let mut parents = vec![pid];
    while let Some(parent) = parents.pop() {
        for process in all.iter().filter(|process| process.parent == parent) {
            parents.push(process.pid);
            found.push(process.clone());
        }
    }
    found
}

/// The first process below `pid` with that name, waited for as long as `limit`.
pub(crate) fn wait_for_descendant(pid: i32, name: &str, limit: Duration) -> Option<Process> {
    let end = Instant::now() + limit;
    let mut looks = Looks::begin();
    loop {
        let found = descendants(pid).into_iter().find(|process| process.name == name && process.state != 'Z');
        if found.is_some() || Instant::now() >= end {
            return found;
        }
        looks.pause();
    }
}

/// Kills `pid` and all below it.
pub(crate) fn kill_tree(pid: i32) {
    for process in descendants(pid) {
        let _ = kill(Pid::from_raw(process.pid), Signal::SIGKILL);
    }
    let _ = kill(Pid::from_raw(pid), Signal::SIGKILL);
}

/// Collects the ended children of this process that nobody waits for: those it inherited as their reaper.
pub(crate) fn reap_orphans(waited_for: &[i32]) {
    let own = std::process::id().cast_signed();
    for process in descendants(own) {
        if process.parent == own && process.state == 'Z' && !waited_for.contains(&process.pid) {
            let _ = waitpid(Pid::from_raw(process.pid), Some(WaitPidFlag::WNOHANG));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_may_hold_anything() {
        let process = Process::parse("12 (a) b) S 7 12 12 0 -1").unwrap();

        assert_eq!((process.pid, process.name.as_str(), process.state, process.parent), (12, "a) b", 'S', 7));
    }
}
