// SPDX-License-Identifier: Apache-2.0
//! Mounts as descriptors: cloned or made without a place, changed, and only then attached where they belong. Nothing is
//! ever visible half set up, and no path is looked up twice.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use rustix::io::Errno;
use rustix::mount::{
    FsMountFlags, FsOpenFlags, MountAttrFlags, MoveMountFlags, OpenTreeFlags, fsconfig_create, fsconfig_set_flag,
    fsconfig_set_string, fsmount, fsopen, move_mount, open_tree,
};

use super::flags;
use crate::sys::{self, MountAttributes};

/// File systems without a device of their own: read-only is a matter of the mount, not of the file system.
const WITHOUT_DEVICE: [&str; 8] = ["cgroup2", "devpts", "devtmpfs", "mqueue", "overlay", "proc", "sysfs", "tmpfs"];

/// Longest explanation taken from the kernel.
const MAX_EXPLANATION_LEN: usize = 512;

/// A copy of the mount that `place` lies in, rooted at `place`; with `recursive`, of all mounts below it too.
pub(crate) fn clone_at(place: BorrowedFd<'_>, recursive: bool) -> io::Result<OwnedFd> {
    let mut flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC | OpenTreeFlags::AT_EMPTY_PATH;
    if recursive {
        flags |= OpenTreeFlags::AT_RECURSIVE;
    }
    Ok(open_tree(place, "", flags)?)
}

/// Puts a mount that has no place yet on `place`.
pub(crate) fn attach(mount: BorrowedFd<'_>, place: BorrowedFd<'_>) -> io::Result<()> {
    let flags = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH | MoveMountFlags::MOVE_MOUNT_T_EMPTY_PATH;
    Ok(move_mount(mount, "", place, "", flags)?)
}

/// Sets the attributes that `set` (MS_*) asks for and clears those of `clear` (MS_*).
pub(crate) fn change(mount: BorrowedFd<'_>, recursive: bool, set: u64, clear: u64) -> io::Result<()> {
    let attributes = flags::attributes(set);
    let cleared = flags::attributes(clear) | flags::access_time_field(set, attributes);
    if attributes == 0 && cleared == 0 {
        return Ok(());
    }
    sys::mount_setattr(mount, recursive, MountAttributes { set: attributes, clear: cleared, ..Default::default() })
}

/// Maps the ids of the files of a mount without a place by a user namespace. That needs the guest's own root.
pub(crate) fn map_ids(mount: BorrowedFd<'_>, namespace: BorrowedFd<'_>) -> io::Result<()> {
    let userns_fd = u64::from(namespace.as_raw_fd().cast_unsigned());
    sys::mount_setattr(mount, false, MountAttributes { set: libc::MOUNT_ATTR_IDMAP, userns_fd, ..Default::default() })
}

/// Sets how mounts below this one spread. `propagation`: MS_SHARED, MS_SLAVE, MS_PRIVATE or MS_UNBINDABLE, with MS_REC
/// for everything below too; 0 leaves it.
pub(crate) fn propagate(mount: BorrowedFd<'_>, propagation: u64) -> io::Result<()> {
    let (propagation, recursive) = flags::propagation(propagation);
    if propagation == 0 {
        return Ok(());
    }
    sys::mount_setattr(mount, recursive, MountAttributes { propagation, ..Default::default() })
}

/// A new mount of a file system, without a place.
///
/// `flags` are MS_*, `data` is the comma-separated rest of the options.
pub(crate) fn make(fs_type: &str, source: &str, flags: u64, data: &str) -> Result<OwnedFd, FileSystemError> {
    let context = fsopen(fs_type, FsOpenFlags::FSOPEN_CLOEXEC).map_err(|errno| match errno {
        Errno::NODEV => FileSystemError::Unknown,
        errno => FileSystemError::System { source: errno.into(), explanation: String::new() },
    })?;
    let explain =
        |errno: Errno| FileSystemError::System { source: errno.into(), explanation: explanation(context.as_fd()) };
    if !source.is_empty() {
        fsconfig_set_string(context.as_fd(), "source", source).map_err(explain)?;
    }
    if flags & libc::MS_RDONLY != 0 && !WITHOUT_DEVICE.contains(&fs_type) {
        fsconfig_set_flag(context.as_fd(), "ro").map_err(explain)?;
    }
    for name in flags::file_system_flags(flags) {
        fsconfig_set_flag(context.as_fd(), name).map_err(explain)?;
    }
    for option in data.split(',').filter(|option| !option.is_empty()) {
        let set = match option.split_once('=') {
            Some((key, value)) => fsconfig_set_string(context.as_fd(), key, value),
            None => fsconfig_set_flag(context.as_fd(), option),
        };
        set.map_err(|errno| FileSystemError::Option {
            option: option.to_owned(),
            source: errno.into(),
            explanation: explanation(context.as_fd()),
        })?;
    }
    fsconfig_create(context.as_fd()).map_err(explain)?;
    // An attribute is an `unsigned int` in this call.
    let attributes = MountAttrFlags::from_bits_retain(u32::try_from(flags::attributes(flags)).unwrap_or_default());
    fsmount(context.as_fd(), FsMountFlags::FSMOUNT_CLOEXEC, attributes).map_err(explain)
}

/// Why a file system could not be mounted.
#[derive(Debug, thiserror::Error)]
pub(crate) enum FileSystemError {
    #[error("the guest's kernel does not know this file system type")]
    Unknown,
    #[error("option {option:?} is refused: {source}{explanation}")]
    Option { option: String, source: io::Error, explanation: String },
    #[error("{source}{explanation}")]
    System { source: io::Error, explanation: String },
}

/// What the kernel has to say about the last error on `context`, in brackets; empty if nothing.
fn explanation(context: BorrowedFd<'_>) -> String {
    let mut text = [0; MAX_EXPLANATION_LEN];
    match rustix::io::read(context, &mut text) {
        // Each message starts with its kind and a space: "e overlay: ...".
        Ok(len) if len > 2 => format!(" ({})", String::from_utf8_lossy(&text[2..len]).trim_end()),
        _ => String::new(),
    }
}
