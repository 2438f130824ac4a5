// SPDX-License-Identifier: Apache-2.0
//! Further processes in a running container, from their making until they are forgotten.

use std::collections::hash_map::Entry;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

use super::channel::{self, AgentEnd, Report};
use super::error::{DeleteProcessError, ExecError, FindError, LaunchError};
use super::instance::Instance;
use super::join::Join;
use super::launch;
use super::process::{ExpectedStreams, Process, Waiting};
use super::{Engine, ProcessSpec};
use crate::process::stdio::AgentStdio;
use crate::sys::{self, Child, Cloned, Parent};
use crate::trace::{Trace, now};

/// An exec that is under way. Unless it succeeds, what has been made of it is taken back, also when the host no longer
/// waits for it.
#[derive(Debug)]
struct Attempt<'a> {
    instance: &'a Instance,
    exec_id: &'a str,
    process: Option<Arc<Process>>,
    succeeded: bool,
}

impl<'a> Attempt<'a> {
    fn begin(instance: &'a Instance, exec_id: &'a str) -> Result<Self, ExecError> {
        match instance.execs().entry(exec_id.to_owned()) {
            Entry::Occupied(_) => Err(ExecError::IdInUse { exec_id: exec_id.to_owned(), id: instance.id.clone() }),
            Entry::Vacant(entry) => {
                entry.insert(None);
                Ok(Self { instance, exec_id, process: None, succeeded: false })
            }
        }
    }

    /// Makes the process known by its id. Returns its pid.
    fn succeed(mut self, process: Arc<Process>) -> i32 {
        self.succeeded = true;
        let pid = process.pid();
        self.instance.execs().insert(self.exec_id.to_owned(), Some(process));
        pid
    }
}

impl Drop for Attempt<'_> {
    fn drop(&mut self) {
        if self.succeeded {
            return;
        }
        self.instance.execs().remove(self.exec_id);
        if let Some(process) = &self.process {
            // It may have ended by itself, which is as good.
            let _ = process.signal(libc::SIGKILL);
            process.pumps().abort();
        }
    }
}

impl Engine {
    /// Makes a process in a container and starts it. Returns its pid. On failure nothing is left of it.
    ///
    /// In a paused container this waits until the container is resumed: the process is frozen from its first moment on.
    pub async fn exec(&self, id: &str, exec_id: &str, spec: &ProcessSpec, trace: &mut Trace) -> Result<i32, ExecError> {
        // Before anything can fail, so that streams of the host's that nobody will use are let go.
        let streams = launch::expect_streams(&self.streams, spec);
        let instance = self.find(id)?;
        if exec_id.is_empty() {
            return Err(ExecError::NoId);
        }
        if instance.init.has_ended() {
            return Err(ExecError::Stopped(instance.id.clone()));
        }
        let mut attempt = Attempt::begin(&instance, exec_id)?;
        match self.launch(spec, streams, &mut attempt, trace).await {
            Ok(process) => Ok(attempt.succeed(process)),
            // Init's end took the process with it.
            Err(_) if instance.init.has_ended() => Err(ExecError::Stopped(instance.id.clone())),
            Err(error) => Err(error),
        }
    }

    async fn launch(
        &self,
        spec: &ProcessSpec,
        streams: ExpectedStreams,
        attempt: &mut Attempt<'_>,
        trace: &mut Trace,
    ) -> Result<Arc<Process>, ExecError> {
        let begin = now();
        let instance = attempt.instance;
        let unclaimed = self.reaper.keep_unclaimed();
        let (channel, stdio) = spawn(spec, instance)?;
        let (child, first) = wait_until_made(&channel).await?;
        let process = Arc::new(Process::follow(child, &self.reaper, instance.cgroup.clone()));
        drop(unclaimed);
        attempt.process = Some(Arc::clone(&process));
        let begin = trace.add("clone", begin);
        launch::wait_until_ready(&channel, &process, first).await?;
        launch::give(instance, &process, spec)?;
        trace.add("set-up", begin);
        launch::start(&process, Waiting { channel, stdio, streams }, trace).await?;
        Ok(process)
    }

    /// Forgets an exec'd process that has ended.
    pub fn delete_process(&self, id: &str, exec_id: &str) -> Result<(), DeleteProcessError> {
        let instance = self.find(id).map_err(FindError::from)?;
        if exec_id.is_empty() {
            return Err(DeleteProcessError::Init(instance.id.clone()));
        }
        let process = instance.exec(exec_id).map_err(FindError::from)?;
        if !process.has_ended() {
            return Err(DeleteProcessError::Running { exec_id: exec_id.to_owned(), id: instance.id.clone() });
        }
        // What processes that it left behind still write is of no interest any more.
        process.pumps().abort();
        instance.execs().remove(exec_id);
        Ok(())
    }
}

/// Makes the helper that makes the process. Returns the agent's ends of things.
fn spawn(spec: &ProcessSpec, instance: &Instance) -> Result<(AgentEnd, AgentStdio), ExecError> {
    let (agent_end, child_end) = channel::pair().map_err(LaunchError::Channel)?;
    let (pipes, stdio) = launch::make_pipes(spec, instance.id_mappings.as_ref())?;
    let cgroup = instance.cgroup.as_ref();
    let inits = cgroup.and_then(|cgroup| cgroup.open_that_of(instance.init.pid()));
    let cgroup = cgroup.map(|cgroup| cgroup.open_below(&spec.cgroup)).transpose()?;
    match sys::clone_process(Parent::Caller, 0, None).map_err(LaunchError::Clone)? {
        // Its status is nobody's business: it tells what went wrong, or what it has made.
        Cloned::Parent(_helper) => Ok((agent_end, stdio)),
        Cloned::Child => Join {
            process: spec,
            channel: &child_end,
            pipes: &pipes,
            init: instance.init.pidfd(),
            namespaces: instance.namespaces,
            cgroup: cgroup.as_ref().map(OwnedFd::as_fd),
            // A place that was asked for is the only one.
            inits_cgroup: inits.as_ref().map(OwnedFd::as_fd).filter(|_| spec.cgroup.is_empty()),
        }
        .run(),
    }
}

/// Waits until the helper has made the process. Returns it, and what the process has said by then.
async fn wait_until_made(channel: &AgentEnd) -> Result<(Child, Vec<Report>), LaunchError> {
    let mut first = Vec::new();
    loop {
        match channel.receive().await.map_err(LaunchError::Channel)? {
            Report::Made(child) => return Ok((child, first)),
            Report::Failed(failure) => return Err(failure.into()),
            Report::Closed => return Err(LaunchError::Channel(std::io::ErrorKind::UnexpectedEof.into())),
            // Its terminal and that it is ready: more it has not to say.
            report if first.len() < 2 => first.push(report),
            _ => return Err(launch::out_of_turn()),
        }
    }
}
