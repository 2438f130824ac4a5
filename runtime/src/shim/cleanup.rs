// SPDX-License-Identifier: Apache-2.0
//! `delete`: removes what is left of a container whose server was killed, or does not answer.

use std::fs;
use std::io;
use std::path::Path;

use containerd_shim_protos::api::DeleteResponse;
use protobuf::Message;
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use thiserror::Error;

use super::arguments::Arguments;
use super::pod::Role;
use super::start::{ADDRESS, PID};
use super::{rootfs, socket};
use crate::logging;
use crate::supervisor;
use crate::supervisor::container::Ended;
use crate::supervisor::state::{Found, start_time};
use crate::supervisor::task_service::timestamp;

/// The status of a container that was killed.
const KILLED: u8 = 137;

/// Something that could not be removed.
#[derive(Debug, Error)]
pub(super) enum CleanupError {
    #[error(transparent)]
    Delete(#[from] supervisor::DeleteError),
    #[error("cannot unmount the root file system of the container")]
    Unmount(#[source] io::Error),
    #[error("cannot encode the answer")]
    Encode(#[source] protobuf::Error),
}

/// Removes it; the answer to containerd. May be called any number of times.
pub(super) fn delete(arguments: &Arguments) -> Result<Vec<u8>, CleanupError> {
    let _ = logging::init(None, logging::LogFormat::Text, arguments.debug);
    let root = super::root(&arguments.namespace);
    let pid = end_server(&arguments.bundle);
    // Nothing else: containerd gives it five seconds, and calls it for each container of a pod at once. A sandbox's containers
    // come first, as they have no machine that is waited for.
    let members = delete_members(&root, &arguments.id);
    supervisor::delete(&root, &arguments.id, true)?;
    members?;
    rootfs::unmount_all(&arguments.bundle).map_err(CleanupError::Unmount)?;
    if let Ok(address) = fs::read_to_string(arguments.bundle.join(ADDRESS))
        && let Some(path) = socket::path_of(&address)
    {
        // One that was just killed may still seem to listen. That of a pod serves its other containers: containerd 1.6 has the
        // rest of each one removed when it closes the connection, also after an ordinary end.
        if pid != 0 || matches!(socket::is_served(path), Ok(false)) {
            let _ = fs::remove_file(path);
        }
    }
    let ended = Ended::now(KILLED);
    let (exit_status, exited_at) = (u32::from(ended.status), timestamp(&ended));
    let answer = DeleteResponse { pid, exit_status, exited_at, ..DeleteResponse::default() };
    answer.write_to_bytes().map_err(CleanupError::Encode)
}

/// Removes what is left of the containers of a pod whose sandbox is gone: containerd 2 calls for the sandbox alone.
fn delete_members(root: &Path, sandbox: &str) -> Result<(), supervisor::DeleteError> {
    let member = Role::Member(sandbox.to_owned());
    let mut result = Ok(());
    let is_member = |found: &Found| Role::of(&found.record().annotations) == member;
    let ids = Found::look_at_all(root, |found| is_member(found).then(|| found.record().id.clone()))?;
    for id in ids {
        // All of them, also after one that cannot be: nobody calls again.
        result = result.and(supervisor::delete(root, &id, true));
    }
    result
}

/// Ends a server that lives; the VMM dies with it. Its process id, or 0 if it is not known.
fn end_server(bundle: &Path) -> u32 {
    let recorded = fs::read_to_string(bundle.join(PID)).unwrap_or_default();
    let mut words = recorded.split_whitespace();
    let Some(pid) = words.next().and_then(|word| word.parse().ok()).and_then(Pid::from_raw) else {
        return 0;
    };
    let number = pid.as_raw_nonzero().get().unsigned_abs();
    // Without a start time, which older versions did not write, nothing tells whose the id is.
    let started = words.next().and_then(|word| word.parse::<u64>().ok());
    // The descriptor is taken first, so that what is looked at is what is killed: the id may be another process' by now.
    if let Ok(pidfd) = pidfd_open(pid, PidfdFlags::empty())
        && started.is_some()
        && start_time(number) == started
        && is_own_program(pid)
    {
        let _ = pidfd_send_signal(&pidfd, Signal::KILL);
    }
    number
}

fn is_own_program(pid: Pid) -> bool {
    let program = |process: &str| fs::read_link(format!("/proc/{process}/exe")).ok();
    program("self").is_some_and(|own| program(&pid.as_raw_nonzero().to_string()) == Some(own))
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::super::start::pid_record;
    use super::*;

    #[test]
    fn only_a_server_is_killed() {
        let bundle = tempfile::tempdir().unwrap();
        let mut other = Command::new("sleep").arg("60").spawn().unwrap();
        fs::write(bundle.path().join(PID), pid_record(other.id())).unwrap();

        assert_eq!(end_server(bundle.path()), other.id());

        assert!(other.try_wait().unwrap().is_none());
        other.kill().unwrap();
        other.wait().unwrap();
        assert_eq!(end_server(Path::new("/no/such")), 0);
    }

    #[test]
    fn an_id_alone_or_of_another_time_kills_nobody() {
        let bundle = tempfile::tempdir().unwrap();
        let own = std::process::id();

        // Were it believed, this very process would end.
        for record in [own.to_string(), format!("{own} 1")] {
            fs::write(bundle.path().join(PID), record).unwrap();
            assert_eq!(end_server(bundle.path()), own);
        }
    }
}
