// SPDX-License-Identifier: Apache-2.0
//! A small world for one case: shared trees with a busybox root file system in them, an engine, and streams.

use std::os::unix::fs::symlink;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use bulkhead_agent::container::{ContainerSpec, CreateError, Engine, EngineConfig};
use bulkhead_agent::process::{FdStream, Reaper, StreamTable};
use bulkhead_agent::storage::ShareRoots;
use bulkhead_agent::trace::Trace;
use bulkhead_protocol::agent as wire;
use tokio::io::AsyncReadExt;

use crate::BUSYBOX;

/// The busybox commands that cases use.
const COMMANDS: [&str; 29] = [
    "cat", "chmod", "cut", "dd", "df", "echo", "env", "false", "grep", "head", "hostname", "id", "ip", "kill", "ls",
    "mkdir", "mount", "ps", "pwd", "readlink", "sh", "sleep", "stat", "stty", "touch", "true", "tty", "uname", "yes",
];

/// Every case ends in this time, or has failed.
pub(crate) const DEADLINE: Duration = Duration::from_secs(20);

pub(crate) const STDIN: u32 = 1;
pub(crate) const STDOUT: u32 = 2;
pub(crate) const STDERR: u32 = 3;

/// Keeps everything that the case mounts from the rest of the machine.
pub(crate) fn isolate() {
    use nix::sched::{CloneFlags, unshare};
    unshare(CloneFlags::CLONE_NEWNS).expect("root can unshare");
    rustix::mount::mount_change(
        "/",
        rustix::mount::MountPropagationFlags::PRIVATE | rustix::mount::MountPropagationFlags::REC,
    )
    .expect("root can change propagation");
}

/// What a container has printed and how it ended.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Output {
    pub(crate) code: u8,
    pub(crate) stdout: String,
    pub(crate) stderr: String,
}

pub(crate) struct World {
    pub(crate) engine: Arc<Engine>,
    pub(crate) streams: Arc<StreamTable>,
    pub(crate) folder: tempfile::TempDir,
    /// The containers' cgroups, on a machine where cgroup v2 can be had.
    cgroup: Option<PathBuf>,
}

impl Drop for World {
    fn drop(&mut self) {
        if let Some(cgroup) = &self.cgroup {
            if std::thread::panicking() {
                end_everything_in(cgroup);
            } else {
                std::fs::remove_dir(cgroup).expect("no cgroup is left");
            }
        }
    }
}

impl World {
    pub(crate) fn new() -> Self {
        // Device nodes and programs must work in it, which a nodev /tmp would not allow.
        let folder = tempfile::tempdir().expect("a folder for the case");
        rustix::mount::mount("tmpfs", folder.path(), "tmpfs", rustix::mount::MountFlags::empty(), Some(c"mode=755"))
            .expect("root can mount");
        for name in ["private", "shared", "mount-point", "devices", "sockets"] {
            std::fs::create_dir(folder.path().join(name)).expect("an empty folder");
        }
        make_rootfs(&folder.path().join("private/rootfs"));
        let cgroup = make_cgroup();
        let streams = Arc::new(StreamTable::default());
        let config = EngineConfig {
            shares: ShareRoots { private: folder.path().join("private"), shared: folder.path().join("shared") },
            cgroup_parent: cgroup.clone(),
            rootfs_mount_point: folder.path().join("mount-point"),
            device_scratch: folder.path().join("devices"),
            sysfs: "/sys".into(),
            sandbox_tmpfs: folder.path().join("tmpfs"),
            sockets: folder.path().join("sockets"),
        };
        // One for the whole process: each would take the children of all.
        static REAPER: OnceLock<Arc<Reaper>> = OnceLock::new();
        let reaper = Arc::clone(REAPER.get_or_init(|| Reaper::start().expect("a reaper starts")));
        let engine = Arc::new(Engine::new(config, reaper, Arc::clone(&streams)));
        Self { engine, streams, folder, cgroup }
    }

    pub(crate) fn has_cgroups(&self) -> bool {
        self.cgroup.is_some()
    }

    /// A file of the cgroup that holds the containers'; a path that is not there on a machine without cgroup v2.
    pub(crate) fn cgroup_file(&self, name: &str) -> PathBuf {
        self.cgroup.clone().unwrap_or_default().join(name)
    }

    /// A file of the container's root file system.
    pub(crate) fn rootfs(&self, path: &str) -> PathBuf {
        self.folder.path().join("private/rootfs").join(path)
    }

    /// Opens the host's end of a stream.
    pub(crate) fn open_stream(&self, id: u32) -> FdStream {
        let (ours, theirs) = UnixStream::pair().expect("a pair of sockets");
        let theirs = FdStream::new(theirs.into()).expect("a stream");
        self.streams.deliver(id, theirs).expect("room for a stream");
        FdStream::new(ours.into()).expect("a stream")
    }

    /// Makes and starts a container with its output streams; its input is /dev/null.
    pub(crate) async fn start(&self, mut request: wire::CreateContainerRequest) -> Result<[FdStream; 2], CreateError> {
        if let Some(process) = request.process.as_mut() {
            process.stdout_stream = STDOUT;
            process.stderr_stream = STDERR;
        }
        let streams = [self.open_stream(STDOUT), self.open_stream(STDERR)];
        let spec = ContainerSpec::from_wire(request)?;
        self.engine.create(&spec, true, &mut Trace::default()).await?;
        Ok(streams)
    }

    /// Runs a container to its end and deletes it.
    pub(crate) async fn run(&self, request: wire::CreateContainerRequest) -> Result<Output, CreateError> {
        let id = request.id.clone();
        let [mut stdout, mut stderr] = self.start(request).await?;
        let (mut out, mut err) = (String::new(), String::new());
        let exit = tokio::time::timeout(DEADLINE, async {
            let (out, err, exit) = tokio::join!(
                stdout.read_to_string(&mut out),
                stderr.read_to_string(&mut err),
                self.engine.wait(&id, "")
            );
            out.expect("stdout is text");
            err.expect("stderr is text");
            exit.expect("the container is known")
        })
        .await
        .expect("the container ends in time");
        self.engine.delete(&id, false).await.expect("the container can be deleted");
        Ok(Output { code: exit.code, stdout: out, stderr: err })
    }

    /// Runs a shell script in a container that `change` has adapted, and returns what it has printed.
    pub(crate) async fn script(&self, script: &str, change: impl FnOnce(&mut wire::CreateContainerRequest)) -> String {
        let mut request = request(&["sh", "-c", script]);
        change(&mut request);
        let output = self.run(request).await.unwrap_or_else(|error| panic!("{}", chain(&error)));
        assert_eq!((output.code, output.stderr.as_str()), (0, ""), "stdout: {}", output.stdout);
        output.stdout.trim_end().to_owned()
    }

    /// Runs a container that cannot be made, and returns why.
    pub(crate) async fn refused(&self, request: wire::CreateContainerRequest) -> CreateError {
        match self.run(request).await {
            Ok(output) => panic!("the container ran: {output:?}"),
            Err(error) => error,
        }
    }
}

/// The error with its causes.
pub(crate) fn chain(error: &CreateError) -> String {
    bulkhead_agent::rpc::error_chain(error)
}

fn make_rootfs(path: &Path) {
    for name in ["bin", "dev", "etc", "proc", "sys", "tmp", "home/user"] {
        std::fs::create_dir_all(path.join(name)).expect("a folder");
    }
    std::fs::copy(BUSYBOX, path.join("bin/busybox")).expect("busybox can be copied");
    for name in COMMANDS {
        symlink("busybox", path.join("bin").join(name)).expect("a link");
    }
    let passwd = "root:x:0:0:root:/root:/bin/sh\nuser:x:1000:1000::/home/user:/bin/sh\n";
    std::fs::write(path.join("etc/passwd"), passwd).expect("a file");
}

/// After a failed case: takes away its containers' processes and cgroups, as far as that goes.
fn end_everything_in(cgroup: &Path) {
    let _ = std::fs::write(cgroup.join("cgroup.kill"), "1");
    for _ in 0..100 {
        let children = std::fs::read_dir(cgroup).into_iter().flatten().flatten();
        children.for_each(|child| drop(std::fs::remove_dir(child.path())));
        if std::fs::remove_dir(cgroup).is_ok() {
            return;
        }
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// A cgroup for the case's containers, if this machine has version 2 where one can be made.
fn make_cgroup() -> Option<PathBuf> {
    ["/sys/fs/cgroup", "/sys/fs/cgroup/unified"].iter().find_map(|root| {
        let root = Path::new(root);
        if !root.join("cgroup.procs").exists() {
            return None;
        }
        let path = root.join(format!("bulkhead-agent-test-{}", std::process::id()));
        std::fs::create_dir(&path).ok()?;
        // What is not there to be enabled is not tested.
        for controller in ["memory", "pids", "cpu"] {
            let _ = std::fs::write(root.join("cgroup.subtree_control"), format!("+{controller}"));
            let _ = std::fs::write(path.join("cgroup.subtree_control"), format!("+{controller}"));
        }
        Some(path)
    })
}

/// A request for a container as most are: the usual namespaces and mounts, root without capabilities.
pub(crate) fn request(args: &[&str]) -> wire::CreateContainerRequest {
    use wire::NamespaceKind as Kind;
    let namespaces = [Kind::MOUNT, Kind::PID, Kind::IPC, Kind::UTS, Kind::CGROUP, Kind::NETWORK];
    wire::CreateContainerRequest {
        id: "case".to_owned(),
        rootfs: Some(place("rootfs", "")).into(),
        mounts: vec![
            mount("/proc", "proc", 0, ""),
            mount("/dev", "tmpfs", libc::MS_NOSUID, "mode=755,size=65536k"),
            mount("/dev/pts", "devpts", libc::MS_NOSUID | libc::MS_NOEXEC, "newinstance,ptmxmode=0666,mode=0620,gid=5"),
            mount("/sys", "sysfs", libc::MS_RDONLY | libc::MS_NOSUID | libc::MS_NOEXEC | libc::MS_NODEV, ""),
        ],
        namespaces: namespaces
            .into_iter()
            .map(|kind| wire::Namespace { kind: kind.into(), ..Default::default() })
            .collect(),
        process: Some(wire::Process {
            args: args.iter().map(|&argument| argument.to_owned()).collect(),
            env: vec!["PATH=/bin".to_owned()],
            cwd: "/".to_owned(),
            ..Default::default()
        })
        .into(),
        ..Default::default()
    }
}

/// The request's process.
pub(crate) fn process(request: &mut wire::CreateContainerRequest) -> &mut wire::Process {
    request.process.as_mut().expect("every request has a process")
}

pub(crate) fn place(tree: &str, path: &str) -> wire::SharePath {
    wire::SharePath {
        device: wire::ShareDevice::PRIVATE.into(),
        tree: tree.to_owned(),
        path: path.to_owned(),
        ..Default::default()
    }
}

pub(crate) fn mount(destination: &str, fs_type: &str, flags: u64, data: &str) -> wire::Mount {
    wire::Mount {
        destination: destination.to_owned(),
        fs_type: fs_type.to_owned(),
        source: fs_type.to_owned(),
        flags,
        data: data.to_owned(),
        ..Default::default()
    }
}

pub(crate) fn bind(destination: &str, tree: &str, path: &str, is_dir: bool, flags: u64) -> wire::Mount {
    wire::Mount {
        destination: destination.to_owned(),
        share: Some(place(tree, path)).into(),
        source_is_dir: is_dir,
        flags: flags | libc::MS_BIND,
        ..Default::default()
    }
}
