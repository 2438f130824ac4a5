// SPDX-License-Identifier: Apache-2.0
//! The container's namespaces on the host, in which its `createContainer` hooks are run: copies of the host's that end with it.
//! Those that its processes have are in the guest. But what hooks mount here on the way to its files is shared with the guest,
//! by a VMM that is started from here.

use std::fs::File;
use std::io;
use std::path::Path;
use std::sync::mpsc;
use std::thread;

use bulkhead_protocol::agent::{CreateContainerRequest, NamespaceKind};
use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, setns, unshare};
use nix::unistd::sethostname;

type Job = Box<dyn FnOnce() + Send>;

/// A thread that is in them, and does what it is asked for as long as this is there. A process that it has started may have tied
/// itself to the thread, as the VMM does.
#[derive(Debug)]
pub(crate) struct ContainerNamespaces(mpsc::Sender<Job>);

impl ContainerNamespaces {
    /// Makes a mount namespace, and one of host names and one of IPC if the container has them. The network is the one at
    /// `network`, or that of the calling thread.
    ///
    /// # Errors
    ///
    /// What the kernel says; there is none of them then.
    pub(crate) fn make(request: &CreateContainerRequest, network: Option<&Path>) -> io::Result<Self> {
        let network = network.map(File::open).transpose()?;
        let has = |kind: NamespaceKind| request.namespaces.iter().any(|namespace| namespace.kind == kind.into());
        let mut kinds = CloneFlags::CLONE_NEWNS;
        kinds.set(CloneFlags::CLONE_NEWIPC, has(NamespaceKind::IPC));
        kinds.set(CloneFlags::CLONE_NEWUTS, has(NamespaceKind::UTS));
        let host_name = request.hostname.clone();
        let (jobs, queue) = mpsc::channel::<Job>();
        let (told, made) = mpsc::channel();
        thread::Builder::new().name("container-hooks".to_owned()).spawn(move || {
            let entered = enter(kinds, &host_name, network.as_ref());
            let is_there = entered.is_ok();
            let _ = told.send(entered);
            if is_there {
                queue.into_iter().for_each(|job| job());
            }
        })?;
        made.recv().map_err(|_| ended())??;
        Ok(Self(jobs))
    }

    /// Does `work` there.
    ///
    /// # Errors
    ///
    /// Earlier work has panicked.
    pub(crate) fn run<T: Send + 'static>(&self, work: impl FnOnce() -> T + Send + 'static) -> io::Result<T> {
        let (told, done) = mpsc::channel();
        let job = move || {
            let _ = told.send(work());
        };
        self.0.send(Box::new(job)).map_err(|_| ended())?;
        done.recv().map_err(|_| ended())
    }
}

fn ended() -> io::Error {
    io::Error::other("the thread in the container's namespaces has ended")
}

fn enter(kinds: CloneFlags, host_name: &str, network: Option<&File>) -> io::Result<()> {
    if let Some(network) = network {
        setns(network, CloneFlags::CLONE_NEWNET)?;
    }
    unshare(kinds)?;
    // What the host mounts is seen here, and the other way round nothing.
    mount(None::<&str>, "/", None::<&str>, MsFlags::MS_REC | MsFlags::MS_SLAVE, None::<&str>)?;
    if kinds.contains(CloneFlags::CLONE_NEWUTS) && !host_name.is_empty() {
        sethostname(host_name)?;
    }
    Ok(())
}
