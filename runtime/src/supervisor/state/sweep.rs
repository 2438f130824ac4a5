// SPDX-License-Identifier: Apache-2.0
//! Sweeping: the removal of state directories whose supervisor was killed.
//!
//! It touches only directories that hold Bulkhead's own marker file, and in them only the files that Bulkhead makes:
//! `--root` may name a directory that has other things in it. Directories that are kept stay for `delete` and `gc`.

use std::ffi::OsStr;
use std::fs::{self, File};
use std::io::{self, Read};
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{AtFlags, Mode, OFlags, openat, unlinkat};
use rustix::io::Errno;
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};

use super::dir::{CGROUP, MARKER, NETWORK, NEW_PREFIX, RESCTRL, VMM, check_id, entries, lock, remove_locked};
use super::lookup::LookupError;
use super::record::{Record, Status};
use crate::cgroup::{HostCgroup, REMOVE_PATIENCE};
use crate::logging;
use crate::network::Network;
use crate::resctrl::ResctrlGroup;
use crate::supervisor::run_poststop_hooks;

/// Most bytes of a cgroup's record that are read.
const MAX_CGROUP_RECORD: u64 = 64 << 10;
/// How long a sweep waits for the end of what it finds. Each start sweeps, and the next one comes back to what is left.
const SWEEP_PATIENCE: Duration = Duration::from_millis(100);

/// Most bytes of a network's record that are read, and of a resctrl group's.
const MAX_NETWORK_RECORD: u64 = 64 << 10;
const MAX_RESCTRL_RECORD: u64 = 64 << 10;

/// What became of a directory that was not ours.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Swept {
    /// Its supervisor lives.
    InUse,
    /// It is none of Bulkhead's.
    Foreign,
    /// Its container is to be deleted by those who created it, or has hooks to be run.
    Kept,
    /// Its container is gone, but not all of its processes.
    Unfinished,
    /// It is gone.
    Removed,
}

/// What is done with the hooks that follow a container's end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Poststop {
    /// A container that has some is left to `delete`, `gc`, and whoever takes its id: nobody else is to wait for them.
    Leave,
    Run,
}

/// Removes the stale state directories under `root`. What cannot be removed is left to the next sweep.
pub(crate) fn sweep(root: &Path) {
    for path in candidates(root).unwrap_or_default() {
        if sweep_with(&path, SWEEP_PATIENCE, Poststop::Leave, logging::aside) == Swept::Removed {
            logging::debug(format_args!("swept the stale state directory {}", path.display()));
        }
    }
}

/// What was collected: a directory, and the record of the container that it was of, if there was one.
pub(crate) type Collected = (PathBuf, Option<Record>);

/// Removes, besides, what killed supervisors have left of containers that were to be kept; or only looks for it. What is
/// gone, or would be.
pub(crate) fn collect(root: &Path, dry_run: bool) -> Result<Vec<Collected>, LookupError> {
    let mut paths = candidates(root).map_err(|error| LookupError::List(root.to_owned(), error))?;
    paths.sort();
    let collected = paths.into_iter().filter_map(|path| match collect_one(&path, dry_run) {
        Ok(record) => record.map(|record| (path, record)),
        Err(error) => {
            logging::warn(format_args!("cannot clean {} up: {error}", path.display()));
            None
        }
    });
    Ok(collected.collect())
}

/// The record of the container whose directory was removed, or would be; `None` if it is left.
fn collect_one(path: &Path, dry_run: bool) -> io::Result<Option<Option<Record>>> {
    let dir = match lock(path) {
        Ok(Some(dir)) => dir,
        Ok(None) | Err(Errno::NOENT) => return Ok(None),
        Err(error) => return Err(error.into()),
    };
    if !is_own(&dir, path) {
        return Ok(None);
    }
    let record = record_left(&dir)?;
    // One that ended in good order waits for whoever created it.
    let ended = record.as_ref().is_some_and(|record| record.status == Status::Stopped);
    if ended {
        return Ok(None);
    }
    if dry_run {
        return Ok(Some(record));
    }
    end_sandbox(&dir, REMOVE_PATIENCE, logging::warn);
    Ok(remove_locked(&dir, path)?.then_some(record))
}

/// The record in a directory whose supervisor is gone; `None` if there is none to believe in.
fn record_left(dir: &OwnedFd) -> io::Result<Option<Record>> {
    match Record::read(dir) {
        Err(error) if matches!(error.kind(), io::ErrorKind::InvalidData | io::ErrorKind::UnexpectedEof) => Ok(None),
        read => read,
    }
}

/// The directories under `root` whose names are those of state directories.
fn candidates(root: &Path) -> io::Result<Vec<PathBuf>> {
    let entries = entries(root)?;
    let fitting = entries.iter().filter(|entry| {
        let name = entry.file_name();
        let fits = name.to_str().is_some_and(|name| name.starts_with(NEW_PREFIX) || check_id(name).is_ok());
        fits && entry.file_type().is_ok_and(|kind| kind.is_dir())
    });
    Ok(fitting.map(fs::DirEntry::path).collect())
}

/// Whether a locked directory is Bulkhead's. A new one may not have its marker yet, and has nothing else then.
fn is_own(dir: &OwnedFd, path: &Path) -> bool {
    let is_new = path.file_name().is_some_and(|name| name.as_encoded_bytes().starts_with(NEW_PREFIX.as_bytes()));
    let is_empty = || fs::read_dir(path).is_ok_and(|mut entries| entries.next().is_none());
    rustix::fs::statat(dir, MARKER, AtFlags::SYMLINK_NOFOLLOW).is_ok() || is_new && is_empty()
}

/// Removes what a killed supervisor has left of one container, unless it is to be kept, and runs its last hooks.
pub(crate) fn sweep_one(path: &Path) -> Swept {
    sweep_with(path, REMOVE_PATIENCE, Poststop::Run, logging::warn)
}

/// `tell` is how to tell of what cannot be removed.
fn sweep_with(path: &Path, patience: Duration, poststop: Poststop, tell: logging::Tell) -> Swept {
    let dir = match lock(path) {
        Ok(Some(dir)) => dir,
        Ok(None) => return Swept::InUse,
        Err(Errno::NOENT) => return Swept::Removed,
        Err(_) => return Swept::Foreign,
    };
    if !is_own(&dir, path) {
        return Swept::Foreign;
    }
    end_sandbox(&dir, patience, tell);
    // What cannot be looked at may be one that is kept.
    let Ok(record) = record_left(&dir) else { return Swept::Kept };
    if record.as_ref().is_some_and(|record| record.kept && record.status != Status::Creating) {
        return Swept::Kept;
    }
    let hooked = record.filter(|record| !record.poststop.is_empty());
    if hooked.is_some() && poststop == Poststop::Leave {
        return Swept::Kept;
    }
    match remove_locked(&dir, path) {
        Ok(true) => {
            if let Some(record) = hooked {
                // This thread may have an event loop already.
                thread::scope(|scope| drop(scope.spawn(|| run_poststop_hooks(&record)).join()));
            }
            Swept::Removed
        }
        Ok(false) => Swept::Unfinished,
        Err(error) => {
            logging::debug(format_args!("cannot sweep {}: {error}", path.display()));
            Swept::Foreign
        }
    }
}

/// The directories of the cgroup that was noted.
fn cgroup_paths(dir: &OwnedFd) -> Vec<PathBuf> {
    let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NOFOLLOW;
    let mut record = Vec::new();
    if let Ok(file) = openat(dir, CGROUP, flags, Mode::empty()) {
        // What cannot be read is not removed.
        let _ = File::from(file).take(MAX_CGROUP_RECORD).read_to_end(&mut record);
    }
    let paths = record.split(|byte| *byte == 0).filter(|path| !path.is_empty());
    paths.map(|path| PathBuf::from(OsStr::from_bytes(path))).collect()
}

/// Strikes from a state directory what has been undone. A cgroup that is there still stays noted, so that it is found
/// again; and what is gone is not looked for again, since by then it may be another container's.
pub(super) fn strike_undone(dir: &OwnedFd) -> bool {
    let is_left = cgroup_paths(dir).iter().any(|path| path.exists());
    for name in [VMM, NETWORK, RESCTRL].into_iter().chain((!is_left).then_some(CGROUP)) {
        let _ = unlinkat(dir, name, AtFlags::empty());
    }
    !is_left
}

/// The network that was noted; to be dropped, which undoes it.
fn recorded_network(dir: &OwnedFd) -> Option<Network> {
    let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NOFOLLOW;
    let file = File::from(openat(dir, NETWORK, flags, Mode::empty()).ok()?);
    Network::reopen(serde_json::from_reader(file.take(MAX_NETWORK_RECORD)).ok()?)
}

/// The resctrl group that was noted; to be dropped, which removes it.
fn recorded_resctrl(dir: &OwnedFd) -> Option<ResctrlGroup> {
    let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NOFOLLOW;
    let file = File::from(openat(dir, RESCTRL, flags, Mode::empty()).ok()?);
    Some(ResctrlGroup::reopen(serde_json::from_reader(file.take(MAX_RESCTRL_RECORD)).ok()?))
}

/// Ends what is left of a sandbox whose supervisor is gone: its VMM, its groups and its network.
pub(super) fn end_sandbox(dir: &OwnedFd, patience: Duration, tell: logging::Tell) {
    kill_recorded_vmm(dir);
    HostCgroup::reopen(cgroup_paths(dir)).remove(patience, tell);
    drop((recorded_network(dir), recorded_resctrl(dir)));
    strike_undone(dir);
}

/// Ends a VMM that has survived its supervisor: it ends by itself when its supervisor does, so this is for one that is
/// stuck. The start time tells it from a later process with the same id.
fn kill_recorded_vmm(dir: &OwnedFd) {
    let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NOFOLLOW;
    let Ok(file) = openat(dir, VMM, flags, Mode::empty()) else {
        return;
    };
    let recorded = io::read_to_string(File::from(file)).unwrap_or_default();
    let mut words = recorded.split_whitespace().map(str::parse::<u64>);
    let (Some(Ok(pid)), Some(Ok(recorded_start))) = (words.next(), words.next()) else {
        return;
    };
    let Some(raw) = i32::try_from(pid).ok().and_then(Pid::from_raw) else {
        return;
    };
    // The descriptor is taken first: it stays with the process that is then compared.
    let Ok(pidfd) = pidfd_open(raw, PidfdFlags::empty()) else {
        return;
    };
    if u32::try_from(pid).ok().and_then(start_time) == Some(recorded_start) {
        let _ = pidfd_send_signal(&pidfd, Signal::KILL);
        // What it was in is removed next. It may take longer: then its cgroup is waited for.
        let limit = Timespec { tv_sec: 1, tv_nsec: 0 };
        let _ = poll(&mut [PollFd::new(&pidfd, PollFlags::IN)], Some(&limit));
    }
}

/// When a process started, in clock ticks since boot: field 22 of /proc/PID/stat (proc_pid_stat(5)).
pub(super) fn start_time(pid: u32) -> Option<u64> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The second field, the name in parentheses, may hold anything.
    let (_, after_name) = stat.rsplit_once(')')?;
    after_name.split_whitespace().nth(19)?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::super::StateDir;
    use super::super::record::tests::record;
    use super::*;
    use crate::hooks::Hook;
    use crate::resctrl::ResctrlSpec;
    use std::mem;

    #[test]
    fn a_collection_takes_what_crashed_and_leaves_what_ended_or_lives() {
        let root = tempfile::tempdir().unwrap();
        for (id, status) in [("ended", Status::Stopped), ("crashed", Status::Running)] {
            let mut state = StateDir::create(root.path(), id).unwrap();
            state.record(&record(id, status, true)).unwrap();
            state.keep();
        }
        let _lives = StateDir::create(root.path(), "lives").unwrap();
        fs::create_dir(root.path().join("theirs")).unwrap();
        let crashed = root.path().join("crashed");

        let expected = [(crashed.clone(), Some("crashed".to_owned()))];
        let seen = |collected: Vec<Collected>| -> Vec<_> {
            collected.into_iter().map(|(path, record)| (path, record.map(|record| record.id))).collect()
        };
        assert_eq!(seen(collect(root.path(), true).unwrap()), expected);
        assert!(crashed.exists());
        assert_eq!(seen(collect(root.path(), false).unwrap()), expected);

        assert!(!crashed.exists());
        for id in ["ended", "lives", "theirs"] {
            assert!(root.path().join(id).exists(), "{id}");
        }
        assert!(collect(root.path(), false).unwrap().is_empty());
    }

    #[test]
    fn what_cannot_be_read_is_left_and_what_is_no_record_is_not() {
        let root = tempfile::tempdir().unwrap();
        let mut state = StateDir::create(root.path(), "c1").unwrap();
        state.record(&record("c1", Status::Running, true)).unwrap();
        state.keep();
        drop(state);
        let (dir, file) = (root.path().join("c1"), root.path().join("c1/state.json"));

        fs::remove_file(&file).unwrap();
        fs::create_dir(&file).unwrap();
        assert_eq!(sweep_one(&dir), Swept::Kept);
        assert!(collect(root.path(), false).unwrap().is_empty());
        assert!(dir.exists());

        fs::remove_dir(&file).unwrap();
        fs::write(&file, "{").unwrap();
        assert_eq!(sweep_one(&dir), Swept::Removed);
    }

    #[test]
    fn the_last_hooks_are_run_by_whoever_takes_the_id() {
        let root = tempfile::tempdir().unwrap();
        let told = root.path().join("told");
        let hook = Hook {
            field: "hooks.poststop[0]".to_owned(),
            path: "/bin/sh".into(),
            args: ["sh", "-c", &format!("cat >{}", told.display())].map(str::to_owned).to_vec(),
            env: Vec::new(),
            timeout: None,
        };
        let containers = root.path().join("root");
        let mut crashed = StateDir::create(&containers, "c1").unwrap();
        crashed
            .record(&Record {
                poststop: vec![hook],
                bundle: root.path().into(),
                ..record("c1", Status::Creating, false)
            })
            .unwrap();
        // As a killed supervisor leaves it.
        crashed.keep();
        drop(crashed);
        let folder = containers.join("c1");

        sweep(&containers);
        assert!(folder.exists() && !told.exists());

        let _next = StateDir::create(&containers, "c1").unwrap();
        assert!(fs::read_to_string(&told).unwrap().contains("c1"));
    }

    #[test]
    fn a_cgroup_that_is_in_use_stays_noted_until_it_is_gone() {
        let root = tempfile::tempdir().unwrap();
        let cgroup = tempfile::tempdir().unwrap();
        let (path, process) = (cgroup.path().join("c1"), cgroup.path().join("c1/process"));
        fs::create_dir(&path).unwrap();
        fs::write(&process, "").unwrap();
        let state = StateDir::create(root.path(), "c1").unwrap();
        state.record(&record("c1", Status::Running, false)).unwrap();
        state.note_cgroup(&path).unwrap();
        drop(state);

        let left = |folder: &Path| fs::read_dir(folder).unwrap().count();
        assert_eq!(left(&root.path().join("c1")), 2);
        let swept = sweep_with(&root.path().join("c1"), Duration::ZERO, Poststop::Leave, logging::aside);
        assert_eq!(swept, Swept::Unfinished);
        fs::remove_file(&process).unwrap();
        sweep(root.path());

        assert_eq!((left(root.path()), path.exists()), (0, false));
    }

    #[test]
    fn a_resctrl_group_that_was_noted_is_removed() {
        let root = tempfile::tempdir().unwrap();
        let groups = tempfile::tempdir().unwrap();
        let state = StateDir::create(root.path(), "c1").unwrap();
        let group = ResctrlGroup::create(groups.path(), &ResctrlSpec::default(), "c1", |record| {
            state.note_resctrl(record).map_err(Into::into)
        });
        // As the kernel drops what a killed supervisor had.
        mem::forget(group.unwrap());
        assert!(groups.path().join("c1").exists());

        end_sandbox(&state.handle().unwrap(), Duration::ZERO, logging::aside);

        assert_eq!(fs::read_dir(groups.path()).unwrap().count(), 0);
        drop(state);
        assert_eq!(fs::read_dir(root.path()).unwrap().count(), 0);
    }

    #[test]
    fn a_container_that_is_kept_after_its_end_lays_no_claim_to_its_cgroup() {
        let root = tempfile::tempdir().unwrap();
        let cgroup = tempfile::tempdir().unwrap();
        let path = cgroup.path().join("shared");
        let mut state = StateDir::create(root.path(), "c1").unwrap();
        state.record(&record("c1", Status::Stopped, true)).unwrap();
        state.note_cgroup(&path).unwrap();
        state.keep();
        drop(state);

        fs::create_dir(&path).unwrap();
        sweep(root.path());

        assert!(path.exists());
    }
}
