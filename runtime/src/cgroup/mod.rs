// SPDX-License-Identifier: Apache-2.0
//! A sandbox's cgroup on the host: what the VMM and its supervisor together may use, and where an engine looks them up.
//!
//! | module | what it knows |
//! | --- | --- |
//! | `block_io` | limits for the host's block devices |
//! | `place` | `linux.cgroupsPath` in its two forms, as a path in the hierarchies |
//! | `hierarchy` | which hierarchies this host has mounted, and where this process is in them |
//! | `limits` | the files and values by which each version of cgroups spells a limit |
//! | `usage` | the files by which each version tells what is used |
//!
//! A configuration that names no place and no limit leaves the sandbox where its caller is. The directories are made by
//! plain file operations, also where systemd manages the tree: an engine that wants a scope of systemd's has one for its
//! own monitor.

pub(crate) mod block_io;
mod hierarchy;
mod limits;
mod place;
mod usage;

use std::error::Error;
use std::io;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};
use std::{fs, thread};

use self::hierarchy::{Hierarchies, Hierarchy};
pub(crate) use self::limits::Limits;
use self::limits::MemoryLimits;
pub(crate) use self::place::Place;
use crate::logging;

/// How long removing is tried, and how often: a killed VMM is in its cgroup until the kernel has taken its machine apart.
pub(crate) const REMOVE_PATIENCE: Duration = Duration::from_secs(2);
const REMOVE_PAUSE: Duration = Duration::from_millis(5);

/// Files of version 2 that a kernel may lack: two came with Linux 5.14 and 5.15, and without swap there is no third.
const OPTIONAL: [&str; 3] = ["cpu.max.burst", "cpu.idle", "memory.swap.max"];

/// What a configuration asks for.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(crate) struct CgroupSpec {
    /// `None` if the configuration leaves it to the runtime.
    pub(crate) place: Option<Place>,
    pub(crate) limits: Limits,
}

/// Why a directory could not be noted, in the words of who was to.
pub(crate) type NoteError = Box<dyn Error + Send + Sync>;

/// A cgroup that cannot be used.
#[derive(Debug, thiserror::Error)]
pub(crate) enum HostCgroupError {
    #[error("cannot find out which cgroups this host has")]
    Hierarchies(#[source] io::Error),
    #[error("cannot honour linux.cgroupsPath: no cgroup hierarchy is mounted on this host")]
    None,
    #[error("cannot honour linux.resources.cpu.mems: this host's cgroups have no controller for memory nodes (cpuset)")]
    NoNodes,
    #[error(
        "cannot honour linux.resources.blockIO: this host's cgroups have no controller for block devices (io, blkio)"
    )]
    NoBlockIo,
    #[error("cannot make the cgroup {}", .0.display())]
    Create(PathBuf, #[source] io::Error),
    #[error("cannot give the cgroup {} the processors and memory nodes of the one above it", .0.display())]
    Inherit(PathBuf, #[source] io::Error),
    #[error("cannot note the cgroup {}", .0.display())]
    Note(PathBuf, #[source] NoteError),
    #[error("the cgroup {} has processes already", .0.display())]
    InUse(PathBuf),
    #[error("cannot set {} to {value:?}", path.display())]
    Limit { path: PathBuf, value: String, source: io::Error },
    #[error("cannot move process {pid} into the cgroup {}", path.display())]
    Join { path: PathBuf, pid: u32, source: io::Error },
}

/// A sandbox's cgroup: one directory in each hierarchy that is used. It is removed when this is dropped.
#[derive(Debug)]
pub(crate) struct HostCgroup {
    /// Where the sandbox's processes go.
    groups: Vec<Group>,
}

#[derive(Debug)]
struct Group {
    path: PathBuf,
    /// Where this process was before, and goes back to before the cgroup is removed.
    origin: Option<PathBuf>,
    version_2: bool,
}

impl HostCgroup {
    /// Makes the cgroup for the sandbox `id` and sets its limits. `None` if none was asked for, or if the host has none
    /// to write in and no certain one was asked for. Each directory is noted before it is made: whoever is killed in between
    /// leaves nothing that nobody knows.
    ///
    /// # Errors
    ///
    /// What could not be made or set; nothing of it is left.
    pub(crate) fn create(
        spec: &CgroupSpec,
        id: &str,
        note: impl FnMut(&Path) -> Result<(), NoteError>,
    ) -> Result<Option<Self>, HostCgroupError> {
        if spec.place.is_none() && spec.limits.is_empty() {
            return Ok(None);
        }
        match (Self::create_in(spec, id, Hierarchies::of_host, note), &spec.place) {
            (Ok(cgroup), _) => Ok(Some(cgroup)),
            (Err(error), Some(_)) | (Err(error @ HostCgroupError::Note(..)), None) => Err(error),
            // Memory of certain NUMA nodes, or less than all of a block device, is had in no other way.
            (Err(error), None) if spec.limits.needs_host() => Err(error),
            (Err(error), None) => {
                let why = crate::text::chain(&error);
                logging::debug(format_args!("the sandbox stays in its caller's cgroup: {why}"));
                Ok(None)
            }
        }
    }

    fn create_in(
        spec: &CgroupSpec,
        id: &str,
        hierarchies: impl FnOnce() -> io::Result<Hierarchies>,
        mut note: impl FnMut(&Path) -> Result<(), NoteError>,
    ) -> Result<Self, HostCgroupError> {
        let hierarchies = hierarchies().map_err(HostCgroupError::Hierarchies)?;
        let default = Place::default_for(id);
        let place = spec.place.as_ref().unwrap_or(&default);
        // Dropped on an error, it takes back what was made.
        let mut cgroup = Self { groups: Vec::new() };
        for hierarchy in hierarchies.list() {
            cgroup.add_group(hierarchy, place, &mut note)?;
        }
        if cgroup.groups.is_empty() {
            return Err(HostCgroupError::None);
        }
        if spec.limits.mems.is_some() && !cgroup.takes_cpus() {
            return Err(HostCgroupError::NoNodes);
        }
        cgroup.set(&spec.limits, &mut Former::default())?;
        Ok(cgroup)
    }

    fn add_group(
        &mut self,
        hierarchy: &Hierarchy,
        place: &Place,
        note: &mut impl FnMut(&Path) -> Result<(), NoteError>,
    ) -> Result<(), HostCgroupError> {
        let path = hierarchy.mount_point.join(place.below(&hierarchy.own_path, hierarchy.version_2));
        let failed = |error| HostCgroupError::Create(path.clone(), error);
        if let Some(parent) = path.parent() {
            fs::create_dir_all(parent).map_err(failed)?;
            if hierarchy.version_2 {
                hierarchy::enable_controllers(&hierarchy.mount_point, parent);
            }
        }
        match fs::read_to_string(path.join("cgroup.procs")) {
            Ok(processes) if !processes.is_empty() => return Err(HostCgroupError::InUse(path)),
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(failed(error)),
            _ => {}
        }
        note(&path).map_err(|error| HostCgroupError::Note(path.clone(), error))?;
        match fs::create_dir(&path) {
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
            result => result.map_err(failed)?,
        }
        let origin = Some(hierarchy.mount_point.join(&hierarchy.own_path));
        self.groups.push(Group { path: path.clone(), origin, version_2: hierarchy.version_2 });
        if !hierarchy.version_2 {
            hierarchy::inherit_cpuset(&hierarchy.mount_point, &path)
                .map_err(|error| HostCgroupError::Inherit(path, error))?;
        }
        Ok(())
    }

    /// The cgroup of a sandbox whose supervisor is gone, by the paths that it had recorded. Dropped, it is removed.
    pub(crate) fn reopen(paths: impl IntoIterator<Item = PathBuf>) -> Self {
        let groups = paths.into_iter().map(|path| {
            let version_2 = path.join("cgroup.controllers").exists();
            Group { path, origin: None, version_2 }
        });
        Self { groups: groups.collect() }
    }

    /// Moves a process in, with all its threads.
    pub(crate) fn add(&self, pid: u32) -> Result<(), HostCgroupError> {
        self.groups.iter().try_for_each(|group| {
            fs::write(group.path.join("cgroup.procs"), pid.to_string()).map_err(|source| HostCgroupError::Join {
                path: group.path.clone(),
                pid,
                source,
            })
        })
    }

    /// Moves this process in, and so all that it starts from then on.
    pub(crate) fn join(&self) -> Result<(), HostCgroupError> {
        self.add(std::process::id())
    }

    /// Whether it says which CPUs and memory nodes may be used.
    pub(crate) fn takes_cpus(&self) -> bool {
        self.groups.iter().any(|group| group.version_2 || group.path.join("cpuset.cpus").exists())
    }

    /// Whether it can be told now.
    pub(crate) fn has_cpus(&self) -> bool {
        self.groups.iter().any(|group| group.version_2 && group.path.join("cpuset.cpus").exists())
    }

    /// Those that the one above it may use.
    pub(crate) fn cpus_of_parent(&self) -> Option<String> {
        let group = self.groups.iter().find(|group| group.version_2)?;
        let cpus = fs::read_to_string(group.path.parent()?.join("cpuset.cpus.effective")).ok()?;
        Some(cpus.trim_end().to_owned()).filter(|cpus| !cpus.is_empty())
    }

    /// Sets the limits that are given, all of them or none; what was before.
    pub(crate) fn update(&self, limits: &Limits) -> Result<Former, HostCgroupError> {
        let mut former = Former::default();
        match self.set(limits, &mut former) {
            Ok(()) => Ok(former),
            Err(error) => {
                former.restore();
                Err(error)
            }
        }
    }

    /// Sets the limits that are given; notes what was before.
    fn set(&self, limits: &Limits, former: &mut Former) -> Result<(), HostCgroupError> {
        // In version 1 a file that is not there is passed over; what is asked for by name has to be in one.
        let has = |file: &&str| self.groups.iter().any(|group| group.path.join(file).exists());
        if limits.block_io.needed_files().any(|one_of| !one_of.iter().any(has)) {
            return Err(HostCgroupError::NoBlockIo);
        }
        for group in &self.groups {
            let mut settings = if group.version_2 {
                limits.version_2(&quota_of(&group.path))
            } else {
                limits.version_1(MemoryLimits::of(&group.path))
            };
            settings.extend(limits.block_io.settings(&group.path, group.version_2));
            for (file, value) in settings {
                let path = group.path.join(file);
                // In version 1 each hierarchy has the files of its own controllers.
                if (!group.version_2 || OPTIONAL.contains(&file)) && !path.exists() {
                    continue;
                }
                let before = fs::read_to_string(&path).map(|before| {
                    let undoing = block_io::undoing(file, &value, &before).unwrap_or_default();
                    before + &undoing
                });
                fs::write(&path, &value).map_err(|source| HostCgroupError::Limit {
                    path: path.clone(),
                    value,
                    source,
                })?;
                former.0.extend(before.map(|before| (path, before)));
            }
        }
        Ok(())
    }

    /// Raises the limit of memory, if there is a lower one.
    pub(crate) fn raise_memory(&self, bytes: i64) -> Result<(), HostCgroupError> {
        let has_less = |group: &Group| {
            // Without a limit, version 2 has a word and version 1 a number that nothing exceeds.
            let file = if group.version_2 { "memory.max" } else { "memory.limit_in_bytes" };
            let limit = fs::read_to_string(group.path.join(file)).ok().and_then(|text| text.trim().parse::<i64>().ok());
            limit.is_some_and(|limit| limit < bytes)
        };
        if !self.groups.iter().any(has_less) {
            return Ok(());
        }
        self.set(&Limits { memory_bytes: Some(bytes), ..Limits::default() }, &mut Former::default())
    }

    /// Removes it; what has processes still when the time is up is left, for whoever has its record, and told of.
    pub(crate) fn remove(&mut self, patience: Duration, tell: logging::Tell) {
        for group in self.groups.drain(..).rev() {
            if let Err(error) = remove(&group, patience) {
                tell(format_args!("cannot remove the cgroup {}: {error}", group.path.display()));
            }
        }
    }
}

/// What files had before limits were set, in the order in which that was done.
#[derive(Debug, Default)]
pub(crate) struct Former(Vec<(PathBuf, String)>);

impl Former {
    /// Gives it back to them, as far as they take it: why it is to be given back is the error to tell of.
    pub(crate) fn restore(self) {
        for (path, value) in self.0.into_iter().rev() {
            // Nothing at all is written as an empty line; of a file with several lines each is a value of its own.
            let value = if value.is_empty() { "\n" } else { value.as_str() };
            for line in value.split_inclusive('\n') {
                if let Err(error) = fs::write(&path, line) {
                    let line = line.trim_end();
                    logging::debug(format_args!("cannot set {} back to {line:?}: {error}", path.display()));
                }
            }
        }
    }
}

/// The first word of `cpu.max`.
fn quota_of(cgroup: &Path) -> String {
    let text = fs::read_to_string(cgroup.join("cpu.max")).unwrap_or_default();
    text.split_ascii_whitespace().next().unwrap_or("max").to_owned()
}

impl Drop for HostCgroup {
    fn drop(&mut self) {
        self.remove(REMOVE_PATIENCE, logging::warn);
    }
}

fn remove(group: &Group, patience: Duration) -> io::Result<()> {
    let end = Instant::now() + patience;
    let mut origin = group.origin.as_deref();
    loop {
        match fs::remove_dir(&group.path) {
            Err(error) if error.raw_os_error() == Some(libc::EBUSY) && (origin.is_some() || Instant::now() < end) => {
                if let Some(origin) = origin.take() {
                    // If this process is not in it, this changes nothing.
                    let _ = fs::write(origin.join("cgroup.procs"), std::process::id().to_string());
                } else {
                    thread::sleep(REMOVE_PAUSE);
                }
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
            result => return result,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Plain directories, which take any file.
    fn hierarchies(root: &Path, version_2: bool) -> Hierarchies {
        fs::create_dir_all(root.join("user/session")).unwrap();
        Hierarchies::for_test(vec![Hierarchy {
            mount_point: root.to_owned(),
            own_path: "user/session".into(),
            version_2,
        }])
    }

    fn spec(place: Option<&str>) -> CgroupSpec {
        let limits = Limits { memory_bytes: Some(1 << 20), ..Limits::default() };
        CgroupSpec { place: place.map(|place| Place::parse(place).unwrap()), limits }
    }

    #[test]
    fn it_is_where_it_was_asked_for_and_has_its_limits() {
        let root = tempfile::tempdir().unwrap();

        let mut noted = Vec::new();
        let note = |path: &Path| {
            noted.push((path.to_owned(), path.exists()));
            Ok(())
        };
        let of_test = || Ok(hierarchies(root.path(), true));

        let cgroup = HostCgroup::create_in(&spec(Some("/a/b")), "x", of_test, note).unwrap();

        assert_eq!(noted, [(root.path().join("a/b"), false)]);
        assert!(cgroup.groups[0].path.is_dir());
        assert_eq!(fs::read_to_string(root.path().join("a/b/memory.max")).unwrap(), "1048576");
    }

    #[test]
    fn block_devices_are_limited_where_the_host_can() {
        let root = tempfile::tempdir().unwrap();
        let mut spec = spec(Some("/a"));
        spec.limits.block_io.throttles = vec![block_io::Throttle {
            device: block_io::Device { major: 7, minor: 0 },
            what: block_io::Rate::WriteBytes,
            per_second: 9,
        }];
        let create = || HostCgroup::create_in(&spec, "x", || Ok(hierarchies(root.path(), true)), |_| Ok(()));

        assert!(matches!(create().unwrap_err(), HostCgroupError::NoBlockIo));
        fs::create_dir_all(root.path().join("a")).unwrap();
        for file in ["cgroup.procs", "io.max"] {
            fs::write(root.path().join("a").join(file), "").unwrap();
        }
        let _cgroup = create().unwrap();
        assert_eq!(fs::read_to_string(root.path().join("a/io.max")).unwrap(), "7:0 wbps=9");
    }

    #[test]
    fn a_refused_update_leaves_what_was() {
        let root = tempfile::tempdir().unwrap();
        let of_test = || Ok(hierarchies(root.path(), true));
        let cgroup = HostCgroup::create_in(&spec(Some("/a")), "x", of_test, |_| Ok(())).unwrap();
        let read = |file: &str| fs::read_to_string(root.path().join("a").join(file)).unwrap();
        fs::write(root.path().join("a/cpu.max"), "5000 100000\n").unwrap();
        // A folder takes no value.
        fs::create_dir(root.path().join("a/cpuset.cpus")).unwrap();
        let limits = Limits {
            memory_bytes: Some(2 << 20),
            cpu_period_us: Some(50_000),
            cpus: Some("0".to_owned()),
            ..Limits::default()
        };

        let error = cgroup.update(&limits).unwrap_err();

        assert!(error.to_string().ends_with("cpuset.cpus to \"0\""), "{error}");
        assert_eq!((read("memory.max").as_str(), read("cpu.max").as_str()), ("1048576", "5000 100000\n"));
        let former = cgroup.update(&Limits { cpus: None, ..limits }).unwrap();
        assert_eq!((read("memory.max").as_str(), read("cpu.max").as_str()), ("2097152", "5000 50000"));
        former.restore();
        assert_eq!((read("memory.max").as_str(), read("cpu.max").as_str()), ("1048576", "5000 100000\n"));
    }

    #[test]
    fn a_limit_of_memory_is_raised_and_none_is_made() {
        let root = tempfile::tempdir().unwrap();
        let of_test = || Ok(hierarchies(root.path(), true));
        let cgroup = HostCgroup::create_in(&spec(Some("/a")), "x", of_test, |_| Ok(())).unwrap();
        let file = root.path().join("a/memory.max");

        let after = |before: &str| {
            fs::write(&file, before).unwrap();
            cgroup.raise_memory(2 << 20).unwrap();
            fs::read_to_string(&file).unwrap()
        };

        assert_eq!([after("1048576\n"), after("4194304\n"), after("max\n")], ["2097152", "4194304\n", "max\n"]);
    }

    #[test]
    fn without_a_place_it_is_beside_the_callers() {
        let root = tempfile::tempdir().unwrap();

        let _cgroup =
            HostCgroup::create_in(&spec(None), "x", || Ok(hierarchies(root.path(), true)), |_| Ok(())).unwrap();

        assert!(root.path().join("user/x/memory.max").exists());
    }

    #[test]
    fn without_a_place_and_a_limit_there_is_none() {
        assert!(HostCgroup::create(&CgroupSpec::default(), "x", |_| Ok(())).unwrap().is_none());
    }

    #[test]
    fn an_empty_one_is_removed_and_removing_again_is_no_error() {
        let root = tempfile::tempdir().unwrap();
        let path = root.path().join("gone");
        fs::create_dir(&path).unwrap();

        drop(HostCgroup::reopen([path.clone()]));
        drop(HostCgroup::reopen([path.clone()]));

        assert!(!path.exists());
    }

    #[test]
    fn one_with_processes_is_not_taken() {
        let root = tempfile::tempdir().unwrap();
        fs::create_dir_all(root.path().join("a")).unwrap();
        fs::write(root.path().join("a/cgroup.procs"), "1\n").unwrap();

        let error = HostCgroup::create_in(&spec(Some("/a")), "x", || Ok(hierarchies(root.path(), true)), |_| Ok(()))
            .unwrap_err();

        assert!(matches!(error, HostCgroupError::InUse(_)), "{error}");
    }

    #[test]
    fn a_host_without_hierarchies_is_an_error_only_for_a_certain_place() {
        let none = || Ok(Hierarchies::for_test(Vec::new()));

        assert!(matches!(HostCgroup::create_in(&spec(Some("/a")), "x", none, |_| Ok(())), Err(HostCgroupError::None)));
    }
}
