// SPDX-License-Identifier: Apache-2.0
//! The host's calls as the server needs them.

use std::ffi::CStr;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};

use rustix::fs::{AtFlags, Mode, OFlags, Statx, StatxFlags, openat, statx};
use rustix::io::Errno;
use rustix::thread::{CapabilitySet, CapabilitySets, capabilities, set_capabilities};

/// What the server opens, it opens so: nothing waits, becomes a controlling terminal, or outlives the process.
pub(super) const OPEN: OFlags = OFlags::CLOEXEC.union(OFlags::NOCTTY).union(OFlags::NONBLOCK);

/// Attributes and identity of a descriptor's file.
pub(in crate::fs) fn stat(descriptor: impl AsFd) -> Result<Statx, Errno> {
    statx(descriptor, c"", AtFlags::EMPTY_PATH, StatxFlags::BASIC_STATS | StatxFlags::MNT_ID)
}

/// Opens one name of a directory, whatever it is, to stand for the file.
pub(in crate::fs) fn open_path(directory: impl AsFd, name: &CStr) -> Result<OwnedFd, Errno> {
    openat(directory, name, OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC, Mode::empty()).map_err(too_many)
}

/// The guest's business is that there are no descriptors left, not whose limit that is.
pub(super) fn too_many(errno: Errno) -> Errno {
    if errno == Errno::MFILE { Errno::NFILE } else { errno }
}

/// A descriptor's name in `/proc/self/fd`. It leads to the file itself, also if that is a symlink or has no name.
#[derive(Debug)]
pub(super) struct DescriptorName([u8; 12]);

impl DescriptorName {
    pub(super) fn new(descriptor: &OwnedFd) -> Self {
        // The number of an open descriptor is not negative and has at most 10 digits.
        let mut number = descriptor.as_raw_fd().unsigned_abs();
        let mut bytes = [0; 12];
        let digits = number.checked_ilog10().map_or(1, |log| log as usize + 1);
        for byte in bytes.iter_mut().take(digits).rev() {
            *byte = b'0' + u8::try_from(number % 10).unwrap_or(0);
            number /= 10;
        }
        Self(bytes)
    }

    pub(super) fn as_c_str(&self) -> &CStr {
        CStr::from_bytes_until_nul(&self.0).unwrap_or(c"")
    }
}

/// Does something without `CAP_FSETID`, so that the kernel clears set-id bits as it does for an ordinary user.
pub(super) fn without_fsetid<T>(act: impl FnOnce() -> Result<T, Errno>) -> Result<T, Errno> {
    let before = capabilities(None)?;
    if !before.effective.contains(CapabilitySet::FSETID) {
        return act();
    }
    set_capabilities(None, CapabilitySets { effective: before.effective.difference(CapabilitySet::FSETID), ..before })?;
    let outcome = act();
    // What is permitted can always be made effective again.
    set_capabilities(None, before)?;
    outcome
}

#[cfg(test)]
mod tests {
    use std::os::fd::FromRawFd;

    use super::*;

    #[test]
    fn a_descriptors_name_is_its_number() {
        for (number, name) in [(0, c"0"), (7, c"7"), (10, c"10"), (1_048_576, c"1048576")] {
            // SAFETY: the descriptor is never used nor closed.
            let descriptor = std::mem::ManuallyDrop::new(unsafe { OwnedFd::from_raw_fd(number) });

            assert_eq!(DescriptorName::new(&descriptor).as_c_str(), name);
        }
    }
}
