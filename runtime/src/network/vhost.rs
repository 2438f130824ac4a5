// SPDX-License-Identifier: Apache-2.0
//! vhost-net: the host's kernel moves the frames of a network device, instead of the VMM.

use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;

use bulkhead_vmm::config::VhostNet;

/// Where it is.
pub(super) const DEVICE: &str = "/dev/vhost-net";

/// Opens it once for each of `pairs` queue pairs.
///
/// # Errors
///
/// When this host has none, or one that cannot do what a guest may ask for.
pub(super) fn open(pairs: usize) -> io::Result<Vec<OwnedFd>> {
    let devices: io::Result<Vec<OwnedFd>> =
        (0..pairs).map(|_| File::options().read(true).write(true).open(DEVICE).map(OwnedFd::from)).collect();
    let devices = devices?;
    match devices.first().map(VhostNet::is_sufficient) {
        Some(Ok(false)) => Err(io::ErrorKind::Unsupported.into()),
        Some(Err(error)) => Err(error),
        Some(Ok(true)) | None => Ok(devices),
    }
}
