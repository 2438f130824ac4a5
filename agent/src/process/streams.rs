// SPDX-License-Identifier: Apache-2.0
//! Where the host's streams meet the processes, and the connections, that wait for them. Either may come first.

use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::oneshot;

use super::FdStream;

/// Streams that may wait for a process to name them.
const MAX_WAITING: usize = 64;

/// How long a stream waits to be named before it is closed.
const MAX_WAIT: Duration = Duration::from_secs(30);

/// Why a stream was not kept. It has been closed.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("stream {id} is refused: {MAX_WAITING} streams that no process has named are waiting already")]
pub struct StreamTableFull {
    id: u32,
}

/// The streams that wait for processes, and the processes that wait for streams.
#[derive(Debug, Default)]
pub struct StreamTable {
    entries: Mutex<Entries>,
}

#[derive(Debug, Default)]
struct Entries {
    arrived: HashMap<u32, Arrived>,
    expected: HashMap<u32, oneshot::Sender<FdStream>>,
}

#[derive(Debug)]
struct Arrived {
    stream: FdStream,
    deadline: tokio::time::Instant,
}

impl StreamTable {
    fn entries(&self) -> MutexGuard<'_, Entries> {
        // No code panics while it holds the lock, and each change leaves the maps whole.
        self.entries.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Hands a stream to the process that waits for `id`, or keeps it for a while. A second stream of the same id
    /// replaces the first.
    pub fn deliver(&self, id: u32, stream: FdStream) -> Result<(), StreamTableFull> {
        let mut entries = self.entries();
        let stream = match entries.expected.remove(&id) {
            Some(waiting) => match waiting.send(stream) {
                Ok(()) => return Ok(()),
                // The process has given up waiting.
                Err(stream) => stream,
            },
            None => stream,
        };
        let now = tokio::time::Instant::now();
        entries.arrived.retain(|_, arrived| arrived.deadline > now);
        if entries.arrived.len() >= MAX_WAITING {
            return Err(StreamTableFull { id });
        }
        entries.arrived.insert(id, Arrived { stream, deadline: now + MAX_WAIT });
        Ok(())
    }

    /// Names a stream. It can be received once it has come, however long that takes; dropping the receiver forgets it.
    pub(crate) fn expect(&self, id: u32) -> oneshot::Receiver<FdStream> {
        let (sender, receiver) = oneshot::channel();
        let mut entries = self.entries();
        match entries.arrived.remove(&id) {
            // The receiver is in our hands, so that the stream cannot come back.
            Some(arrived) => drop(sender.send(arrived.stream)),
            None => {
                entries.expected.retain(|_, waiting| !waiting.is_closed());
                entries.expected.insert(id, sender);
            }
        }
        receiver
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::net::UnixStream;

    fn stream() -> FdStream {
        FdStream::new(UnixStream::pair().unwrap().0.into()).unwrap()
    }

    #[tokio::test(flavor = "current_thread")]
    async fn stream_and_process_meet_in_either_order() {
        let table = StreamTable::default();

        table.deliver(1, stream()).unwrap();
        table.expect(1).await.unwrap();

        let waiting = table.expect(2);
        table.deliver(2, stream()).unwrap();
        waiting.await.unwrap();
    }

    #[tokio::test(flavor = "current_thread")]
    async fn table_of_unnamed_streams_is_bounded() {
        let table = StreamTable::default();
        for id in 0..MAX_WAITING as u32 {
            table.deliver(id, stream()).unwrap();
        }
        assert_eq!(table.deliver(1000, stream()), Err(StreamTableFull { id: 1000 }));
    }

    #[tokio::test(flavor = "current_thread")]
    async fn forgotten_expectations_take_no_room() {
        let table = StreamTable::default();
        for id in 0..100 {
            drop(table.expect(id));
        }
        assert_eq!(table.entries().expected.len(), 1);
    }
}
