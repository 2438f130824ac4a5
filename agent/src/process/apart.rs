// SPDX-License-Identifier: Apache-2.0
//! Work that may take long, or for ever, in a process of its own: what waits for a disk or a file system of the host is not
//! to keep the agent, which has one thread, from answering other calls.

use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsFd, BorrowedFd};

use rustix::pipe::{PipeFlags, pipe_with};
use tokio::sync::oneshot;

use super::{ExitStatus, Reaper};
use crate::sys::{self, Cloned, Parent};

/// Longest text that is read so: what a pipe takes at once, whoever reads it.
const MAX_TEXT_LEN: usize = 4096;

/// Does something in a process of its own, and waits for it. The process has no descriptors but its own; of an error that the
/// kernel has no number for, only that there was one is known here.
pub(crate) async fn apart(reaper: &Reaper, work: impl FnOnce() -> io::Result<()>) -> io::Result<()> {
    run(reaper, &[], work)?.end().await
}

/// The same for a text, of at most a page.
pub(crate) async fn read_apart(reaper: &Reaper, read: impl FnOnce() -> io::Result<String>) -> io::Result<String> {
    let (ours, theirs) = pipe_with(PipeFlags::CLOEXEC)?;
    let work = || {
        let text = read()?;
        let text = text.as_bytes().get(..MAX_TEXT_LEN).unwrap_or(text.as_bytes());
        Ok(rustix::io::write(&theirs, text).map(drop)?)
    };
    let running = run(reaper, &[theirs.as_fd()], work)?;
    drop(theirs);
    running.end().await?;
    let mut text = String::new();
    File::from(ours).take(MAX_TEXT_LEN as u64).read_to_string(&mut text)?;
    Ok(text)
}

/// The end of such a process.
struct Running(oneshot::Receiver<ExitStatus>);

impl Running {
    async fn end(self) -> io::Result<()> {
        // The reaper outlives all calls.
        match self.0.await.map_or(0, |status| i32::from(status.code)) {
            0 => Ok(()),
            errno => Err(io::Error::from_raw_os_error(errno)),
        }
    }
}

fn run(reaper: &Reaper, kept: &[BorrowedFd<'_>], work: impl FnOnce() -> io::Result<()>) -> io::Result<Running> {
    match sys::clone_process(Parent::Caller, 0, None)? {
        Cloned::Parent(child) => Ok(Running(reaper.expect(child.pid))),
        Cloned::Child => {
            crate::init::enter_child();
            // Streams of containers are not to be held open by what may never end.
            let errno = match sys::close_all_but(kept).and_then(|()| work()) {
                Ok(()) => 0,
                Err(error) => error.raw_os_error().unwrap_or(libc::EIO),
            };
            sys::exit_now(errno)
        }
    }
}
