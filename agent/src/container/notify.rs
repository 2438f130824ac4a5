// SPDX-License-Identifier: Apache-2.0
//! The socket at which a container tells that it is ready (sd_notify(3)). Of all that comes there only that is kept, and the host is
//! told of it when it asks. What else comes is thrown away as it comes, for as long as the container lives: nobody who sends is held up.

use std::fs::{self, Permissions};
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixDatagram;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use bulkhead_protocol::notification::{MAX_LEN, ready_line};
use rustix::net::{RecvFlags, recv};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::sync::watch;
use tokio::task::JoinSet;

use super::Engine;
use super::error::ReadyError;
use crate::log::{self, Level};
use crate::sys;

/// The socket's name in its folder.
const NAME: &str = "notify.sock";

/// How many messages are taken before others have their turn.
const MOST_AT_ONCE: usize = 64;

/// How many are taken after the container's end: more than the kernel lets wait (net.unix.max_dgram_qlen), and nobody is left who sends.
const MOST_AT_END: usize = 1024;

/// The socket. With it go its folder, and the task that takes what comes.
#[derive(Debug)]
pub(crate) struct NotifySocket {
    folder: PathBuf,
    path: PathBuf,
    inbox: Arc<Inbox>,
    _task: JoinSet<()>,
}

/// What comes at it.
#[derive(Debug)]
struct Inbox {
    socket: AsyncFd<OwnedFd>,
    /// The first line that says that the container is ready.
    ready: watch::Sender<Option<String>>,
}

impl Drop for NotifySocket {
    fn drop(&mut self) {
        // It is in a directory of the agent's: there is nobody else to take it away.
        let _ = fs::remove_file(&self.path);
        let _ = fs::remove_dir(&self.folder);
    }
}

impl NotifySocket {
    /// Makes the folder, with the socket in it; anybody in the container may send there.
    pub(super) fn new(folder: PathBuf) -> io::Result<Self> {
        fs::create_dir(&folder)?;
        let path = folder.join(NAME);
        let made = Self::listen(&path);
        if made.is_err() {
            let _ = fs::remove_file(&path);
            let _ = fs::remove_dir(&folder);
        }
        let inbox = Arc::new(made?);
        let mut task = JoinSet::new();
        task.spawn(Arc::clone(&inbox).serve());
        Ok(Self { folder, path, inbox, _task: task })
    }

    fn listen(path: &Path) -> io::Result<Inbox> {
        let socket = UnixDatagram::bind(path)?;
        socket.set_nonblocking(true)?;
        fs::set_permissions(path, Permissions::from_mode(0o777))?;
        Ok(Inbox { socket: sys::watch_descriptor(socket.into(), Interest::READABLE)?, ready: watch::Sender::new(None) })
    }

    pub(super) fn folder(&self) -> &Path {
        &self.folder
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// Waits until the container tells that it is ready; the line by which it does.
    async fn ready(&self) -> String {
        let mut ready = self.inbox.ready.subscribe();
        let told = ready.wait_for(Option::is_some).await.ok().and_then(|line| line.clone());
        match told {
            Some(line) => line,
            // The sender is this very socket's: it lives.
            None => std::future::pending().await,
        }
    }

    /// The line, if what has been sent until now has it.
    fn ready_by_now(&self) -> Option<String> {
        self.inbox.take(MOST_AT_END);
        self.inbox.ready.borrow().clone()
    }
}

impl Inbox {
    /// Takes what comes, for ever.
    async fn serve(self: Arc<Self>) {
        loop {
            match self.socket.readable().await {
                Ok(mut guard) => {
                    if self.take(MOST_AT_ONCE) < MOST_AT_ONCE {
                        guard.clear_ready();
                    }
                }
                Err(error) => {
                    let what = "cannot wait for what a container tells of itself";
                    return log::write(Level::Error, &format!("{what}: {error}"));
                }
            }
            tokio::task::yield_now().await;
        }
    }

    /// Takes so many messages at most of those that have come; how many there were. What is too long is cut, and descriptors that
    /// come with a message are closed by the kernel.
    fn take(&self, most: usize) -> usize {
        let mut buffer = [0; MAX_LEN];
        for taken in 0..most {
            let Ok((_, length)) = recv(self.socket.get_ref(), &mut buffer[..], RecvFlags::empty()) else {
                return taken;
            };
            if let Some(line) = buffer.get(..length).and_then(ready_line) {
                self.ready.send_if_modified(|ready| {
                    let is_first = ready.is_none();
                    if is_first {
                        *ready = Some(line.to_owned());
                    }
                    is_first
                });
            }
        }
        most
    }
}

impl Engine {
    /// Waits until a container tells that it is ready: the line by which it does, or `None` once it has ended without.
    pub async fn wait_ready(&self, id: &str) -> Result<Option<String>, ReadyError> {
        let instance = self.find(id)?;
        let socket = instance.sockets.notify().ok_or_else(|| ReadyError::NoSocket(id.to_owned()))?;
        tokio::select! {
            biased;
            line = socket.ready() => Ok(Some(line)),
            // What it has sent last counts all the same.
            () = instance.init.ended() => Ok(socket.ready_by_now()),
        }
    }
}
