// SPDX-License-Identifier: Apache-2.0
//! What the agent does for a process until it executes its program: its standard streams, its set-up, its start. The
//! process's own side is in [`super::attributes`].

use tokio::sync::oneshot;

use super::channel::{AgentEnd, Report};
use super::error::LaunchError;
use super::id_map::IdMappings;
use super::instance::Instance;
use super::process::{ExpectedStreams, Process, Waiting};
use super::{ContainerSpec, ProcessSpec, attributes};
use crate::process::stdio::{self, AgentStdio, ChildStdio};
use crate::process::{FdStream, StreamTable, preserved, pump};
use crate::sys::Child;
use crate::trace::{Trace, now};

/// How long the host may take to open the streams of a process that is ready to start.
const STREAM_DEADLINE: std::time::Duration = std::time::Duration::from_secs(10);

/// Makes what a process has beside a terminal: the process's ends, and the agent's. The process's user is one of a user
/// namespace if there are `mappings`.
pub(super) fn make_pipes(
    process: &ProcessSpec,
    mappings: Option<&IdMappings>,
) -> Result<(ChildStdio, AgentStdio), LaunchError> {
    // A user that there is not is refused when the process becomes that.
    let uid = mappings.map_or(process.uid, |mappings| mappings.user_outside(process.uid).unwrap_or(0));
    stdio::make_pipes(&process.stdio, &process.preserved, uid).map_err(LaunchError::Stdio)
}

/// Gives the new process of a container, if that has a user namespace, the ids that it waits for, and what it cannot take
/// there.
pub(super) fn map_ids(spec: &ContainerSpec, child: &Child, channel: &AgentEnd) -> Result<(), LaunchError> {
    let Some(mappings) = &spec.id_mappings else { return Ok(()) };
    mappings.write(child.pid)?;
    attributes::set_oom_score(&spec.process, Some(child.pid))?;
    channel.mapped().map_err(LaunchError::Channel)
}

/// Gives a process that is set up what it could not take itself, in a user namespace.
pub(super) fn give(instance: &Instance, process: &Process, spec: &ProcessSpec) -> Result<(), LaunchError> {
    if instance.namespaces.user { Ok(attributes::give(spec, process.pid())?) } else { Ok(()) }
}

/// Names the host's streams that the process will need.
pub(super) fn expect_streams(table: &StreamTable, spec: &ProcessSpec) -> ExpectedStreams {
    let expect = |id: Option<u32>| id.map(|id| (id, table.expect(id)));
    let stdio = &spec.stdio;
    ExpectedStreams {
        stdin: expect(stdio.stdin),
        stdout: expect(stdio.stdout),
        stderr: expect(stdio.stderr),
        preserved: spec.preserved.iter().map(|preserved| expect(preserved.stream())).collect(),
    }
}

/// Waits until the process is set up. It may already have sent `first`.
pub(super) async fn wait_until_ready(
    channel: &AgentEnd,
    process: &Process,
    first: Vec<Report>,
) -> Result<(), LaunchError> {
    let mut first = first.into_iter();
    loop {
        let report = match first.next() {
            Some(report) => report,
            None => channel.receive().await.map_err(LaunchError::Channel)?,
        };
        match report {
            Report::Terminal(controller) => {
                let controller = FdStream::new(controller).map_err(LaunchError::Stdio)?;
                // A process makes one terminal; of a second there is no use.
                let _ = process.terminal.set(controller.into());
            }
            Report::Ready => return Ok(()),
            Report::Failed(failure) => return Err(failure.into()),
            Report::Closed => return Err(LaunchError::Ended { code: process.wait().await.code }),
            Report::Made(_) => return Err(out_of_turn()),
        }
    }
}

/// Connects the process's streams and lets it execute its program. Returns when that has succeeded or failed.
pub(super) async fn start(process: &Process, waiting: Waiting, trace: &mut Trace) -> Result<(), LaunchError> {
    let begin = now();
    let Waiting { channel, stdio, streams } = waiting;
    connect(process, stdio, streams).await?;
    let begin = trace.add("streams", begin);
    if let Err(error) = channel.start() {
        process.pumps().abort();
        return Err(LaunchError::Channel(error));
    }
    match channel.receive().await.map_err(LaunchError::Channel)? {
        Report::Closed => {
            process.set_started(trace.add("exec", begin));
            Ok(())
        }
        Report::Failed(failure) => Err(failure.into()),
        Report::Ready | Report::Terminal(_) | Report::Made(_) => Err(out_of_turn()),
    }
}

/// Waits for the host's streams and starts the pumps.
async fn connect(process: &Process, stdio: AgentStdio, streams: ExpectedStreams) -> Result<(), LaunchError> {
    let deadline = tokio::time::Instant::now() + STREAM_DEADLINE;
    let stdin = await_stream(streams.stdin, "stdin", deadline).await?;
    let stdout = await_stream(streams.stdout, "stdout", deadline).await?;
    let stderr = await_stream(streams.stderr, "stderr", deadline).await?;
    let pumps = process.pumps();
    for (end, expected) in stdio.preserved.into_iter().zip(streams.preserved) {
        let stream = await_stream(expected, "preserved descriptor", deadline).await?;
        if let (Some(end), Some(stream)) = (end, stream) {
            preserved::serve(end, stream, pumps).map_err(LaunchError::Stdio)?;
        }
    }
    if let Some(terminal) = process.terminal.get() {
        let (output, input) = (terminal.clone(), terminal.clone());
        pumps.spawn_output(|drain| pump::terminal_output(output, stdout, drain));
        if let Some(stdin) = stdin {
            pumps.spawn_input(pump::terminal_input(stdin, input));
        }
        return Ok(());
    }
    let to_stream = |pipe| FdStream::new(pipe).map_err(LaunchError::Stdio);
    if let (Some(stdin), Some(pipe)) = (stdin, stdio.stdin) {
        pumps.spawn_input(pump::input(stdin, to_stream(pipe)?));
    }
    for (pipe, stream) in [(stdio.stdout, stdout), (stdio.stderr, stderr)] {
        if let (Some(pipe), Some(stream)) = (pipe, stream) {
            let pipe = to_stream(pipe)?;
            pumps.spawn_output(|drain| pump::output(pipe, stream, drain));
        }
    }
    Ok(())
}

async fn await_stream(
    expected: Option<(u32, oneshot::Receiver<FdStream>)>,
    name: &'static str,
    deadline: tokio::time::Instant,
) -> Result<Option<FdStream>, LaunchError> {
    let Some((id, receiver)) = expected else { return Ok(None) };
    match tokio::time::timeout_at(deadline, receiver).await {
        Ok(Ok(stream)) => Ok(Some(stream)),
        _ => Err(LaunchError::NoStream { id, name, seconds: STREAM_DEADLINE.as_secs() }),
    }
}

/// The error of a report that makes no sense when it comes.
pub(super) fn out_of_turn() -> LaunchError {
    LaunchError::Channel(std::io::Error::other("it spoke out of turn"))
}
