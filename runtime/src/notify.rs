// SPDX-License-Identifier: Apache-2.0
//! Who is told that a container is ready (sd_notify(3)): the service manager whose socket the caller's environment names, or an
//! engine that has put a socket of its own into the container.

use std::env;
use std::ffi::{OsStr, OsString};
use std::io;
use std::os::fd::AsRawFd;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::{SocketAddr, UnixDatagram};
use std::path::{Path, PathBuf};
use std::time::Duration;

use bulkhead_protocol::agent::Mount;
use libc::{MS_BIND, MS_NODEV, MS_NOEXEC, MS_NOSUID, MS_RDONLY};
use oci_spec::runtime::Mount as OciMount;
use rustix::fs::{FileType, Mode, OFlags, fstat, open};
use thiserror::Error;
use tokio::time::timeout;

use crate::text;

/// What names the socket in an environment.
const VARIABLE: &str = "NOTIFY_SOCKET";

/// Where the container has its own, and what its environment says of it, as with runc.
const FOLDER: &str = "/run/notify";
const PLACE: &str = "/run/notify/notify.sock";

/// How long a manager may take until it has room for a message.
const SEND_TIMEOUT: Duration = Duration::from_secs(30);

/// Nobody can be told.
#[derive(Debug, Error)]
pub(crate) enum NotifyError {
    #[error(
        "NOTIFY_SOCKET={0} is not supported: expected an absolute path, or @ and an abstract name, of at most 107 bytes"
    )]
    Address(String),
    #[error("cannot connect to NOTIFY_SOCKET={name}, to tell that the container is ready")]
    Connect { name: String, source: io::Error },
    #[error("cannot tell {name} that the container is ready")]
    Tell { name: String, source: io::Error },
    #[error(
        "NOTIFY_SOCKET is set, and container {0} was created without: it cannot tell that it is ready; set it for `create`, \
         or for neither"
    )]
    CreatedWithout(String),
}

/// The socket that a caller's environment names.
#[derive(Debug)]
pub(crate) struct NotifySocket {
    name: String,
    address: SocketAddr,
}

impl NotifySocket {
    /// That of this process; `None` if there is none.
    ///
    /// # Errors
    ///
    /// It is not named as sd_notify(3) has it.
    pub(crate) fn of_caller() -> Result<Option<Self>, NotifyError> {
        env::var_os(VARIABLE).filter(|name| !name.is_empty()).map(|name| Self::parse(&name)).transpose()
    }

    fn parse(name: &OsStr) -> Result<Self, NotifyError> {
        let address = match name.as_bytes() {
            [b'/', ..] => SocketAddr::from_pathname(Path::new(name)).ok(),
            [b'@', name @ ..] if !name.is_empty() => SocketAddr::from_abstract_name(name).ok(),
            _ => None,
        };
        let name = text::one_line(&name.to_string_lossy());
        match address {
            Some(address) => Ok(Self { name, address }),
            None => Err(NotifyError::Address(name)),
        }
    }

    /// Connects to it.
    pub(crate) fn connect(&self) -> Result<Manager, NotifyError> {
        let connected = UnixDatagram::unbound().and_then(|socket| socket.connect_addr(&self.address).map(|()| socket));
        let failed = |source| NotifyError::Connect { name: self.name.clone(), source };
        connected.map(|socket| Manager { name: self.name.clone(), socket }).map_err(failed)
    }
}

/// The socket of who is told.
#[derive(Debug)]
pub(crate) struct Manager {
    name: String,
    socket: UnixDatagram,
}

impl Manager {
    /// Says that the container is ready, by its own line, and, in a message of its own as runc does, which process stands for it.
    /// Within an event loop.
    pub(crate) async fn tell(&self, line: &str, main_pid: Option<u32>) -> Result<(), NotifyError> {
        let messages = [Some(format!("{line}\n")), main_pid.map(|pid| format!("MAINPID={pid}\n"))];
        let tell = async {
            let socket = self.socket.try_clone()?;
            socket.set_nonblocking(true)?;
            let socket = tokio::net::UnixDatagram::from_std(socket)?;
            for message in messages.into_iter().flatten() {
                socket.send(message.as_bytes()).await?;
            }
            Ok(())
        };
        let told = timeout(SEND_TIMEOUT, tell).await.unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()));
        told.map_err(|source| NotifyError::Tell { name: self.name.clone(), source })
    }
}

/// Who is told, and by whom.
#[derive(Debug)]
pub(crate) enum Notice {
    /// The manager or the engine, by the supervisor; and which process stands for the container, if it is to know.
    Supervisor { manager: Manager, with_pid: bool },
    /// The manager, by the process that this one was forked from, which has it from this one.
    Caller,
}

/// Gives a container a socket of its own to tell at that it is ready.
pub(crate) fn give(mounts: &mut Vec<Mount>, environment: &mut Vec<String>) {
    let flags = MS_BIND | MS_RDONLY | MS_NOSUID | MS_NOEXEC | MS_NODEV;
    mounts.push(Mount { notify_socket: true, source_is_dir: true, flags, ..at(FOLDER) });
    // What the configuration says of it gives way.
    environment.retain(|entry| entry.split_once('=').is_none_or(|(name, _)| name != VARIABLE));
    environment.push(format!("{VARIABLE}={PLACE}"));
}

fn at(destination: &str) -> Mount {
    Mount { destination: destination.to_owned(), ..Mount::default() }
}

/// Finds the socket that an engine has put into a container, in a folder that is bound there: what the environment names. In the
/// guest there is another one in its place, which is to be mounted over it.
pub(crate) fn of_engine(environment: &[String], mounts: &[OciMount], bundle: &Path) -> Option<(Mount, Notice)> {
    let place = environment.iter().find_map(|entry| entry.split_once('=').filter(|(name, _)| *name == VARIABLE))?.1;
    let (folder, name) = (Path::new(place).parent()?, Path::new(place).file_name()?);
    // The last one covers the others.
    let mount = mounts.iter().rfind(|mount| folder.starts_with(mount.destination()))?;
    let words = mount.options().as_deref().unwrap_or_default();
    let is_bind = mount.typ().as_deref() == Some("bind") || words.iter().any(|word| word == "bind" || word == "rbind");
    if !is_bind || mount.destination() != folder {
        return None;
    }
    let path = bundle.join(mount.source().as_ref()?).join(name);
    let manager = Manager { name: text::one_line(&path.to_string_lossy()), socket: connect_to_file(&path)? };
    let flags = MS_BIND | MS_NOSUID | MS_NOEXEC | MS_NODEV;
    Some((Mount { notify_socket: true, flags, ..at(place) }, Notice::Supervisor { manager, with_pid: false }))
}

/// Connects to a socket of datagrams that a path names, without following a link in its place; `None` if there is none.
fn connect_to_file(path: &Path) -> Option<UnixDatagram> {
    let node = open(path, OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC, Mode::empty()).ok()?;
    if FileType::from_raw_mode(fstat(&node).ok()?.st_mode) != FileType::Socket {
        return None;
    }
    let socket = UnixDatagram::unbound().ok()?;
    socket.connect(PathBuf::from(OsString::from(format!("/proc/self/fd/{}", node.as_raw_fd())))).ok()?;
    Some(socket)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;
    use std::os::unix::net::UnixListener;

    use super::*;
    use serde_json::json;

    fn received(socket: &UnixDatagram) -> String {
        let mut buffer = [0; 100];
        let length = socket.recv(&mut buffer).unwrap();
        String::from_utf8_lossy(&buffer[..length]).into_owned()
    }

    #[tokio::test]
    async fn a_manager_is_told_in_two_messages() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("s");
        let abstract_name = format!("@bulkhead-test-{}", std::process::id());
        let address = SocketAddr::from_abstract_name(&abstract_name[1..]).unwrap();
        let sockets = [UnixDatagram::bind(&path).unwrap(), UnixDatagram::bind_addr(&address).unwrap()];
        for (name, socket) in [path.as_os_str(), OsStr::new(&abstract_name)].into_iter().zip(&sockets) {
            let manager = NotifySocket::parse(name).unwrap().connect().unwrap();

            manager.tell("READY=1", Some(7)).await.unwrap();

            assert_eq!([received(socket), received(socket)], ["READY=1\n", "MAINPID=7\n"]);
        }
    }

    #[test]
    fn names_that_are_no_sockets_are_refused_and_absent_ones_are_named() {
        let long = format!("/{}", "x".repeat(108));
        for name in ["run/notify", "@", "vsock:2:1", &long] {
            let error = NotifySocket::parse(OsStr::new(name)).unwrap_err();
            assert!(error.to_string().starts_with(&format!("NOTIFY_SOCKET={name} is not supported")), "{error}");
        }
        let error = NotifySocket::parse(OsStr::new("/no/such")).unwrap().connect().unwrap_err();
        assert!(error.to_string().contains("NOTIFY_SOCKET=/no/such"), "{error}");
    }

    #[test]
    fn a_container_is_given_one_in_the_place_of_what_its_environment_names() {
        let mut environment = ["A=b", "NOTIFY_SOCKET=/x", "NOTIFY_SOCKETS=/y"].map(str::to_owned).to_vec();
        let mut mounts = Vec::new();

        give(&mut mounts, &mut environment);

        assert_eq!(environment, ["A=b", "NOTIFY_SOCKETS=/y", "NOTIFY_SOCKET=/run/notify/notify.sock"]);
        assert!(mounts[0].notify_socket && mounts[0].source_is_dir && mounts[0].flags & MS_RDONLY != 0);
    }

    #[tokio::test]
    async fn the_socket_of_an_engine_is_found_in_its_folder() {
        let bundle = tempfile::tempdir().unwrap();
        std::fs::create_dir(bundle.path().join("notify")).unwrap();
        let path = bundle.path().join("notify/s");
        let socket = UnixDatagram::bind(&path).unwrap();
        let mount = |destination: &str, kind: &str| -> OciMount {
            serde_json::from_value(json!({"destination": destination, "type": kind, "source": "notify"})).unwrap()
        };
        let environment = ["NOTIFY_SOCKET=/run/notify/s".to_owned()];
        let find = |mounts: &[OciMount]| of_engine(&environment, mounts, bundle.path());

        let (mounted, notice) = find(&[mount("/run", "tmpfs"), mount("/run/notify", "bind")]).unwrap();
        assert!(mounted.notify_socket && !mounted.source_is_dir && mounted.destination == "/run/notify/s");
        let Notice::Supervisor { manager, with_pid: false } = notice else { panic!("{notice:?}") };
        manager.tell("READY=1", None).await.unwrap();
        assert_eq!(received(&socket), "READY=1\n");

        assert!(find(&[mount("/run/notify", "bind"), mount("/run", "tmpfs")]).is_none());
        assert!(find(&[mount("/run/notify", "tmpfs")]).is_none());
        assert!(of_engine(&[], &[mount("/run/notify", "bind")], bundle.path()).is_none());
        for other in ["stream", "file", "link", "none"] {
            std::fs::remove_file(&path).ok();
            let _listener = (other == "stream").then(|| UnixListener::bind(&path).unwrap());
            match other {
                "file" => std::fs::write(&path, "").unwrap(),
                "link" => symlink("/run/systemd/notify", &path).unwrap(),
                _ => {}
            }
            assert!(find(&[mount("/run/notify", "bind")]).is_none(), "{other}");
        }
    }
}
