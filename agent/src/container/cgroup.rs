// SPDX-License-Identifier: Apache-2.0
//! A container's cgroup (version 2): its limits, its end, and what the kernel counted.

use std::io::{self, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use bulkhead_bpf::{INSTRUCTION_LEN, Kind, Program};
use rustix::fs::OFlags;

use super::files::{self, EventFile};
use crate::storage::resolve;

/// The file that counts what befell its processes for want of memory.
pub(crate) const MEMORY_EVENTS: &str = "memory.events";

/// How often, and how long apart, removing is tried: the kernel lets go of a cgroup a moment after its last process.
const REMOVE_ATTEMPTS: u32 = 50;
const REMOVE_PAUSE: Duration = Duration::from_millis(2);

/// How deep a container may nest cgroups below its own.
pub(crate) const MAX_CGROUP_DEPTH: usize = 32;

/// Why a cgroup could not be used.
#[derive(Debug, thiserror::Error)]
pub enum CgroupError {
    /// It could not be made.
    #[error("cannot make cgroup {}", path.display())]
    Create {
        /// The cgroup.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// One of its settings was refused.
    #[error("cannot set {file} of the container's cgroup to {value:?}")]
    Set {
        /// The file.
        file: String,
        /// What was written.
        value: String,
        /// Why.
        source: io::Error,
    },
    /// Its processes could not be killed.
    #[error("cannot kill the processes of cgroup {}", path.display())]
    Kill {
        /// The cgroup.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// Its processes could not be listed.
    #[error("cannot list the processes of cgroup {}", path.display())]
    List {
        /// The cgroup.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// One of its files cannot be read.
    #[error("cannot read {file} of the container's cgroup")]
    Read {
        /// The file.
        file: &'static str,
        /// Why.
        source: io::Error,
    },
    /// The filter of devices was refused.
    #[error("cannot install the container's filter of devices, of {instructions} instructions")]
    DeviceFilter {
        /// How long it is.
        instructions: usize,
        /// Why.
        source: io::Error,
    },
    /// There is no such cgroup below it.
    #[error("cannot enter the cgroup {path:?} of the container")]
    Below {
        /// Relative to the container's.
        path: String,
        /// Why.
        source: io::Error,
    },
    /// There is none.
    #[error("container {0:?} has no cgroup")]
    None(String),
    /// It could not be removed.
    #[error("cannot remove cgroup {}", path.display())]
    Remove {
        /// The cgroup.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
}

/// What one of its files is to be set to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Setting {
    pub(crate) file: String,
    pub(crate) value: String,
    /// The first word of the file stays, and the value is written behind it.
    pub(crate) keep_first_word: bool,
}

impl Setting {
    /// A whole value.
    pub(crate) fn new(file: impl Into<String>, value: impl Into<String>) -> Self {
        Self { file: file.into(), value: value.into(), keep_first_word: false }
    }
}

/// A container's cgroup.
#[derive(Debug)]
pub(crate) struct Cgroup {
    path: PathBuf,
    /// What decides over access to devices, if anything does.
    device_filter: Mutex<Option<Program>>,
}

impl Cgroup {
    /// Makes the cgroup `id` below `parent` with `settings`, in their order, and a filter of devices unless that is empty.
    pub(crate) fn create(
        parent: &Path,
        id: &str,
        settings: &[Setting],
        device_filter: &[u8],
    ) -> Result<Self, CgroupError> {
        let path = parent.join(id);
        std::fs::create_dir(&path).map_err(|source| CgroupError::Create { path: path.clone(), source })?;
        let cgroup = Self { path, device_filter: Mutex::default() };
        if let Err(error) = settings
            .iter()
            .try_for_each(|setting| cgroup.set(setting))
            .and_then(|()| cgroup.filter_devices(device_filter))
        {
            // It is empty, so that this cannot fail for long; the setting is the error to tell of.
            let _ = std::fs::remove_dir(&cgroup.path);
            return Err(error);
        }
        Ok(cgroup)
    }

    /// Writes a setting.
    pub(crate) fn set(&self, setting: &Setting) -> Result<(), CgroupError> {
        let Setting { file, value, keep_first_word } = setting;
        let before = keep_first_word.then(|| self.read(file)).flatten().unwrap_or_default();
        let value = match before.split_ascii_whitespace().next() {
            Some(first) => &format!("{first} {value}"),
            None => value,
        };
        write_existing(&self.path.join(file), value).map_err(|source| CgroupError::Set {
            file: file.clone(),
            value: value.clone(),
            source,
        })
    }

    /// Installs a filter of devices (`struct bpf_insn`s) in the place of the one that there is; an empty one changes
    /// nothing. There is no moment without any.
    pub(crate) fn filter_devices(&self, filter: &[u8]) -> Result<(), CgroupError> {
        if filter.is_empty() {
            return Ok(());
        }
        let instructions = filter.len() / INSTRUCTION_LEN;
        let failed = |source| CgroupError::DeviceFilter { instructions, source };
        let program = Program::load(Kind::CgroupDevice, "devices", filter).map_err(failed)?;
        let cgroup = self.open()?;
        // Nothing panics while the lock is held.
        let mut installed = self.device_filter.lock().unwrap_or_else(PoisonError::into_inner);
        program.attach_to_cgroup(cgroup.as_fd(), installed.as_ref()).map_err(failed)?;
        *installed = Some(program);
        Ok(())
    }

    /// Freezes its processes and those below it, or lets them go on. The kernel does so in its own time.
    pub(crate) fn freeze(&self, frozen: bool) -> Result<(), CgroupError> {
        self.set(&Setting::new("cgroup.freeze", u8::from(frozen).to_string()))
    }

    /// Opens one of its files that tell of changes.
    pub(crate) fn watch(&self, file: &'static str) -> Result<EventFile, CgroupError> {
        EventFile::open(&self.path.join(file)).map_err(|source| CgroupError::Read { file, source })
    }

    /// The content of one of its files; `None` where there is no such file.
    pub(crate) fn read(&self, file: &str) -> Option<String> {
        files::read_bounded(&self.path.join(file))
    }

    /// Where it is.
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// The descriptor that clone3(2) takes.
    pub(crate) fn open(&self) -> Result<OwnedFd, CgroupError> {
        resolve::own_directory(&self.path).map_err(|source| CgroupError::Create { path: self.path.clone(), source })
    }

    /// The same for one below it, which the container has made: `path` is relative, and leads nowhere else.
    pub(crate) fn open_below(&self, path: &str) -> Result<OwnedFd, CgroupError> {
        let own = self.open()?;
        if path.split('/').all(str::is_empty) {
            return Ok(own);
        }
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        resolve::open(own.as_fd(), path, flags).map_err(|source| CgroupError::Below { path: path.to_owned(), source })
    }

    /// The same for the one below it that a process has gone to; `None` if it has not.
    pub(crate) fn open_that_of(&self, pid: i32) -> Option<OwnedFd> {
        let text = files::read_bounded(Path::new(&format!("/proc/{pid}/cgroup")))?;
        let place = text.lines().find_map(|line| line.strip_prefix("0::/"))?;
        let own = self.path.file_name()?.to_str()?;
        let below: Vec<&str> = place.split('/').skip_while(|name| *name != own).skip(1).collect();
        if below.is_empty() { None } else { self.open_below(&below.join("/")).ok() }
    }

    /// Kills every process in it and below it.
    pub(crate) fn kill(&self) -> Result<(), CgroupError> {
        match std::fs::write(self.path.join("cgroup.kill"), "1") {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                Err(CgroupError::Kill { path: self.path.clone(), source: error })
            }
            _ => Ok(()),
        }
    }

    /// The pids in it and below it.
    pub(crate) fn processes(&self) -> Result<Vec<i32>, CgroupError> {
        let mut pids = Vec::new();
        list(&self.path, &mut pids, MAX_CGROUP_DEPTH)
            .map_err(|source| CgroupError::List { path: self.path.clone(), source })?;
        Ok(pids)
    }

    /// How often the kernel's OOM killer struck in it; `None` where that is not counted.
    pub(crate) fn oom_kills(&self) -> Option<u64> {
        self.read(MEMORY_EVENTS).map(|events| files::value_of(&events, "oom_kill").unwrap_or(0))
    }

    /// Removes it and what the container made below it. Its processes must be dead.
    pub(crate) async fn remove(&self) -> Result<(), CgroupError> {
        let mut attempt = 0;
        loop {
            match remove_tree(&self.path, MAX_CGROUP_DEPTH) {
                Ok(()) => return Ok(()),
                Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
                Err(source) => {
                    attempt += 1;
                    if attempt >= REMOVE_ATTEMPTS {
                        return Err(CgroupError::Remove { path: self.path.clone(), source });
                    }
                }
            }
            tokio::time::sleep(REMOVE_PAUSE).await;
        }
    }
}

/// Writes to a file that is there: to making one, the cgroup file system says that it is not permitted, which is not what
/// is wrong with the name of a file that there is not.
fn write_existing(path: &Path, value: &str) -> io::Result<()> {
    std::fs::File::options().write(true).open(path)?.write_all(value.as_bytes())
}

fn children(path: &Path) -> io::Result<Vec<PathBuf>> {
    let mut children = Vec::new();
    for entry in std::fs::read_dir(path)? {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            children.push(entry.path());
        }
    }
    Ok(children)
}

fn list(path: &Path, pids: &mut Vec<i32>, depth: usize) -> io::Result<()> {
    let text = std::fs::read_to_string(path.join("cgroup.procs"))?;
    pids.extend(text.lines().filter_map(|line| line.parse::<i32>().ok()));
    let Some(depth) = depth.checked_sub(1) else { return Ok(()) };
    children(path)?.iter().try_for_each(|child| match list(child, pids, depth) {
        // It has been removed; or it is one for threads, whose processes are listed above it.
        Err(error) if matches!(error.raw_os_error(), Some(libc::ENOENT | libc::ENODEV | libc::EOPNOTSUPP)) => Ok(()),
        result => result,
    })
}

fn remove_tree(path: &Path, depth: usize) -> io::Result<()> {
    if let Some(depth) = depth.checked_sub(1) {
        children(path)?.iter().try_for_each(|child| remove_tree(child, depth))?;
    }
    std::fs::remove_dir(path)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn oom_kills_are_counted() {
        let parent = tempfile::tempdir().unwrap();
        let cgroup = Cgroup::create(parent.path(), "one", &[], &[]).unwrap();
        assert_eq!(cgroup.oom_kills(), None);
        std::fs::write(cgroup.path().join(MEMORY_EVENTS), "low 0\noom 4\noom_kill 3\noom_group_kill 0\n").unwrap();
        assert_eq!(cgroup.oom_kills(), Some(3));
    }

    #[test]
    fn refused_setting_is_named_and_the_cgroup_undone() {
        let parent = tempfile::tempdir().unwrap();
        let settings = [Setting::new("no-such-directory/file", "7")];

        let error = Cgroup::create(parent.path(), "one", &settings, &[]).unwrap_err();

        assert!(matches!(&error, CgroupError::Set { value, .. } if value == "7"));
        assert!(!parent.path().join("one").exists());
    }

    #[test]
    fn first_word_of_a_file_may_stay() {
        let parent = tempfile::tempdir().unwrap();
        let cgroup = Cgroup::create(parent.path(), "one", &[], &[]).unwrap();
        let file = cgroup.path().join("cpu.max");
        for (before, expected) in [("50000 100000\n", "50000 200000\n"), ("max 1\n", "max 200000")] {
            std::fs::write(&file, before).unwrap();
            cgroup.set(&Setting { keep_first_word: true, ..Setting::new("cpu.max", "200000") }).unwrap();
            assert_eq!(std::fs::read_to_string(&file).unwrap(), expected);
        }
    }

    #[tokio::test(flavor = "current_thread")]
    async fn nested_cgroups_are_removed_and_removing_again_is_no_error() {
        let parent = tempfile::tempdir().unwrap();
        let cgroup = Cgroup::create(parent.path(), "one", &[], &[]).unwrap();
        std::fs::create_dir_all(cgroup.path().join("a/b")).unwrap();

        cgroup.remove().await.unwrap();
        cgroup.remove().await.unwrap();

        assert!(!parent.path().join("one").exists());
    }

    #[test]
    fn same_id_twice_is_an_error() {
        let parent = tempfile::tempdir().unwrap();
        Cgroup::create(parent.path(), "one", &[], &[]).unwrap();
        assert!(matches!(Cgroup::create(parent.path(), "one", &[], &[]), Err(CgroupError::Create { .. })));
    }
}
