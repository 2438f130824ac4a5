// SPDX-License-Identifier: Apache-2.0
//! `exec`: a process on the host that stands for one that is added to a container. It moves the bytes of its streams,
//! forwards its signals and its terminal's size, and ends with its status.

use std::cell::Cell;
use std::future::poll_fn;
use std::mem;
use std::path::PathBuf;
use std::pin::pin;
use std::process;
use std::sync::Arc;
use std::task::Poll;

use containerd_shim_protos::api::{
    DeleteRequest, Empty, ExecProcessRequest, KillRequest, ResizePtyRequest, StartRequest, StateRequest, StateResponse,
    WaitRequest,
};
use containerd_shim_protos::shim_async::TaskClient;
use nix::sys::signal::Signal;
use protobuf::MessageField;
use protobuf::well_known_types::any::Any;
use serde::Serialize;
use thiserror::Error;
use ttrpc::context::Context;

use super::client::{self, ClientError};
use super::console::{self, ConsoleError};
use super::container::CallError;
use super::daemon::{self, DetachError, Reporter};
use super::pid_file;
use super::signals::{self, BlockedSignals, Received, SignalStream};
use super::state::{Found, Status};
use super::streams::{self, Ends, OpenStreamError, Preserved, StreamIds};
use super::task_service::STREAM;
use super::terminal::{self, RawTerminal, Size, TerminalError};
use crate::logging;
use crate::spec::PreservedKind;
use crate::text;
use crate::trace::now_ns;

/// The type by which containerd calls a process of the specification.
const PROCESS_TYPE: &str = "types.containerd.io/opencontainers/runtime-spec/1/Process";

/// What to add to a container.
#[derive(Debug)]
pub(crate) struct ExecOptions {
    /// The specification's `process`, without a terminal's size.
    pub(crate) process: oci_spec::runtime::Process,
    pub(crate) detach: bool,
    /// Absolute.
    pub(crate) pid_file: Option<PathBuf>,
    /// Absolute.
    pub(crate) console_socket: Option<PathBuf>,
    /// Add it to a frozen container: it runs when that goes on.
    pub(crate) ignore_paused: bool,
    /// Below the container's.
    pub(crate) cgroup: String,
    /// What it has beside its standard streams.
    pub(crate) preserved: Preserved,
}

/// The specification's process, with what it has no word for.
#[derive(Debug, Serialize)]
struct Described<'a> {
    #[serde(flatten)]
    process: &'a oci_spec::runtime::Process,
    #[serde(rename = "io.bulkhead.cgroup")]
    cgroup: &'a str,
    #[serde(rename = "io.bulkhead.preserved")]
    preserved: Vec<PreservedKind>,
}

/// A process that could not be added, or was lost.
#[derive(Debug, Error)]
pub(crate) enum ExecError {
    #[error(transparent)]
    Client(#[from] ClientError),
    #[error("cannot exec in a paused container (use --ignore-paused to override)")]
    Paused,
    #[error(transparent)]
    Console(#[from] ConsoleError),
    #[error(transparent)]
    Terminal(#[from] TerminalError),
    #[error(transparent)]
    Detach(#[from] DetachError),
    #[error(transparent)]
    Streams(#[from] OpenStreamError),
    #[error("cannot receive signals")]
    Signals(#[source] std::io::Error),
    #[error("{0} came before the process was started")]
    Interrupted(Received),
    #[error("cannot write the pid file {}", path.display())]
    PidFile { path: PathBuf, source: std::io::Error },
    #[error("cannot describe the process")]
    Describe(#[source] serde_json::Error),
}

impl From<ttrpc::Error> for ExecError {
    fn from(error: ttrpc::Error) -> Self {
        Self::Client(error.into())
    }
}

impl ExecError {
    /// The exit status that says so: always runc's.
    pub(crate) const STATUS: u8 = 255;
}

/// Adds a process to a container. Detached, it returns 0 once the process runs; else the process' status.
pub(crate) fn exec(found: &Found, mut options: ExecOptions) -> Result<u8, ExecError> {
    let terminal = options.process.terminal().unwrap_or(false);
    console::check(terminal, options.detach, options.console_socket.as_deref())?;
    match found.status() {
        Status::Stopped => return Err(ClientError::from(CallError::ExecStopped).into()),
        Status::Paused if !options.ignore_paused => return Err(ExecError::Paused),
        _ => {}
    }
    if !options.detach {
        if terminal {
            terminal::require_for_exec()?;
        }
        return attend(found, &mut options, &mut None);
    }
    daemon::detach(|reporter| {
        let mut reporter = Some(reporter);
        match attend(found, &mut options, &mut reporter) {
            Ok(status) => status,
            Err(error) => {
                let message = text::chain(&error);
                match reporter {
                    Some(reporter) => reporter.failed(message, ExecError::STATUS),
                    None => logging::error(format_args!("{message}")),
                }
                ExecError::STATUS
            }
        }
    })?;
    Ok(0)
}

/// Stands for the process until its end.
fn attend(found: &Found, options: &mut ExecOptions, reporter: &mut Option<Reporter>) -> Result<u8, ExecError> {
    let signals = BlockedSignals::block().map_err(ExecError::Signals)?;
    if let Some(socket) = &options.console_socket {
        console::attach(socket)?;
    }
    let terminal = options.process.terminal().unwrap_or(false);
    if let Some(size) = terminal::size().filter(|_| terminal) {
        let size = oci_spec::runtime::BoxBuilder::default()
            .height(u64::from(size.rows))
            .width(u64::from(size.columns))
            .build();
        options.process.set_console_size(size.ok());
    }
    client::event_loop()?.block_on(async {
        let proxy = Arc::new(Proxy {
            task: client::connect_unless_ended(found, CallError::ExecStopped)?,
            id: found.record().id.clone(),
            // Unique on this host, also where several pid namespaces share it.
            exec_id: format!("exec-{}-{}", process::id(), now_ns()),
            terminal,
        });
        proxy.add(options).await?;
        let result = proxy.attend(found, options, signals.into_stream().map_err(ExecError::Signals)?, reporter).await;
        if result.is_err() {
            // Where it runs, nobody stands for it.
            let _ = proxy.kill(Signal::SIGKILL.into()).await;
        }
        proxy.forget().await;
        result
    })
}

/// A process that was added.
struct Proxy {
    task: TaskClient,
    id: String,
    exec_id: String,
    terminal: bool,
}

impl Proxy {
    async fn add(&self, options: &ExecOptions) -> Result<(), ExecError> {
        let preserved = options.preserved.kinds().collect();
        let described = Described { process: &options.process, cgroup: &options.cgroup, preserved };
        let value = serde_json::to_vec(&described).map_err(ExecError::Describe)?;
        let spec = MessageField::some(Any { type_url: PROCESS_TYPE.to_owned(), value, ..Any::default() });
        let wanted = StreamIds::choose(self.terminal);
        let name = |number: u32| if number == 0 { String::new() } else { STREAM.to_owned() };
        let request = ExecProcessRequest {
            id: self.id.clone(),
            exec_id: self.exec_id.clone(),
            terminal: self.terminal,
            stdin: name(wanted.stdin),
            stdout: name(wanted.stdout),
            stderr: name(wanted.stderr),
            spec,
            ..Default::default()
        };
        self.task.exec(Context::default(), &request).await?;
        Ok(())
    }

    async fn attend(
        self: &Arc<Self>,
        found: &Found,
        options: &mut ExecOptions,
        signals: SignalStream,
        reporter: &mut Option<Reporter>,
    ) -> Result<u8, ExecError> {
        let (id, exec_id) = (self.id.clone(), self.exec_id.clone());
        let state = StateRequest { id: id.clone(), exec_id: exec_id.clone(), ..Default::default() };
        let state = self.task.state(Context::default(), &state).await?;
        let ids = stream_ids(&state, options.preserved.carried())?;
        let raw = self.terminal.then(RawTerminal::enter).transpose()?;
        // The wait is on its way before the start: the supervisor knows from it that somebody attends, and sees it end with
        // this process.
        let request = WaitRequest { id: id.clone(), exec_id: exec_id.clone(), ..Default::default() };
        let mut ended = pin!(self.task.wait(Context::default(), &request));
        if let Poll::Ready(early) = poll_fn(|context| Poll::Ready(ended.as_mut().poll(context))).await {
            early?;
            return Err(ClientError::Answer.into());
        }
        let start = StartRequest { id, exec_id, ..Default::default() };
        let started = async { Ok(self.task.start(Context::default(), &start).await?) };
        let vsock = found.vsock_path();
        let opened = async { streams::open(&vsock, ids).await.map_err(ExecError::from) };
        let starting = async { tokio::try_join!(started, opened) };
        tokio::pin!(starting);
        // What comes for the process before it is there.
        let mut early = Vec::new();
        let (_, opened) = loop {
            tokio::select! {
                result = &mut starting => break result?,
                signal = signals.next() => match signal.map_err(ExecError::Signals)? {
                    signal if signals::ends_a_start(signal) => return Err(ExecError::Interrupted(signal)),
                    signal => early.push(signal),
                },
            }
        };
        // Whoever has set the size before typing sees it heeded in this order.
        if let Some(size) = self.size() {
            passed(Signal::SIGWINCH.into(), self.resize(size).await);
        }
        let mut outputs = opened.pump(Ends::Own(mem::take(&mut options.preserved)))?;
        if let Some(path) = &options.pid_file {
            pid_file::write(path).map_err(|source| ExecError::PidFile { path: path.clone(), source })?;
        }
        if let Some(reporter) = reporter.take() {
            reporter.succeeded();
        }
        early.into_iter().for_each(|signal| self.forward(signal));
        let has_ended = Cell::new(false);
        let end = async {
            let end = ended.await?;
            has_ended.set(true);
            outputs.drained().await;
            Ok::<_, ExecError>(u8::try_from(end.exit_status).unwrap_or(u8::MAX))
        };
        tokio::pin!(end);
        let status = loop {
            tokio::select! {
                status = &mut end => break status?,
                signal = signals.next() => {
                    let signal = signal.map_err(ExecError::Signals)?;
                    if has_ended.get() && signals::ends_a_start(signal) {
                        // Its last output is given up.
                        break signal.exit_status();
                    }
                    self.forward(signal);
                }
            }
        };
        drop(raw);
        Ok(status)
    }

    /// Passes a signal on; nobody waits for its arrival.
    fn forward(self: &Arc<Self>, signal: Received) {
        let proxy = Arc::clone(self);
        tokio::spawn(async move {
            let result = match proxy.size().filter(|_| signal.is(Signal::SIGWINCH)) {
                Some(size) => proxy.resize(size).await,
                None => proxy.kill(signal).await,
            };
            passed(signal, result);
        });
    }

    /// The size of the terminal, if there is one that knows it.
    fn size(&self) -> Option<Size> {
        terminal::size().filter(|_| self.terminal)
    }

    async fn resize(&self, size: Size) -> ttrpc::Result<Empty> {
        let (id, exec_id) = (self.id.clone(), self.exec_id.clone());
        let request = ResizePtyRequest { id, exec_id, width: size.columns, height: size.rows, ..Default::default() };
        self.task.resize_pty(Context::default(), &request).await
    }

    async fn kill(&self, signal: Received) -> ttrpc::Result<Empty> {
        let (id, exec_id) = (self.id.clone(), self.exec_id.clone());
        let signal = signal.number();
        self.task.kill(Context::default(), &KillRequest { id, exec_id, signal, ..Default::default() }).await
    }

    /// Lets the supervisor forget the process; with the container it is forgotten anyway.
    async fn forget(&self) {
        let request = DeleteRequest { id: self.id.clone(), exec_id: self.exec_id.clone(), ..Default::default() };
        let _ = self.task.delete(Context::default(), &request).await;
    }
}

/// A signal that was not passed on is no failure: the process may have just ended.
fn passed(signal: Received, result: ttrpc::Result<Empty>) {
    if let Err(error) = result {
        logging::debug(format_args!("{signal} was not delivered: {}", ClientError::from(error)));
    }
}

/// The numbers of the streams in the answer to `State`, with so many that are preserved.
fn stream_ids(state: &StateResponse, preserved: u32) -> Result<StreamIds, ClientError> {
    let parse = |number: &str| number.parse().map_err(|_| ClientError::Answer);
    let number = |name: &str| match name {
        "" => Ok(0),
        name => name.strip_prefix(STREAM).ok_or(ClientError::Answer).and_then(parse),
    };
    let (stderr, first) = match (state.stderr.split_once(','), preserved) {
        (None, 0) => (number(&state.stderr)?, 0),
        (Some((stderr, first)), 1..) => (number(stderr)?, parse(first)?),
        _ => return Err(ClientError::Answer),
    };
    let (stdin, stdout) = (number(&state.stdin)?, number(&state.stdout)?);
    Ok(StreamIds { stdin, stdout, stderr, preserved: (first, preserved) })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn streams_are_named_by_their_numbers() {
        let state = |stdin: &str, stdout: &str| StateResponse {
            stdin: stdin.to_owned(),
            stdout: stdout.to_owned(),
            ..StateResponse::default()
        };

        let ids = stream_ids(&state("stream:16", ""), 0).unwrap();
        assert_eq!(ids, StreamIds { stdin: 16, ..StreamIds::default() });
        assert!(matches!(stream_ids(&state("stream:x", ""), 0), Err(ClientError::Answer)));
        assert!(matches!(stream_ids(&state("/fifo", ""), 0), Err(ClientError::Answer)));
        let preserving = StateResponse { stderr: "stream:0,40".to_owned(), ..state("stream:39", "") };
        let ids = stream_ids(&preserving, 2).unwrap();
        assert_eq!(ids, StreamIds { stdin: 39, preserved: (40, 2), ..StreamIds::default() });
        assert!(matches!(stream_ids(&preserving, 0), Err(ClientError::Answer)));
        assert!(matches!(stream_ids(&state("", ""), 1), Err(ClientError::Answer)));
    }
}
