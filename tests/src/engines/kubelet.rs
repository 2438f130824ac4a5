// SPDX-License-Identifier: Apache-2.0
//! The kubelet's part: pods by containerd's CRI, on a bridge that Debian's CNI plugins make.

use std::fs;
use std::path::PathBuf;
use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use protobuf::{EnumOrUnknown, Message, MessageField};
use serde_json::json;

use super::containerd::IMAGE;
use super::{Containerd, debian_program, state_folder};
use crate::cri::Client;
use crate::cri::api::{
    ContainerConfig, ContainerMetadata, ContainerRequest, ContainerState, ContainerStatus, ContainerStatusResponse,
    CreateContainerRequest, CreateContainerResponse, DNSConfig, Empty, ExecSyncRequest, ExecSyncResponse, ImageSpec,
    ImageStatusRequest, ImageStatusResponse, LinuxContainerConfig, LinuxContainerSecurityContext,
    LinuxPodSandboxConfig, Mount, NamespaceMode, NamespaceOption, PodSandboxConfig, PodSandboxMetadata,
    PodSandboxRequest, PodSandboxStatus, PodSandboxStatusResponse, RunPodSandboxRequest, RunPodSandboxResponse,
    StopContainerRequest,
};
use crate::env::{Env, Kind};
use crate::failure::{Result, ensure, fail, skip};

/// How long a call may take, and what is waited for to happen.
const LIMIT: Duration = Duration::from_secs(180);

/// What `bulkhead install-containerd` calls its runtime in containerd's configuration, and what another's is called.
const BULKHEAD: &str = "bulkhead";
const OTHER: &str = "runc";

/// The runtimes that there are where Bulkhead is tested.
pub(crate) const RUNTIMES: [&str; 2] = [BULKHEAD, OTHER];

/// containerd with CRI; it ends when dropped, with all pods, and the bridge with it.
#[derive(Debug)]
pub(crate) struct Kubelet<'a> {
    env: &'a Env,
    pub(crate) containerd: Containerd<'a>,
    client: Client,
    bridge: Bridge,
    /// Logs of containers, and volumes.
    folder: PathBuf,
    pods: AtomicU32,
}

impl<'a> Kubelet<'a> {
    /// A daemon that has the image, which serves for the sandboxes too.
    pub(crate) fn new(env: &'a Env) -> Result<Self> {
        Self::with(env, false)
    }

    /// A daemon that has the sandboxes made by the shim's Sandbox service, as from containerd 2.0 on.
    pub(crate) fn with_shim_sandboxes(env: &'a Env) -> Result<Self> {
        Self::with(env, true)
    }

    fn with(env: &'a Env, shim_sandboxes: bool) -> Result<Self> {
        let plugins = debian_program("/usr/lib/cni/bridge", "containernetworking-plugins")?;
        let plugins = plugins.parent().unwrap_or(&plugins).display().to_string();
        let state = state_folder(env, "containerd")?;
        let bridge = Bridge::new(&state)?;
        let mut containerd = Containerd::in_folder(env, state, "overlayfs", "k8s.io")?;
        if shim_sandboxes && containerd.config_version() < 3 {
            skip!("this containerd has no Sandbox service (tests/README.md tells how to try another)");
        }
        containerd.configure("", &settings(env, containerd.config_version(), &plugins, &bridge))?;
        if env.kind == Kind::Bulkhead {
            let config = containerd.config().display().to_string();
            env.call(["install-containerd", "--config", &config]).output()?.expect_code(0)?;
        }
        if shim_sandboxes {
            // The runtime's table is the last one.
            let mut text = fs::read_to_string(containerd.config())?;
            text += "sandboxer = \"shim\"\n";
            fs::write(containerd.config(), text)?;
        }
        containerd.begin()?;
        let client = Client::new(&containerd.socket(), LIMIT)?;
        let kubelet = Self { env, containerd, client, bridge, folder: env.folder("kubelet")?, pods: AtomicU32::new(0) };
        kubelet.wait_for_image()?;
        Ok(kubelet)
    }

    /// Starts the daemon again; CRI takes calls a while after the rest.
    pub(crate) fn start(&mut self) -> Result {
        self.containerd.start()?;
        self.wait_for_image()
    }

    /// CRI learns of an imported image by an event.
    fn wait_for_image(&self) -> Result {
        let image = MessageField::some(ImageSpec { image: IMAGE.to_owned(), ..Default::default() });
        let request = ImageStatusRequest { image, ..Default::default() };
        let end = Instant::now() + LIMIT;
        loop {
            let answer = self.client.call::<ImageStatusResponse>("runtime.v1.ImageService/ImageStatus", &request);
            if answer.as_ref().is_ok_and(|answer| answer.image.is_some()) {
                return Ok(());
            }
            ensure!(Instant::now() < end, "CRI has no image: {answer:?}; {}", self.containerd.log());
            thread::sleep(Duration::from_millis(100));
        }
    }

    /// A call of the runtime service.
    pub(crate) fn call<A: Message>(&self, method: &str, request: &impl Message) -> Result<A> {
        self.client.call(&format!("runtime.v1.RuntimeService/{method}"), request)
    }

    /// The configuration of a new pod.
    pub(crate) fn pod_config(&self, name: &str) -> Result<PodSandboxConfig> {
        let number = self.pods.fetch_add(1, Ordering::Relaxed) + 1;
        let uid = format!("{}{number}", self.env.id_prefix());
        let logs = self.folder.join(format!("logs-{uid}"));
        fs::create_dir_all(&logs)?;
        let metadata = PodSandboxMetadata {
            name: name.to_owned(),
            namespace: "e2e".to_owned(),
            uid: uid.clone(),
            ..Default::default()
        };
        let dns_config = DNSConfig {
            servers: vec!["10.1.2.3".to_owned()],
            searches: vec!["cluster.test".to_owned()],
            ..Default::default()
        };
        Ok(PodSandboxConfig {
            metadata: MessageField::some(metadata),
            hostname: name.to_owned(),
            log_directory: logs.display().to_string(),
            dns_config: MessageField::some(dns_config),
            // The names of cgroups hold the case's id.
            linux: MessageField::some(LinuxPodSandboxConfig { cgroup_parent: format!("/{uid}"), ..Default::default() }),
            ..Default::default()
        })
    }

    /// Runs a pod that has no containers yet.
    pub(crate) fn run(&self, config: PodSandboxConfig) -> Result<Pod<'_>> {
        self.run_by(handler(self.env), config)
    }

    /// Runs a pod by one of the runtimes.
    pub(crate) fn run_by(&self, runtime: &str, config: PodSandboxConfig) -> Result<Pod<'_>> {
        let request = RunPodSandboxRequest {
            config: MessageField::some(config.clone()),
            runtime_handler: runtime.to_owned(),
            ..Default::default()
        };
        let answer: RunPodSandboxResponse = self.call("RunPodSandbox", &request)?;
        Ok(Pod { kubelet: self, id: answer.pod_sandbox_id, config })
    }

    /// A pod that was run before, by an earlier daemon perhaps.
    pub(crate) fn found(&self, id: String, config: PodSandboxConfig) -> Pod<'_> {
        Pod { kubelet: self, id, config }
    }

    /// Runs a pod of that name.
    pub(crate) fn pod(&self, name: &str) -> Result<Pod<'_>> {
        self.run(self.pod_config(name)?)
    }

    /// A new folder on the host, to be a volume.
    pub(crate) fn volume(&self, name: &str) -> Result<PathBuf> {
        let folder = self.folder.join("volumes").join(name);
        fs::create_dir_all(&folder)?;
        Ok(folder)
    }

    /// The address of the bridge.
    pub(crate) fn host_address(&self) -> &str {
        &self.bridge.address
    }

    /// Ends the daemon, after which nothing of its pods may be left.
    pub(crate) fn end(self) -> Result {
        let Self { containerd, bridge, .. } = self;
        containerd.end()?;
        let links = bridge.ports()?;
        ensure!(links.is_empty(), "interfaces that are left: {links}");
        Ok(())
    }
}

/// A pod that runs.
#[derive(Debug)]
pub(crate) struct Pod<'k> {
    kubelet: &'k Kubelet<'k>,
    pub(crate) id: String,
    config: PodSandboxConfig,
}

impl Pod<'_> {
    /// The configuration of a container that runs a shell script.
    pub(crate) fn config(&self, name: &str, script: &str) -> ContainerConfig {
        // What the kubelet asks for where a pod says nothing: a container has its own process ids.
        let namespaces = NamespaceOption { pid: EnumOrUnknown::new(NamespaceMode::CONTAINER), ..Default::default() };
        let security =
            LinuxContainerSecurityContext { namespace_options: MessageField::some(namespaces), ..Default::default() };
        ContainerConfig {
            metadata: MessageField::some(ContainerMetadata { name: name.to_owned(), ..Default::default() }),
            image: MessageField::some(ImageSpec { image: IMAGE.to_owned(), ..Default::default() }),
            command: ["sh", "-c", script].map(str::to_owned).to_vec(),
            log_path: format!("{name}.log"),
            linux: MessageField::some(LinuxContainerConfig {
                security_context: MessageField::some(security),
                ..Default::default()
            }),
            ..Default::default()
        }
    }

    /// Creates a container; its id.
    pub(crate) fn create(&self, config: ContainerConfig) -> Result<String> {
        let request = CreateContainerRequest {
            pod_sandbox_id: self.id.clone(),
            config: MessageField::some(config),
            sandbox_config: MessageField::some(self.config.clone()),
            ..Default::default()
        };
        let answer: CreateContainerResponse = self.kubelet.call("CreateContainer", &request)?;
        Ok(answer.container_id)
    }

    /// Creates and starts a container; its id.
    pub(crate) fn start(&self, config: ContainerConfig) -> Result<String> {
        let id = self.create(config)?;
        self.kubelet.call::<Empty>("StartContainer", &named(&id))?;
        Ok(id)
    }

    /// Creates and starts a container that runs a shell script; its id.
    pub(crate) fn script(&self, name: &str, script: &str) -> Result<String> {
        self.start(self.config(name, script))
    }

    /// Runs a shell script in a container to its end.
    pub(crate) fn exec(&self, id: &str, script: &str) -> Result<ExecSyncResponse> {
        let cmd = ["sh", "-c", script].map(str::to_owned).to_vec();
        let request = ExecSyncRequest { container_id: id.to_owned(), cmd, timeout: 60, ..Default::default() };
        self.kubelet.call("ExecSync", &request)
    }

    /// What a shell script prints in a container. It has to succeed.
    pub(crate) fn output(&self, id: &str, script: &str) -> Result<String> {
        let answer = self.exec(id, script)?;
        let (stdout, stderr) = (String::from_utf8_lossy(&answer.stdout), String::from_utf8_lossy(&answer.stderr));
        ensure!(answer.exit_code == 0, "{script}: status {}; {stdout:?}; {stderr:?}", answer.exit_code);
        Ok(stdout.into_owned())
    }

    pub(crate) fn container(&self, id: &str) -> Result<ContainerStatus> {
        let answer: ContainerStatusResponse = self.kubelet.call("ContainerStatus", &named(id))?;
        Ok(answer.status.unwrap_or_default())
    }

    /// Waits for a container's end; its exit code.
    pub(crate) fn wait(&self, id: &str) -> Result<i32> {
        let end = Instant::now() + LIMIT;
        loop {
            let status = self.container(id)?;
            if status.state == ContainerState::CONTAINER_EXITED.into() {
                return Ok(status.exit_code);
            }
            if Instant::now() >= end {
                fail!("the container does not end: {status:?}; {}", self.kubelet.containerd.log());
            }
            thread::sleep(Duration::from_millis(100));
        }
    }

    /// The lines of a container's log, without their times.
    pub(crate) fn log(&self, name: &str) -> Result<Vec<String>> {
        let text = fs::read_to_string(format!("{}/{name}.log", self.config.log_directory))?;
        Ok(text.lines().map(|line| line.split_once(' ').map_or(line, |(_, rest)| rest).to_owned()).collect())
    }

    /// Ends a container, which has so many seconds for it.
    pub(crate) fn stop(&self, id: &str, timeout: i64) -> Result {
        let request = StopContainerRequest { container_id: id.to_owned(), timeout, ..Default::default() };
        self.kubelet.call::<Empty>("StopContainer", &request).map(drop)
    }

    pub(crate) fn remove_container(&self, id: &str) -> Result {
        self.kubelet.call::<Empty>("RemoveContainer", &named(id)).map(drop)
    }

    pub(crate) fn status(&self) -> Result<PodSandboxStatus> {
        let answer: PodSandboxStatusResponse = self.kubelet.call("PodSandboxStatus", &self.request())?;
        Ok(answer.status.unwrap_or_default())
    }

    /// Its address.
    pub(crate) fn address(&self) -> Result<String> {
        Ok(self.status()?.network.ip.clone())
    }

    /// Ends it, and removes it with its containers.
    pub(crate) fn remove(self) -> Result {
        self.kubelet.call::<Empty>("StopPodSandbox", &self.request())?;
        self.kubelet.call::<Empty>("RemovePodSandbox", &self.request())?;
        // The cgroup of a pod is the kubelet's.
        let _ = fs::remove_dir(format!("/sys/fs/cgroup{}", self.config.linux.cgroup_parent));
        Ok(())
    }

    pub(crate) fn request(&self) -> PodSandboxRequest {
        PodSandboxRequest { pod_sandbox_id: self.id.clone(), ..Default::default() }
    }
}

/// The name of the tested runtime in containerd's configuration.
fn handler(env: &Env) -> &'static str {
    match env.kind {
        Kind::Bulkhead => BULKHEAD,
        Kind::Other => OTHER,
    }
}

/// CRI's settings in a configuration of that version, but for Bulkhead's runtime.
fn settings(env: &Env, version: u32, plugins: &str, bridge: &Bridge) -> String {
    let streams = "stream_server_address = \"127.0.0.1\"\n";
    let (cri, image) = match version {
        2 => (
            "[plugins.\"io.containerd.grpc.v1.cri\"",
            format!("[plugins.\"io.containerd.grpc.v1.cri\"]\nsandbox_image = \"{IMAGE}\"\n{streams}"),
        ),
        // A plugin each for the service, images, and containers.
        _ => (
            "[plugins.\"io.containerd.cri.v1.runtime\"",
            format!(
                "[plugins.\"io.containerd.grpc.v1.cri\"]\n{streams}\
                 [plugins.\"io.containerd.cri.v1.images\".pinned_images]\nsandbox = \"{IMAGE}\"\n\
                 [plugins.\"io.containerd.cri.v1.runtime\"]\n"
            ),
        ),
    };
    format!(
        "{image}disable_apparmor = true\nnetns_mounts_under_state_dir = true\n\
         {cri}.cni]\nbin_dir = \"{plugins}\"\nconf_dir = \"{0}\"\n\
         {cri}.containerd]\ndefault_runtime_name = \"{1}\"\n\
         {cri}.containerd.runtimes.{OTHER}]\nruntime_type = \"io.containerd.runc.v2\"\n",
        bridge.configuration.display(),
        handler(env),
    )
}

/// The request that names a container and nothing else.
pub(crate) fn named(id: &str) -> ContainerRequest {
    ContainerRequest { container_id: id.to_owned(), ..Default::default() }
}

/// A mount of a folder or file of the host.
pub(crate) fn mount(host_path: &std::path::Path, container_path: &str, readonly: bool) -> Mount {
    let (host_path, container_path) = (host_path.display().to_string(), container_path.to_owned());
    Mount { host_path, container_path, readonly, ..Default::default() }
}

/// The bridge that pods are put on, and the plugins' configuration for it.
#[derive(Debug)]
struct Bridge {
    name: String,
    address: String,
    configuration: PathBuf,
}

impl Bridge {
    fn new(state: &std::path::Path) -> Result<Self> {
        let number = std::process::id();
        // Cases may run side by side.
        let (name, net) = (format!("bhe{number}"), format!("10.88.{}", number % 250));
        let configuration = state.join("cni");
        fs::create_dir(&configuration)?;
        let plugin = json!({
            "cniVersion": "0.4.0", "name": "e2e",
            "plugins": [{
                "type": "bridge", "bridge": name, "isGateway": true, "ipMasq": false,
                "ipam": {
                    "type": "host-local", "subnet": format!("{net}.0/24"), "gateway": format!("{net}.1"),
                    "dataDir": state.join("addresses"), "routes": [{ "dst": "0.0.0.0/0" }],
                },
            }],
        });
        fs::write(configuration.join("e2e.conflist"), plugin.to_string())?;
        Ok(Self { name, address: format!("{net}.1"), configuration })
    }

    /// The interfaces on it.
    fn ports(&self) -> Result<String> {
        let output = Command::new("ip").args(["-o", "link", "show", "master", &self.name]).output()?;
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    }
}

impl Drop for Bridge {
    fn drop(&mut self) {
        let _ = Command::new("ip").args(["link", "delete", &self.name]).output();
    }
}
