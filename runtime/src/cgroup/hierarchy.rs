// SPDX-License-Identifier: Apache-2.0
//! The cgroup hierarchies of this host, and this process' place in each.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

/// Controllers of version 1 whose hierarchies are joined: all, as with runc. systemd's own hierarchy has none, and a name instead.
const JOINED: [&str; 15] = [
    "blkio",
    "cpu",
    "cpuacct",
    "cpuset",
    "devices",
    "freezer",
    "hugetlb",
    "memory",
    "misc",
    "name=systemd",
    "net_cls",
    "net_prio",
    "perf_event",
    "pids",
    "rdma",
];

/// Those of them whose hierarchy makes a host one of version 1. The others are also mounted where all that has limits is in version
/// 2: `net_cls` by who marks packets, systemd's own for old images.
const DECIDING: [&str; 7] = ["blkio", "cpu", "cpuacct", "cpuset", "freezer", "memory", "pids"];

/// What a cgroup of version 1 has to have before it can have a process.
const NEEDED_CPUSET: [&str; 2] = ["cpuset.cpus", "cpuset.mems"];

/// Controllers of version 2 that a sandbox's cgroup is to have: those with limits, and those that engines read.
const WANTED: [&str; 5] = ["cpu", "cpuset", "io", "memory", "pids"];

/// One hierarchy.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Hierarchy {
    pub(crate) mount_point: PathBuf,
    /// This process' cgroup, relative to the mount point.
    pub(crate) own_path: PathBuf,
    pub(crate) version_2: bool,
}

/// The hierarchies to be used: version 2, or where controllers with limits are mounted as version 1, those.
#[derive(Debug)]
pub(crate) struct Hierarchies(Vec<Hierarchy>);

impl Hierarchies {
    pub(crate) fn of_host() -> io::Result<Self> {
        // Some mount of somebody else's may have a name that is no UTF-8.
        let mounts = fs::read("/proc/self/mountinfo")?;
        let own = fs::read_to_string("/proc/self/cgroup")?;
        Ok(Self(find(&String::from_utf8_lossy(&mounts), &own)))
    }

    pub(crate) fn list(&self) -> &[Hierarchy] {
        &self.0
    }

    #[cfg(test)]
    pub(crate) fn for_test(list: Vec<Hierarchy>) -> Self {
        Self(list)
    }
}

/// A cgroup mount as `/proc/PID/mountinfo` has it (proc_pid_mountinfo(5)).
struct Mount<'a> {
    root: &'a str,
    mount_point: String,
    version_2: bool,
    options: &'a str,
}

fn find(mountinfo: &str, own: &str) -> Vec<Hierarchy> {
    let mounts: Vec<Mount<'_>> = mountinfo.lines().filter_map(parse_mount).collect();
    let decides = |mount: &Mount<'_>| !mount.version_2 && names_any(mount.options, &DECIDING);
    if mounts.iter().any(decides) { version_1(&mounts, own) } else { version_2(&mounts, own).into_iter().collect() }
}

/// Whether a list with commas has any of these.
fn names_any(list: &str, names: &[&str]) -> bool {
    list.split(',').any(|one| names.contains(&one))
}

fn version_1(mounts: &[Mount<'_>], own: &str) -> Vec<Hierarchy> {
    let of_mount = |mount: &Mount<'_>| {
        let options: Vec<&str> = mount.options.split(',').filter(|option| JOINED.contains(option)).collect();
        let own_path = own_path(own, mount.root, |id, controllers| id != "0" && names_any(controllers, &options))?;
        Some(Hierarchy { mount_point: mount.mount_point.clone().into(), own_path, version_2: false })
    };
    let mut hierarchies: Vec<Hierarchy> = mounts.iter().filter(|mount| !mount.version_2).filter_map(of_mount).collect();
    hierarchies.dedup_by(|later, earlier| later.mount_point == earlier.mount_point);
    hierarchies
}

fn version_2(mounts: &[Mount<'_>], own: &str) -> Option<Hierarchy> {
    let mount = mounts.iter().find(|mount| mount.version_2)?;
    let own_path = own_path(own, mount.root, |id, _| id == "0")?;
    Some(Hierarchy { mount_point: mount.mount_point.clone().into(), own_path, version_2: true })
}

fn parse_mount(line: &str) -> Option<Mount<'_>> {
    let (place, file_system) = line.split_once(" - ")?;
    let mut place = place.split(' ').skip(3);
    let (root, mount_point) = (place.next()?, unescape(place.next()?));
    let mut file_system = file_system.split(' ');
    let version_2 = match file_system.next()? {
        "cgroup" => false,
        "cgroup2" => true,
        _ => return None,
    };
    Some(Mount { root, mount_point, version_2, options: file_system.nth(1)? })
}

/// The path, relative to what is mounted, of the first line of `/proc/self/cgroup` that is asked for.
fn own_path(own: &str, root: &str, wanted: impl Fn(&str, &str) -> bool) -> Option<PathBuf> {
    let line = own.lines().find_map(|line| {
        let (id, rest) = line.split_once(':')?;
        let (controllers, path) = rest.split_once(':')?;
        wanted(id, controllers).then_some(path)
    })?;
    let path = Path::new(line).strip_prefix(root).ok()?;
    // Such a path leads out of a cgroup namespace, to where nothing is mounted.
    let outside = path.components().any(|component| matches!(component, std::path::Component::ParentDir));
    (!outside).then(|| path.to_owned())
}

/// Octal escapes of blanks and the like.
fn unescape(text: &str) -> String {
    let mut rest = text;
    let mut plain = String::with_capacity(text.len());
    while let Some((before, after)) = rest.split_once('\\') {
        plain.push_str(before);
        match after.get(..3).and_then(|digits| u8::from_str_radix(digits, 8).ok()) {
            Some(byte) => {
                plain.push(char::from(byte));
                rest = &after[3..];
            }
            None => {
                plain.push('\\');
                rest = after;
            }
        }
    }
    plain.push_str(rest);
    plain
}

/// Lets the children of `parent`, a cgroup of version 2, have the controllers, from the hierarchy's root down. What the
/// host does not allow shows when a limit cannot be set.
pub(crate) fn enable_controllers(mount_point: &Path, parent: &Path) {
    let mut chain: Vec<&Path> = parent.ancestors().take_while(|path| path.starts_with(mount_point)).collect();
    chain.reverse();
    for path in chain {
        let available = fs::read_to_string(path.join("cgroup.controllers")).unwrap_or_default();
        let control = path.join("cgroup.subtree_control");
        let enabled = fs::read_to_string(&control).unwrap_or_default();
        let has = |list: &str, name: &str| list.split_whitespace().any(|word| word == name);
        for name in WANTED.iter().filter(|name| has(&available, name) && !has(&enabled, name)) {
            // One at a time: one that is refused does not keep the others from being enabled.
            let _ = fs::write(&control, format!("+{name}"));
        }
    }
}

/// Gives `path`, a cgroup of version 1, and those between it and the hierarchy's root the CPUs and memory nodes of the one above
/// where they have none. Other controllers' hierarchies have no such files.
pub(crate) fn inherit_cpuset(mount_point: &Path, path: &Path) -> io::Result<()> {
    let is_below = |path: &&Path| path.starts_with(mount_point) && *path != mount_point;
    let mut chain: Vec<&Path> = path.ancestors().take_while(is_below).collect();
    chain.reverse();
    for (path, file) in chain.into_iter().flat_map(|path| NEEDED_CPUSET.map(|file| (path, file))) {
        let own = path.join(file);
        if fs::read_to_string(&own).is_ok_and(|list| list.trim().is_empty())
            && let Some(parent) = path.parent()
        {
            fs::write(&own, fs::read_to_string(parent.join(file))?)?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    const UNIFIED: &str = "25 1 0:22 / /proc rw - proc proc rw\n\
        30 25 0:26 / /sys/fs/cgroup rw,nosuid shared:4 - cgroup2 cgroup2 rw,nsdelegate\n";

    const VERSION_1: &str = "31 25 0:27 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw\n\
        32 25 0:28 / /sys/fs/cgroup/systemd rw - cgroup cgroup rw,xattr,name=systemd\n\
        33 25 0:29 / /sys/fs/cgroup/cpu,cpuacct rw - cgroup cgroup rw,cpu,cpuacct\n\
        34 25 0:30 /docker/1 /sys/fs/cgroup/memory\\040x rw - cgroup cgroup rw,memory\n\
        35 25 0:31 / /sys/fs/cgroup/debug rw - cgroup cgroup rw,debug\n";

    fn found(mountinfo: &str, own: &str) -> Vec<(String, String, bool)> {
        let text = |path: &Path| path.display().to_string();
        let list = find(mountinfo, own).into_iter();
        list.map(|one| (text(&one.mount_point), text(&one.own_path), one.version_2)).collect()
    }

    #[test]
    fn version_2_is_one_hierarchy() {
        let own = "0::/user.slice/session-1.scope\n";

        assert_eq!(found(UNIFIED, own), [("/sys/fs/cgroup".to_owned(), "user.slice/session-1.scope".to_owned(), true)]);
        assert_eq!(found(UNIFIED, "0::/../outside\n"), []);
    }

    #[test]
    fn hierarchies_without_limits_leave_a_host_of_version_2() {
        for (options, own) in
            [("net_cls", "1:net_cls:/\n0::/u\n"), ("xattr,name=systemd", "1:name=systemd:/s\n0::/u\n")]
        {
            let mounts = format!("{UNIFIED}40 25 0:40 / /sys/fs/cgroup/more rw - cgroup cgroup rw,{options}\n");

            assert_eq!(found(&mounts, own), [("/sys/fs/cgroup".to_owned(), "u".to_owned(), true)], "{options}");
        }
    }

    #[test]
    fn controllers_of_version_1_go_first() {
        let own = "12:cpu,cpuacct:/user\n11:memory:/docker/1/x\n10:debug:/d\n1:name=systemd:/s\n0::/u\n";

        assert_eq!(
            found(VERSION_1, own),
            [
                ("/sys/fs/cgroup/systemd".to_owned(), "s".to_owned(), false),
                ("/sys/fs/cgroup/cpu,cpuacct".to_owned(), "user".to_owned(), false),
                ("/sys/fs/cgroup/memory x".to_owned(), "x".to_owned(), false),
            ]
        );
    }

    #[test]
    fn a_host_without_cgroups_has_none() {
        assert_eq!(found("25 1 0:22 / /proc rw - proc proc rw\nnonsense\n", "0::/\n"), []);
        assert_eq!(found(UNIFIED, ""), []);
    }

    #[test]
    fn processors_and_nodes_are_those_of_the_cgroup_above() {
        let root = tempfile::tempdir().unwrap();
        let path = root.path().join("a/b");
        fs::create_dir_all(&path).unwrap();
        let write = |folder: &str, cpus: &str, mems: &str| {
            fs::write(root.path().join(folder).join("cpuset.cpus"), cpus).unwrap();
            fs::write(root.path().join(folder).join("cpuset.mems"), mems).unwrap();
        };
        write("", "0-3\n", "0-1\n");
        write("a", "2\n", "\n");
        write("a/b", "\n", "\n");

        inherit_cpuset(root.path(), &path).unwrap();

        let read = |file: &str| fs::read_to_string(root.path().join(file)).unwrap();
        assert_eq!((read("a/cpuset.cpus").as_str(), read("a/cpuset.mems").as_str()), ("2\n", "0-1\n"));
        assert_eq!((read("a/b/cpuset.cpus").as_str(), read("a/b/cpuset.mems").as_str()), ("2\n", "0-1\n"));
    }

    #[test]
    fn this_hosts_can_be_read() {
        assert!(Hierarchies::of_host().is_ok());
    }
}
