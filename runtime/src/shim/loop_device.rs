// SPDX-License-Identifier: Apache-2.0
//! Files as block devices (loop(4)): what snapshotters with the mount option `loop` hand over, such as `blockfile` and `erofs`
//! of containerd 2.
//!
//! A device detaches itself from its file when its last user goes, which is a mount, or this program where it is killed in
//! between.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::path::{Path, PathBuf};

const CONTROL: &str = "/dev/loop-control";

/// Of the flags of a device (linux/loop.h).
const LO_FLAGS_READ_ONLY: u32 = 1;
const LO_FLAGS_AUTOCLEAR: u32 = 4;

/// How often another one takes the device that was free.
const ATTEMPTS: usize = 64;

/// `struct loop_config` of linux/loop.h, with `struct loop_info64` in it.
#[repr(C)]
struct LoopConfig {
    fd: u32,
    block_size: u32,
    /// Device, inode, its device, offset, size limit: the kernel's, and the whole of the file.
    info: [u64; 5],
    number: u32,
    encrypt_type: u32,
    encrypt_key_size: u32,
    flags: u32,
    names_and_key: [u8; 160],
    init: [u64; 2],
    reserved: [u64; 8],
}

const _: () = assert!(size_of::<LoopConfig>() == 304);

mod request {
    use super::LoopConfig;

    // linux/loop.h
    nix::ioctl_none_bad!(loop_ctl_get_free, 0x4c82);
    nix::ioctl_write_ptr_bad!(loop_configure, 0x4c0a, LoopConfig);
}

/// A device on a file, attached for as long as this is held or it is mounted.
#[derive(Debug)]
pub(super) struct LoopDevice {
    path: PathBuf,
    _open: File,
}

impl LoopDevice {
    /// Attaches a free device to the whole of a file.
    pub(super) fn attach(file: &Path, read_only: bool) -> io::Result<Self> {
        let backing = OpenOptions::new().read(true).write(!read_only).open(file)?;
        let control = OpenOptions::new().read(true).write(true).open(CONTROL)?;
        for _ in 0..ATTEMPTS {
            let path = PathBuf::from(format!("/dev/loop{}", free(control.as_fd())?));
            let device = OpenOptions::new().read(true).write(!read_only).open(&path)?;
            match configure(device.as_fd(), backing.as_fd(), read_only) {
                Ok(()) => return Ok(Self { path, _open: device }),
                Err(error) if error.raw_os_error() == Some(libc::EBUSY) => {}
                Err(error) => return Err(error),
            }
        }
        Err(io::Error::other("others take every loop device that is free"))
    }

    /// Its node.
    pub(super) fn path(&self) -> &Path {
        &self.path
    }
}

/// The number of a device that has no file; the kernel makes one if there is none.
fn free(control: BorrowedFd<'_>) -> io::Result<i32> {
    // SAFETY: the request takes no argument, and the descriptor is open.
    Ok(unsafe { request::loop_ctl_get_free(control.as_raw_fd()) }?)
}

fn configure(device: BorrowedFd<'_>, backing: BorrowedFd<'_>, read_only: bool) -> io::Result<()> {
    let config = LoopConfig {
        fd: backing.as_raw_fd().cast_unsigned(),
        block_size: 0,
        info: [0; 5],
        number: 0,
        encrypt_type: 0,
        encrypt_key_size: 0,
        flags: LO_FLAGS_AUTOCLEAR | if read_only { LO_FLAGS_READ_ONLY } else { 0 },
        names_and_key: [0; 160],
        init: [0; 2],
        reserved: [0; 8],
    };
    // SAFETY: the kernel reads a `struct loop_config`, which this is by its layout, and keeps no pointer to it; both
    // descriptors are open.
    unsafe { request::loop_configure(device.as_raw_fd(), &config) }?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_that_is_not_there_is_no_device() {
        let error = LoopDevice::attach(Path::new("/no/such/file"), true).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::NotFound);
    }
}
