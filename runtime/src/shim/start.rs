// SPDX-License-Identifier: Apache-2.0
//! `start`: makes the server of a container, a process of its own, and tells its address.

use std::fs;
use std::io;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};

use thiserror::Error;

use super::arguments::Arguments;
use super::pod::Role;
use super::{sandbox, server, socket};
use crate::spec::{self, SpecError};
use crate::supervisor::daemon::{self, DetachError};
use crate::supervisor::state;

/// In the bundle: the server's address, and its process id. Containerd reads the one, `delete` the other.
pub(super) const ADDRESS: &str = "address";
pub(super) const PID: &str = "shim.pid";

/// A server that could not be made.
#[derive(Debug, Error)]
pub(super) enum StartError {
    #[error("cannot make the socket {}", .0.display())]
    Socket(PathBuf, #[source] io::Error),
    #[error("cannot write {}", .0.display())]
    File(PathBuf, #[source] io::Error),
    #[error("the sandbox {0:?}, into which the container belongs, is not there")]
    Sandbox(String, #[source] io::Error),
    #[error(transparent)]
    Spec(#[from] SpecError),
    #[error(transparent)]
    Detach(#[from] DetachError),
}

/// Makes the server, unless it is there already; its address. A pod's containers have the server of its sandbox.
pub(super) fn start(arguments: &Arguments) -> Result<String, StartError> {
    // A bundle without a configuration is a sandbox's, of which more is told by a call.
    let is_bare = sandbox::config::is_absent(&arguments.bundle);
    let role = if is_bare { Role::Sandbox } else { Role::of(&spec::load_annotations(&arguments.bundle)?) };
    let group = match role {
        Role::Member(sandbox) => sandbox,
        Role::Alone | Role::Sandbox => arguments.id.clone(),
    };
    let path = socket::path(arguments.sockets.as_deref(), &arguments.address, &arguments.namespace, &group);
    let address = socket::address(&path);
    if group != arguments.id {
        // The sandbox's server has the pod's machine.
        UnixStream::connect(&path).map_err(|error| StartError::Sandbox(group, error))?;
        write(&arguments.bundle, ADDRESS, &address)?;
        return Ok(address);
    }
    let listener = socket::bind(&path).map_err(|error| StartError::Socket(path.clone(), error))?;
    write(&arguments.bundle, ADDRESS, &address)?;
    if let Some(listener) = listener {
        daemon::detach(|reporter| server::run(arguments, &path, listener, reporter)).inspect_err(|_| {
            let _ = fs::remove_file(&path);
        })?;
    }
    Ok(address)
}

/// What is noted of a server's process: its id, and when it started, as the id may be another shim's later.
pub(super) fn pid_record(pid: u32) -> String {
    format!("{pid} {}", state::start_time(pid).unwrap_or(0))
}

/// Writes a file of the bundle so that whoever reads it sees all of it.
pub(super) fn write(bundle: &Path, name: &str, content: &str) -> Result<(), StartError> {
    let (path, new) = (bundle.join(name), bundle.join(format!(".{name}")));
    fs::write(&new, content).and_then(|()| fs::rename(&new, &path)).map_err(|error| StartError::File(path, error))
}
