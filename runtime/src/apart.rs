// SPDX-License-Identifier: Apache-2.0
//! Work that may take long, beside the event loop: what touches the host's files waits for their file system, which may be that
//! of a server that does not answer.

use std::{io, thread};

use tokio::sync::oneshot;

/// Does work in a thread of its own. It is gone when this returns: the event loop's own threads would stay for a while, and
/// take signals that are blocked in every thread that is made later.
///
/// # Errors
///
/// There is no such thread, or it has panicked.
pub(crate) async fn apart<T: Send + 'static>(name: &str, work: impl FnOnce() -> T + Send + 'static) -> io::Result<T> {
    let (sender, done) = oneshot::channel();
    let thread = thread::Builder::new().name(name.to_owned()).spawn(move || drop(sender.send(work())))?;
    let result = done.await;
    // It has nothing left to do.
    let _ = thread.join();
    result.map_err(|_| io::Error::other("the thread has panicked"))
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;

    use super::*;

    #[tokio::test]
    async fn others_go_on_meanwhile_and_a_panic_is_told() {
        let (release, released) = mpsc::channel();
        let work = apart("slow", move || released.recv());
        let others = async move { release.send(7) };

        let (done, sent) = tokio::join!(work, others);

        assert_eq!((done.unwrap(), sent), (Ok(7), Ok(())));
        assert!(apart("bad", || panic!("on purpose")).await.is_err());
    }
}
