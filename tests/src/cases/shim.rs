// SPDX-License-Identifier: Apache-2.0
//! The program `containerd-shim-bulkhead-v2` as each version of containerd calls it.

use std::fs::{self, File};
use std::io::Read;
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use containerd_shim_protos::api::{CreateTaskRequest, DeleteRequest, ShutdownRequest, StartRequest, WaitRequest};
use containerd_shim_protos::ttrpc::context::with_duration;
use containerd_shim_protos::types::mount::Mount;
use containerd_shim_protos::{Client, TaskClient};
use nix::sys::signal::{Signal, kill};
use nix::sys::stat::Mode;
use nix::unistd::{Pid, mkfifo};
use protobuf::Message;

use super::{Case, case};
use crate::bundle::Bundle;
use crate::env::Env;
use crate::failure::{Context as _, Result, ensure, ensure_eq, fail, skip};
use crate::messages::shim::{Any, BootstrapParams, BootstrapResult, DeleteResponse, RuntimeInfo};
use crate::output::Output;
use crate::processes::{self, Looks, Process};
use crate::run::Run;

pub(super) const CASES: &[Case] = &[
    case!(start_and_delete),
    case!(information),
    case!(refused),
    case!(root_in_a_file),
    case!(root_of_layers),
    case!(log),
];

/// `log_level` of the bootstrap parameters.
const DEBUG: i32 = -4;

/// A shim's program, and a bundle to call it in.
pub(super) struct Shim<'a> {
    env: &'a Env,
    program: PathBuf,
    pub(super) bundle: PathBuf,
    pub(super) id: String,
    debug: bool,
    /// How long its machine's boot may take, and a container's creation.
    pub(super) boot_timeout_ms: Option<u32>,
}

impl<'a> Shim<'a> {
    pub(super) fn new(env: &'a Env) -> Result<Self> {
        let shim = Self::bare(env)?;
        fs::write(shim.bundle.join("config.json"), r#"{"ociVersion": "1.0.2"}"#)?;
        Ok(shim)
    }

    /// The same with a bundle that has no configuration.
    pub(super) fn bare(env: &'a Env) -> Result<Self> {
        env.only_bulkhead()?;
        let program = env.runtime.with_file_name("containerd-shim-bulkhead-v2");
        let id = env.id();
        let bundle = env.folder(&id)?;
        Ok(Self { env, program, bundle, id, debug: false, boot_timeout_ms: None })
    }

    fn call(&self, words: &[&str]) -> Run<'_> {
        let run = self.env.tool(&self.program, words).variable("BULKHEAD_ROOT", self.root()).in_folder(&self.bundle);
        match self.boot_timeout_ms {
            Some(limit) => run.variable("BULKHEAD_BOOT_TIMEOUT_MS", limit.to_string()),
            None => run,
        }
    }

    /// Where the state of its containers is.
    pub(super) fn root(&self) -> PathBuf {
        self.env.work.join("shims")
    }

    /// The process of the server that was started.
    pub(super) fn pid(&self) -> Result<i32> {
        let record = fs::read_to_string(self.bundle.join("shim.pid"))?;
        Ok(record.split_whitespace().next().unwrap_or_default().parse()?)
    }

    /// Waits until the server has ended.
    pub(super) fn ends(pid: i32) -> Result {
        let end = Instant::now() + Duration::from_secs(10);
        let mut looks = Looks::begin();
        loop {
            processes::reap_orphans(&[]);
            if Process::of(pid).is_none_or(|process| process.state == 'Z') {
                return Ok(());
            }
            ensure!(Instant::now() < end, "the server {pid} goes on");
            looks.pause();
        }
    }

    fn flags(&self) -> [&str; 8] {
        ["-namespace", "e2e", "-address", "/c.sock", "-publish-binary", "/bin/false", "-id", &self.id]
    }

    /// `start`, with those bytes on stdin.
    pub(super) fn start(&self, stdin: Vec<u8>) -> Result<Output> {
        let verb: &[&str] = if self.debug { &["-debug", "start"] } else { &["start"] };
        let output = self.call(&[self.flags().as_slice(), verb].concat()).input(stdin).output()?;
        output.expect_code(0)?;
        output.expect_silent_stderr()?;
        Ok(output)
    }

    /// Starts it, unless it is there; its Task service, by a connection of its own.
    pub(super) fn tasks(&self) -> Result<TaskClient> {
        Ok(TaskClient::new(self.connect()?))
    }

    /// The same for any of its services.
    pub(super) fn connect(&self) -> Result<Client> {
        let address = self.start(Vec::new())?.stdout();
        Client::connect(&address).context(|| format!("connecting to {address}"))
    }

    /// `delete` of a server that is gone.
    pub(super) fn remove_what_is_left(&self) -> Result {
        let bundle = self.bundle.display().to_string();
        let output = self.call(&[self.flags().as_slice(), &["-bundle", &bundle, "delete"]].concat()).output()?;
        output.expect_code(0)
    }

    /// `delete` of a server at that address, after which nothing is left.
    fn delete(&self, address: &str) -> Result {
        let Some(socket) = address.strip_prefix("unix://") else { fail!("{address:?} is no address") };
        UnixStream::connect(socket)?;
        let pid = self.pid()?;
        let bundle = self.bundle.display().to_string();
        let output = self.call(&[self.flags().as_slice(), &["-bundle", &bundle, "delete"]].concat()).output()?;
        output.expect_code(0)?;
        let answer = DeleteResponse::parse_from_bytes(&output.stdout)?;
        ensure_eq!((answer.pid, answer.exit_status), (pid.unsigned_abs(), 137), "what was deleted");
        Self::ends(pid)?;
        ensure!(!Path::new(socket).exists(), "{socket} is left");
        Ok(())
    }
}

fn start_and_delete(env: &Env) -> Result {
    let shim = Shim::new(env)?;
    // containerd 1.6 to 2.2: nothing on stdin, or the runtime's options.
    let options = Any { type_url: "runtimeoptions.v1.Options".to_owned(), value: vec![0xff; 300], ..Any::default() };
    let plain = shim.start(Vec::new())?.stdout();
    ensure!(plain.starts_with("unix:///run/containerd/s/") && plain.lines().count() == 1, "the address is {plain:?}");
    ensure_eq!(shim.start(options.write_to_bytes()?)?.stdout(), plain, "the address of the server that is there");
    ensure_eq!(fs::read_to_string(shim.bundle.join("address"))?, plain, "the address in the bundle");
    shim.delete(&plain)?;

    // From 2.3 on.
    // The path of a socket has to be short.
    let folder = tempfile::tempdir_in("/run")?;
    let sockets = folder.path();
    let params = BootstrapParams {
        instance_id: shim.id.clone(),
        namespace: "e2e".to_owned(),
        log_level: DEBUG,
        containerd_ttrpc_address: "unix:///c.sock.ttrpc".to_owned(),
        socket_dir: Some(sockets.display().to_string()),
        ..BootstrapParams::default()
    };
    let answer = BootstrapResult::parse_from_bytes(&shim.start(params.write_to_bytes()?)?.stdout)?;
    ensure_eq!((answer.version, answer.protocol.as_str()), (3, "ttrpc"), "the answer");
    ensure!(answer.address.starts_with(&format!("unix://{}/", sockets.display())), "the address is {}", answer.address);
    shim.delete(&answer.address)
}

fn information(env: &Env) -> Result {
    let shim = Shim::new(env)?;

    let version = shim.call(&["-v"]).output()?;
    version.expect_in_stdout(&["containerd-shim-bulkhead-v2:\n", "Version:"])?;
    let output = shim.call(&["-info"]).output()?;
    output.expect_code(0)?;
    let info = RuntimeInfo::parse_from_bytes(&output.stdout)?;
    ensure_eq!(info.name, "io.containerd.bulkhead.v2", "the name");
    ensure!(version.stdout().contains(&info.version.version), "the version: {info:?}");
    let features: serde_json::Value = serde_json::from_slice(&info.features.value)?;
    ensure!(features["ociVersionMax"].is_string(), "the features: {features}");
    Ok(())
}

fn refused(env: &Env) -> Result {
    let shim = Shim::new(env)?;
    for (words, named) in [
        (&["-namespace", "e2e", "-id", "../up", "start"] as &[&str], "-id is \"../up\""),
        (&["-namespace", "e2e", "start"], "the flag -id is missing"),
        (&["-namespace", "e2e", "-id", "c", "serve"], "\"serve\" is not a verb"),
    ] {
        shim.call(words).output()?.expect_error(&[named])?;
    }
    let relative = BootstrapParams {
        instance_id: shim.id.clone(),
        namespace: "e2e".to_owned(),
        socket_dir: Some("sockets".to_owned()),
        ..BootstrapParams::default()
    };
    let words = [shim.flags().as_slice(), &["start"]].concat();
    shim.call(&words).input(relative.write_to_bytes()?).output()?.expect_error(&["socket_dir", "\"sockets\""])
}

/// What the snapshotters `blockfile` and `erofs` of containerd 2 hand over: a file with a file system.
fn root_in_a_file(env: &Env) -> Result {
    let shim = Shim::new(env)?;
    let mut bundle = Bundle::busybox(env)?;
    let (image, output) = (env.work.join("root.ext4"), env.work.join("output"));
    let [image_path, rootfs] = [&image, &bundle.rootfs()].map(|path| path.display().to_string());
    env.tool(Path::new("mkfs.ext4"), ["-q", "-d", &rootfs, &image_path, "32M"]).output()?.expect_code(0)?;
    fs::remove_dir_all(bundle.rootfs())?;
    bundle.sh("echo from the container >/written; echo it ran").write()?;
    env.tool(Path::new("modprobe"), ["loop"]).output()?.expect_code(0)?;
    let tasks = shim.tasks()?;
    let limit = || with_duration(Duration::from_secs(120));
    let options = vec!["loop".to_owned()];
    let root = Mount { type_: "ext4".to_owned(), source: image_path.clone(), options, ..Mount::default() };
    let request = CreateTaskRequest {
        id: shim.id.clone(),
        bundle: bundle.folder.display().to_string(),
        rootfs: vec![root],
        stdout: format!("file://{}", output.display()),
        ..CreateTaskRequest::default()
    };
    let absent = Mount { source: "/no/such/image".to_owned(), ..request.rootfs[0].clone() };
    let refused = tasks.create(limit(), &CreateTaskRequest { rootfs: vec![absent], ..request.clone() });
    let why = refused.map(|_| String::new()).unwrap_or_else(|error| error.to_string());
    ensure!(why.contains("cannot make a block device of /no/such/image"), "an absent image is refused by {why:?}");

    tasks.create(limit(), &request)?;
    ensure_eq!(loop_devices(&image)?, 1, "loop devices while it is there");
    tasks.start(limit(), &StartRequest { id: shim.id.clone(), ..StartRequest::default() })?;
    let ended = tasks.wait(limit(), &WaitRequest { id: shim.id.clone(), ..WaitRequest::default() })?;
    ensure_eq!(ended.exit_status, 0, "the exit status");
    ensure_eq!(fs::read_to_string(&output)?, "it ran\n", "its output");
    tasks.delete(limit(), &DeleteRequest { id: shim.id.clone(), ..DeleteRequest::default() })?;
    ensure_eq!(loop_devices(&image)?, 0, "loop devices when it is gone");
    let written = env.tool(Path::new("debugfs"), ["-R", "cat /written", &image_path]).output()?.stdout();
    ensure_eq!(written, "from the container\n", "what the image has");

    tasks.shutdown(limit(), &ShutdownRequest { id: shim.id.clone(), ..ShutdownRequest::default() })?;
    Shim::ends(shim.pid()?)?;

    // One that is killed leaves none.
    let killed = Shim::new(env)?;
    killed.tasks()?.create(limit(), &CreateTaskRequest { id: killed.id.clone(), ..request })?;
    ensure_eq!(loop_devices(&image)?, 1, "loop devices of the second one");
    kill(Pid::from_raw(killed.pid()?), Signal::SIGKILL)?;
    Shim::ends(killed.pid()?)?;
    let end = Instant::now() + Duration::from_secs(10);
    while loop_devices(&image)? > 0 {
        ensure!(Instant::now() < end, "a loop device is left");
        thread::sleep(Duration::from_millis(20));
    }
    let bundle = killed.bundle.display().to_string();
    killed.call(&[killed.flags().as_slice(), &["-bundle", &bundle, "delete"]].concat()).output()?.expect_code(0)
}

/// What the snapshotter `erofs` of containerd 2.1 hands over: for a view of one layer its file, and for a container an overlay over
/// layers that containerd has mounted, as the layers' files are read-only.
fn root_of_layers(env: &Env) -> Result {
    if env.tool(Path::new("modprobe"), ["erofs"]).output()?.status.code() != Some(0) {
        skip!("this host's kernel has no erofs");
    }
    env.tool(Path::new("modprobe"), ["loop"]).output()?.expect_code(0)?;
    // The second one runs before its layers are mounted.
    let shims = [Shim::new(env)?, Shim::new(env)?];
    let calls = [shims[0].tasks()?, shims[1].tasks()?];
    let bundle = Bundle::busybox(env)?;
    let image = env.work.join("layer.erofs");
    bundle.add_file("etc/layer", "of the layer\n", 0o640)?;
    let [image_path, rootfs] = [&image, &bundle.rootfs()].map(|path| path.display().to_string());
    env.tool(Path::new("mkfs.erofs"), ["--quiet", &image_path, &rootfs]).output()?.expect_code(0)?;
    fs::remove_dir_all(bundle.rootfs())?;
    let limit = || with_duration(Duration::from_secs(120));
    let run = |number: usize, root: Mount, script: &str| -> Result<(u32, String)> {
        let (shim, tasks) = (&shims[number], &calls[number]);
        let output = env.work.join(format!("output{number}"));
        let mut bundle = Bundle { folder: bundle.folder.clone(), spec: bundle.spec.clone() };
        bundle.sh(script).write()?;
        let request = CreateTaskRequest {
            id: shim.id.clone(),
            bundle: bundle.folder.display().to_string(),
            rootfs: vec![root],
            stdout: format!("file://{}", output.display()),
            ..CreateTaskRequest::default()
        };
        tasks.create(limit(), &request)?;
        tasks.start(limit(), &StartRequest { id: shim.id.clone(), ..StartRequest::default() })?;
        let ended = tasks.wait(limit(), &WaitRequest { id: shim.id.clone(), ..WaitRequest::default() })?;
        tasks.delete(limit(), &DeleteRequest { id: shim.id.clone(), ..DeleteRequest::default() })?;
        let pid = shim.pid()?;
        tasks.shutdown(limit(), &ShutdownRequest { id: shim.id.clone(), ..ShutdownRequest::default() })?;
        Shim::ends(pid)?;
        Ok((ended.exit_status, fs::read_to_string(&output)?))
    };
    let options = |options: &[&str]| options.iter().map(|option| (*option).to_owned()).collect::<Vec<_>>();

    let root = Mount {
        type_: "erofs".into(),
        source: image_path.clone(),
        options: options(&["ro", "loop"]),
        ..Mount::default()
    };
    let script = "cat /etc/layer; stat -c %a /etc/layer; touch /new 2>/dev/null || echo read-only";
    ensure_eq!(run(0, root, script)?, (0, "of the layer\n640\nread-only\n".to_owned()), "a view");
    ensure_eq!(loop_devices(&image)?, 0, "loop devices when it is gone");

    // Below an upper folder that is no overlay's.
    let snapshots = env.folder("snapshots")?;
    env.mount("tmpfs", "tmpfs", &snapshots, "size=16m")?;
    let [lower, upper, work] = ["lower", "upper", "work"].map(|name| snapshots.join(name));
    [&lower, &upper, &work].into_iter().try_for_each(fs::create_dir)?;
    let words = ["-t", "erofs", "-o", "ro,loop", &image_path, &lower.display().to_string()];
    env.tool(Path::new("mount"), words).output()?.expect_code(0)?;
    let [lower_option, upper_option, work_option] = [("lowerdir", &lower), ("upperdir", &upper), ("workdir", &work)]
        .map(|(name, path)| format!("{name}={}", path.display()));
    let root = Mount {
        type_: "overlay".into(),
        source: "overlay".into(),
        options: options(&[&work_option, &upper_option, &lower_option]),
        ..Mount::default()
    };
    let script = "cat /etc/layer; echo changed > /etc/layer; cat /etc/layer; rm -r /etc/group";
    let ended = run(1, root, script);
    env.tool(Path::new("umount"), [&lower]).output()?.expect_code(0)?;

    ensure_eq!(ended?, (0, "of the layer\nchanged\n".to_owned()), "a container");
    ensure_eq!(fs::read_to_string(upper.join("etc/layer"))?, "changed\n", "what it has changed");
    Ok(())
}

/// What containerd reads at the named pipe in the bundle, and with `-debug`.
fn log(env: &Env) -> Result {
    for debug in [false, true] {
        let shim = Shim { debug, ..Shim::new(env)? };
        let pipe = shim.bundle.join("log");
        mkfifo(&pipe, Mode::S_IRWXU)?;
        let mut reader = File::options().read(true).custom_flags(libc::O_NONBLOCK).open(&pipe)?;
        let (tasks, mut bundle) = (shim.tasks()?, Bundle::busybox(env)?);
        bundle.sh("sleep 1000").write()?;
        let (id, limit) = (shim.id.clone(), || with_duration(Duration::from_secs(120)));
        let folder = bundle.folder.display().to_string();
        tasks.create(limit(), &CreateTaskRequest { id: id.clone(), bundle: folder, ..CreateTaskRequest::default() })?;

        let pid = shim.pid()?;
        for process in processes::descendants(pid) {
            kill(Pid::from_raw(process.pid), Signal::SIGKILL)?;
        }
        let ended = tasks.wait(limit(), &WaitRequest { id: id.clone(), ..WaitRequest::default() })?;
        ensure_eq!(ended.exit_status, 137, "the exit status of what was lost");
        tasks.delete(limit(), &DeleteRequest { id: id.clone(), ..DeleteRequest::default() })?;
        tasks.shutdown(limit(), &ShutdownRequest { id, ..ShutdownRequest::default() })?;
        Shim::ends(pid)?;

        let mut text = String::new();
        reader.read_to_string(&mut text)?;
        ensure!(text.contains("the sandbox's VMM was killed by signal 9"), "the log: {text:?}");
        ensure_eq!(
            text.contains("agent ") && text.contains(" on Linux "),
            debug,
            "whether details are logged: {text:?}"
        );
    }
    Ok(())
}

/// How many block devices a file is.
fn loop_devices(file: &Path) -> Result<usize> {
    let mut count = 0;
    for device in fs::read_dir("/sys/block")? {
        let backing = fs::read_to_string(device?.path().join("loop/backing_file")).unwrap_or_default();
        count += usize::from(Path::new(backing.trim_end()) == file);
    }
    Ok(count)
}
