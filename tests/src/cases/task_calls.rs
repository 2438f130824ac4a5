// SPDX-License-Identifier: Apache-2.0
//! Calls of the Task API in states that containerd's own client does not come to: of further processes that are not started yet,
//! could not be, or are frozen, and of containers that are not there.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use containerd_shim_protos::api::{
    ConnectRequest, DeleteRequest, ExecProcessRequest, KillRequest, PauseRequest, PidsRequest, ResizePtyRequest,
    ResumeRequest, StartRequest, StateRequest, StateResponse, Status, WaitRequest,
};
use containerd_shim_protos::shim::oci::ProcessDetails;
use containerd_shim_protos::ttrpc::context::with_duration;
use containerd_shim_protos::ttrpc::{Code, Error, Request};
use protobuf::well_known_types::any::Any;
use protobuf::{Message, MessageField};
use serde_json::json;

use super::task::{KILL, Tasks, creation, limit, wait_for_line};
use super::{Case, case};
use crate::bundle::Bundle;
use crate::env::Env;
use crate::failure::{Result, ensure, ensure_eq, fail};

pub(super) const CASES: &[Case] = &[
    case!(starts_that_fail),
    case!(size_of_a_terminal),
    case!(states),
    case!(id_that_is_taken),
    case!(connect),
    case!(both_versions),
    case!(processes),
];

/// The further process of these cases.
pub(super) const EXEC: &str = "further";

/// A container that waits to be ended, and its id.
pub(super) fn waiting(env: &Env) -> Result<(Tasks<'_>, String)> {
    let tasks = Tasks::new(env)?;
    let id = tasks.shim.id.clone();
    tasks.create(&id, Bundle::busybox(env)?.sh("sleep 1000"), "")?;
    tasks.start(&id, "")?;
    Ok((tasks, id))
}

/// The process of a container that is described so.
pub(super) fn exec(id: &str, args: &[&str], terminal: bool, stdout: &str) -> Result<ExecProcessRequest> {
    let user = json!({ "uid": 0, "gid": 0 });
    let process = json!({ "args": args, "cwd": "/", "env": ["PATH=/bin"], "user": user, "terminal": terminal });
    let spec = Any { value: serde_json::to_vec(&process)?, ..Any::default() };
    Ok(ExecProcessRequest {
        id: id.to_owned(),
        exec_id: EXEC.to_owned(),
        terminal,
        stdout: stdout.to_owned(),
        spec: MessageField::some(spec),
        ..ExecProcessRequest::default()
    })
}

/// The code of a call that was refused.
fn refusal<T>(answer: std::result::Result<T, Error>) -> Option<Code> {
    match answer {
        Err(Error::RpcStatus(status)) => Some(status.code()),
        _ => None,
    }
}

impl Tasks<'_> {
    fn state_of_exec(&self, id: &str) -> Result<Status> {
        let request = StateRequest { id: id.to_owned(), exec_id: EXEC.to_owned(), ..StateRequest::default() };
        Ok(self.calls.state(limit(), &request)?.status.enum_value_or_default())
    }

    fn kill_exec(&self, id: &str) -> Option<Code> {
        let (id, exec_id) = (id.to_owned(), EXEC.to_owned());
        refusal(self.calls.kill(limit(), &KillRequest { id, exec_id, signal: KILL, ..KillRequest::default() }))
    }

    fn delete_exec(&self, id: &str) -> Result<u32> {
        let (id, exec_id) = (id.to_owned(), EXEC.to_owned());
        Ok(self.calls.delete(limit(), &DeleteRequest { id, exec_id, ..DeleteRequest::default() })?.exit_status)
    }

    fn resize_exec(&self, id: &str, height: u32, width: u32) -> Option<Code> {
        let (id, exec_id) = (id.to_owned(), EXEC.to_owned());
        let request = ResizePtyRequest { id, exec_id, height, width, ..ResizePtyRequest::default() };
        refusal(self.calls.resize_pty(limit(), &request))
    }
}

fn starts_that_fail(env: &Env) -> Result {
    let (tasks, id) = waiting(env)?;
    tasks.calls.exec(limit(), &exec(&id, &["/no/such/program"], false, "")?)?;
    let (calls, request) =
        (tasks.shim.tasks()?, WaitRequest { id: id.clone(), exec_id: EXEC.to_owned(), ..WaitRequest::default() });
    let waits = thread::spawn(move || calls.wait(with_duration(Duration::from_secs(60)), &request).map(drop));

    let refused = tasks.start(&id, EXEC);
    ensure!(
        format!("{refused:?}").contains("/no/such/program"),
        "the start of a program that is not there: {refused:?}"
    );
    let Ok(waited) = waits.join() else { fail!("the call has panicked") };
    ensure!(waited.is_ok(), "whoever waits for it goes on waiting: {waited:?}");
    ensure_eq!(tasks.state_of_exec(&id)?, Status::STOPPED, "the state of what could not be started");
    ensure_eq!(tasks.kill_exec(&id), Some(Code::FAILED_PRECONDITION), "a signal to it");
    tasks.delete_exec(&id)?;
    ensure!(tasks.state_of_exec(&id).is_err(), "what was deleted has a state");

    // Its id is free again.
    tasks.calls.exec(limit(), &exec(&id, &["sh", "-c", "exit 4"], false, "")?)?;
    tasks.start(&id, EXEC)?;
    ensure_eq!(tasks.wait(&id, EXEC)?.exit_status, 4, "the exit status");
    ensure_eq!(tasks.delete_exec(&id)?, 4, "the exit status once more");
    tasks.shut_down(&id)
}

fn size_of_a_terminal(env: &Env) -> Result {
    let (tasks, id) = waiting(env)?;
    let output = env.work.join("output");
    let script = "stty size; while test \"$(stty size)\" = '33 77'; do sleep 0.1; done; stty size; exit 5";
    let stdout = format!("file://{}", output.display());
    tasks.calls.exec(limit(), &exec(&id, &["sh", "-c", script], true, &stdout)?)?;

    ensure_eq!(tasks.resize_exec(&id, 70_000, 1), Some(Code::INVALID_ARGUMENT), "a terminal that is too large");
    ensure_eq!(tasks.resize_exec(&id, 33, 77), None, "a size before the start");
    tasks.start(&id, EXEC)?;
    wait_for_line(&output, "33 77")?;
    ensure_eq!(tasks.resize_exec(&id, 20, 60), None, "a size after it");
    wait_for_line(&output, "20 60")?;
    ensure_eq!(tasks.wait(&id, EXEC)?.exit_status, 5, "the exit status");
    tasks.delete_exec(&id)?;
    ensure_eq!(tasks.resize_exec(&id, 33, 77), Some(Code::NOT_FOUND), "the size of a terminal that is gone");
    tasks.shut_down(&id)
}

fn states(env: &Env) -> Result {
    let (tasks, id) = waiting(env)?;
    tasks.calls.exec(limit(), &exec(&id, &["sleep", "1000"], false, "")?)?;

    ensure_eq!(tasks.state_of_exec(&id)?, Status::CREATED, "the state before the start");
    ensure_eq!(tasks.kill_exec(&id), Some(Code::FAILED_PRECONDITION), "a signal before the start");
    tasks.start(&id, EXEC)?;
    ensure_eq!(tasks.state_of_exec(&id)?, Status::RUNNING, "the state after it");
    tasks.calls.pause(limit(), &PauseRequest { id: id.clone(), ..PauseRequest::default() })?;
    ensure_eq!((tasks.status(&id)?, tasks.state_of_exec(&id)?), (Status::PAUSED, Status::PAUSED), "the frozen states");
    tasks.calls.resume(limit(), &ResumeRequest { id: id.clone(), ..ResumeRequest::default() })?;
    ensure_eq!(tasks.state_of_exec(&id)?, Status::RUNNING, "the state of what goes on");
    ensure_eq!(tasks.kill_exec(&id), None, "a signal to it");
    ensure_eq!(tasks.wait(&id, EXEC)?.exit_status, 137, "the exit status");
    ensure_eq!(tasks.state_of_exec(&id)?, Status::STOPPED, "the state in the end");
    ensure_eq!(tasks.kill_exec(&id), Some(Code::NOT_FOUND), "a signal to what has ended");
    tasks.delete_exec(&id)?;
    tasks.shut_down(&id)
}

/// For a process whose id is taken no log program is started; the program hears of a process by its own id, as of runc's shim.
fn id_that_is_taken(env: &Env) -> Result {
    let (tasks, id) = waiting(env)?;
    let (program, started) = (env.work.join("logger"), env.work.join("started"));
    fs::write(
        &program,
        "#!/bin/sh\necho $CONTAINER_NAMESPACE $CONTAINER_ID >> \"$2\"\nexec 5>&-\ncat <&3 >> \"$2\"\n",
    )?;
    fs::set_permissions(&program, fs::Permissions::from_mode(0o755))?;
    let place = started.display().to_string().replace('/', "%2F");
    let request = exec(&id, &["echo", "written"], false, &format!("binary://{}?to={place}", program.display()))?;
    tasks.calls.exec(limit(), &request)?;

    ensure_eq!(refusal(tasks.calls.exec(limit(), &request)), Some(Code::ALREADY_EXISTS), "a second one of that id");
    ensure_eq!(fs::read_to_string(&started)?, format!("e2e {EXEC}\n"), "the log programs that were started");
    tasks.start(&id, EXEC)?;
    ensure_eq!(tasks.wait(&id, EXEC)?.exit_status, 0, "the exit status");
    wait_for_line(&started, "written")?;
    tasks.delete_exec(&id)?;
    tasks.shut_down(&id)
}

fn connect(env: &Env) -> Result {
    let tasks = Tasks::new(env)?;
    let id = tasks.shim.id.clone();
    let mut bundle = Bundle::busybox(env)?;
    bundle.sh("sleep 1000").write()?;
    let request = ConnectRequest { id: id.clone(), ..ConnectRequest::default() };
    let shim = tasks.shim.pid()?.unsigned_abs();

    let mut restored = creation(&id, &bundle, "");
    restored.checkpoint = "/no/such/image".to_owned();
    let refused = tasks.calls.create(limit(), &restored);
    ensure!(format!("{refused:?}").contains("checkpoint"), "what is refused: {refused:?}");
    ensure_eq!(refusal(refused), Some(Code::UNIMPLEMENTED), "a container that is to be restored");
    let answer = tasks.calls.connect(limit(), &request)?;
    ensure_eq!((answer.shim_pid, answer.task_pid), (shim, 0), "the processes before there is a task");
    tasks.create(&id, &bundle, "")?;
    let answer = tasks.calls.connect(limit(), &request)?;
    ensure_eq!((answer.shim_pid, answer.task_pid), (shim, shim), "the processes of a task");
    ensure!(!answer.version.is_empty(), "the shim has no version");
    tasks.shut_down(&id)
}

/// containerd calls the service by the second version's name before 2.0, and by the third's from there on.
fn both_versions(env: &Env) -> Result {
    let (tasks, id) = waiting(env)?;
    let client = tasks.shim.connect()?;
    let payload = StateRequest { id: id.clone(), ..StateRequest::default() }.write_to_bytes()?;
    let state = |service: &str| {
        let (service, method, payload) = (service.to_owned(), "State".to_owned(), payload.clone());
        client.request(Request { service, method, payload, timeout_nano: 60_000_000_000, ..Request::default() })
    };

    for service in ["containerd.task.v2.Task", "containerd.task.v3.Task"] {
        let answer = StateResponse::parse_from_bytes(&state(service)?.payload)?;
        ensure_eq!(answer.status.enum_value_or_default(), Status::RUNNING, "the state by {service}");
        ensure_eq!(answer.id, id, "the id by {service}");
    }
    ensure!(state("containerd.task.v1.Task").is_err(), "a version that there is not is answered");
    tasks.shut_down(&id)
}

/// Each process of the container is there once, and a further one by its own id.
fn processes(env: &Env) -> Result {
    let (tasks, id) = waiting(env)?;
    let seen = env.work.join("seen");
    let script = "sleep 1001 & sleep 1002 & echo /proc/[0-9]*; exec sleep 1003";
    tasks.calls.exec(limit(), &exec(&id, &["sh", "-c", script], false, &format!("file://{}", seen.display()))?)?;
    let request = StartRequest { id: id.clone(), exec_id: EXEC.to_owned(), ..StartRequest::default() };
    let further = tasks.calls.start(limit(), &request)?.pid;
    // Init, and the three of the further process.
    let of_container = wait_for_words(&seen)?;
    ensure_eq!(of_container, 4, "the processes that the container sees");

    let listed = tasks.calls.pids(limit(), &PidsRequest { id: id.clone(), ..PidsRequest::default() })?.processes;
    let mut pids: Vec<u32> = listed.iter().map(|process| process.pid).collect();
    ensure_eq!(pids.len(), of_container, "the processes that are listed: {pids:?}");
    let with_ids = listed.iter().filter(|process| process.info.is_some());
    let named = with_ids
        .map(|process| Ok((process.pid, ProcessDetails::parse_from_bytes(&process.info.value)?.exec_id)))
        .collect::<Result<Vec<_>>>()?;
    ensure_eq!(named, [(further, EXEC.to_owned())], "those that have ids of their own");
    pids.sort_unstable();
    pids.dedup();
    ensure!(pids.len() == of_container && pids[0] > 0, "pids that are there twice: {listed:?}");
    tasks.shut_down(&id)
}

/// How many words the one line of a file has, once it is there.
fn wait_for_words(file: &Path) -> Result<usize> {
    let end = Instant::now() + Duration::from_secs(60);
    loop {
        let text = fs::read_to_string(file).unwrap_or_default();
        if let Some(line) = text.strip_suffix('\n') {
            return Ok(line.split_whitespace().count());
        }
        ensure!(Instant::now() < end, "no line comes: {text:?}");
        thread::sleep(Duration::from_millis(50));
    }
}
