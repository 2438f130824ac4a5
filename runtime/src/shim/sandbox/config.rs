// SPDX-License-Identifier: Apache-2.0
//! What CRI says of a pod, in the words of an OCI configuration: it is written into the bundle, so that a pod is made of the
//! same whoever asks for it. With it come the files that containerd makes for other runtimes' pods, and that containers
//! inherit.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use containerd_shim_protos::sandbox_api::CreateSandboxRequest;
use protobuf::{EnumOrUnknown, Message};
use serde_json::{Value, json};
use thiserror::Error;

use self::generated::cri::{DNSConfig, LinuxContainerResources, NamespaceMode, PodSandboxConfig};
use crate::spec::{CONFIG_FILE, OVERHEAD};

/// The messages of `proto/`.
#[allow(
    dead_code,
    missing_docs,
    missing_debug_implementations,
    unreachable_pub,
    clippy::all,
    clippy::pedantic,
    clippy::restriction,
    reason = "generated code"
)]
mod generated {
    include!(concat!(env!("OUT_DIR"), "/modules.rs"));
}

/// The type by which containerd calls what CRI says.
const TYPE: &str = "runtime.v1.PodSandboxConfig";

/// The bundle's folder for the files of the pod's containers.
const FILES: &str = "etc";

/// Of the annotations that a pod has, those that are for the runtime.
const OURS: &str = "io.bulkhead.";

/// The size of the shared memory that containers of a pod have in common.
const SHM_SIZE: &str = "size=65536k";

/// What cannot be made a configuration of.
#[derive(Debug, Error)]
pub(in super::super) enum ConfigError {
    #[error("the sandbox has neither a {CONFIG_FILE} nor options of the type {TYPE}, but {0:?}")]
    Options(String),
    #[error("the sandbox's {TYPE} cannot be decoded")]
    Decode(#[source] protobuf::Error),
    #[error("the sandbox asks for {0}, which a virtual machine does not have")]
    Mode(&'static str),
    #[error("cannot write {}", .0.display())]
    Write(PathBuf, #[source] io::Error),
}

/// Whether a bundle has no configuration: containerd makes an empty one, or none, of a sandbox that it has no container for.
pub(in super::super) fn is_absent(bundle: &Path) -> bool {
    fs::metadata(bundle.join(CONFIG_FILE)).map_or_else(
        |error| error.kind() == io::ErrorKind::NotFound,
        |metadata| metadata.is_file() && metadata.len() == 0,
    )
}

/// Writes the configuration of a sandbox into its bundle, unless that has one.
pub(in super::super) fn write(namespace: &str, request: &CreateSandboxRequest) -> Result<(), ConfigError> {
    let bundle = Path::new(&request.bundle_path);
    if !is_absent(bundle) {
        return Ok(());
    }
    let type_url = &request.options.type_url;
    // A prefix names who knows the type.
    if type_url.rsplit('/').next() != Some(TYPE) {
        return Err(ConfigError::Options(type_url.clone()));
    }
    let config = PodSandboxConfig::parse_from_bytes(&request.options.value).map_err(ConfigError::Decode)?;
    let files = write_files(&bundle.join(FILES), &config)?;
    let rootfs = bundle.join("rootfs");
    fs::create_dir_all(&rootfs).map_err(|error| ConfigError::Write(rootfs, error))?;
    let mut config = config;
    // What containerd itself asks of a runtime comes beside; the pod's own word goes first.
    for (key, value) in &request.annotations {
        config.annotations.entry(key.clone()).or_insert_with(|| value.clone());
    }
    let text = describe(&config, (namespace, &request.sandbox_id), &request.netns_path, &files)?.to_string();
    let path = bundle.join(CONFIG_FILE);
    fs::write(&path, text).map_err(|error| ConfigError::Write(path, error))
}

/// The configuration of a sandbox in a namespace of containerd's, by its id, with these files for its containers.
fn describe(
    config: &PodSandboxConfig,
    (namespace, id): (&str, &str),
    netns: &str,
    files: &[PathBuf],
) -> Result<Value, ConfigError> {
    let cgroup = match config.linux.cgroup_parent.as_str() {
        "" => format!("/{namespace}/{id}"),
        parent if parent.ends_with(".slice") => {
            let slice = parent.rsplit('/').next().unwrap_or(parent);
            format!("{slice}:cri-containerd:{id}")
        }
        parent => format!("{}/{id}", parent.trim_end_matches('/')),
    };
    Ok(json!({
        "ociVersion": "1.2.0",
        // As of any sandbox, the program and the root file system are not looked at.
        "process": {"args": ["sandbox"], "cwd": "/", "user": {"uid": 0, "gid": 0}},
        "root": {"path": "rootfs", "readonly": true},
        "hostname": config.hostname,
        "mounts": mounts(files),
        "annotations": annotations(config, id),
        "linux": {
            "cgroupsPath": cgroup,
            "namespaces": namespaces(config, netns)?,
            "sysctl": sysctls(config),
        },
    }))
}

/// What is asked for, and what containerd 2 adds to any pod unless its configuration says otherwise, which a shim is not told.
fn sysctls(config: &PodSandboxConfig) -> BTreeMap<String, String> {
    let added = [("net.ipv4.ip_unprivileged_port_start", "0"), ("net.ipv4.ping_group_range", "0 2147483647")];
    let asked = config.linux.sysctls.iter().map(|(key, value)| (key.clone(), value.clone()));
    added.map(|(key, value)| (key.to_owned(), value.to_owned())).into_iter().chain(asked).collect()
}

/// What the sandbox has of its own, as containerd's CRI would list it.
fn namespaces(config: &PodSandboxConfig, netns: &str) -> Result<Value, ConfigError> {
    let options = &config.linux.security_context.namespace_options;
    let is = |mode: &EnumOrUnknown<NamespaceMode>, wanted| mode.enum_value() == Ok(wanted);
    if options.userns_options.as_ref().is_some_and(|userns| is(&userns.mode, NamespaceMode::POD)) {
        return Err(ConfigError::Mode("a user namespace of the host's kernel"));
    }
    if is(&options.network, NamespaceMode::NODE) {
        return Err(ConfigError::Mode("the host's network"));
    }
    if is(&options.pid, NamespaceMode::NODE) {
        return Err(ConfigError::Mode("the host's processes"));
    }
    let mut network = json!({"type": "network"});
    if !netns.is_empty() {
        network["path"] = netns.into();
    }
    Ok(json!([{"type": "pid"}, {"type": "ipc"}, {"type": "uts"}, {"type": "mount"}, network]))
}

/// CRI's annotations of a sandbox, and those for the runtime.
fn annotations(config: &PodSandboxConfig, id: &str) -> BTreeMap<String, String> {
    let ours = config.annotations.iter().filter(|(key, _)| key.starts_with(OURS));
    let mut annotations: BTreeMap<String, String> = ours.map(|(key, value)| (key.clone(), value.clone())).collect();
    let metadata = &config.metadata;
    let LinuxContainerResources { cpu_period, cpu_quota, cpu_shares, memory_limit_in_bytes, .. } =
        config.linux.resources.clone().unwrap_or_default();
    if let Some(overhead) = config.linux.overhead.as_ref() {
        // containerd has no word for it, CRI-O has.
        let told = json!({
            "cpu_period": overhead.cpu_period, "cpu_quota": overhead.cpu_quota, "cpu_shares": overhead.cpu_shares,
            "memory_limit_in_bytes": overhead.memory_limit_in_bytes,
        });
        annotations.insert(OVERHEAD[0].to_owned(), told.to_string());
    }
    let cri = [
        ("container-type", "sandbox".to_owned()),
        ("sandbox-id", id.to_owned()),
        ("sandbox-name", metadata.name.clone()),
        ("sandbox-namespace", metadata.namespace.clone()),
        ("sandbox-uid", metadata.uid.clone()),
        ("sandbox-cpu-period", cpu_period.to_string()),
        ("sandbox-cpu-quota", cpu_quota.to_string()),
        ("sandbox-cpu-shares", cpu_shares.to_string()),
        ("sandbox-memory", memory_limit_in_bytes.to_string()),
    ];
    annotations.extend(cri.map(|(key, value)| (format!("io.kubernetes.cri.{key}"), value)));
    annotations
}

/// The shared memory, and each file as the one of its name below `/etc`: those the containers inherit.
fn mounts(files: &[PathBuf]) -> Vec<Value> {
    let shm = json!({
        "destination": "/dev/shm", "type": "tmpfs", "source": "shm",
        "options": ["nosuid", "noexec", "nodev", "mode=1777", SHM_SIZE],
    });
    let bind = |file: &PathBuf| {
        let name = file.file_name().unwrap_or_default().to_string_lossy();
        json!({"destination": format!("/etc/{name}"), "type": "bind", "source": file, "options": ["rbind"]})
    };
    std::iter::once(shm).chain(files.iter().map(bind)).collect()
}

/// Makes the files; those of the host that are copied may be absent there.
fn write_files(folder: &Path, config: &PodSandboxConfig) -> Result<Vec<PathBuf>, ConfigError> {
    fs::create_dir_all(folder).map_err(|error| ConfigError::Write(folder.to_owned(), error))?;
    let hostname = (!config.hostname.is_empty()).then(|| format!("{}\n", config.hostname).into_bytes());
    let resolv = match config.dns_config.as_ref() {
        Some(dns) => Some(resolv_conf(dns).into_bytes()),
        None => fs::read("/etc/resolv.conf").ok(),
    };
    let mut files = Vec::new();
    let contents = [("hostname", hostname), ("hosts", fs::read("/etc/hosts").ok()), ("resolv.conf", resolv)];
    for (name, content) in contents {
        let Some(content) = content else { continue };
        let path = folder.join(name);
        fs::write(&path, content).map_err(|error| ConfigError::Write(path.clone(), error))?;
        files.push(path);
    }
    Ok(files)
}

/// The resolver's file; see resolv.conf(5).
fn resolv_conf(dns: &DNSConfig) -> String {
    let mut text = String::new();
    if !dns.searches.is_empty() {
        text += &format!("search {}\n", dns.searches.join(" "));
    }
    for server in &dns.servers {
        text += &format!("nameserver {server}\n");
    }
    if !dns.options.is_empty() {
        text += &format!("options {}\n", dns.options.join(" "));
    }
    text
}

#[cfg(test)]
mod tests {
    use protobuf::MessageField;
    use protobuf::well_known_types::any::Any;

    use super::generated::cri::{NamespaceOption, UserNamespace};
    use super::*;
    use crate::spec::{self, Role};

    fn config() -> PodSandboxConfig {
        let mut config = PodSandboxConfig { hostname: "mine".to_owned(), ..PodSandboxConfig::default() };
        config.metadata.mut_or_insert_default().name = "pod".to_owned();
        config.annotations.insert("io.bulkhead.vcpus".to_owned(), "3".to_owned());
        config.annotations.insert("other".to_owned(), "x".to_owned());
        let dns = config.dns_config.mut_or_insert_default();
        (dns.servers, dns.searches) = (vec!["10.1.2.3".to_owned(), "10.1.2.4".to_owned()], vec!["a.b".to_owned()]);
        let linux = config.linux.mut_or_insert_default();
        linux.cgroup_parent = "/pods".to_owned();
        linux.sysctls.insert("kernel.shmmax".to_owned(), "4096".to_owned());
        linux.resources.mut_or_insert_default().memory_limit_in_bytes = 256 << 20;
        linux.overhead.mut_or_insert_default().memory_limit_in_bytes = 264 << 20;
        config
    }

    fn request(bundle: &Path, config: &PodSandboxConfig) -> CreateSandboxRequest {
        let value = config.write_to_bytes().unwrap();
        CreateSandboxRequest {
            sandbox_id: "p1".to_owned(),
            bundle_path: bundle.display().to_string(),
            options: MessageField::some(Any { type_url: TYPE.to_owned(), value, ..Any::default() }),
            annotations: [("io.bulkhead.vcpus", "2"), ("io.bulkhead.kernel_args", "x")]
                .map(|(key, value)| (key.to_owned(), value.to_owned()))
                .into(),
            ..CreateSandboxRequest::default()
        }
    }

    #[test]
    fn a_pod_is_made_of_what_cri_says() {
        let bundle = tempfile::tempdir().unwrap();
        fs::write(bundle.path().join(CONFIG_FILE), "").unwrap();
        assert!(is_absent(bundle.path()));

        write("k8s.io", &request(bundle.path(), &config())).unwrap();

        assert!(!is_absent(bundle.path()));
        let translated = spec::load_as(bundle.path(), Role::Sandbox).unwrap();
        assert_eq!(translated.request.hostname, "mine");
        assert_eq!(translated.request.sysctls["kernel.shmmax"], "4096");
        assert_eq!(translated.request.sysctls["net.ipv4.ip_unprivileged_port_start"], "0");
        // The overhead is the host's 64 and the guest's 200.
        assert_eq!((translated.machine.vcpus, translated.machine.mem_size_mib), (3, 256 + 200));
        assert_eq!(translated.machine.kernel_args, ["x"]);
        assert_eq!(translated.annotations["io.kubernetes.cri.sandbox-name"], "pod");
        assert!(!translated.annotations.contains_key("other"));
        let resolv = fs::read_to_string(bundle.path().join("etc/resolv.conf")).unwrap();
        assert_eq!(resolv, "search a.b\nnameserver 10.1.2.3\nnameserver 10.1.2.4\n");
        assert_eq!(fs::read_to_string(bundle.path().join("etc/hostname")).unwrap(), "mine\n");
    }

    #[test]
    fn the_cgroup_is_where_cri_would_have_it() {
        let path = |parent: &str| {
            let mut config = config();
            config.linux.mut_or_insert_default().cgroup_parent = parent.to_owned();
            describe(&config, ("ns", "p1"), "/run/netns/n", &[]).unwrap()["linux"]["cgroupsPath"].clone()
        };

        assert_eq!(path("/pods/x/"), "/pods/x/p1");
        assert_eq!(path("/kubepods.slice/kubepods-pod1.slice"), "kubepods-pod1.slice:cri-containerd:p1");
        assert_eq!(path(""), "/ns/p1");
    }

    #[test]
    fn a_configuration_that_is_there_is_kept() {
        let bundle = tempfile::tempdir().unwrap();
        fs::write(bundle.path().join(CONFIG_FILE), "{}").unwrap();

        write("ns", &request(bundle.path(), &config())).unwrap();

        assert_eq!(fs::read_to_string(bundle.path().join(CONFIG_FILE)).unwrap(), "{}");
    }

    #[test]
    fn what_is_not_cris_or_asks_for_the_host_is_refused() {
        let bundle = tempfile::tempdir().unwrap();
        let refused = |request: &CreateSandboxRequest| write("ns", request).unwrap_err().to_string();
        let with = |options: NamespaceOption| {
            let mut config = config();
            let context = config.linux.mut_or_insert_default().security_context.mut_or_insert_default();
            context.namespace_options = MessageField::some(options);
            refused(&request(bundle.path(), &config))
        };
        let node = || EnumOrUnknown::new(NamespaceMode::NODE);

        assert!(refused(&CreateSandboxRequest::default()).contains("but \"\""));
        let mut broken = request(bundle.path(), &config());
        broken.options.mut_or_insert_default().value = vec![0xff];
        assert!(refused(&broken).contains("cannot be decoded"));
        assert!(with(NamespaceOption { network: node(), ..Default::default() }).contains("the host's network"));
        assert!(with(NamespaceOption { pid: node(), ..Default::default() }).contains("the host's processes"));
        let userns_options = MessageField::some(UserNamespace::default());
        assert!(with(NamespaceOption { userns_options, ..Default::default() }).contains("a user namespace"));
    }
}
