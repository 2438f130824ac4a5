// SPDX-License-Identifier: Apache-2.0
//! The network namespace of this process. It is the host's until a container's is entered, which then is what engines find
//! by the container's process id; what is started for the host has to be started from the host's.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::MetadataExt;
use std::sync::OnceLock;
use std::thread;

use bulkhead_netlink::{LinkHeader, Message, Socket};
use nix::sched::{CloneFlags, setns, unshare};

/// The namespace of a process' first thread.
const OWN: &str = "/proc/self/ns/net";

/// The host's network namespace, once this process has left it.
static HOST: OnceLock<File> = OnceLock::new();

/// The number of the host's network namespace.
pub(super) fn host_inode() -> io::Result<u64> {
    Ok(match HOST.get() {
        Some(host) => host.metadata()?.ino(),
        None => fs::metadata(OWN)?.ino(),
    })
}

/// Moves the calling thread into another network namespace. It is to be the first of its process.
pub(super) fn enter(namespace: &File) -> io::Result<()> {
    remember_host()?;
    Ok(setns(namespace, CloneFlags::CLONE_NEWNET)?)
}

/// Moves the calling thread into a new network namespace. It is to be the first of its process.
pub(super) fn enter_new() -> io::Result<File> {
    remember_host()?;
    unshare(CloneFlags::CLONE_NEWNET)?;
    turn_loopback_on(&mut Socket::open()?)?;
    File::open("/proc/thread-self/ns/net")
}

/// Turns the loopback interface of a namespace on, whose number is the same in each.
pub(super) fn turn_loopback_on(socket: &mut Socket) -> io::Result<()> {
    let up = libc::IFF_UP.cast_unsigned();
    let header = LinkHeader { index: 1, flags: up, change: up, ..Default::default() };
    socket.request(Message::new(libc::RTM_NEWLINK, 0, &header))
}

fn remember_host() -> io::Result<()> {
    if HOST.get().is_none() {
        // Another thread's is the same.
        let _ = HOST.set(File::open(OWN)?);
    }
    Ok(())
}

/// Does `work` in the host's network namespace, wherever this process is.
///
/// # Errors
///
/// That one cannot be entered any more.
pub(crate) fn on_host<T: Send>(work: impl FnOnce() -> T + Send) -> io::Result<T> {
    match HOST.get() {
        Some(host) => inside(host, work),
        None => Ok(work()),
    }
}

/// Does `work` in a network namespace, on a thread of its own: that one ends, so it need not find the way back.
pub(super) fn inside<T: Send>(namespace: &File, work: impl FnOnce() -> T + Send) -> io::Result<T> {
    thread::scope(|scope| {
        let thread = thread::Builder::new().name("netns".to_owned()).spawn_scoped(scope, || {
            setns(namespace, CloneFlags::CLONE_NEWNET)?;
            Ok(work())
        })?;
        thread.join().map_err(|_| io::Error::other("the thread in it failed"))?
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_that_has_not_left_the_host_is_there() {
        assert_eq!(host_inode().unwrap(), fs::metadata(OWN).unwrap().ino());
        assert_eq!(on_host(|| 7).unwrap(), 7);
    }
}
