// SPDX-License-Identifier: Apache-2.0
//! The container's `/dev`: the devices that every container has, those that its spec adds, and the usual links.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::path::Path;

use rustix::fs::{AtFlags, FileType, Gid, Mode, Uid, makedev};
use rustix::io::Errno;

use super::spec::{Device, MountSource};
use super::{ContainerSpec, Failure, Stage};
use crate::storage::resolve::{self, Kind};
use crate::storage::tree;

/// Name, major and minor number of the devices that every container has (OCI runtime spec, "Default Devices"), all
/// with mode 0666.
const DEFAULT: [(&str, u32, u32); 6] = [
    ("/dev/null", 1, 3),
    ("/dev/zero", 1, 5),
    ("/dev/full", 1, 7),
    ("/dev/random", 1, 8),
    ("/dev/urandom", 1, 9),
    ("/dev/tty", 5, 0),
];

/// The major numbers of pseudo-terminals in devpts (Documentation/admin-guide/devices.txt of Linux).
const PTY_MAJORS: std::ops::RangeInclusive<u32> = 136..=143;

/// Link and target.
const LINKS: [(&str, &str); 4] = [
    ("/dev/fd", "/proc/self/fd"),
    ("/dev/stdin", "/proc/self/fd/0"),
    ("/dev/stdout", "/proc/self/fd/1"),
    ("/dev/stderr", "/proc/self/fd/2"),
];

/// Makes the devices and links. `scratch` is a directory of the agent's where device nodes can be made, `sysfs` one that tells
/// which devices there are.
pub(crate) fn make(root: BorrowedFd<'_>, spec: &ContainerSpec, scratch: &Path, sysfs: &Path) -> Result<(), Failure> {
    if !has_own_dev(spec) {
        return Ok(());
    }
    for device in wanted(spec) {
        refuse_absent(&device, sysfs)?;
        make_device(root, &device, spec, scratch)
            .map_err(|error| Failure::new(Stage::Device, device.path.clone(), error))?;
    }
    for (link, target) in LINKS {
        make_link(root, link, target, false).map_err(|error| Failure::new(Stage::Device, link, error))?;
    }
    if resolve::existing(root, "/dev/pts/ptmx").is_ok() {
        make_link(root, "/dev/ptmx", "pts/ptmx", true)
            .map_err(|error| Failure::new(Stage::Device, "/dev/ptmx", error))?;
    }
    Ok(())
}

/// A node whose number the guest's kernel does not know would be a device that nobody can open, or some day another one.
/// Pseudo-terminals come and go.
fn refuse_absent(device: &Device, sysfs: &Path) -> Result<(), Failure> {
    let is_terminal = PTY_MAJORS.contains(&device.major) || (device.major, device.minor) == (5, 2);
    let known = || sysfs.join(format!("dev/char/{}:{}", device.major, device.minor)).exists();
    if device.kind != FileType::CharacterDevice || is_terminal || known() {
        return Ok(());
    }
    let (path, major, minor) = (&device.path, device.major, device.minor);
    let why =
        format!("{path}: the guest has no character device {major}:{minor}, and those of the host are not passed on");
    Err(Failure::explained(Stage::Device, why))
}

/// Makes the nodes that a container in a user namespace is to bind, in `scratch`: it can make none itself.
pub(crate) fn prepare(spec: &ContainerSpec, scratch: &Path) -> Result<(), Failure> {
    if spec.id_mappings.is_none() || !has_own_dev(spec) {
        return Ok(());
    }
    for device in wanted(spec).filter(|device| device.kind != FileType::Fifo) {
        make_bindable(&device, spec, scratch)
            .map_err(|error| Failure::new(Stage::Device, device.path.clone(), error))?;
    }
    Ok(())
}

/// The devices that the spec adds, and those of every container that it does not replace.
fn wanted(spec: &ContainerSpec) -> impl Iterator<Item = Device> {
    let asked = move |path: &str| spec.devices.iter().any(|device| device.path == path);
    let default = DEFAULT.iter().filter(move |(path, ..)| !asked(path)).map(|(path, major, minor)| Device {
        path: (*path).to_owned(),
        kind: FileType::CharacterDevice,
        major: *major,
        minor: *minor,
        mode: 0o666,
        uid: 0,
        gid: 0,
    });
    spec.devices.iter().cloned().chain(default)
}

/// A `/dev` that is bound from elsewhere is not the container's own, and is left as it is.
fn has_own_dev(spec: &ContainerSpec) -> bool {
    !spec.mounts.iter().any(|mount| {
        mount.destination.trim_end_matches('/') == "/dev" && matches!(mount.source, MountSource::Share { .. })
    })
}

fn make_device(root: BorrowedFd<'_>, device: &Device, spec: &ContainerSpec, scratch: &Path) -> io::Result<()> {
    let (parent, name) = resolve::parent_and_name(root, &device.path)?;
    match make_node(parent.as_fd(), Path::new(&name), device) {
        // Shared trees take no device nodes: one of the guest's is bound over a file there, which may be left from last
        // time.
        Err(error) if matches!(error.raw_os_error(), Some(libc::EPERM | libc::EEXIST)) => {
            let name = match spec.id_mappings {
                // It has been made there.
                Some(_) => bindable_name(&outside(device, spec)),
                None => make_bindable(device, spec, scratch)?,
            };
            let node = resolve::existing(resolve::own_directory(scratch)?.as_fd(), &name)?;
            let place = resolve::existing_or_made(root, &device.path, Kind::File)?;
            tree::attach(tree::clone_at(node.as_fd(), false)?.as_fd(), place.as_fd())
        }
        result => result,
    }
}

/// Makes the node. The same device that is there already is kept.
fn make_node(directory: BorrowedFd<'_>, name: &Path, device: &Device) -> io::Result<()> {
    let number = makedev(device.major, device.minor);
    let mode = Mode::from_raw_mode(device.mode);
    match rustix::fs::mknodat(directory, name, device.kind, mode, number) {
        // The agent's own mask may have taken something away.
        Ok(()) => rustix::fs::chmodat(directory, name, mode, AtFlags::empty())?,
        Err(Errno::EXIST) => {
            let found = rustix::fs::statat(directory, name, AtFlags::SYMLINK_NOFOLLOW)?;
            let same = FileType::from_raw_mode(found.st_mode) == device.kind
                && (device.kind == FileType::Fifo || found.st_rdev == number);
            return if same { Ok(()) } else { Err(Errno::EXIST.into()) };
        }
        Err(error) => return Err(error.into()),
    }
    let owner = (Uid::from_raw(device.uid), Gid::from_raw(device.gid));
    rustix::fs::chownat(directory, name, Some(owner.0), Some(owner.1), AtFlags::SYMLINK_NOFOLLOW)?;
    Ok(())
}

/// Makes the node in `scratch`. Returns its name there.
fn make_bindable(device: &Device, spec: &ContainerSpec, scratch: &Path) -> io::Result<String> {
    let device = outside(device, spec);
    let name = bindable_name(&device);
    make_node(resolve::own_directory(scratch)?.as_fd(), Path::new(&name), &device)?;
    Ok(name)
}

/// All that the node is goes into its name, so that containers can share it.
fn bindable_name(device: &Device) -> String {
    let kind = match device.kind {
        FileType::BlockDevice => 'b',
        FileType::Fifo => 'p',
        _ => 'c',
    };
    format!("{kind}-{}-{}-{:04o}-{}-{}", device.major, device.minor, device.mode, device.uid, device.gid)
}

/// The device with the guest's ids for its owner. One that the user namespace does not have is nobody's there.
fn outside(device: &Device, spec: &ContainerSpec) -> Device {
    let Some(mappings) = &spec.id_mappings else { return device.clone() };
    let uid = mappings.user_outside(device.uid).unwrap_or(0);
    let gid = mappings.group_outside(device.gid).unwrap_or(0);
    Device { uid, gid, ..device.clone() }
}

/// Makes a link. What is there already is kept, unless it is to be `replaced`.
fn make_link(root: BorrowedFd<'_>, link: &str, target: &str, replaced: bool) -> io::Result<()> {
    let (parent, name) = resolve::parent_and_name(root, link)?;
    if replaced {
        match rustix::fs::unlinkat(&parent, &name, AtFlags::empty()) {
            Ok(()) | Err(Errno::NOENT) => {}
            Err(error) => return Err(error.into()),
        }
    }
    match rustix::fs::symlinkat(target, &parent, &name) {
        Ok(()) | Err(Errno::EXIST) => Ok(()),
        Err(error) => Err(error.into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::File;

    #[test]
    fn links_are_made_once_and_replaced_on_request() {
        let folder = tempfile::tempdir().unwrap();
        let root = File::open(folder.path()).unwrap();

        make_link(root.as_fd(), "/dev/fd", "/proc/self/fd", false).unwrap();
        make_link(root.as_fd(), "/dev/fd", "elsewhere", false).unwrap();
        assert_eq!(std::fs::read_link(folder.path().join("dev/fd")).unwrap(), Path::new("/proc/self/fd"));

        make_link(root.as_fd(), "/dev/fd", "elsewhere", true).unwrap();
        assert_eq!(std::fs::read_link(folder.path().join("dev/fd")).unwrap(), Path::new("elsewhere"));
    }
}
