// SPDX-License-Identifier: Apache-2.0
//! The processes that were added to a container, from the call that describes one to the call that forgets it.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use bulkhead_protocol::agent::{DescriptorKind, ExecProcessResponse, Process};
use tokio::sync::{Notify, watch};
use tokio::time::timeout;

use super::agent::{Agent, AgentError};
use super::container::{CallError, Container, Ended, SIGKILL};
use super::state::Status;
use super::streams::{FIRST_FREE, StreamIds};
use super::terminal::Size;
use crate::trace::now_ns;

/// How long a guest may take to make a process in a container that is not frozen, and how often it is looked whether it is.
const START_TIMEOUT: Duration = Duration::from_secs(60);
const LOOK_INTERVAL: Duration = Duration::from_secs(1);

/// The status of a process that ended with its container: it was killed.
const KILLED: u8 = 137;

/// The table of processes.
#[derive(Debug)]
pub(crate) struct Execs {
    table: Mutex<HashMap<String, Arc<Exec>>>,
    /// The next stream's number: no two that are under way in a guest have the same.
    next_stream: Arc<AtomicU32>,
    /// Somebody who attended to a process is done with it.
    changed: Notify,
}

impl Default for Execs {
    fn default() -> Self {
        Self::new(stream_numbers())
    }
}

/// The numbers of streams in a new guest.
pub(super) fn stream_numbers() -> Arc<AtomicU32> {
    Arc::new(AtomicU32::new(FIRST_FREE))
}

/// One process.
#[derive(Debug)]
pub(crate) struct Exec {
    pub(crate) streams: StreamIds,
    pub(crate) terminal: bool,
    /// What to start; taken by the start.
    process: Mutex<Option<Process>>,
    /// Its pid in the guest, once it runs.
    pid: watch::Sender<Option<u32>>,
    ended: watch::Sender<Option<Ended>>,
    /// Whether somebody pumps its streams, and is to be given time at the end.
    attended: Mutex<bool>,
    /// Whether whoever waited for its end is gone.
    abandoned: AtomicBool,
}

impl Exec {
    pub(crate) fn pid(&self) -> Option<u32> {
        *self.pid.borrow()
    }

    pub(crate) fn ended(&self) -> Option<Ended> {
        self.ended.borrow().clone()
    }

    /// Waits for its end, once it runs.
    pub(crate) async fn wait(&self) -> Option<Ended> {
        let mut ended = self.ended.subscribe();
        ended.wait_for(Option::is_some).await.ok().and_then(|ended| ended.clone())
    }

    fn process(&self) -> MutexGuard<'_, Option<Process>> {
        self.process.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether its start is under way.
    fn is_starting(&self) -> bool {
        self.process().is_none() && self.pid().is_none() && self.ended().is_none()
    }

    /// Has it begin with a terminal of that size, if it is not started yet; whether it will. A start that is under way is
    /// waited for.
    async fn begins_with(&self, size: Size) -> bool {
        if let Some(process) = self.process().as_mut() {
            (process.terminal_rows, process.terminal_columns) = (size.rows, size.columns);
            return true;
        }
        let (mut pid, mut ended) = (self.pid.subscribe(), self.ended.subscribe());
        tokio::select! {
            _ = pid.wait_for(Option::is_some) => {}
            _ = ended.wait_for(Option::is_some) => {}
        }
        false
    }

    /// Somebody pumps its streams, from before it starts, and is to be given time at the end.
    pub(crate) fn attend(&self) {
        self.set_attended(true);
    }

    fn set_attended(&self, attended: bool) {
        *self.attended.lock().unwrap_or_else(PoisonError::into_inner) = attended;
    }

    fn is_attended(&self) -> bool {
        *self.attended.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Execs {
    /// A table without processes, whose streams have the next of these numbers.
    pub(super) fn new(next_stream: Arc<AtomicU32>) -> Self {
        Self { table: Mutex::default(), next_stream, changed: Notify::new() }
    }

    fn table(&self) -> MutexGuard<'_, HashMap<String, Arc<Exec>>> {
        // Nothing panics while the lock is held.
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The number of a further stream.
    pub(crate) fn stream_number(&self) -> u32 {
        self.stream_numbers(1)
    }

    /// The first of so many numbers of further streams.
    fn stream_numbers(&self, count: u32) -> u32 {
        loop {
            let first = self.next_stream.fetch_add(count, Ordering::Relaxed);
            // Else after four billion connections.
            if first != 0 && first.checked_add(count).is_some() {
                return first;
            }
        }
    }

    /// Adds a process; `wanted` says which of its streams are to be carried.
    pub(crate) fn add(&self, exec_id: &str, mut process: Process, wanted: [bool; 3]) -> Result<(), CallError> {
        let terminal = process.terminal;
        let number = |wanted: bool| if wanted { self.stream_number() } else { 0 };
        let [stdin, stdout, stderr] = wanted;
        // A terminal's output is one stream.
        let streams = StreamIds {
            stdin: number(stdin),
            stdout: number(stdout),
            stderr: number(stderr && !terminal),
            preserved: self.preserved_numbers(&process),
        };
        streams.name_in(&mut process);
        let exec = Exec {
            streams,
            terminal,
            process: Mutex::new(Some(process)),
            pid: watch::Sender::new(None),
            ended: watch::Sender::new(None),
            attended: Mutex::new(false),
            abandoned: AtomicBool::new(false),
        };
        let mut table = self.table();
        if exec_id.is_empty() || table.contains_key(exec_id) {
            return Err(CallError::ProcessExists(exec_id.to_owned()));
        }
        table.insert(exec_id.to_owned(), Arc::new(exec));
        Ok(())
    }

    /// The numbers for what a process has beside its standard streams: the first, and how many.
    fn preserved_numbers(&self, process: &Process) -> (u32, u32) {
        let carried = process.preserved.iter().filter(|one| one.kind != DescriptorKind::NULL_DEVICE.into());
        match carried.map(|_| 1).sum() {
            0 => (0, 0),
            count => (self.stream_numbers(count), count),
        }
    }

    /// Looks a process up.
    pub(crate) fn get(&self, exec_id: &str) -> Result<Arc<Exec>, CallError> {
        self.table().get(exec_id).cloned().ok_or_else(|| CallError::NoSuchProcess(exec_id.to_owned()))
    }

    /// Nobody has output of a process to fetch any more.
    pub(crate) fn unattend(&self, exec: &Exec) {
        exec.set_attended(false);
        self.changed.notify_waiters();
    }

    /// Forgets a process.
    pub(crate) fn remove(&self, exec_id: &str) {
        self.table().remove(exec_id);
        self.changed.notify_waiters();
    }

    /// After the container's end: returns when nobody has output to fetch any more, or has had the time to.
    pub(crate) async fn farewell(&self, limit: Duration) {
        let done = async {
            loop {
                let changed = self.changed.notified();
                tokio::pin!(changed);
                // From here on no change is missed.
                changed.as_mut().enable();
                if !self.table().values().any(|exec| exec.is_attended()) {
                    return;
                }
                changed.await;
            }
        };
        // Who has not fetched it by now has stopped reading.
        let _ = timeout(limit, done).await;
    }
}

/// Starts a process that was added; its pid in the guest.
pub(crate) async fn start(container: &Arc<Container>, exec_id: &str) -> Result<u32, CallError> {
    let exec = container.execs.get(exec_id)?;
    let process = exec.process().take();
    let Some(process) = process else {
        return Err(CallError::ProcessExists(exec_id.to_owned()));
    };
    let started = match make(container, exec_id, process).await {
        Ok(started) => started,
        Err(error) => {
            container.execs.remove(exec_id);
            // Nobody is to wait for it any longer.
            exec.ended.send_replace(Some(Ended::now(KILLED)));
            return container.heard(Err(error)).map_err(|error| match error {
                CallError::NotRunning => CallError::ExecStopped,
                error => error,
            });
        }
    };
    let pid = u32::try_from(started.pid).unwrap_or(0);
    exec.pid.send_replace(Some(pid));
    if exec.abandoned.load(Ordering::Acquire) {
        kill_abandoned(container.agent.clone(), exec_id.to_owned());
    }
    let begin_ns = now_ns();
    let (container, exec_id) = (Arc::clone(container), exec_id.to_owned());
    tokio::spawn(async move {
        let ended = match container.agent.wait(&exec_id).await {
            Ok(exit) => {
                let status = u8::try_from(exit.exit_status).unwrap_or(u8::MAX);
                Ended::told(status, container.agent.on_host_clock(exit.exited_at_ns), begin_ns)
            }
            Err(AgentError::Lost | AgentError::Timeout | AgentError::Refused { .. }) => Ended::now(KILLED),
        };
        exec.ended.send_replace(Some(ended));
        if exec.abandoned.load(Ordering::Acquire) {
            // Nobody else will: it is gone, or the container is.
            let _ = delete(&container, &exec_id).await;
        }
    });
    Ok(pid)
}

/// Has the guest make a process. While its container is frozen it cannot be made, which is no fault of the guest's.
async fn make(container: &Container, exec_id: &str, process: Process) -> Result<ExecProcessResponse, AgentError> {
    let (agent, id) = (container.agent.clone(), exec_id.to_owned());
    let mut made = Box::pin(async move { agent.exec(&id, process).await });
    let mut left = START_TIMEOUT;
    while !left.is_zero() {
        match timeout(LOOK_INTERVAL, &mut made).await {
            Ok(result) => return result,
            Err(_) if container.status() == Status::Paused => {}
            Err(_) => left = left.saturating_sub(LOOK_INTERVAL),
        }
    }
    let (agent, id) = (container.agent.clone(), exec_id.to_owned());
    tokio::spawn(async move {
        // It must not run on when nobody expects it any more.
        if made.await.is_ok() && agent.signal(&id, SIGKILL, false).await.is_ok() && agent.wait(&id).await.is_ok() {
            let _ = agent.delete_process(&id).await;
        }
    });
    Err(AgentError::Timeout)
}

/// Waits for the end of a process, which may not have been started yet. Who waits attends to it; who gives up waiting has no
/// further interest in it.
pub(crate) async fn wait(container: &Container, exec_id: &str) -> Result<Ended, CallError> {
    let exec = container.execs.get(exec_id)?;
    exec.attend();
    let mut attention = Attention { container, exec_id, exec: &exec, kept: false };
    let ended = exec.wait().await;
    attention.kept = true;
    // The sender is in the entry that this function holds.
    ended.ok_or_else(|| CallError::NoSuchProcess(exec_id.to_owned()))
}

/// Sets the size of a terminal: of init's, whose id is empty, or of a further process', which may not have been started yet.
pub(crate) async fn resize(container: &Container, exec_id: &str, size: Size) -> Result<(), CallError> {
    if size.rows.max(size.columns) > u16::MAX.into() {
        return Err(CallError::BadRequest(format!("a terminal of {} rows and {} columns", size.rows, size.columns)));
    }
    if !exec_id.is_empty() && container.execs.get(exec_id)?.begins_with(size).await {
        return Ok(());
    }
    container.heard(container.agent.resize(exec_id, size).await)
}

/// Forgets a process that has ended, or was never started.
pub(crate) async fn delete(container: &Container, exec_id: &str) -> Result<Ended, CallError> {
    let exec = container.execs.get(exec_id)?;
    let ended = match (exec.pid(), exec.ended()) {
        (None, _) if exec.is_starting() => return Err(CallError::DeleteRunning(exec_id.to_owned())),
        (None, _) => Ended::now(0),
        (Some(_), Some(ended)) => {
            // The container may have ended meanwhile, and everything of it with it.
            let _ = container.agent.delete_process(exec_id).await;
            ended
        }
        (Some(_), None) => return Err(CallError::DeleteRunning(exec_id.to_owned())),
    };
    container.execs.remove(exec_id);
    Ok(ended)
}

/// Kills a process whose proxy is gone: engines know it by that, and kill it so. Nobody waits for the kill.
fn kill_abandoned(agent: Agent, exec_id: String) {
    // Without an event loop, the machine ends.
    if let Ok(runtime) = tokio::runtime::Handle::try_current() {
        runtime.spawn(async move { agent.signal(&exec_id, SIGKILL, false).await });
    }
}

/// Somebody waits for a process; dropped before its end, that somebody is gone.
struct Attention<'a> {
    container: &'a Container,
    exec_id: &'a str,
    exec: &'a Exec,
    kept: bool,
}

impl Drop for Attention<'_> {
    fn drop(&mut self) {
        if self.kept {
            return;
        }
        self.exec.abandoned.store(true, Ordering::Release);
        self.container.execs.unattend(self.exec);
        // One that is being started is killed by its start.
        if self.exec.pid().is_some() && self.exec.ended().is_none() {
            let (agent, exec_id) = (self.container.agent.clone(), self.exec_id.to_owned());
            kill_abandoned(agent, exec_id);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::spec::PreservedKind;

    fn added(terminal: bool, wanted: [bool; 3]) -> StreamIds {
        let execs = Execs::default();
        execs.add("e", Process { terminal, ..Process::default() }, wanted).unwrap();
        execs.get("e").unwrap().streams
    }

    #[test]
    fn each_wanted_stream_has_a_number_of_its_own_and_a_terminal_two() {
        let ids = |stdin, stdout, stderr| StreamIds { stdin, stdout, stderr, preserved: (0, 0) };
        assert_eq!(added(false, [true, true, true]), ids(36, 37, 38));
        assert_eq!(added(false, [false, true, false]), ids(0, 36, 0));
        assert_eq!(added(true, [true, true, true]), ids(36, 37, 0));
    }

    #[test]
    fn what_a_process_has_beside_them_is_numbered_in_a_row_but_for_null_devices() {
        let execs = Execs::default();
        let kinds = [PreservedKind::Input, PreservedKind::Null, PreservedKind::Connection];
        let process = Process { preserved: kinds.map(PreservedKind::to_wire).into(), ..Process::default() };

        execs.add("e", process, [false, true, false]).unwrap();

        let exec = execs.get("e").unwrap();
        assert_eq!(exec.streams, StreamIds { stdin: 0, stdout: 36, stderr: 0, preserved: (37, 2) });
        let process = exec.process.lock().unwrap().take().unwrap();
        assert!(process.preserved.iter().map(|one| one.stream).eq([37, 0, 38]));
    }

    #[test]
    fn an_id_names_one_process() {
        let execs = Execs::default();
        execs.add("e", Process::default(), [false; 3]).unwrap();

        assert!(matches!(execs.add("e", Process::default(), [false; 3]), Err(CallError::ProcessExists(_))));
        assert!(matches!(execs.add("", Process::default(), [false; 3]), Err(CallError::ProcessExists(_))));
        execs.remove("e");
        assert!(matches!(execs.get("e"), Err(CallError::NoSuchProcess(_))));
    }

    #[tokio::test]
    async fn a_size_is_kept_for_the_start() {
        let execs = Execs::default();
        execs.add("e", Process { terminal: true, ..Process::default() }, [true; 3]).unwrap();
        let exec = execs.get("e").unwrap();

        assert!(exec.begins_with(Size { rows: 33, columns: 77 }).await);

        let process = exec.process().take().unwrap();
        assert_eq!((process.terminal_rows, process.terminal_columns), (33, 77));
        // From here on it is the guest's to be told.
        assert!(exec.is_starting());
        let (kept, ()) = tokio::join!(exec.begins_with(Size { rows: 1, columns: 2 }), async {
            exec.pid.send_replace(Some(7));
        });
        assert!(!kept && !exec.is_starting());
    }

    #[tokio::test]
    async fn the_farewell_waits_for_those_who_attend_only_and_not_for_ever() {
        let execs = Execs::default();
        execs.add("e", Process::default(), [true; 3]).unwrap();
        let limit = Duration::from_millis(50);
        let begin = tokio::time::Instant::now();

        execs.farewell(Duration::from_secs(3600)).await;
        execs.get("e").unwrap().set_attended(true);
        execs.farewell(limit).await;

        assert!(begin.elapsed() >= limit);
    }
}
