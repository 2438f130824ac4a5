// SPDX-License-Identifier: Apache-2.0
//! A sandbox's share of the host's caches and memory bandwidth: the group of its processes in the resctrl file system (the
//! kernel's Documentation/arch/x86/resctrl.rst). The guest's memory is accessed by the VMM's threads, so that theirs is the
//! container's.
//!
//! A group that is there already is used as it is, and stays.

mod schemata;

use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::logging;

/// Where the file system is mounted.
pub(crate) const ROOT: &str = "/sys/fs/resctrl";

/// The file of a group's allocations, and that of its threads.
const SCHEMATA: &str = "schemata";
const TASKS: &str = "tasks";
/// The folder of the groups within a group that are only watched.
const MONITORED: &str = "mon_groups";

/// Whether this host has the file system.
pub(crate) fn is_mounted() -> bool {
    Path::new(ROOT).join(SCHEMATA).exists()
}

/// What a configuration asks for.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(crate) struct ResctrlSpec {
    /// The group's name; else it is the container's id.
    pub(crate) class: Option<String>,
    /// Lines of its schemata.
    pub(crate) schemata: Vec<String>,
    /// Whether what the sandbox uses is to be seen, by a group of the container's id within that one.
    pub(crate) monitored: bool,
}

/// What is to be undone.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct ResctrlRecord {
    /// The groups that were made, or were about to be.
    made: Vec<PathBuf>,
    /// Whether others may have come to use them.
    named: bool,
}

/// A group that cannot be used.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ResctrlError {
    #[error("cannot honour linux.intelRdt: there is no group {}, and no schema to make one with", .0.display())]
    Absent(PathBuf),
    #[error("cannot honour linux.intelRdt: the group {} is there already", .0.display())]
    Exists(PathBuf),
    #[error("cannot honour linux.intelRdt: the group {} is there already, and has not {line:?}", path.display())]
    Mismatch { path: PathBuf, line: String },
    #[error("cannot make the group {}", .0.display())]
    Create(PathBuf, #[source] io::Error),
    #[error("cannot note the group {}", .0.display())]
    Note(PathBuf, #[source] crate::cgroup::NoteError),
    #[error("cannot read {}", .0.display())]
    Read(PathBuf, #[source] io::Error),
    #[error("cannot write {value:?} to {}", path.display())]
    Write { path: PathBuf, value: String, source: io::Error },
}

/// The group of a sandbox. What was made for it is removed when this is dropped.
#[derive(Debug, Default)]
pub(crate) struct ResctrlGroup {
    /// Where its threads go, one after the other: the kernel takes them into the inner group from the outer one only.
    places: Vec<PathBuf>,
    record: ResctrlRecord,
}

impl ResctrlGroup {
    /// Makes or finds the group for the sandbox `id`. What is made is noted before.
    ///
    /// # Errors
    ///
    /// What could not be made, or does not fit; nothing of it is left.
    pub(crate) fn create(
        root: &Path,
        spec: &ResctrlSpec,
        id: &str,
        mut note: impl FnMut(&ResctrlRecord) -> Result<(), crate::cgroup::NoteError>,
    ) -> Result<Self, ResctrlError> {
        // Dropped on an error, it takes back what was made.
        let mut group = Self::default();
        group.record.named = spec.class.is_some();
        let path = root.join(spec.class.as_deref().unwrap_or(id));
        if path.is_dir() {
            check_existing(&path, spec)?;
        } else {
            if spec.class.is_some() && spec.schemata.is_empty() {
                return Err(ResctrlError::Absent(path));
            }
            group.make(&path, &mut note)?;
            if !spec.schemata.is_empty() {
                append(&path.join(SCHEMATA), &format!("{}\n", spec.schemata.join("\n")))?;
            }
        }
        group.places.push(path.clone());
        if spec.monitored {
            let path = path.join(MONITORED).join(id);
            group.make(&path, &mut note)?;
            group.places.push(path);
        }
        Ok(group)
    }

    fn make(
        &mut self,
        path: &Path,
        note: &mut impl FnMut(&ResctrlRecord) -> Result<(), crate::cgroup::NoteError>,
    ) -> Result<(), ResctrlError> {
        let mut record = self.record.clone();
        record.made.push(path.to_owned());
        note(&record).map_err(|error| ResctrlError::Note(path.to_owned(), error))?;
        fs::create_dir(path).map_err(|error| ResctrlError::Create(path.to_owned(), error))?;
        self.record = record;
        Ok(())
    }

    /// That of a sandbox whose supervisor is gone. Dropped, it is removed.
    pub(crate) fn reopen(record: ResctrlRecord) -> Self {
        Self { places: Vec::new(), record }
    }

    /// Moves this process in, and so all that it starts from then on.
    pub(crate) fn join(&self) -> Result<(), ResctrlError> {
        for place in &self.places {
            for thread in own_threads() {
                append(&place.join(TASKS), &format!("{thread}\n"))?;
            }
        }
        Ok(())
    }
}

impl Drop for ResctrlGroup {
    fn drop(&mut self) {
        for path in self.record.made.iter().rev() {
            // The kernel removes a group that has threads, which are those of the group above from then on.
            if self.record.named && !is_monitoring(path) && is_used_by_others(path) {
                continue;
            }
            match fs::remove_dir(path) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => {
                    logging::warn(format_args!("cannot remove the group {}: {error}", path.display()));
                }
                _ => {}
            }
        }
    }
}

/// Whether a group that is there is the one that is wanted.
fn check_existing(path: &Path, spec: &ResctrlSpec) -> Result<(), ResctrlError> {
    if spec.class.is_none() {
        return Err(ResctrlError::Exists(path.to_owned()));
    }
    if spec.schemata.is_empty() {
        return Ok(());
    }
    let file = path.join(SCHEMATA);
    let have = fs::read_to_string(&file).map_err(|error| ResctrlError::Read(file, error))?;
    match schemata::mismatch(&spec.schemata, &have) {
        Some(line) => Err(ResctrlError::Mismatch { path: path.to_owned(), line: line.to_owned() }),
        None => Ok(()),
    }
}

/// Whether a group is the sandbox's alone, in whatever class that is.
fn is_monitoring(group: &Path) -> bool {
    group.parent().and_then(Path::file_name).is_some_and(|folder| folder == MONITORED)
}

/// Whether there is somebody else in a group than this process, its children, and who has ended: a VMM that was killed has
/// not been waited for.
fn is_used_by_others(group: &Path) -> bool {
    let own = own_threads();
    let tasks = fs::read_to_string(group.join(TASKS)).unwrap_or_default();
    tasks.split_whitespace().any(|task| !own.iter().any(|thread| thread == task) && !is_ending(task))
}

/// Whether a thread is of a child of this process, or has ended: fields 3 and 4 of /proc/PID/stat (proc_pid_stat(5)).
fn is_ending(thread: &str) -> bool {
    let Ok(stat) = fs::read_to_string(format!("/proc/{thread}/stat")) else { return true };
    let mut fields = stat.rsplit(')').next().unwrap_or_default().split_whitespace();
    let (state, parent) = (fields.next().unwrap_or_default(), fields.next().unwrap_or_default());
    matches!(state, "Z" | "X" | "x") || parent.parse() == Ok(std::process::id())
}

fn own_threads() -> Vec<String> {
    let threads = fs::read_dir("/proc/self/task").into_iter().flatten().flatten();
    threads.filter_map(|thread| thread.file_name().into_string().ok()).collect()
}

fn append(path: &Path, value: &str) -> Result<(), ResctrlError> {
    let written =
        File::options().append(true).create(true).open(path).and_then(|mut file| file.write_all(value.as_bytes()));
    written.map_err(|source| ResctrlError::Write { path: path.to_owned(), value: value.trim_end().to_owned(), source })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spec(class: Option<&str>, schemata: &[&str], monitored: bool) -> ResctrlSpec {
        let schemata = schemata.iter().map(|line| (*line).to_owned()).collect();
        ResctrlSpec { class: class.map(str::to_owned), schemata, monitored }
    }

    fn create(root: &tempfile::TempDir, spec: &ResctrlSpec) -> Result<ResctrlGroup, ResctrlError> {
        ResctrlGroup::create(root.path(), spec, "c1", |_| Ok(()))
    }

    /// Takes away what the kernel would take away with a group.
    fn empty(group: &Path) {
        for file in [SCHEMATA, TASKS] {
            let _ = fs::remove_file(group.join(file));
        }
        let _ = fs::remove_dir(group.join(MONITORED));
    }

    #[test]
    fn a_group_has_the_containers_id_its_schemata_and_its_threads() {
        let root = tempfile::tempdir().unwrap();
        let path = root.path().join("c1");
        let mut noted = Vec::new();
        let note = |record: &ResctrlRecord| {
            noted.push((record.clone(), path.exists()));
            Ok(())
        };

        let group = ResctrlGroup::create(root.path(), &spec(None, &["L3:0=f", "MB:0=20"], false), "c1", note).unwrap();
        group.join().unwrap();

        assert_eq!(noted, [(ResctrlRecord { made: vec![path.clone()], named: false }, false)]);
        assert_eq!(fs::read_to_string(path.join(SCHEMATA)).unwrap(), "L3:0=f\nMB:0=20\n");
        let own = std::process::id().to_string();
        assert!(fs::read_to_string(path.join(TASKS)).unwrap().lines().any(|thread| thread == own));
        empty(&path);
        drop(group);
        assert!(!path.exists());
    }

    #[test]
    fn a_class_that_is_there_is_used_and_stays() {
        let root = tempfile::tempdir().unwrap();
        let path = root.path().join("gold");
        fs::create_dir(&path).unwrap();
        fs::write(path.join(SCHEMATA), "    L3:0=00ff;1=00ff\n").unwrap();

        drop(create(&root, &spec(Some("gold"), &[], false)).unwrap());
        drop(create(&root, &spec(Some("gold"), &["L3:1=ff"], false)).unwrap());
        let mismatch = create(&root, &spec(Some("gold"), &["L3:1=f"], false)).unwrap_err();

        assert!(matches!(mismatch, ResctrlError::Mismatch { line, .. } if line == "L3:1=f"));
        assert_eq!(fs::read_to_string(path.join(SCHEMATA)).unwrap(), "    L3:0=00ff;1=00ff\n");
    }

    #[test]
    fn a_class_is_made_by_its_schemata_and_left_to_those_who_have_come_to_use_it() {
        let root = tempfile::tempdir().unwrap();
        let path = root.path().join("gold");
        assert!(matches!(create(&root, &spec(Some("gold"), &[], false)), Err(ResctrlError::Absent(_))));

        let group = create(&root, &spec(Some("gold"), &["L3:0=f"], false)).unwrap();
        group.join().unwrap();
        append(&path.join(TASKS), "1\n").unwrap();
        drop(group);
        assert!(path.exists());

        let record = ResctrlRecord { made: vec![path.clone()], named: true };
        // One that is this process' own need not have been waited for.
        let mut child = std::process::Command::new("true").spawn().unwrap();
        fs::write(path.join(TASKS), format!("{}\n", child.id())).unwrap();
        assert!(!is_used_by_others(&path));
        child.wait().unwrap();
        empty(&path);
        drop(ResctrlGroup::reopen(record.clone()));
        drop(ResctrlGroup::reopen(record));
        assert!(!path.exists());
    }

    #[test]
    fn what_is_watched_has_a_group_in_the_group() {
        let root = tempfile::tempdir().unwrap();
        let path = root.path().join("gold");
        fs::create_dir_all(path.join(MONITORED)).unwrap();

        let group = create(&root, &spec(Some("gold"), &[], true)).unwrap();
        group.join().unwrap();

        let inner = path.join(MONITORED).join("c1");
        // Those of other tests come and go.
        let own = std::process::id().to_string();
        for place in [&path, &inner] {
            assert!(fs::read_to_string(place.join(TASKS)).unwrap().lines().any(|thread| thread == own));
        }
        empty(&inner);
        drop(group);
        assert!(path.exists() && !inner.exists());
    }

    #[test]
    fn what_cannot_be_made_leaves_nothing() {
        let root = tempfile::tempdir().unwrap();

        // There is no folder for the inner one.
        let error = create(&root, &spec(None, &[], true)).unwrap_err();

        assert!(matches!(error, ResctrlError::Create(path, _) if path.ends_with("mon_groups/c1")));
        assert!(fs::read_dir(root.path()).unwrap().next().is_none());
        fs::create_dir(root.path().join("c1")).unwrap();
        assert!(matches!(create(&root, &spec(None, &[], false)), Err(ResctrlError::Exists(_))));
    }
}
