// SPDX-License-Identifier: Apache-2.0
//! A container's state directory, as those see it who are not its supervisor.

use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

use rustix::fs::{FlockOperation, Mode, OFlags, flock, open, openat};
use rustix::io::Errno;
use thiserror::Error;

use super::dir::{
    CONSOLE, MARKER, StateDirError, TASK, check_id, entries, lock, remove_locked, short_path, vsock_path,
};
use super::record::{Record, Status};
use super::sweep::end_sandbox;
use crate::cgroup::REMOVE_PATIENCE;
use crate::{logging, text};

/// A container that cannot be looked up. Engines look for the words "does not exist".
#[derive(Debug, Error)]
pub(crate) enum LookupError {
    #[error(transparent)]
    Id(StateDirError),
    #[error("container does not exist: {0}")]
    NotFound(String),
    #[error("cannot read the state of the container in {}", .0.display())]
    Read(PathBuf, #[source] io::Error),
    #[error("cannot list the containers in {}", .0.display())]
    List(PathBuf, #[source] io::Error),
}

/// A container that has been looked up.
#[derive(Debug)]
pub(crate) struct Found {
    path: PathBuf,
    dir: OwnedFd,
    record: Record,
}

impl Found {
    /// Looks a container up.
    pub(crate) fn open(root: &Path, id: &str) -> Result<Self, LookupError> {
        check_id(id).map_err(LookupError::Id)?;
        let path = root.join(id);
        let failed = |error: io::Error| LookupError::Read(path.clone(), error);
        let dir = match open(&path, OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC, Mode::empty()) {
            Ok(dir) => dir,
            Err(Errno::NOENT | Errno::NOTDIR | Errno::LOOP) => return Err(LookupError::NotFound(id.to_owned())),
            Err(error) => return Err(failed(error.into())),
        };
        // It is being made, or being deleted.
        let read = || Record::read(&dir).map_err(failed)?.ok_or_else(|| LookupError::NotFound(id.to_owned()));
        let record = read()?;
        let found = Self { path: path.clone(), dir: dir.try_clone().map_err(failed)?, record };
        // A supervisor writes down how it ended before it is gone: who has read too early reads again.
        if found.record.status != Status::Stopped && !found.look().map_err(failed)? {
            return Ok(Self { record: read()?, ..found });
        }
        Ok(found)
    }

    /// Looks at all containers under `root`, in the order of their ids, one after the other: there may be more of them than a
    /// process may open files. One that cannot be read is warned of.
    pub(crate) fn look_at_all<T>(root: &Path, mut look: impl FnMut(&Self) -> Option<T>) -> Result<Vec<T>, LookupError> {
        let entries = entries(root).map_err(|error| LookupError::List(root.to_owned(), error))?;
        let mut ids: Vec<_> = entries.iter().filter_map(|entry| entry.file_name().into_string().ok()).collect();
        ids.sort();
        // Others may keep their folders there too.
        let own = ids.iter().filter(|id| root.join(id).join(MARKER).symlink_metadata().is_ok());
        let seen = own.filter_map(|id| match Self::open(root, id) {
            Ok(found) => look(&found),
            Err(LookupError::Id(_) | LookupError::NotFound(_)) => None,
            Err(error) => {
                logging::warn(format_args!("{}", text::chain(&error)));
                None
            }
        });
        Ok(seen.collect())
    }

    /// What its supervisor wrote down last.
    pub(crate) fn record(&self) -> &Record {
        &self.record
    }

    /// Whether its supervisor lives, as far as can be seen: what cannot be looked at is not taken for dead.
    pub(crate) fn is_alive(&self) -> bool {
        self.look().unwrap_or(true)
    }

    /// Whether its supervisor lives: whether the lock is held that nobody else takes.
    fn look(&self) -> io::Result<bool> {
        let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NOFOLLOW;
        let marker = match openat(&self.dir, MARKER, flags, Mode::empty()) {
            Ok(marker) => marker,
            // It is being removed.
            Err(Errno::NOENT) => return Ok(false),
            Err(error) => return Err(error.into()),
        };
        // A shared lock does not disturb others who ask.
        match flock(&marker, FlockOperation::NonBlockingLockShared) {
            Ok(()) => Ok(false),
            Err(Errno::WOULDBLOCK) => Ok(true),
            Err(error) => Err(error.into()),
        }
    }

    /// Where the container is in its life: without its supervisor it has none.
    pub(crate) fn status(&self) -> Status {
        if self.is_alive() { self.record.status } else { Status::Stopped }
    }

    /// Where it is by now.
    pub(crate) fn status_now(&self) -> Result<Status, LookupError> {
        let failed = |error: io::Error| LookupError::Read(self.path.clone(), error);
        let record = Record::read(&self.dir).map_err(failed)?;
        let record = record.ok_or_else(|| LookupError::NotFound(self.record.id.clone()))?;
        Ok(if self.is_alive() { record.status } else { Status::Stopped })
    }

    /// The path of the Task API's socket, for this process alone.
    pub(crate) fn task_path(&self) -> PathBuf {
        short_path(&self.dir, TASK)
    }

    /// The path of the vsock's socket, for this process alone.
    pub(crate) fn vsock_path(&self) -> PathBuf {
        vsock_path(&self.dir)
    }

    /// What the guest's kernel wrote to its console.
    pub(crate) fn console(&self) -> io::Result<File> {
        let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NOFOLLOW;
        Ok(openat(&self.dir, CONSOLE, flags, Mode::empty())?.into())
    }

    /// Removes the state, if the supervisor is gone; whether it was.
    pub(crate) fn remove(&self) -> Result<bool, LookupError> {
        let failed = |error: io::Error| LookupError::Read(self.path.clone(), error);
        match lock(&self.path) {
            Ok(Some(dir)) => {
                end_sandbox(&dir, REMOVE_PATIENCE, logging::warn);
                // A cgroup that is left is a sweep's; without its state the container is none any more.
                remove_locked(&dir, &self.path).map_err(failed)?;
                Ok(true)
            }
            Ok(None) => Ok(false),
            // Another deleter was faster.
            Err(Errno::NOENT) => Err(LookupError::NotFound(self.record.id.clone())),
            Err(error) => Err(failed(error.into())),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::StateDir;
    use super::super::record::tests::record;
    use super::*;

    #[test]
    fn a_container_is_what_its_record_says_while_its_supervisor_lives() {
        let root = tempfile::tempdir().unwrap();
        let mut state = StateDir::create(root.path(), "c1").unwrap();
        state.record(&record("c1", Status::Running, true)).unwrap();
        state.keep();

        let found = Found::open(root.path(), "c1").unwrap();
        assert_eq!(found.status(), Status::Running);
        assert!(!found.remove().unwrap());
        drop(state);

        assert_eq!(found.status(), Status::Stopped);
        assert!(found.remove().unwrap());
        assert!(matches!(found.remove(), Err(LookupError::NotFound(_))));
    }

    #[test]
    fn a_dead_container_does_not_come_to_life_while_it_is_removed() {
        let root = tempfile::tempdir().unwrap();
        let mut state = StateDir::create(root.path(), "c1").unwrap();
        state.record(&record("c1", Status::Running, true)).unwrap();
        state.keep();
        drop(state);
        let found = Found::open(root.path(), "c1").unwrap();

        let _deleter = lock(&root.path().join("c1")).unwrap().unwrap();

        assert!(!found.is_alive());
        assert_eq!(found.status(), Status::Stopped);
    }

    #[test]
    fn what_is_not_there_is_named() {
        let root = tempfile::tempdir().unwrap();
        let _unborn = StateDir::create(root.path(), "unborn").unwrap();

        for id in ["absent", "unborn"] {
            let error = Found::open(root.path(), id).unwrap_err();
            assert_eq!(error.to_string(), format!("container does not exist: {id}"));
        }
        assert!(matches!(Found::open(root.path(), "a/b"), Err(LookupError::Id(_))));
        assert!(Found::look_at_all(root.path(), |found| Some(found.record().id.clone())).unwrap().is_empty());
        assert!(Found::look_at_all(&root.path().join("absent"), |_| Some(())).unwrap().is_empty());
        let file = root.path().join("file");
        std::fs::write(&file, "").unwrap();
        let error = Found::look_at_all(&file, |_| Some(())).unwrap_err();
        assert_eq!(error.to_string(), format!("cannot list the containers in {}", file.display()));
    }
}
