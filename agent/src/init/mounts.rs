// SPDX-License-Identifier: Apache-2.0
//! The agent's own mounts.

use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use rustix::mount::{MountFlags, mount, mount_bind, mount_move};

use crate::container::MAX_CGROUP_DEPTH;
use crate::log;

/// Directories that are made, beside those in the image.
const DIRECTORIES: [&str; 8] = [
    super::PRIVATE,
    super::SHARED,
    super::CGROUP,
    super::ROOTFS,
    super::DEVICES,
    super::SYS,
    super::TMPFS,
    super::SOCKETS,
];

/// The cgroup in which containers get theirs.
const CONTAINERS: &str = "bulkhead";

/// Why one of the agent's mounts could not be made.
#[derive(Debug, thiserror::Error)]
pub(super) enum MountError {
    #[error("cannot mount {what} at {}", place.display())]
    Mount { what: String, place: PathBuf, source: io::Error },
    #[error("cannot move the root file system off the bottom of the mount tree")]
    Root(#[source] io::Error),
    #[error("cannot make directory {}", path.display())]
    Directory { path: PathBuf, source: io::Error },
    #[error("cannot enable the controllers of cgroup {}", path.display())]
    Controllers { path: PathBuf, source: io::Error },
    #[error("cannot limit by {} how deep cgroups are nested", path.display())]
    Depth { path: PathBuf, source: io::Error },
}

/// Mounts /dev and /proc and makes the agent's directories. From the first of these on, the agent can log.
pub(super) fn mount_kernel_file_systems() -> Result<(), MountError> {
    lift_root().map_err(MountError::Root)?;
    mount_at("devtmpfs", "devtmpfs", Path::new("/dev"), MountFlags::NOSUID)?;
    // A guest without a log works all the same.
    let _ = log::open();
    mount_at("proc", "proc", Path::new("/proc"), MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC)?;
    let make = || DIRECTORIES.iter().try_for_each(fs::create_dir_all);
    match make() {
        // The debugging image cannot be written.
        Err(error) if error.kind() == io::ErrorKind::ReadOnlyFilesystem => {
            mount_at("tmpfs", "tmpfs", Path::new("/run"), MountFlags::NOSUID)?;
            make()
        }
        result => result,
    }
    .map_err(|source| MountError::Directory { path: "/run/bulkhead".into(), source })
}

/// Puts a mount of the root file system on top of itself.
///
/// An initramfs is the very first mount, and pivot_root(2) cannot replace that one; with another on top, containers can
/// pivot as they do anywhere.
fn lift_root() -> io::Result<()> {
    // Any directory that is in the image will do.
    mount_bind("/", "/run")?;
    rustix::process::chdir("/run")?;
    mount_move(".", "/")?;
    rustix::process::chroot(".")?;
    rustix::process::chdir("/")?;
    Ok(())
}

fn mount_at(source: &str, fs_type: &str, place: &Path, flags: MountFlags) -> Result<(), MountError> {
    mount(source, place, fs_type, flags, None).map_err(|errno| MountError::Mount {
        what: if source == fs_type { fs_type.to_owned() } else { format!("{fs_type} {source:?}") },
        place: place.into(),
        source: errno.into(),
    })
}

/// Mounts the share device of this tag.
pub(super) fn mount_share(tag: &str, place: &Path) -> Result<(), MountError> {
    mount_at(tag, "virtiofs", place, MountFlags::empty())
}

/// Lets files of the share at `place` be cached and written back like those of a disk. Linux holds every FUSE file system
/// to one hundredth of its dirty pages, since a stranger may serve it; here the host does, and reads and writes in large
/// pieces are what make it fast (Documentation/ABI/testing/sysfs-class-bdi).
pub(super) fn let_write_back_grow(place: &Path) -> io::Result<()> {
    const SETTINGS: [(&str, &str); 3] = [("strict_limit", "0"), ("max_ratio", "100"), ("read_ahead_kb", "1024")];
    mount("sysfs", super::SYS, "sysfs", MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC, None)?;
    let device = fs::metadata(place)?.dev();
    let (major, minor) = (rustix::fs::major(device), rustix::fs::minor(device));
    let settings = Path::new(super::SYS).join(format!("class/bdi/{major}:{minor}"));
    SETTINGS.iter().try_for_each(|(name, value)| fs::write(settings.join(name), value))
}

/// Mounts the cgroup file system and makes the cgroup for containers, with every controller there is. Returns its path.
pub(super) fn mount_cgroup(place: &Path) -> Result<PathBuf, MountError> {
    mount_at("cgroup2", "cgroup2", place, MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC)?;
    enable_controllers(place)?;
    let containers = place.join(CONTAINERS);
    fs::create_dir(&containers).map_err(|source| MountError::Directory { path: containers.clone(), source })?;
    enable_controllers(&containers)?;
    // So that what a container makes below its own can be cleaned up after it; it does not see this one.
    let (limit, depth) = (containers.join("cgroup.max.depth"), MAX_CGROUP_DEPTH + 1);
    fs::write(&limit, depth.to_string()).map_err(|source| MountError::Depth { path: limit, source })?;
    Ok(containers)
}

/// Gives the cgroups below `cgroup` every controller that it has itself.
fn enable_controllers(cgroup: &Path) -> Result<(), MountError> {
    let enable = || -> io::Result<()> {
        let names = fs::read_to_string(cgroup.join("cgroup.controllers"))?;
        let wanted: Vec<String> = names.split_whitespace().map(|name| format!("+{name}")).collect();
        if wanted.is_empty() { Ok(()) } else { fs::write(cgroup.join("cgroup.subtree_control"), wanted.join(" ")) }
    };
    enable().map_err(|source| MountError::Controllers { path: cgroup.into(), source })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_controllers_are_enabled_below() {
        let cgroup = tempfile::tempdir().unwrap();
        fs::write(cgroup.path().join("cgroup.controllers"), "cpu memory pids\n").unwrap();
        enable_controllers(cgroup.path()).unwrap();
        let written = fs::read_to_string(cgroup.path().join("cgroup.subtree_control")).unwrap();
        assert_eq!(written, "+cpu +memory +pids");
    }
}
