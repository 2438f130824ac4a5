// SPDX-License-Identifier: Apache-2.0
//! `state.json`: what is known of a container by those that are not its supervisor, and after its supervisor's end.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::thread;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use rustix::fs::{Mode, OFlags, openat};
use serde::{Deserialize, Serialize};

use super::dir::replace_file;
use crate::hooks::{Hook, State};
use crate::logging;

/// The file's name in a state directory.
pub(super) const STATE: &str = "state.json";
/// Its name while it is being written.
pub(super) const STATE_NEW: &str = ".state.json";

/// Most bytes that are read: annotations are bounded by the configuration's size.
const MAX_SIZE: u64 = 32 << 20;

/// By how much a later record may be longer and still fit in its place.
const RESERVE: usize = 64;

/// How often a record that makes no sense is read, and how far apart.
const READ_ATTEMPTS: u32 = 4;
const READ_PAUSE: Duration = Duration::from_millis(1);

/// Where a container is in its life, in the specification's words and runc's.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Status {
    /// Its guest boots.
    Creating,
    /// Its init waits for the start.
    Created,
    /// Its program runs.
    Running,
    /// All of its processes are frozen.
    Paused,
    /// Its init has ended.
    Stopped,
}

impl Status {
    /// The word for it.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Creating => "creating",
            Self::Created => "created",
            Self::Running => "running",
            Self::Paused => "paused",
            Self::Stopped => "stopped",
        }
    }
}

/// The content of the file.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Record {
    pub(crate) id: String,
    /// The supervisor's process.
    pub(crate) pid: u32,
    pub(crate) status: Status,
    /// Absolute.
    pub(crate) bundle: PathBuf,
    /// Absolute.
    pub(crate) rootfs: PathBuf,
    /// When it was made, RFC 3339 with nanoseconds.
    pub(crate) created: String,
    #[serde(default)]
    pub(crate) annotations: BTreeMap<String, String>,
    /// Whether the state stays after the container's end, until it is deleted.
    pub(crate) kept: bool,
    /// Once the container has ended.
    pub(crate) exit_status: Option<u8>,
    /// Who moves the frames of its network devices, if it has any.
    #[serde(default)]
    pub(crate) net_backend: Option<String>,
    /// The hooks that `delete` is to run.
    #[serde(default)]
    pub(crate) poststop: Vec<Hook>,
    /// The id of the pod's sandbox that it is in: its supervisor is that of the pod's other containers, too.
    #[serde(default)]
    pub(crate) sandbox: Option<String>,
    /// Whether it can tell that it is ready, so that a start may wait for that.
    #[serde(default)]
    pub(crate) notifies: bool,
}

impl Record {
    /// The container as hooks are told of it.
    pub(crate) fn hook_state(&self) -> State {
        State::new(&self.id, &self.bundle, self.annotations.clone())
    }

    /// Reads the record of a state directory; `None` if it has none yet.
    pub(super) fn read(dir: impl AsFd) -> io::Result<Option<Self>> {
        let dir = dir.as_fd();
        let mut attempts = READ_ATTEMPTS;
        loop {
            let Some(text) = read_text(dir)? else { return Ok(None) };
            attempts -= 1;
            match serde_json::from_slice(&text) {
                Ok(record) => return Ok(Some(record)),
                Err(error) if attempts == 0 => return Err(error.into()),
                // On a full disk it is written in place.
                Err(_) => thread::sleep(READ_PAUSE),
            }
        }
    }

    /// Writes the record so that whoever reads it sees the old one or this, whole. Where the disk is full, it is written in
    /// place of the old one: a state that is not true is worse than one that has to be read twice.
    pub(crate) fn write(&self, dir: impl AsFd) -> io::Result<()> {
        let dir = dir.as_fd();
        let mut text = serde_json::to_vec(self)?;
        text.resize(text.len() + RESERVE, b' ');
        match replace_file(dir, (STATE_NEW, STATE), &text) {
            Err(error) if matches!(error.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded) => {
                overwrite(dir, text.trim_ascii_end()).map_err(|_| error)
            }
            result => result,
        }
    }
}

fn read_text(dir: BorrowedFd<'_>) -> io::Result<Option<Vec<u8>>> {
    let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NOFOLLOW;
    let file = match openat(dir, STATE, flags, Mode::empty()) {
        Ok(file) => File::from(file),
        Err(rustix::io::Errno::NOENT) => return Ok(None),
        Err(error) => return Err(error.into()),
    };
    let mut text = Vec::new();
    file.take(MAX_SIZE).read_to_end(&mut text)?;
    Ok(Some(text))
}

/// Writes over the old record, in the space that it has.
fn overwrite(dir: BorrowedFd<'_>, text: &[u8]) -> io::Result<()> {
    let file = File::from(openat(dir, STATE, OFlags::WRONLY | OFlags::CLOEXEC | OFlags::NOFOLLOW, Mode::empty())?);
    let space = usize::try_from(file.metadata()?.len()).unwrap_or(0);
    if text.len() > space {
        return Err(io::ErrorKind::StorageFull.into());
    }
    let mut padded = text.to_vec();
    padded.resize(space, b' ');
    file.write_all_at(&padded, 0)
}

/// This moment, as RFC 3339 with nanoseconds.
pub(crate) fn now() -> String {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    let seconds = logging::rfc3339(now.as_secs());
    format!("{}.{:09}Z", seconds.trim_end_matches('Z'), now.subsec_nanos())
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    pub(crate) fn record(id: &str, status: Status, kept: bool) -> Record {
        Record {
            id: id.to_owned(),
            pid: 7,
            status,
            bundle: "/b".into(),
            rootfs: "/b/rootfs".into(),
            created: now(),
            annotations: BTreeMap::new(),
            kept,
            exit_status: None,
            net_backend: None,
            poststop: Vec::new(),
            sandbox: None,
            notifies: false,
        }
    }

    #[test]
    fn a_record_is_read_as_it_was_written_and_the_last_one_counts() {
        let folder = tempfile::tempdir().unwrap();
        let dir = File::open(folder.path()).unwrap();
        let mut first = record("c1", Status::Running, true);
        first.annotations.insert("a".into(), "b".into());

        assert_eq!(Record::read(&dir).unwrap(), None);
        first.write(&dir).unwrap();
        assert_eq!(Record::read(&dir).unwrap(), Some(first.clone()));
        first.status = Status::Stopped;
        first.write(&dir).unwrap();

        assert_eq!(Record::read(&dir).unwrap(), Some(first));
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1);
    }

    #[test]
    fn a_record_is_written_in_place_of_the_old_one_and_never_beyond_it() {
        let folder = tempfile::tempdir().unwrap();
        let dir = File::open(folder.path()).unwrap();
        record("c1", Status::Creating, true).write(&dir).unwrap();
        let size = dir_size(&folder);
        let ended = Record { exit_status: Some(137), ..record("c1", Status::Stopped, true) };

        overwrite(dir.as_fd(), &serde_json::to_vec(&ended).unwrap()).unwrap();

        assert_eq!(Record::read(&dir).unwrap(), Some(ended));
        assert_eq!(dir_size(&folder), size);
        let longer = Record { id: "x".repeat(200), ..record("", Status::Stopped, true) };
        assert!(overwrite(dir.as_fd(), &serde_json::to_vec(&longer).unwrap()).is_err());
    }

    fn dir_size(folder: &tempfile::TempDir) -> u64 {
        std::fs::metadata(folder.path().join(STATE)).unwrap().len()
    }

    #[test]
    fn the_time_is_of_a_fixed_length() {
        let now = now();

        assert_eq!(now.len(), "2026-01-01T00:00:00.000000000Z".len(), "{now}");
        assert!(now.starts_with("20") && now.ends_with('Z'));
    }
}
