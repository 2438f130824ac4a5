// SPDX-License-Identifier: Apache-2.0
//! vhost-net: the host's kernel moves the frames of a network device, instead of the VMM.

use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;

use bulkhead_vmm::config::VhostNet;

use super::node::Node;

/// Where it is.
pub(super) const DEVICE: &str = "/dev/vhost-net";

/// Opens it once for each of `pairs` queue pairs.
///
/// # Errors
///
/// When this host has none, or one that cannot do what a guest may ask for.
pub(super) fn open(pairs: usize) -> io::Result<Vec<OwnedFd>> {
    let node = Node::find(DEVICE)?;
    let open = || node.open(File::options().read(true).write(true)).map(OwnedFd::from);
    let devices: Vec<OwnedFd> = (0..pairs).map(|_| open()).collect::<io::Result<_>>()?;
    node.seal()?;
    match devices.first().map(VhostNet::is_sufficient) {
        Some(Ok(false)) => Err(io::ErrorKind::Unsupported.into()),
        Some(Err(error)) => Err(error),
        Some(Ok(true)) | None => Ok(devices),
    }
}
