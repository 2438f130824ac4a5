// SPDX-License-Identifier: Apache-2.0
//! A container's processes, where engines look for them: in /proc of the mount namespace of the process that stands for the
//! container. `podman top` enters it and reads what it finds there (psgo), as it would for processes of this host.
//!
//! It is a file system in user space (FUSE) with no more than that: for each process its folder with `stat`, `status` and
//! `cmdline`, asked of the guest when somebody looks; and, for the times in `stat`, `stat` and `self/auxv` (proc(5)).
//!
//! | module | what it knows |
//! | --- | --- |
//! | `node` | the numbers of files |
//! | `snapshot` | what there was to see at some time |

mod node;
mod snapshot;

use std::collections::HashMap;
use std::ffi::OsStr;
use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant, UNIX_EPOCH};

use bulkhead_protocol::agent::ReadProcessesResponse;
use fuser::{
    Config, Errno, FileAttr, FileHandle, FileType, Filesystem, FopenFlags, Generation, INodeNo, LockOwner, OpenFlags,
    ReplyAttr, ReplyData, ReplyDirectory, ReplyEmpty, ReplyEntry, ReplyOpen, Request, Session, SessionACL,
};
use nix::mount::{MsFlags, mount};
use tokio::sync::{mpsc, oneshot};
use tokio::task::JoinSet;

use self::node::Node;
use self::snapshot::Snapshot;
use super::agent::{Agent, AgentError};
use crate::logging;

/// Where it is.
pub(super) const PLACE: &str = "/proc";

const DEVICE: &str = "/dev/fuse";

/// How long what was seen is good for somebody who does not list the processes.
const FRESH: Duration = Duration::from_secs(1);

/// Most files that are open at once.
const MAX_OPEN: usize = 1024;

/// A connection to the kernel's FUSE, mounted nowhere yet.
#[derive(Debug)]
pub(super) struct ProcMount(File);

/// The file system where it is mounted. As long as it has no agent to ask, whoever looks gets an error, and is not kept waiting.
#[derive(Debug)]
pub(super) struct ProcPlace {
    asked: mpsc::Receiver<Asker>,
    is_served: Arc<AtomicBool>,
}

impl ProcMount {
    /// `None` where the host has none: then nothing is to be seen.
    pub(super) fn open() -> Option<Self> {
        let device = OpenOptions::new().read(true).write(true).open(DEVICE);
        told(device.map(Self), "open /dev/fuse")
    }

    /// Mounts it in this thread's mount namespace; `None` where that has no such place. It ends with the process, or with the
    /// last process that is in the mount namespace.
    pub(super) fn mount(self) -> Option<ProcPlace> {
        let (uid, gid) = (rustix::process::geteuid().as_raw(), rustix::process::getegid().as_raw());
        // Only this user sees it: without allow_other, the kernel refuses all others.
        let options = format!("fd={},rootmode=40555,user_id={uid},group_id={gid}", self.0.as_raw_fd());
        let flags = MsFlags::MS_RDONLY | MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
        let mounted = mount(Some("bulkhead"), PLACE, Some("fuse"), flags, Some(options.as_str()));
        told(mounted.map_err(io::Error::from), "mount the file system of its processes")?;
        let (ask, asked) = mpsc::channel::<Asker>(1);
        let is_served = Arc::new(AtomicBool::new(false));
        let place = ProcPlace { asked, is_served: Arc::clone(&is_served) };
        let view = ProcView { ask, is_served, last: Mutex::default(), open: Mutex::default(), next: AtomicU64::new(1) };
        let serve = move || {
            let session = Session::from_fd(view, self.0.into(), SessionACL::Owner, Config::default());
            told(session.and_then(Session::run), "show its processes");
        };
        told(std::thread::Builder::new().name("processes".to_owned()).spawn(serve), "start a thread").map(|_| place)
    }
}

impl ProcPlace {
    /// Shows the processes of the container that `agent` has, as one of `tasks`; to be called within an event loop.
    pub(super) fn serve(self, agent: Agent, tasks: &mut JoinSet<()>) {
        let Self { mut asked, is_served } = self;
        is_served.store(true, Ordering::Release);
        tasks.spawn(async move {
            while let Some(asker) = asked.recv().await {
                // Whoever has asked may be gone.
                let _ = asker.send(agent.process_files().await);
            }
        });
    }
}

/// The container does without it where it fails.
fn told<T>(result: io::Result<T>, doing: &str) -> Option<T> {
    result
        .inspect_err(|error| logging::debug(format_args!("cannot {doing} for engines that look for them: {error}")))
        .ok()
}

type Asker = oneshot::Sender<Result<ReadProcessesResponse, AgentError>>;

/// The file system.
struct ProcView {
    ask: mpsc::Sender<Asker>,
    /// Whether anybody answers.
    is_served: Arc<AtomicBool>,
    /// What was seen last.
    last: Mutex<Option<(Instant, Arc<Snapshot>)>>,
    /// Open files, which do not change.
    open: Mutex<HashMap<u64, Vec<u8>>>,
    next: AtomicU64,
}

/// Nothing panics while one is held.
fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl ProcView {
    /// What there is now.
    fn look(&self) -> Result<Arc<Snapshot>, Errno> {
        if !self.is_served.load(Ordering::Acquire) {
            return Err(Errno::EAGAIN);
        }
        let (asker, answer) = oneshot::channel();
        self.ask.blocking_send(asker).map_err(|_| Errno::EIO)?;
        let answer = answer.blocking_recv().map_err(|_| Errno::EIO)?;
        let answer = answer.map_err(|error| {
            logging::debug(format_args!("cannot show the container's processes: {error}"));
            Errno::EIO
        })?;
        let seen = Arc::new(Snapshot::new(answer));
        *locked(&self.last) = Some((Instant::now(), Arc::clone(&seen)));
        Ok(seen)
    }

    /// What there is, or was a moment ago.
    fn glance(&self) -> Result<Arc<Snapshot>, Errno> {
        let last = locked(&self.last).clone();
        match last {
            Some((at, seen)) if at.elapsed() < FRESH => Ok(seen),
            _ => self.look(),
        }
    }

    fn find(&self, parent: INodeNo, name: &OsStr) -> Result<FileAttr, Errno> {
        let parent = Node::from_number(parent.0).ok_or(Errno::ENOENT)?;
        let node = match (parent, name.to_str()) {
            // For all that is asked, it has some; they mean nothing here.
            (Node::Process(_), Some("ns")) => return Err(Errno::EACCES),
            (_, Some(name)) => parent.child(name).ok_or(Errno::ENOENT)?,
            (_, None) => return Err(Errno::ENOENT),
        };
        self.attributes(node)
    }

    fn attributes(&self, node: Node) -> Result<FileAttr, Errno> {
        if let Some(pid) = node.pid()
            && !self.glance()?.has(pid)
        {
            return Err(Errno::ENOENT);
        }
        let (kind, perm) = if node.is_folder() { (FileType::Directory, 0o555) } else { (FileType::RegularFile, 0o444) };
        Ok(FileAttr {
            ino: INodeNo(node.number()),
            // As files of /proc have it: they are read to their end.
            size: 0,
            blocks: 0,
            atime: UNIX_EPOCH,
            mtime: UNIX_EPOCH,
            ctime: UNIX_EPOCH,
            crtime: UNIX_EPOCH,
            kind,
            perm,
            nlink: 1,
            uid: 0,
            gid: 0,
            rdev: 0,
            blksize: 4096,
            flags: 0,
        })
    }

    fn open(&self, ino: INodeNo) -> Result<u64, Errno> {
        let node = Node::from_number(ino.0).ok_or(Errno::ENOENT)?;
        let content = self.glance()?.content(node).ok_or(Errno::ENOENT)?;
        let mut open = locked(&self.open);
        if open.len() >= MAX_OPEN {
            return Err(Errno::ENFILE);
        }
        let handle = self.next.fetch_add(1, Ordering::Relaxed);
        open.insert(handle, content);
        Ok(handle)
    }
}

impl Filesystem for ProcView {
    fn lookup(&self, _: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEntry) {
        match self.find(parent, name) {
            Ok(attributes) => reply.entry(&Duration::ZERO, &attributes, Generation(0)),
            Err(error) => reply.error(error),
        }
    }

    fn getattr(&self, _: &Request, ino: INodeNo, _: Option<FileHandle>, reply: ReplyAttr) {
        match Node::from_number(ino.0).ok_or(Errno::ENOENT).and_then(|node| self.attributes(node)) {
            Ok(attributes) => reply.attr(&Duration::ZERO, &attributes),
            Err(error) => reply.error(error),
        }
    }

    fn open(&self, _: &Request, ino: INodeNo, _: OpenFlags, reply: ReplyOpen) {
        match self.open(ino) {
            Ok(handle) => reply.opened(FileHandle(handle), FopenFlags::FOPEN_DIRECT_IO),
            Err(error) => reply.error(error),
        }
    }

    fn read(
        &self,
        _: &Request,
        _: INodeNo,
        handle: FileHandle,
        offset: u64,
        size: u32,
        _: OpenFlags,
        _: Option<LockOwner>,
        reply: ReplyData,
    ) {
        match locked(&self.open).get(&handle.0) {
            Some(content) => {
                let rest = usize::try_from(offset).ok().and_then(|offset| content.get(offset..)).unwrap_or_default();
                reply.data(&rest[..rest.len().min(size as usize)]);
            }
            None => reply.error(Errno::EBADF),
        }
    }

    fn release(
        &self,
        _: &Request,
        _: INodeNo,
        handle: FileHandle,
        _: OpenFlags,
        _: Option<LockOwner>,
        _: bool,
        reply: ReplyEmpty,
    ) {
        locked(&self.open).remove(&handle.0);
        reply.ok();
    }

    fn opendir(&self, _: &Request, ino: INodeNo, _: OpenFlags, reply: ReplyOpen) {
        // Who lists the processes wants those of now.
        match if ino == INodeNo::ROOT { self.look().map(drop) } else { Ok(()) } {
            Ok(()) => reply.opened(FileHandle(0), FopenFlags::empty()),
            Err(error) => reply.error(error),
        }
    }

    fn readdir(&self, _: &Request, ino: INodeNo, _: FileHandle, offset: u64, mut reply: ReplyDirectory) {
        let listed = Node::from_number(ino.0).ok_or(Errno::ENOENT).and_then(|folder| {
            let seen = self.glance()?;
            Ok([(".".to_owned(), folder), ("..".to_owned(), Node::Root)]
                .into_iter()
                .chain(seen.entries(folder))
                .collect())
        });
        let entries: Vec<(String, Node)> = match listed {
            Ok(entries) => entries,
            Err(error) => return reply.error(error),
        };
        let first = usize::try_from(offset).unwrap_or(usize::MAX);
        for (next, (name, node)) in (1..).zip(entries).skip(first) {
            let kind = if node.is_folder() { FileType::Directory } else { FileType::RegularFile };
            if reply.add(INodeNo(node.number()), next, kind, name) {
                break;
            }
        }
        reply.ok();
    }
}
