// SPDX-License-Identifier: Apache-2.0
//! The tasks that move one process's bytes, and when they are done.

use std::sync::{Mutex, MutexGuard, PoisonError};

use tokio::sync::{oneshot, watch};
use tokio::task::AbortHandle;

/// The tasks that move a process's bytes.
#[derive(Debug, Default)]
pub(crate) struct Pumps {
    /// Whether the process has ended.
    ended: watch::Sender<bool>,
    tasks: Mutex<Tasks>,
}

#[derive(Debug, Default)]
struct Tasks {
    inputs: Vec<AbortHandle>,
    outputs: Vec<AbortHandle>,
    /// Of each output that nobody waits for yet: ends when its [`Drain`] is dropped.
    undrained: Vec<oneshot::Receiver<()>>,
}

/// What an output's pump has of its process. Dropped once all that the process wrote before its end has been handed on.
///
/// That can be before the end of the output: processes that the process has left behind may still be writing.
#[derive(Debug)]
pub(crate) struct Drain {
    ended: watch::Receiver<bool>,
    _told_by_dropping: oneshot::Sender<()>,
}

impl Drain {
    /// Whether the process has ended.
    pub(crate) fn has_ended(&self) -> bool {
        *self.ended.borrow()
    }

    /// Waits until the process has ended.
    pub(crate) async fn ended(&mut self) {
        // The sender goes away with the pumps of a process that is forgotten.
        let _ = self.ended.wait_for(|ended| *ended).await;
    }
}

impl Pumps {
    fn tasks(&self) -> MutexGuard<'_, Tasks> {
        // Nothing panics while the lock is held.
        self.tasks.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Runs a pump to the process: it ends with the process at the latest.
    pub(crate) fn spawn_input(&self, pump: impl Future<Output = ()> + Send + 'static) {
        self.tasks().inputs.push(tokio::spawn(pump).abort_handle());
    }

    /// Runs a pump from the process: it ends when everything has been handed on.
    pub(crate) fn spawn_output<F: Future<Output = ()> + Send + 'static>(&self, pump: impl FnOnce(Drain) -> F) {
        let (told_by_dropping, drained) = oneshot::channel();
        let drain = Drain { ended: self.ended.subscribe(), _told_by_dropping: told_by_dropping };
        let task = tokio::spawn(pump(drain));
        let mut tasks = self.tasks();
        tasks.outputs.push(task.abort_handle());
        tasks.undrained.push(drained);
    }

    /// After the process's end: ends the pumps to it, and waits until those from it have handed on what it wrote.
    pub(crate) async fn finish(&self) {
        self.ended.send_replace(true);
        let undrained = {
            let mut tasks = self.tasks();
            tasks.inputs.iter().for_each(AbortHandle::abort);
            std::mem::take(&mut tasks.undrained)
        };
        for drained in undrained {
            // It never says more than that it is gone.
            let _ = drained.await;
        }
    }

    /// Ends all pumps, whatever is still under way.
    pub(crate) fn abort(&self) {
        let tasks = self.tasks();
        tasks.inputs.iter().chain(&tasks.outputs).for_each(AbortHandle::abort);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::process::{FdStream, pump};
    use std::os::unix::net::UnixStream;
    use std::time::Duration;
    use tokio::time::timeout;

    #[tokio::test(flavor = "current_thread")]
    async fn finished_is_what_was_written_even_if_another_writer_is_left() {
        let (read, write) = rustix::pipe::pipe().unwrap();
        let (ours, theirs) = UnixStream::pair().unwrap();
        let (read, stream, host) =
            (FdStream::new(read).unwrap(), FdStream::new(ours.into()).unwrap(), FdStream::new(theirs.into()).unwrap());
        let pumps = Pumps::default();
        pumps.spawn_output(|drain| pump::output(read, stream, drain));
        tokio::task::yield_now().await;
        rustix::io::write(&write, b"before the end").unwrap();

        timeout(Duration::from_secs(5), pumps.finish()).await.expect("the other writer is not waited for");

        let mut buffer = [0; 64];
        assert_eq!(host.read_now(&mut buffer).unwrap(), Some(14));
        rustix::io::write(&write, b"after").unwrap();
        assert_eq!(host.read(&mut buffer).await.unwrap(), 5);
    }

    #[tokio::test(flavor = "current_thread")]
    async fn aborted_pumps_are_finished() {
        let (read, _write) = rustix::pipe::pipe().unwrap();
        let (ours, _theirs) = UnixStream::pair().unwrap();
        let (read, stream) = (FdStream::new(read).unwrap(), FdStream::new(ours.into()).unwrap());
        let pumps = Pumps::default();
        pumps.spawn_output(|drain| pump::output(read, stream, drain));
        pumps.abort();
        timeout(Duration::from_secs(5), pumps.finish()).await.unwrap();
    }
}
