// SPDX-License-Identifier: Apache-2.0
//! A Unix socket of the host that a container may connect to.
//!
//! It is known by its folder, which is held open, and its name there: a server that is started again makes its socket anew. No
//! link is followed, and nothing but a socket is connected to, whatever somebody puts there.

use std::ffi::OsString;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use rustix::fs::{FileType, Mode, OFlags, Stat, fstat, open, openat};
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, connect, socket_with};
use tokio::net::UnixStream;
use tokio::time::sleep;

use super::ShareError;
use crate::logging;

/// How long a server that has no room for a connection is left alone: the kernel does not tell when it has.
const BUSY: Duration = Duration::from_millis(20);

/// The place of the socket.
#[derive(Debug)]
pub(crate) struct HostSocket {
    path: PathBuf,
    folder: OwnedFd,
    name: OsString,
    /// As it was found.
    status: Stat,
    /// Whether it has been said that it is of another type.
    type_told: AtomicBool,
}

impl HostSocket {
    /// The socket at a path that has no links in it.
    ///
    /// # Errors
    ///
    /// It is absent, or not one that takes connections, as far as that can be told without making one.
    pub(crate) fn find(path: PathBuf) -> Result<Self, ShareError> {
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let folder = open(path.parent().unwrap_or(Path::new("/")), flags, Mode::empty()).map_err(io::Error::from)?;
        let name = path.file_name().unwrap_or_default().to_owned();
        let (node, status) = look(&folder, &name)?;
        if takes_datagrams(&node) {
            return Err(ShareError::Kind("Unix socket of datagrams"));
        }
        Ok(Self { path, folder, name, status, type_told: AtomicBool::new(false) })
    }

    /// Permission bits, user and group.
    pub(crate) fn attributes(&self) -> (u32, u32, u32) {
        (self.status.st_mode & 0o777, self.status.st_uid, self.status.st_gid)
    }

    /// Connects to whoever listens there now. A refusal is told to the log.
    pub(crate) async fn connect(&self) -> Option<UnixStream> {
        let connected = loop {
            match self.try_connect().await {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => sleep(BUSY).await,
                connected => break connected,
            }
        };
        connected.map_err(|error| self.tell(&error)).ok()
    }

    async fn try_connect(&self) -> io::Result<UnixStream> {
        let (node, _) = look(&self.folder, &self.name)?;
        UnixStream::connect(address(&node)).await
    }

    fn tell(&self, error: &io::Error) {
        let path = self.path.display();
        if error.raw_os_error() == Some(libc::EPROTOTYPE) && !self.type_told.swap(true, Ordering::Relaxed) {
            logging::warn(format_args!("connections to {path} are closed: it is no stream socket"));
        } else {
            logging::debug(format_args!("a connection to {path} was closed: {error}"));
        }
    }
}

/// The socket that has that name in a folder (`O_PATH`).
fn look(folder: &OwnedFd, name: &OsString) -> io::Result<(OwnedFd, Stat)> {
    let node = openat(folder, name, OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC, Mode::empty())?;
    let status = fstat(&node)?;
    if FileType::from_raw_mode(status.st_mode) != FileType::Socket {
        return Err(io::Error::other("it is not a socket any more"));
    }
    Ok((node, status))
}

/// The address of a socket, for this process alone, and as long as `node` is open.
fn address(node: &OwnedFd) -> PathBuf {
    PathBuf::from(format!("/proc/self/fd/{}", node.as_raw_fd()))
}

/// Whether a socket is of datagrams. It does not notice being asked: one that takes connections is of the wrong type for this
/// one, and others get nothing by a connect(2).
fn takes_datagrams(node: &OwnedFd) -> bool {
    let asked = socket_with(AddressFamily::UNIX, SocketType::DGRAM, SocketFlags::CLOEXEC, None)
        .and_then(|socket| connect(&socket, &SocketAddrUnix::new(address(node))?));
    // The last is one that takes them from somebody else alone.
    matches!(asked, Ok(()) | Err(Errno::PERM))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;
    use std::os::unix::fs::{PermissionsExt, symlink};
    use std::os::unix::net::{UnixDatagram, UnixListener};

    fn found(folder: &tempfile::TempDir) -> Result<HostSocket, ShareError> {
        HostSocket::find(folder.path().join("s"))
    }

    #[tokio::test]
    async fn a_server_that_makes_its_socket_anew_is_found_again() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("s");
        let first = UnixListener::bind(&path).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o640)).unwrap();
        let socket = found(&folder).unwrap();
        assert_eq!(socket.attributes().0, 0o640);
        assert!(socket.connect().await.is_some());

        drop(first);
        assert!(socket.connect().await.is_none());
        fs::remove_file(&path).unwrap();
        assert!(socket.connect().await.is_none());
        let second = UnixListener::bind(&path).unwrap();

        assert!(socket.connect().await.is_some());
        second.set_nonblocking(true).unwrap();
        second.accept().unwrap();
    }

    #[tokio::test]
    async fn a_link_in_its_place_is_not_followed() {
        let folder = tempfile::tempdir().unwrap();
        let first = UnixListener::bind(folder.path().join("s")).unwrap();
        let _other = UnixListener::bind(folder.path().join("other")).unwrap();
        let socket = found(&folder).unwrap();
        drop(first);

        fs::remove_file(folder.path().join("s")).unwrap();
        symlink("other", folder.path().join("s")).unwrap();

        assert!(socket.connect().await.is_none());
    }

    /// A server that keeps one connection waiting.
    fn server(folder: &tempfile::TempDir, kind: SocketType) -> OwnedFd {
        let server = socket_with(AddressFamily::UNIX, kind, SocketFlags::CLOEXEC, None).unwrap();
        rustix::net::bind(&server, &SocketAddrUnix::new(folder.path().join("s")).unwrap()).unwrap();
        rustix::net::listen(&server, 0).unwrap();
        server
    }

    #[tokio::test]
    async fn one_of_another_type_is_told_of() {
        let folder = tempfile::tempdir().unwrap();
        let _server = server(&folder, SocketType::SEQPACKET);
        let socket = found(&folder).unwrap();

        assert!(socket.connect().await.is_none());

        assert!(socket.type_told.load(Ordering::Relaxed));
    }

    #[tokio::test]
    async fn a_server_without_room_is_waited_for() {
        let folder = tempfile::tempdir().unwrap();
        let server = server(&folder, SocketType::STREAM);
        let socket = found(&folder).unwrap();
        let _first = socket.connect().await.unwrap();
        assert!(socket.try_connect().await.is_err_and(|error| error.kind() == io::ErrorKind::WouldBlock));

        let (second, accepted) = tokio::join!(socket.connect(), async {
            tokio::task::yield_now().await;
            rustix::net::accept(&server)
        });

        assert!(second.is_some() && accepted.is_ok());
    }

    #[test]
    fn a_socket_of_datagrams_is_refused_and_one_that_nobody_listens_at_is_not() {
        let folder = tempfile::tempdir().unwrap();
        let datagrams = UnixDatagram::bind(folder.path().join("s")).unwrap();
        assert!(matches!(found(&folder), Err(ShareError::Kind("Unix socket of datagrams"))));

        drop(datagrams);

        assert!(found(&folder).is_ok());
    }

    #[test]
    fn a_listener_does_not_notice_that_it_is_looked_at() {
        let folder = tempfile::tempdir().unwrap();
        let server = UnixListener::bind(folder.path().join("s")).unwrap();
        server.set_nonblocking(true).unwrap();

        found(&folder).unwrap();

        assert_eq!(server.accept().unwrap_err().kind(), io::ErrorKind::WouldBlock);
    }
}
