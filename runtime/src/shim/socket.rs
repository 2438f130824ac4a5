// SPDX-License-Identifier: Apache-2.0
//! The socket of a server: its address follows from who asks for which container, so that it can be found again.

use std::fmt::Write as _;
use std::fs::{self, DirBuilder};
use std::io;
use std::os::unix::fs::DirBuilderExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

use sha2::{Digest, Sha256};

/// Where containerd's shims have their sockets, whatever containerd's own folders are.
const FOLDER: &str = "/run/containerd/s";

/// What begins the address of a Unix socket.
const SCHEME: &str = "unix://";

/// The path of the socket for a container of a namespace of the containerd at that address, in another folder if it names one.
pub(super) fn path(folder: Option<&Path>, containerd: &str, namespace: &str, id: &str) -> PathBuf {
    let name = Path::new(containerd).join(namespace).join(id);
    let mut digest = String::with_capacity(64);
    for byte in Sha256::digest(name.as_os_str().as_encoded_bytes()) {
        // Writing to a string does not fail.
        let _ = write!(digest, "{byte:02x}");
    }
    folder.unwrap_or(Path::new(FOLDER)).join(digest)
}

/// The address by which containerd connects to it.
pub(super) fn address(path: &Path) -> String {
    format!("{SCHEME}{}", path.display())
}

/// The path in such an address.
pub(super) fn path_of(address: &str) -> Option<&Path> {
    address.trim().strip_prefix(SCHEME).map(Path::new)
}

/// Makes the socket; `None` if a server answers there already. One that nobody listens on any more is replaced.
pub(super) fn bind(path: &Path) -> io::Result<Option<UnixListener>> {
    if let Some(folder) = path.parent() {
        DirBuilder::new().recursive(true).mode(0o711).create(folder)?;
    }
    match UnixListener::bind(path) {
        Err(error) if error.kind() == io::ErrorKind::AddrInUse => {
            if is_served(path)? {
                return Ok(None);
            }
            fs::remove_file(path)?;
            UnixListener::bind(path).map(Some)
        }
        listener => listener.map(Some),
    }
}

/// Whether somebody listens on a socket.
pub(super) fn is_served(path: &Path) -> io::Result<bool> {
    match UnixStream::connect(path) {
        Ok(_) => Ok(true),
        Err(error) if matches!(error.kind(), io::ErrorKind::ConnectionRefused | io::ErrorKind::NotFound) => Ok(false),
        Err(error) => Err(error),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_path_is_that_of_containerds_convention() {
        let path = path(None, "/run/containerd/containerd.sock", "default", "c1");

        // printf /run/containerd/containerd.sock/default/c1 | sha256sum
        let digest = "d25aa4ef11a84e954e74a5bcff06557d0b6ea8d0c00243896f29826694bbd888";
        assert_eq!(path, Path::new(FOLDER).join(digest));
        assert_eq!(path_of(&address(&path)), Some(path.as_path()));
        assert_eq!(path_of("vsock://1:2"), None);
    }

    #[test]
    fn whether_a_socket_is_served_is_not_guessed() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("s");
        let listener = UnixListener::bind(&path).unwrap();

        assert!(is_served(&path).unwrap());
        drop(listener);
        assert!(!is_served(&path).unwrap());
        assert!(!is_served(&folder.path().join("absent")).unwrap());
        assert!(is_served(&path.join("below")).is_err());
    }

    #[test]
    fn a_server_that_answers_is_left_alone_and_a_dead_ones_socket_replaced() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s/socket");

        let first = bind(&path).unwrap();
        assert!(first.is_some());
        assert!(bind(&path).unwrap().is_none());
        drop(first);
        assert!(bind(&path).unwrap().is_some());
    }
}
