// SPDX-License-Identifier: Apache-2.0
//! The state directory of a sandbox, `<root>/<id>/`, as its supervisor holds it.
//!
//! The directory itself carries a lock (flock(2)) that its supervisor holds for as long as it lives; the kernel drops it
//! with the process, however it ends. So a directory whose lock is free is stale, and whoever gets that lock may remove
//! it. A new directory is made and locked under a name that cannot be an id (`.new-…`), and then renamed, so that there
//! is no moment at which a live sandbox's directory is unlocked.
//!
//! The supervisor alone holds a lock on the marker as well: so whoever asks whether it lives is not misled by somebody who
//! removes what it has left.

use std::fs::{self, DirBuilder, File};
use std::io::{self, Write};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::process;
use std::sync::atomic::{AtomicU32, Ordering};
use std::thread;
use std::time::Duration;

use rustix::fs::{
    AtFlags, CWD, FlockOperation, Mode, OFlags, RenameFlags, flock, open, openat, renameat, renameat_with, unlinkat,
};
use rustix::io::Errno;
use thiserror::Error;

use super::record::{Record, STATE, STATE_NEW};
use super::sweep::{Swept, start_time, strike_undone, sweep_one};
use crate::logging;
use crate::network::Recorder;
use crate::resctrl::ResctrlRecord;

/// The longest id: a file name of the kernel's.
const MAX_ID: usize = 255;

/// Marks a directory as a sandbox's.
pub(super) const MARKER: &str = "bulkhead";
/// The VMM's process id and start time.
pub(super) const VMM: &str = "vmm";
/// What the guest's kernel wrote to its console.
pub(super) const CONSOLE: &str = "console.log";
/// The host side of the guest's vsock.
pub(super) const VSOCK: &str = "vsock.sock";
/// The supervisor's Task API.
pub(super) const TASK: &str = "task.sock";

/// The directories of the sandbox's cgroup, each ended by a NUL byte.
pub(super) const CGROUP: &str = "cgroup";
/// What is to be undone of the sandbox's network, as JSON.
pub(super) const NETWORK: &str = "network";
/// Its name while it is being written.
const NETWORK_NEW: &str = ".network";
/// What is to be undone of the sandbox's resctrl group, as JSON.
pub(super) const RESCTRL: &str = "resctrl";
/// Its name while it is being written.
const RESCTRL_NEW: &str = ".resctrl";

const FILES: [&str; 12] =
    [MARKER, VMM, CONSOLE, VSOCK, TASK, CGROUP, NETWORK, NETWORK_NEW, RESCTRL, RESCTRL_NEW, STATE, STATE_NEW];
pub(super) const NEW_PREFIX: &str = ".new-";

/// Tells apart the directories that one process makes.
static SERIAL: AtomicU32 = AtomicU32::new(0);

/// How often a race with a sweep, or with the end of a sandbox of the same name, is tried again.
const ATTEMPTS: u32 = 12;

/// A state directory that cannot be made.
#[derive(Debug, Error)]
pub(crate) enum StateDirError {
    #[error(
        "invalid container ID format: {0:?} is empty, `.`, `..`, longer than {MAX_ID} bytes, or has other characters than A-Z a-z 0-9 _ + - ."
    )]
    Id(String),
    #[error("container with given ID already exists: {0}")]
    InUse(String),
    #[error("{} is in the way: it is not a state directory of Bulkhead's", .0.display())]
    Foreign(PathBuf),
    #[error("cannot {doing} {}{}", path.display(), hint(source))]
    Io { doing: &'static str, path: PathBuf, source: io::Error },
    #[error("container with given ID has ended, but its processes are still in their cgroup: {0} (try again)")]
    Unfinished(String),
    #[error("cannot make {}: it is removed again and again", .0.display())]
    Contended(PathBuf),
}

fn hint(error: &io::Error) -> &'static str {
    match error.kind() {
        io::ErrorKind::StorageFull => " (--root can name a place with free space)",
        io::ErrorKind::PermissionDenied | io::ErrorKind::ReadOnlyFilesystem => " (--root can name another place)",
        _ => "",
    }
}

/// Checks an id by runc's rule, `^[\w+.-]+$`.
pub(crate) fn check_id(id: &str) -> Result<(), StateDirError> {
    let allowed = |byte: u8| byte.is_ascii_alphanumeric() || b"_+-.".contains(&byte);
    if id.is_empty()
        || id.len() > MAX_ID
        || id == "."
        || id == ".."
        || !id.bytes().all(allowed)
        || id.starts_with(NEW_PREFIX)
    {
        return Err(StateDirError::Id(id.to_owned()));
    }
    Ok(())
}

/// A sandbox's state directory, locked; removed when dropped, unless it is to be kept.
#[derive(Debug)]
pub(crate) struct StateDir {
    path: PathBuf,
    /// Holds the lock.
    dir: OwnedFd,
    /// Holds the supervisor's own lock, once it is there.
    marker: Option<File>,
    keep: bool,
}

impl StateDir {
    /// Makes the directory for `id` under `root`, which is made too.
    ///
    /// # Errors
    ///
    /// The id is in use, or the file system does not let it be made.
    pub(crate) fn create(root: &Path, id: &str) -> Result<Self, StateDirError> {
        check_id(id)?;
        let made = DirBuilder::new().mode(0o700).recursive(true).create(root);
        made.map_err(|source| StateDirError::Io { doing: "make the folder", path: root.to_owned(), source })?;
        let path = root.join(id);
        let mut in_use = false;
        for _ in 0..ATTEMPTS {
            let serial = SERIAL.fetch_add(1, Ordering::Relaxed);
            let new = root.join(format!("{NEW_PREFIX}{}-{serial}", process::id()));
            let io = |doing| {
                let path = new.clone();
                move |source: io::Error| StateDirError::Io { doing, path, source }
            };
            match DirBuilder::new().mode(0o700).create(&new) {
                Ok(()) => {}
                // Left by a killed process that had our id.
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
                    sweep_one(&new);
                    continue;
                }
                Err(error) => return Err(io("make the folder")(error)),
            }
            // From here on, dropping it removes what there is.
            let Some(mut state) = Self::lock_new(&new).map_err(|error| io("lock the folder")(error.into()))? else {
                continue;
            };
            let marker = state.create_file(MARKER).map_err(io("write into the folder"))?;
            flock(&marker, FlockOperation::NonBlockingLockExclusive)
                .map_err(|error| io("lock the marker in the folder")(error.into()))?;
            state.marker = Some(marker);
            match renameat_with(CWD, &new, CWD, &path, RenameFlags::NOREPLACE) {
                Ok(()) => {
                    state.path = path;
                    return Ok(state);
                }
                Err(Errno::EXIST) => match sweep_one(&path) {
                    // Or another process is about to sweep it: that takes no time.
                    Swept::InUse => {
                        in_use = true;
                        thread::sleep(Duration::from_millis(2));
                    }
                    Swept::Foreign => return Err(StateDirError::Foreign(path)),
                    Swept::Kept => return Err(StateDirError::InUse(id.to_owned())),
                    Swept::Unfinished => return Err(StateDirError::Unfinished(id.to_owned())),
                    Swept::Removed => in_use = false,
                },
                Err(error) => return Err(io("rename to the container's id the folder")(error.into())),
            }
        }
        Err(if in_use { StateDirError::InUse(id.to_owned()) } else { StateDirError::Contended(path) })
    }

    /// Locks a directory that was just made; `None` when a sweep was faster.
    fn lock_new(path: &Path) -> Result<Option<Self>, Errno> {
        match lock(path) {
            Ok(Some(dir)) => Ok(Some(Self { path: path.to_owned(), dir, marker: None, keep: false })),
            Ok(None) | Err(Errno::NOENT) => Ok(None),
            Err(error) => Err(error),
        }
    }

    fn create_file(&self, name: &str) -> io::Result<File> {
        create_file(&self.dir, name)
    }

    fn named(&self, doing: &'static str, name: &str) -> impl FnOnce(io::Error) -> StateDirError {
        let path = self.path.join(name);
        move |source| StateDirError::Io { doing, path, source }
    }

    /// Makes the file for the guest's console output.
    pub(crate) fn create_console_log(&self) -> Result<File, StateDirError> {
        self.create_file(CONSOLE).map_err(self.named("make the file", CONSOLE))
    }

    /// Makes the socket that leads to the guest's vsock.
    pub(crate) fn bind_vsock(&self) -> Result<UnixListener, StateDirError> {
        UnixListener::bind(self.vsock_path()).map_err(self.named("make the socket", VSOCK))
    }

    /// Lets the vsock's socket be the one of another sandbox under the same root.
    pub(crate) fn link_vsock(&self, id: &str) -> Result<(), StateDirError> {
        let target = Path::new("..").join(id).join(VSOCK);
        let linked = rustix::fs::symlinkat(&target, &self.dir, VSOCK);
        linked.map_err(|error| self.named("make the link", VSOCK)(error.into()))
    }

    /// The path of the vsock's socket, for this process alone.
    pub(crate) fn vsock_path(&self) -> PathBuf {
        vsock_path(&self.dir)
    }

    /// Makes the socket of the Task API.
    pub(crate) fn bind_task(&self) -> Result<UnixListener, StateDirError> {
        UnixListener::bind(short_path(&self.dir, TASK)).map_err(self.named("make the socket", TASK))
    }

    /// A second descriptor of the directory, which holds the lock as well.
    pub(crate) fn handle(&self) -> Result<OwnedFd, StateDirError> {
        let doing = "duplicate the descriptor of";
        self.dir.try_clone().map_err(|source| StateDirError::Io { doing, path: self.path.clone(), source })
    }

    /// Writes the record.
    pub(crate) fn record(&self, record: &Record) -> Result<(), StateDirError> {
        record.write(&self.dir).map_err(self.named("write the file", STATE))
    }

    /// Notes a further directory of the sandbox's cgroup, so that a sweep can remove what a killed supervisor leaves.
    pub(crate) fn note_cgroup(&self, path: &Path) -> Result<(), StateDirError> {
        let line = [path.as_os_str().as_encoded_bytes(), &[0]].concat();
        let flags = OFlags::CREATE | OFlags::APPEND | OFlags::WRONLY | OFlags::CLOEXEC | OFlags::NOFOLLOW;
        let file = openat(&self.dir, CGROUP, flags, Mode::RUSR | Mode::WUSR).map(File::from);
        let written = file.map_err(io::Error::from).and_then(|mut file| file.write_all(&line));
        written.map_err(self.named("write the file", CGROUP))
    }

    /// Notes what is to be undone of the sandbox's resctrl group, for the same reason.
    pub(crate) fn note_resctrl(&self, record: &ResctrlRecord) -> Result<(), StateDirError> {
        let written = serde_json::to_vec(record).map_err(io::Error::from);
        let written = written.and_then(|record| replace_file(&self.dir, (RESCTRL_NEW, RESCTRL), &record));
        written.map_err(self.named("write the file", RESCTRL))
    }

    /// Notes what is to be undone of the sandbox's network, for the same reason.
    pub(crate) fn network_recorder(&self) -> Result<Recorder, StateDirError> {
        let dir = self.handle()?;
        Ok(Recorder::new(move |record| replace_file(&dir, (NETWORK_NEW, NETWORK), &serde_json::to_vec(record)?)))
    }

    /// From here on the directory stays when this is dropped.
    pub(crate) fn keep(&mut self) {
        self.keep = true;
    }

    /// Whether it stays.
    pub(crate) fn is_kept(&self) -> bool {
        self.keep
    }

    /// Notes the VMM's process, so that a sweep can end one that has survived its supervisor.
    pub(crate) fn record_vmm(&self, pid: u32) -> Result<(), StateDirError> {
        let start_time = start_time(pid).unwrap_or(0);
        let written = self.create_file(VMM).and_then(|mut file| writeln!(file, "{pid} {start_time}"));
        written.map_err(self.named("write the file", VMM))
    }
}

fn create_file(dir: impl AsFd, name: &str) -> io::Result<File> {
    let flags = OFlags::CREATE | OFlags::TRUNC | OFlags::RDWR | OFlags::CLOEXEC | OFlags::NOFOLLOW;
    Ok(openat(dir, name, flags, Mode::RUSR | Mode::WUSR)?.into())
}

/// Writes a file of an open state directory, by way of a new one, so that whoever reads it sees the old content or this, whole.
pub(super) fn replace_file(dir: impl AsFd, (new, name): (&str, &str), content: &[u8]) -> io::Result<()> {
    let dir = dir.as_fd();
    create_file(dir, new)?.write_all(content).inspect_err(|_| {
        let _ = unlinkat(dir, new, AtFlags::empty());
    })?;
    Ok(renameat(dir, new, dir, name)?)
}

/// The path of a socket, for this process alone: through the open directory, since a socket's address is limited to 107
/// bytes and `--root` is not.
pub(super) fn short_path(dir: &OwnedFd, name: &str) -> PathBuf {
    PathBuf::from(format!("/proc/self/fd/{}/{name}", dir.as_raw_fd()))
}

/// The path of the vsock's socket in an open state directory, for this process alone.
pub(crate) fn vsock_path(dir: &OwnedFd) -> PathBuf {
    short_path(dir, VSOCK)
}

impl Drop for StateDir {
    fn drop(&mut self) {
        if self.keep {
            strike_undone(&self.dir);
            return;
        }
        if let Err(error) = remove_locked(&self.dir, &self.path) {
            logging::warn(format_args!("cannot remove the state directory {}: {error}", self.path.display()));
        }
    }
}

/// Opens and locks a directory. `None`: the lock is taken, or `path` has come to name another directory meanwhile.
pub(super) fn lock(path: &Path) -> Result<Option<OwnedFd>, Errno> {
    let dir = open(path, OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC, Mode::empty())?;
    match flock(&dir, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => {}
        Err(Errno::WOULDBLOCK) => return Ok(None),
        Err(error) => return Err(error),
    }
    let opened = rustix::fs::fstat(&dir)?;
    match fs::symlink_metadata(path) {
        Ok(named) if (named.dev(), named.ino()) == (opened.st_dev, opened.st_ino) => Ok(Some(dir)),
        Ok(_) => Ok(None),
        Err(_) => Err(Errno::NOENT),
    }
}

/// What is in the folder of all state directories, which is made with the first of them.
pub(super) fn entries(root: &Path) -> io::Result<Vec<fs::DirEntry>> {
    match fs::read_dir(root) {
        Ok(entries) => entries.collect(),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Vec::new()),
        Err(error) => Err(error),
    }
}

/// Removes Bulkhead's files and the directory, whose lock is held. The marker goes last. While there is a cgroup, the
/// directory stays with its record, for a sweep; whether all is gone.
pub(super) fn remove_locked(dir: &OwnedFd, path: &Path) -> io::Result<bool> {
    let all = strike_undone(dir);
    for name in FILES.iter().rev().filter(|name| all || ![MARKER, CGROUP].contains(name)) {
        match unlinkat(dir.as_fd(), *name, AtFlags::empty()) {
            Ok(()) | Err(Errno::NOENT) => {}
            Err(error) => return Err(error.into()),
        }
    }
    if all {
        fs::remove_dir(path)?;
    }
    Ok(all)
}

#[cfg(test)]
mod tests {
    use super::super::record::Status;
    use super::super::record::tests::record;
    use super::super::sweep::sweep;
    use super::*;
    use std::collections::HashSet;
    use std::process::Command;
    use std::sync::Mutex;

    fn names(root: &Path) -> Vec<String> {
        fs::read_dir(root).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect()
    }

    #[test]
    fn a_file_that_is_replaced_is_never_seen_in_part() {
        let folder = tempfile::tempdir().unwrap();
        let dir = File::open(folder.path()).unwrap();
        let path = folder.path().join(NETWORK);
        replace_file(&dir, (NETWORK_NEW, NETWORK), b"the first, and longer").unwrap();
        let reader = File::open(&path).unwrap();

        replace_file(&dir, (NETWORK_NEW, NETWORK), b"the second").unwrap();

        assert_eq!(io::read_to_string(reader).unwrap(), "the first, and longer");
        assert_eq!(fs::read_to_string(&path).unwrap(), "the second");
        assert_eq!(names(folder.path()), [NETWORK]);
    }

    /// Leaves a state directory as a killed supervisor does.
    fn abandon(state: StateDir) {
        let mut state = std::mem::ManuallyDrop::new(state);
        state.marker = None;
        // The lock belongs to the open file: drop it by hand.
        flock(&state.dir, FlockOperation::Unlock).unwrap();
    }

    #[test]
    fn ids_follow_the_rule_of_runc() {
        for id in ["a", "A-b_c+1.2", "...", ".hidden", &"x".repeat(255)] {
            assert!(check_id(id).is_ok(), "{id}");
        }
        for id in ["", ".", "..", "a/b", "a b", "ä", "a\n", ".new-1-0", &"x".repeat(256)] {
            assert!(matches!(check_id(id), Err(StateDirError::Id(_))), "{id}");
        }
    }

    #[test]
    fn a_state_directory_is_private_and_gone_when_dropped() {
        let root = tempfile::tempdir().unwrap();
        let under = root.path().join("deep/er");

        let state = StateDir::create(&under, "c1").unwrap();
        state.create_console_log().unwrap();
        state.record_vmm(process::id()).unwrap();
        let _listener = state.bind_vsock().unwrap();

        assert_eq!(fs::metadata(under.join("c1")).unwrap().mode() & 0o777, 0o700);
        drop(state);
        assert!(names(&under).is_empty());
    }

    #[test]
    fn an_id_is_in_use_while_its_supervisor_lives() {
        let root = tempfile::tempdir().unwrap();
        let state = StateDir::create(root.path(), "c1").unwrap();

        let second = StateDir::create(root.path(), "c1");
        sweep(root.path());

        assert!(matches!(second, Err(StateDirError::InUse(_))));
        assert_eq!(names(root.path()), ["c1"]);
        drop(state);
        assert!(StateDir::create(root.path(), "c1").is_ok());
    }

    #[test]
    fn a_stale_directory_is_swept_and_its_id_free() {
        let root = tempfile::tempdir().unwrap();
        abandon(StateDir::create(root.path(), "c1").unwrap());
        abandon(StateDir::create(root.path(), "c2").unwrap());
        fs::create_dir(root.path().join(".new-77-0")).unwrap();

        let state = StateDir::create(root.path(), "c1").unwrap();
        sweep(root.path());

        assert_eq!(names(root.path()), ["c1"]);
        drop(state);
    }

    #[test]
    fn a_kept_directory_survives_its_supervisor_and_keeps_its_id() {
        let root = tempfile::tempdir().unwrap();
        for (id, status) in [("ended", Status::Stopped), ("killed", Status::Running), ("unborn", Status::Creating)] {
            let state = StateDir::create(root.path(), id).unwrap();
            state.record(&record(id, status, true)).unwrap();
            abandon(state);
        }

        sweep(root.path());

        let mut left = names(root.path());
        left.sort();
        assert_eq!(left, ["ended", "killed"]);
        assert!(matches!(StateDir::create(root.path(), "ended"), Err(StateDirError::InUse(_))));
    }

    #[test]
    fn a_directory_that_is_kept_is_not_removed_with_its_holder() {
        let root = tempfile::tempdir().unwrap();
        let mut state = StateDir::create(root.path(), "c1").unwrap();

        state.keep();
        drop(state);

        assert_eq!(names(root.path()), ["c1"]);
    }

    #[test]
    fn what_is_not_bulkheads_is_left_alone() {
        let root = tempfile::tempdir().unwrap();
        fs::create_dir(root.path().join("theirs")).unwrap();
        fs::write(root.path().join("theirs/state.json"), "{}").unwrap();
        fs::write(root.path().join("file"), "").unwrap();
        abandon(StateDir::create(root.path(), "mixed").unwrap());
        fs::write(root.path().join("mixed/precious"), "").unwrap();

        sweep(root.path());
        let taken = StateDir::create(root.path(), "theirs");

        assert!(matches!(taken, Err(StateDirError::Foreign(_))));
        assert!(root.path().join("theirs/state.json").exists());
        assert!(root.path().join("mixed/precious").exists());
    }

    #[test]
    fn a_long_root_does_not_break_the_socket() {
        let root = tempfile::tempdir().unwrap();
        let long = root.path().join("x".repeat(200));

        let state = StateDir::create(&long, "c1").unwrap();
        let _listener = state.bind_vsock().unwrap();

        assert!(std::os::unix::net::UnixStream::connect(state.vsock_path()).is_ok());
    }

    #[test]
    fn a_sweep_kills_the_recorded_vmm_but_no_later_process_of_that_id() {
        let root = tempfile::tempdir().unwrap();
        let mut stuck = Command::new("sleep").arg("60").spawn().unwrap();
        let mut other = Command::new("sleep").arg("60").spawn().unwrap();
        let first = StateDir::create(root.path(), "c1").unwrap();
        first.record_vmm(stuck.id()).unwrap();
        let second = StateDir::create(root.path(), "c2").unwrap();
        writeln!(second.create_file(VMM).unwrap(), "{} 1", other.id()).unwrap();
        abandon(first);
        abandon(second);

        sweep(root.path());

        assert!(!stuck.wait().unwrap().success());
        assert!(other.try_wait().unwrap().is_none());
        other.kill().unwrap();
        other.wait().unwrap();
    }

    #[test]
    fn of_many_starts_with_one_id_exactly_one_wins_each_time() {
        let root = tempfile::tempdir().unwrap();
        for round in 0..20 {
            let won = Mutex::new(HashSet::new());
            let held = Mutex::new(Vec::new());
            thread::scope(|scope| {
                for starter in 0..8 {
                    let (won, held, root) = (&won, &held, root.path());
                    scope.spawn(move || {
                        sweep(root);
                        if let Ok(state) = StateDir::create(root, "c1") {
                            won.lock().unwrap().insert(starter);
                            held.lock().unwrap().push(state);
                        }
                    });
                }
            });
            assert_eq!(won.lock().unwrap().len(), 1, "round {round}");
            abandon(held.into_inner().unwrap().remove(0));
        }
    }
}
