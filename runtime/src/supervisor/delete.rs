// SPDX-License-Identifier: Apache-2.0
//! `delete`: the removal of a container's state, and, where asked for, of the container before.

use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use containerd_shim_protos::api::KillRequest;
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use thiserror::Error;

use super::client;
use super::container::{CallError, SIGKILL};
use super::state::{Found, LookupError, Record, Status, sweep_one};
use crate::event_loop;
use crate::hooks;
use crate::logging;

/// How long things may take.
#[derive(Debug, Clone, Copy)]
struct Patience {
    /// A killed container, to end in good order: its files are written back.
    end: Duration,
    /// A supervisor, to be gone once the kernel ends it.
    kill: Duration,
    /// A container of a pod, besides: what defies SIGKILL in it costs the pod its machine, which its supervisor sees to.
    member: Duration,
}

const PATIENCE: Patience =
    Patience { end: Duration::from_secs(10), kill: Duration::from_secs(10), member: Duration::from_secs(50) };

/// How long a supervisor may take to answer.
const ANSWER: Duration = Duration::from_secs(10);

/// How often it is looked whether a supervisor is gone.
const LOOK_INTERVAL: Duration = Duration::from_millis(5);

/// A container that cannot be deleted.
#[derive(Debug, Error)]
pub(crate) enum DeleteError {
    #[error(transparent)]
    Lookup(#[from] LookupError),
    #[error("cannot delete container {id} that is not stopped: {}", status.name())]
    NotStopped { id: String, status: Status },
    #[error("cannot delete container {id}: its supervisor, process {pid}, does not end")]
    Stuck { id: String, pid: u32 },
    #[error(
        "cannot delete container {id}: it does not end, and its supervisor, process {pid}, is that of all of pod {sandbox}"
    )]
    StuckInPod { id: String, pid: u32, sandbox: String },
}

/// Deletes a container that has ended, or that was never started. With `force` one that runs is killed, and one that does
/// not exist is no error. May be called any number of times, also at once.
pub(crate) fn delete(root: &Path, id: &str, force: bool) -> Result<(), DeleteError> {
    match Found::open(root, id).map_err(DeleteError::from).and_then(|found| delete_found(&found, force, PATIENCE)) {
        Err(DeleteError::Lookup(LookupError::NotFound(_))) if force => {
            // A supervisor that was killed early has noted what is to be undone, but no container yet. What is in use, or
            // none of ours, is left alone.
            sweep_one(&root.join(id));
            Ok(())
        }
        result => result,
    }
}

fn delete_found(found: &Found, force: bool, patience: Patience) -> Result<(), DeleteError> {
    if remove(found)? {
        return Ok(());
    }
    let (id, status) = (found.record().id.clone(), found.status());
    let ends = match status {
        Status::Stopped => removed_within(found, patience.end)?,
        Status::Created => end(found, patience.end)?,
        _ if force => end(found, patience.end)?,
        _ => return Err(DeleteError::NotStopped { id, status }),
    };
    if ends {
        return Ok(());
    }
    let pid = found.record().pid;
    match may_be_killed(found.record()) {
        Ok(()) => {
            // The VMM dies with it.
            logging::debug(format_args!("{id} does not end, so its supervisor is killed"));
            signal_supervisor(found, Signal::KILL);
            if removed_within(found, patience.kill)? { Ok(()) } else { Err(DeleteError::Stuck { id, pid }) }
        }
        Err(sandbox) => {
            // If it has ended, its output waits for a reader: a second one gives that up.
            if !end(found, patience.member)? {
                return Err(DeleteError::StuckInPod { id, pid, sandbox: sandbox.to_owned() });
            }
            logging::debug(format_args!("{id} has ended late, in the pod {sandbox}"));
            Ok(())
        }
    }
}

/// Has a container end, and removes it; whether that was done in time. While it is being created there is nothing to kill: its
/// creation is broken off, or, where the supervisor is a pod's, its end waited for.
fn end(found: &Found, patience: Duration) -> Result<bool, LookupError> {
    let mut end = Instant::now() + patience;
    let (mut broken_off, mut killed) = (false, false);
    loop {
        match found.status_now() {
            Ok(Status::Creating) if !broken_off => {
                broken_off = true;
                if may_be_killed(found.record()).is_ok() {
                    signal_supervisor(found, Signal::TERM);
                }
            }
            Ok(Status::Created | Status::Running | Status::Paused) if !killed => {
                killed = true;
                kill(found);
                end = Instant::now() + patience;
            }
            Ok(_) => {}
            Err(LookupError::NotFound(_)) => return Ok(true),
            Err(error) => return Err(error),
        }
        if removed_within(found, Duration::ZERO)? {
            return Ok(true);
        }
        if Instant::now() >= end {
            return Ok(false);
        }
        thread::sleep(LOOK_INTERVAL);
    }
}

/// Whether a container's supervisor is its own; else the pod's sandbox whose it is.
fn may_be_killed(record: &Record) -> Result<(), &str> {
    record.sandbox.as_deref().map_or(Ok(()), Err)
}

/// Asks the supervisor to kill the container. Where that fails, there is another way.
fn kill(found: &Found) {
    let killed = client::call(found, CallError::NotRunning, async |task, id| {
        task.kill(ttrpc::context::with_duration(ANSWER), &KillRequest { id, signal: SIGKILL, ..Default::default() })
            .await
    });
    if let Err(error) = killed {
        logging::debug(format_args!("{} was not killed by its supervisor: {error}", found.record().id));
    }
}

fn removed_within(found: &Found, limit: Duration) -> Result<bool, LookupError> {
    let end = Instant::now() + limit;
    loop {
        match remove(found) {
            Ok(true) | Err(LookupError::NotFound(_)) => return Ok(true),
            Ok(false) if Instant::now() >= end => return Ok(false),
            Ok(false) => thread::sleep(LOOK_INTERVAL),
            Err(error) => return Err(error),
        }
    }
}

/// Removes the state, if the supervisor is gone, and runs the hooks that follow that; whether it was.
fn remove(found: &Found) -> Result<bool, LookupError> {
    let removed = found.remove()?;
    if removed {
        run_poststop_hooks(found.record());
    }
    Ok(removed)
}

/// Runs the hooks of a container that is gone; within no event loop.
pub(crate) fn run_poststop_hooks(record: &Record) {
    if record.poststop.is_empty() {
        return;
    }
    let stopped = record.hook_state().at(hooks::Status::Stopped, None);
    match event_loop::new() {
        Ok(runtime) => runtime.block_on(hooks::run_all(&record.poststop, &stopped)),
        Err(error) => logging::warn(format_args!("the poststop hooks were not run: {error}")),
    }
}

fn signal_supervisor(found: &Found, signal: Signal) {
    let Some(raw) = i32::try_from(found.record().pid).ok().and_then(Pid::from_raw) else {
        return;
    };
    // The descriptor is taken first: as long as the supervisor's own lock is held, the id is its.
    if let Ok(pidfd) = pidfd_open(raw, PidfdFlags::empty())
        && found.is_alive()
    {
        let _ = pidfd_send_signal(&pidfd, signal);
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::process::ExitStatusExt;
    use std::process::Command;

    use super::super::state::StateDir;
    use super::*;

    fn kept(root: &Path, id: &str, status: Status) -> StateDir {
        let mut state = StateDir::create(root, id).unwrap();
        let record = Record {
            id: id.to_owned(),
            pid: 0,
            status,
            bundle: "/b".into(),
            rootfs: "/b/rootfs".into(),
            created: String::new(),
            annotations: Default::default(),
            kept: true,
            exit_status: None,
            net_backend: None,
            poststop: Vec::new(),
            sandbox: None,
            notifies: false,
        };
        state.record(&record).unwrap();
        state.keep();
        state
    }

    #[test]
    fn what_has_ended_is_deleted_once() {
        let root = tempfile::tempdir().unwrap();
        drop(kept(root.path(), "ended", Status::Stopped));
        drop(kept(root.path(), "killed", Status::Running));

        for id in ["ended", "killed"] {
            delete(root.path(), id, false).unwrap();
            assert!(matches!(delete(root.path(), id, false), Err(DeleteError::Lookup(LookupError::NotFound(_)))));
            delete(root.path(), id, true).unwrap();
        }
    }

    #[test]
    fn a_supervisor_that_does_not_end_is_killed_unless_it_is_a_pods() {
        let root = tempfile::tempdir().unwrap();
        let short = Duration::from_millis(20);
        let patience = Patience { end: short, kill: short, member: short };
        for (id, sandbox) in [("alone", None), ("member", Some("pod".to_owned()))] {
            let mut supervisor = Command::new("sleep").arg("60").spawn().unwrap();
            let state = kept(root.path(), id, Status::Running);
            let found = Found::open(root.path(), id).unwrap();
            let record = Record { pid: supervisor.id(), sandbox: sandbox.clone(), ..found.record().clone() };
            state.record(&record).unwrap();

            // The lock is this process', and stays.
            let error = delete_found(&Found::open(root.path(), id).unwrap(), true, patience).unwrap_err();

            assert_eq!(matches!(error, DeleteError::StuckInPod { .. }), sandbox.is_some(), "{error}");
            if sandbox.is_some() {
                assert!(supervisor.try_wait().unwrap().is_none());
                supervisor.kill().unwrap();
            }
            assert_eq!(supervisor.wait().unwrap().signal(), Some(9));
        }
    }

    #[test]
    fn a_creation_is_broken_off_unless_it_is_in_a_pod() {
        let root = tempfile::tempdir().unwrap();
        let short = Duration::from_millis(200);
        let patience = Patience { end: short, kill: short, member: short };
        for (id, sandbox, signal) in [("alone", None, 15), ("member", Some("pod".to_owned()), 9)] {
            let mut supervisor = Command::new("sleep").arg("60").spawn().unwrap();
            let state = kept(root.path(), id, Status::Creating);
            let found = Found::open(root.path(), id).unwrap();
            state.record(&Record { pid: supervisor.id(), sandbox, ..found.record().clone() }).unwrap();

            // The lock is this process', and stays.
            delete_found(&Found::open(root.path(), id).unwrap(), true, patience).unwrap_err();

            let _ = supervisor.kill();
            assert_eq!(supervisor.wait().unwrap().signal(), Some(signal), "{id}");
        }
    }

    #[test]
    fn what_runs_is_left_alone() {
        let root = tempfile::tempdir().unwrap();
        let _running = kept(root.path(), "c1", Status::Running);

        let error = delete(root.path(), "c1", false).unwrap_err();

        assert_eq!(error.to_string(), "cannot delete container c1 that is not stopped: running");
        assert!(Found::open(root.path(), "c1").is_ok());
    }
}
