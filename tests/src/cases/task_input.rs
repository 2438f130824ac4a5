// SPDX-License-Identifier: Apache-2.0
//! Stdin as containerd's client gives it: by a named pipe that it keeps open, so that CloseIO alone tells of the end.

use std::fs::File;
use std::io::Write;
use std::path::Path;

use containerd_shim_protos::api::{CloseIORequest, CreateTaskRequest, ExecProcessRequest, StateRequest, Status};

use super::task::{Tasks, creation, limit, named_pipe, wait_for_line};
use super::task_calls::{EXEC, exec, waiting};
use super::{Case, case};
use crate::bundle::Bundle;
use crate::env::Env;
use crate::failure::{Result, ensure_eq};

pub(super) const CASES: &[Case] = &[case!(of_a_container), case!(of_a_further_process)];

/// Says what it reads, and when there is no more.
const READER: &str = "while read line; do echo \"got $line\"; done; echo the end; exit 4";

/// A writer's end of a named pipe; it stays open.
fn writer(pipe: &Path) -> Result<File> {
    // With the other end, it does not wait for a reader.
    Ok(File::options().read(true).write(true).open(pipe)?)
}

impl Tasks<'_> {
    fn is_running(&self, id: &str, exec_id: &str) -> Result<bool> {
        let (id, exec_id) = (id.to_owned(), exec_id.to_owned());
        let state = self.calls.state(limit(), &StateRequest { id, exec_id, ..StateRequest::default() })?;
        Ok(state.status == Status::RUNNING.into())
    }

    fn close_io(&self, id: &str, exec_id: &str, stdin: bool) -> Result {
        let (id, exec_id) = (id.to_owned(), exec_id.to_owned());
        self.calls.close_io(limit(), &CloseIORequest { id, exec_id, stdin, ..CloseIORequest::default() })?;
        Ok(())
    }

    /// Writes to a process that runs [`READER`], and ends its stdin, whose writer stays.
    fn end_input(&self, id: &str, exec_id: &str, mut writer: File, output: &Path) -> Result {
        writer.write_all(b"one\n")?;
        wait_for_line(output, "got one")?;
        // One that names no stream ends none.
        self.close_io(id, exec_id, false)?;
        writer.write_all(b"two\n")?;
        wait_for_line(output, "got two")?;
        ensure_eq!(self.is_running(id, exec_id)?, true, "whether it runs while there may be more");

        self.close_io(id, exec_id, true)?;
        wait_for_line(output, "the end")?;
        ensure_eq!(self.wait(id, exec_id)?.exit_status, 4, "the exit status");
        // Again, and of what has ended: nothing is left to be done.
        self.close_io(id, exec_id, true)
    }
}

fn of_a_container(env: &Env) -> Result {
    let tasks = Tasks::new(env)?;
    let id = tasks.shim.id.clone();
    let (pipe, output) = (named_pipe(env, "input")?, env.work.join("output"));
    let mut bundle = Bundle::busybox(env)?;
    bundle.sh(READER).write()?;
    let writer = writer(&pipe)?;
    let request = CreateTaskRequest {
        stdin: pipe.display().to_string(),
        ..creation(&id, &bundle, &format!("file://{}", output.display()))
    };
    tasks.calls.create(limit(), &request)?;
    tasks.start(&id, "")?;

    tasks.end_input(&id, "", writer, &output)?;
    tasks.shut_down(&id)
}

fn of_a_further_process(env: &Env) -> Result {
    let (tasks, id) = waiting(env)?;
    let (pipe, output) = (named_pipe(env, "input")?, env.work.join("output"));
    let writer = writer(&pipe)?;
    let request = ExecProcessRequest {
        stdin: pipe.display().to_string(),
        ..exec(&id, &["sh", "-c", READER], false, &format!("file://{}", output.display()))?
    };
    tasks.calls.exec(limit(), &request)?;
    tasks.start(&id, EXEC)?;

    tasks.end_input(&id, EXEC, writer, &output)?;
    ensure_eq!(tasks.is_running(&id, "")?, true, "whether the container goes on");
    tasks.shut_down(&id)
}
