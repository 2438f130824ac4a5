// SPDX-License-Identifier: Apache-2.0
//! Block devices of the host, opened by their numbers: what a path leads to may be another one.

use std::fmt;
use std::fs;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;

use bulkhead_vmm::tree::mount_setattr;
use rustix::fs::{FileType, Mode, OFlags, makedev, mknodat, openat};
use rustix::io::Errno;
use rustix::mount::{FsMountFlags, FsOpenFlags, MountAttrFlags, fsconfig_create, fsmount, fsopen};

/// The kernel's devices by their numbers.
const DEVICES: &str = "/sys/dev/block";

/// What the node is called, in a folder of its own.
const NODE: &str = "device";

/// The number of a block device, the host's or a guest's.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Number {
    pub(crate) major: u32,
    pub(crate) minor: u32,
}

impl fmt::Display for Number {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "{}:{}", self.major, self.minor)
    }
}

/// An open device.
#[derive(Debug)]
pub(crate) struct Opened {
    pub(crate) file: OwnedFd,
    /// Whether it cannot be written to by this descriptor.
    pub(crate) read_only: bool,
}

/// Opens the device of that number; for writing too if it `may_write`, and the host lets it be written to.
///
/// # Errors
///
/// When the host has none, or this process may not use it.
pub(crate) fn open(number: Number, may_write: bool) -> io::Result<Opened> {
    let known = Path::new(DEVICES).join(number.to_string());
    // Opening the node of an absent device may have the kernel make one.
    if !known.exists() {
        return Err(io::Error::new(io::ErrorKind::NotFound, format!("this host has no block device {number}")));
    }
    let is_writable = fs::read_to_string(known.join("ro")).is_ok_and(|text| text.trim_end() == "0");
    let folder = nameless_folder()?;
    let node = makedev(number.major, number.minor);
    mknodat(&folder, NODE, FileType::BlockDevice, Mode::RUSR | Mode::WUSR, node)?;
    let opened = open_node(&folder, may_write && is_writable)?;
    // By a descriptor alone, without the folder, the node can be opened again: for writing too, by a VMM that a guest has taken over.
    mount_setattr(folder.as_fd(), false, MountAttrFlags::MOUNT_ATTR_RDONLY | MountAttrFlags::MOUNT_ATTR_NODEV)?;
    Ok(opened)
}

fn open_node(folder: &OwnedFd, may_write: bool) -> io::Result<Opened> {
    let open = |access| openat(folder, NODE, access | OFlags::CLOEXEC, Mode::empty());
    if may_write {
        match open(OFlags::RDWR) {
            // Of this process, the host may allow no more than reading.
            Err(Errno::ROFS | Errno::ACCESS | Errno::PERM) => {}
            result => return Ok(Opened { file: result?, read_only: false }),
        }
    }
    Ok(Opened { file: open(OFlags::RDONLY)?, read_only: true })
}

/// A file system that is mounted nowhere, and gone with its descriptor: where others may have device nodes, such as `/run`, they
/// cannot be opened.
fn nameless_folder() -> io::Result<OwnedFd> {
    let context = fsopen("tmpfs", FsOpenFlags::FSOPEN_CLOEXEC)?;
    fsconfig_create(context.as_fd())?;
    let attributes = MountAttrFlags::MOUNT_ATTR_NOSUID | MountAttrFlags::MOUNT_ATTR_NOEXEC;
    Ok(fsmount(context.as_fd(), FsMountFlags::FSMOUNT_CLOEXEC, attributes)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_device_that_is_not_there_is_named() {
        // No driver has a major number as large.
        let error = open(Number { major: 4095, minor: 7 }, true).unwrap_err();
        assert_eq!(error.to_string(), "this host has no block device 4095:7");
    }
}
