// SPDX-License-Identifier: Apache-2.0
//! The Sandbox service of containerd 2: its calls, made here, and CRI with `sandboxer = "shim"`.

use std::fs;
use std::path::Path;
use std::thread;
use std::time::Duration;

use containerd_shim_protos::api::{CreateTaskRequest, DeleteRequest, ShutdownRequest, StartRequest, WaitRequest};
use containerd_shim_protos::cgroups_v2::metrics::Metrics;
use containerd_shim_protos::sandbox_api::{
    CreateSandboxRequest, PingRequest, PlatformRequest, SandboxMetricsRequest, SandboxStatusRequest,
    SandboxStatusResponse, ShutdownSandboxRequest, StartSandboxRequest, StopSandboxRequest, WaitSandboxRequest,
};
use containerd_shim_protos::sandbox_sync::SandboxClient;
use containerd_shim_protos::ttrpc::context::{Context, with_duration};
use containerd_shim_protos::{Client, TaskClient};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use protobuf::well_known_types::any::Any;
use protobuf::{Message, MessageField};
use serde_json::json;

use super::shim::Shim;
use super::{Case, case};
use crate::bundle::Bundle;
use crate::cri::api::{DNSConfig, LinuxContainerResources, LinuxPodSandboxConfig, PodSandboxConfig};
use crate::engines::Kubelet;
use crate::env::Env;
use crate::failure::{Context as _, Result, ensure, ensure_eq, fail};
use crate::processes;

pub(super) const CASES: &[Case] = &[case!(calls), case!(lost), case!(killed), case!(refused), case!(pods)];

/// A pod's sandbox, by its shim.
struct Sandbox<'a> {
    shim: Shim<'a>,
    calls: SandboxClient,
    tasks: TaskClient,
}

/// How long a call may take.
fn limit() -> Context {
    with_duration(Duration::from_secs(120))
}

impl<'a> Sandbox<'a> {
    /// A server that has no sandbox yet.
    fn new(env: &'a Env) -> Result<Self> {
        let shim = Shim::bare(env)?;
        let address = shim.start(Vec::new())?.stdout();
        let connect = || Client::connect(&address).context(|| format!("connecting to {address}"));
        let (calls, tasks) = (SandboxClient::new(connect()?), TaskClient::new(connect()?));
        Ok(Self { shim, calls, tasks })
    }

    fn create_with(&self, type_url: &str, config: &PodSandboxConfig) -> Result {
        let options = Any { type_url: type_url.to_owned(), value: config.write_to_bytes()?, ..Any::default() };
        let request = CreateSandboxRequest {
            sandbox_id: self.shim.id.clone(),
            bundle_path: self.shim.bundle.display().to_string(),
            options: MessageField::some(options),
            ..CreateSandboxRequest::default()
        };
        self.calls.create_sandbox(limit(), &request)?;
        Ok(())
    }

    /// Makes and starts it.
    fn run(&self) -> Result {
        let dns = DNSConfig { servers: vec!["10.1.2.3".to_owned()], ..DNSConfig::default() };
        // With limits it has a cgroup of its own on the host.
        let resources = MessageField::some(LinuxContainerResources { cpu_shares: 512, ..Default::default() });
        let linux = LinuxPodSandboxConfig { resources, ..LinuxPodSandboxConfig::default() };
        let config = PodSandboxConfig {
            hostname: "mine".to_owned(),
            dns_config: MessageField::some(dns),
            linux: MessageField::some(linux),
            ..PodSandboxConfig::default()
        };
        self.create_with("runtime.v1.PodSandboxConfig", &config)?;
        ensure_eq!(self.status()?.state, "SANDBOX_NOTREADY", "the state before the start");
        let request = StartSandboxRequest { sandbox_id: self.shim.id.clone(), ..StartSandboxRequest::default() };
        let started = self.calls.start_sandbox(limit(), &request)?;
        ensure_eq!(started.pid, self.shim.pid()?.unsigned_abs(), "its process");
        ensure!(started.created_at.seconds > 0, "it was never created");
        Ok(())
    }

    fn status(&self) -> Result<SandboxStatusResponse> {
        let request = SandboxStatusRequest { sandbox_id: self.shim.id.clone(), ..SandboxStatusRequest::default() };
        Ok(self.calls.sandbox_status(limit(), &request)?)
    }

    /// Why a ping fails, if it does.
    fn ping(&self) -> Option<String> {
        let request = PingRequest { sandbox_id: self.shim.id.clone(), ..PingRequest::default() };
        self.calls.ping_sandbox(limit(), &request).err().map(|error| error.to_string())
    }

    /// Waits for its end; the exit status.
    fn wait(&self) -> Result<u32> {
        let request = WaitSandboxRequest { sandbox_id: self.shim.id.clone(), ..WaitSandboxRequest::default() };
        let ended = self.calls.wait_sandbox(limit(), &request)?;
        ensure!(ended.exited_at.seconds > 0, "it has ended at no time");
        Ok(ended.exit_status)
    }

    /// Ends the server, after which nothing is left.
    fn shut_down(self) -> Result {
        let pid = self.shim.pid()?;
        let request = ShutdownSandboxRequest { sandbox_id: self.shim.id.clone(), ..ShutdownSandboxRequest::default() };
        self.calls.shutdown_sandbox(limit(), &request)?;
        Shim::ends(pid)?;
        let left: Vec<_> = fs::read_dir(self.shim.root().join("e2e")).into_iter().flatten().flatten().collect();
        ensure!(left.is_empty(), "state that is left: {left:?}");
        let address = fs::read_to_string(self.shim.bundle.join("address"))?;
        ensure!(!Path::new(address.trim_start_matches("unix://")).exists(), "{address} is left");
        Ok(())
    }

    /// Makes a bundle one of a container of the sandbox that runs a script.
    fn prepare(&self, bundle: &mut Bundle, script: &str) -> Result {
        let cri =
            json!({ "io.kubernetes.cri.container-type": "container", "io.kubernetes.cri.sandbox-id": self.shim.id });
        let own = json!([{"type": "pid"}, {"type": "mount"}]);
        bundle.sh(script).set("/annotations", cri).set("/linux/namespaces", own).set("/hostname", json!("")).write()
    }

    /// Runs a script in a container of its own to its end; its exit status, and what it has written.
    fn script(&self, bundle: &mut Bundle, id: &str, script: &str) -> Result<(u32, String)> {
        self.prepare(bundle, script)?;
        let output = bundle.folder.join(id);
        let request = CreateTaskRequest {
            id: id.to_owned(),
            bundle: bundle.folder.display().to_string(),
            stdout: format!("file://{}", output.display()),
            ..CreateTaskRequest::default()
        };
        self.tasks.create(limit(), &request)?;
        self.tasks.start(limit(), &StartRequest { id: id.to_owned(), ..StartRequest::default() })?;
        let ended = self.tasks.wait(limit(), &WaitRequest { id: id.to_owned(), ..WaitRequest::default() })?;
        self.tasks.delete(limit(), &DeleteRequest { id: id.to_owned(), ..DeleteRequest::default() })?;
        // What containerd says after each container; the sandbox goes on.
        self.tasks.shutdown(limit(), &ShutdownRequest { id: id.to_owned(), ..ShutdownRequest::default() })?;
        Ok((ended.exit_status, fs::read_to_string(output)?))
    }
}

fn calls(env: &Env) -> Result {
    let sandbox = Sandbox::new(env)?;
    let id = sandbox.shim.id.clone();
    ensure!(sandbox.ping().is_some_and(|why| why.contains("does not exist")), "a sandbox that was not made answers");
    sandbox.run()?;

    let status = sandbox.status()?;
    ensure_eq!((status.state.as_str(), status.sandbox_id.as_str()), ("SANDBOX_READY", id.as_str()), "the state");
    ensure_eq!(sandbox.ping(), None, "the ping");
    let request = PlatformRequest { sandbox_id: id.clone(), ..PlatformRequest::default() };
    let platform = sandbox.calls.platform(limit(), &request)?.platform.unwrap_or_default();
    ensure_eq!((platform.os.as_str(), platform.architecture.as_str()), ("linux", "amd64"), "the platform");

    let request = SandboxMetricsRequest { sandbox_id: id.clone(), ..SandboxMetricsRequest::default() };
    let metric = sandbox.calls.sandbox_metrics(limit(), &request)?.metrics.unwrap_or_default();
    ensure_eq!((metric.id.as_str(), metric.timestamp.seconds > 0), (id.as_str(), true), "whose metrics, and when");
    let metrics = metric.data.unwrap_or_default();
    ensure_eq!(metrics.type_url, "io.containerd.cgroups.v2.Metrics", "the metrics' type");
    let used = Metrics::parse_from_bytes(&metrics.value)?.memory.usage;
    ensure!(used > 1 << 20, "a machine uses {used} bytes of memory");

    let mut bundle = Bundle::busybox(env)?;
    let script = "hostname; cat /etc/hostname /etc/resolv.conf; echo kept > /dev/shm/file; exit 7";
    let ended = sandbox.script(&mut bundle, &env.id(), script)?;
    ensure_eq!(ended, (7, "mine\nmine\nnameserver 10.1.2.3\n".to_owned()), "what the first container has written");
    let ended = sandbox.script(&mut bundle, &env.id(), "cat /dev/shm/file")?;
    ensure_eq!(ended, (0, "kept\n".to_owned()), "what the second finds in shared memory");

    let stop = StopSandboxRequest { sandbox_id: id, timeout_secs: 10, ..StopSandboxRequest::default() };
    sandbox.calls.stop_sandbox(limit(), &stop)?;
    ensure_eq!(sandbox.wait()?, 0, "the exit status");
    let status = sandbox.status()?;
    ensure!(status.state == "SANDBOX_NOTREADY" && status.exited_at.seconds > 0, "after the end: {status:?}");
    ensure!(sandbox.ping().is_some(), "a sandbox that has ended answers");
    sandbox.calls.stop_sandbox(limit(), &stop)?;
    sandbox.shut_down()
}

fn lost(env: &Env) -> Result {
    let sandbox = Sandbox::new(env)?;
    sandbox.run()?;

    let Some(vmm) = processes::descendants(sandbox.shim.pid()?).first().map(|process| process.pid) else {
        fail!("the sandbox has no machine");
    };
    kill(Pid::from_raw(vmm), Signal::SIGKILL)?;

    ensure_eq!(sandbox.wait()?, 137, "the exit status");
    ensure_eq!(sandbox.status()?.state, "SANDBOX_NOTREADY", "the state");
    sandbox.shut_down()
}

/// The server is killed while a container runs and another one is being made; containerd calls `delete` then.
fn killed(env: &Env) -> Result {
    let sandbox = Sandbox::new(env)?;
    sandbox.run()?;
    let address = fs::read_to_string(sandbox.shim.bundle.join("address"))?;
    let bundles = [env.id(), env.id()].map(|id| (Bundle::busybox(env), id));
    let mut requests = Vec::new();
    for (bundle, id) in bundles {
        let mut bundle = bundle?;
        sandbox.prepare(&mut bundle, "sleep 1000")?;
        let bundle = bundle.folder.display().to_string();
        requests.push(CreateTaskRequest { id, bundle, ..CreateTaskRequest::default() });
    }
    let (running, creating) = (&requests[0], &requests[1]);
    sandbox.tasks.create(limit(), running)?;
    sandbox.tasks.start(limit(), &StartRequest { id: running.id.clone(), ..StartRequest::default() })?;
    let pid = sandbox.shim.pid()?;
    let processes = processes::descendants(pid);

    let created = thread::scope(|scope| {
        let creation = scope.spawn(|| sandbox.tasks.create(limit(), creating).map(drop));
        let state = sandbox.shim.root().join("e2e").join(&creating.id).join("state.json");
        while !state.exists() && !creation.is_finished() {
            thread::sleep(Duration::from_millis(1));
        }
        let killed = kill(Pid::from_raw(pid), Signal::SIGKILL);
        killed.map(|()| creation.join())
    })?;

    ensure!(matches!(created, Ok(Err(_)) | Ok(Ok(()))), "the call has panicked");
    Shim::ends(pid)?;
    sandbox.shim.remove_what_is_left()?;
    let left: Vec<_> = fs::read_dir(sandbox.shim.root().join("e2e")).into_iter().flatten().flatten().collect();
    ensure!(left.is_empty(), "state that is left: {left:?}");
    ensure!(!Path::new(address.trim_start_matches("unix://")).exists(), "{address} is left");
    for process in processes {
        Shim::ends(process.pid)?;
    }
    Ok(())
}

fn refused(env: &Env) -> Result {
    let sandbox = Sandbox::new(env)?;

    let refused = sandbox.create_with("other.Options", &PodSandboxConfig::default()).err();
    ensure!(format!("{refused:?}").contains("other.Options"), "what is no pod's configuration: {refused:?}");
    ensure!(sandbox.status().is_err(), "a sandbox that was refused has a state");
    let request = SandboxMetricsRequest { sandbox_id: "other".to_owned(), ..SandboxMetricsRequest::default() };
    ensure!(sandbox.calls.sandbox_metrics(limit(), &request).is_err(), "another sandbox has metrics");
    sandbox.shut_down()
}

/// CRI, whose pods are made by these calls.
fn pods(env: &Env) -> Result {
    env.only_bulkhead()?;
    let kubelet = Kubelet::with_shim_sandboxes(env)?;
    let pod = kubelet.pod("shim")?;
    let lasting = pod.script("lasting", "trap 'exit 3' TERM; while :; do sleep 0.1; done")?;

    let files = pod.output(&lasting, "hostname; cat /etc/hostname /etc/resolv.conf")?;
    ensure!(files.starts_with("shim\nshim\n") && files.contains("nameserver 10.1.2.3"), "its files: {files:?}");
    ensure!(
        pod.output(&lasting, "ip -o addr show dev eth0")?.contains(&pod.address()?),
        "it does not have its address"
    );
    let ending = pod.script("ending", "echo out; exit 6")?;
    ensure_eq!(pod.wait(&ending)?, 6, "the exit code");
    ensure_eq!(pod.log("ending")?, ["stdout F out"], "the log");
    pod.stop(&lasting, 30)?;
    ensure_eq!(pod.wait(&lasting)?, 3, "the exit code of what was stopped");
    pod.remove()?;
    kubelet.end()
}
