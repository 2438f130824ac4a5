// SPDX-License-Identifier: Apache-2.0
//! A bundle's config.json: from bytes to what the guest's agent is told and what machine it runs in.
//!
//! Every property of the OCI runtime specification 1.2 is honoured, or refused by name; `docs/oci.md` has the list.
//! Everything is checked before anything is created.

mod block_devices;
mod block_io;
mod capabilities;
mod cpu_limit;
mod device_filter;
mod error;
mod hooks;
mod host_cgroup;
mod id_mappings;
mod intel_rdt;
mod linux;
mod locate;
mod machine;
mod mount_options;
mod mounts;
mod net_device;
mod network_namespace;
mod pod;
mod process;
mod resources;
mod scheduling;
mod seccomp;
mod spelling;
pub(crate) mod template;
mod unified;
mod unknown;
mod unsupported;
mod user_network;

use std::collections::{BTreeMap, HashMap};
use std::fs;
use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};

use bulkhead_protocol::agent::{
    CgroupSetting, CreateContainerRequest, DescriptorKind, Device, PreservedDescriptor, Process,
};
use oci_spec::runtime::{
    Linux, LinuxNamespace, LinuxNamespaceType, LinuxResources, Mount, Process as OciProcess, Spec,
};

pub(crate) use self::block_devices::BlockDevice;
pub(crate) use self::cpu_limit::CpuLimit;
pub(crate) use self::device_filter::{DeviceRules, GuestDisk};
use self::error::{FieldError, without_nul};
pub(crate) use self::error::{PartError, SpecError};
pub(crate) use self::host_cgroup::host_memory_bytes;
use self::id_mappings::IdMappings;
use self::linux::Namespaces;
use self::machine::{Besides, Host, POD_VCPUS};
pub(crate) use self::machine::{DEFAULT_MEMORY_MIB, MEMORY_OVERHEAD_MIB, Machine, parse_cpu_list};
pub(crate) use self::net_device::NetSettings;
pub(crate) use self::pod::{OVERHEAD, PodNamespaces, Role, tells_memory as tells_memory_of_pod};
pub(crate) use self::user_network::{Protocol, Published, UserNetwork};
use crate::cgroup::{CgroupSpec, Limits};
use crate::hooks::Hooks;
use crate::logging;
use crate::network::NetworkNamespace;
use crate::notify::{self, Notice};
use crate::resctrl::ResctrlSpec;
use crate::storage::{HostSocket, ShareError, Shares};

/// The name of the configuration in a bundle.
pub(crate) const CONFIG_FILE: &str = "config.json";

/// Most bytes of a configuration that are read.
const MAX_CONFIG_SIZE: u64 = 16 << 20;

/// A bundle's configuration, checked and translated.
#[derive(Debug)]
pub(crate) struct Translated {
    /// What the agent is told; the id and the streams are the supervisor's to add.
    pub(crate) request: CreateContainerRequest,
    /// What the guest gets to see of the host's files.
    pub(crate) shares: Shares,
    /// The block devices of the host that it has; the request has their numbers on the host.
    pub(crate) block_devices: Vec<BlockDevice>,
    /// What decides over them, and over other devices.
    pub(crate) device_rules: DeviceRules,
    /// The host's sockets that it may connect to, by their numbers in the request.
    pub(crate) sockets: Vec<HostSocket>,
    /// The machine.
    pub(crate) machine: Machine,
    /// The container's limit of memory, if it has one.
    pub(crate) memory_limit_mib: Option<u64>,
    /// What it may use of processors.
    pub(crate) cpu_limit: CpuLimit,
    /// The sandbox's cgroup on the host.
    pub(crate) cgroup: CgroupSpec,
    /// What it may use of the host's caches and memory bandwidth, if that is said.
    pub(crate) resctrl: Option<ResctrlSpec>,
    /// The network namespace of the host whose interfaces the guest gets.
    pub(crate) network: Option<NetworkNamespace>,
    /// The namespaces of the host that the configuration names, each by its path.
    pub(crate) named_namespaces: Vec<(LinuxNamespaceType, PathBuf)>,
    /// Of a sandbox: what the pod's containers inherit.
    pub(crate) inherited: Vec<Mount>,
    /// Who is told that the container is ready, if anybody.
    pub(crate) notice: Option<Notice>,
    /// The programs to run on the host.
    pub(crate) hooks: Hooks,
    /// What those are told of the container, but for its id.
    pub(crate) bundle: PathBuf,
    pub(crate) annotations: BTreeMap<String, String>,
}

/// Reads and translates the configuration of a bundle.
///
/// # Errors
///
/// Names the file, the field, and its value.
pub(crate) fn load(bundle: &Path) -> Result<Translated, SpecError> {
    load_as(bundle, Role::Alone)
}

/// The same for a sandbox of a pod, or a container in one.
///
/// # Errors
///
/// As [`load`].
pub(crate) fn load_as(bundle: &Path, role: Role<'_>) -> Result<Translated, SpecError> {
    let bundle = fs::canonicalize(bundle).map_err(|error| SpecError::Bundle(bundle.to_owned(), error))?;
    let path = bundle.join(CONFIG_FILE);
    let spec = read(&path)?;
    let mut translated = translate(&spec, &bundle, role).map_err(|error| SpecError::Field(path, error))?;
    if matches!(role, Role::Alone) {
        stand_for_engine(&mut translated, list(spec.mounts().as_ref()));
    }
    Ok(translated)
}

/// Has the guest's notification socket mounted over an engine's, if there is one, which is then told.
fn stand_for_engine(translated: &mut Translated, mounts: &[Mount]) {
    let environment = translated.request.process.as_ref().map(|process| process.env.as_slice());
    if let Some((mount, notice)) = notify::of_engine(environment.unwrap_or_default(), mounts, &translated.bundle) {
        translated.request.mounts.push(mount);
        translated.notice = Some(notice);
    }
}

/// Reads a bundle's annotations.
///
/// # Errors
///
/// Names the file.
pub(crate) fn load_annotations(bundle: &Path) -> Result<BTreeMap<String, String>, SpecError> {
    let spec = read(&bundle.join(CONFIG_FILE))?;
    Ok(spec.annotations().clone().unwrap_or_default().into_iter().collect())
}

/// Reads a bundle's `process`, as a base for further ones.
///
/// # Errors
///
/// Names the file; the field that is wrong.
pub(crate) fn load_process(bundle: &Path) -> Result<OciProcess, SpecError> {
    let path = bundle.join(CONFIG_FILE);
    let spec = read(&path)?;
    let missing = || FieldError::missing("process", "it says what to run");
    spec.process().clone().ok_or_else(|| SpecError::Field(path, missing()))
}

/// The names of the mount options that are honoured, sorted.
pub(crate) fn mount_option_names() -> Vec<&'static str> {
    mount_options::names()
}

/// The names of the capabilities that are known, sorted.
pub(crate) fn capability_names() -> Vec<&'static str> {
    capabilities::names()
}

/// The rules of a container that has none of its own.
#[cfg(test)]
pub(crate) fn no_device_rules() -> DeviceRules {
    device_filter::translate(&[], &[]).unwrap_or_else(|error| panic!("{error}"))
}

/// Whether that is a `linux.seccomp` that is honoured.
#[cfg(test)]
pub(crate) fn is_seccomp_filter(json: &serde_json::Value) -> bool {
    serde_json::from_value(json.clone()).is_ok_and(|filter| seccomp::translate(&filter).is_ok())
}

/// A further process, from the JSON of the specification's `process`.
///
/// # Errors
///
/// Names the field.
pub(crate) fn process_from_json(json: &[u8]) -> Result<Process, PartError> {
    /// What the specification has no word for.
    #[derive(serde::Deserialize)]
    struct Ours {
        #[serde(default, rename = "io.bulkhead.cgroup")]
        cgroup: String,
        #[serde(default, rename = "io.bulkhead.preserved")]
        preserved: Vec<PreservedKind>,
    }
    let process = serde_json::from_slice(&spelling::of_process(json))?;
    unsupported::refuse_process(&process)?;
    let Ours { cgroup, preserved } = serde_json::from_slice(json)?;
    let preserved = preserved.into_iter().map(PreservedKind::to_wire).collect();
    Ok(Process { cgroup, preserved, ..process::translate(&process)? })
}

/// What a descriptor is that a process has beside its standard streams.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum PreservedKind {
    Null,
    Input,
    Output,
    Connection,
}

impl PreservedKind {
    /// For the agent; its stream has no number yet.
    pub(crate) fn to_wire(self) -> PreservedDescriptor {
        let kind = match self {
            Self::Null => DescriptorKind::NULL_DEVICE,
            Self::Input => DescriptorKind::INPUT,
            Self::Output => DescriptorKind::OUTPUT,
            Self::Connection => DescriptorKind::CONNECTION,
        };
        PreservedDescriptor { kind: kind.into(), ..PreservedDescriptor::default() }
    }
}

/// New limits of a container that there is.
#[derive(Debug)]
pub(crate) struct NewLimits {
    /// For its cgroup in the guest.
    pub(crate) cgroup_settings: Vec<CgroupSetting>,
    /// The same, over its access to devices; absent where they say nothing of it.
    pub(crate) device_rules: Option<DeviceRules>,
    /// Of memory, in bytes: what the machine is to have room for. Negative for none.
    pub(crate) memory: Option<i64>,
    /// Of processors: how many the guest is to use.
    pub(crate) cpu: CpuLimit,
    /// What the container may not use as much of already, if there is such a condition: memory, by a limit of that name.
    pub(crate) above_use: Vec<(&'static str, i64)>,
    /// For the sandbox's cgroup on the host, but for its memory, which depends on the machine's.
    pub(crate) host: Limits,
}

/// New limits, from the JSON of the specification's `linux.resources`.
///
/// # Errors
///
/// Names the field.
pub(crate) fn new_limits_from_json(json: &[u8]) -> Result<NewLimits, PartError> {
    let resources: LinuxResources = serde_json::from_slice(json)?;
    let device_rules = match list(resources.devices().as_ref()) {
        [] => None,
        rules => Some(device_filter::translate(rules, &[])?),
    };
    let cgroup_settings = resources::translate(&resources)?;
    let resources = unified::fold(&resources)?;
    let memory = resources.memory().and_then(|memory| memory.limit()).filter(|limit| *limit != 0);
    let cpu = CpuLimit::translate(resources.cpu().as_ref())?;
    let host = host_cgroup::new_limits(&resources)?;
    Ok(NewLimits { cgroup_settings, device_rules, memory, cpu, above_use: resources::above_use(&resources), host })
}

fn read(path: &Path) -> Result<Spec, SpecError> {
    let failed = |error| SpecError::Read(path.to_owned(), error);
    let mut file = File::open(path).map_err(failed)?;
    let length = file.metadata().map_err(failed)?.len();
    let mut text = Vec::with_capacity(usize::try_from(length.min(MAX_CONFIG_SIZE)).unwrap_or(0) + 1);
    let read = file.by_ref().take(MAX_CONFIG_SIZE + 1).read_to_end(&mut text).map_err(failed)? as u64;
    if read > MAX_CONFIG_SIZE {
        return Err(SpecError::TooLong { path: path.to_owned(), length, max: MAX_CONFIG_SIZE });
    }
    let text = spelling::of_config(&text);
    let mut spec: Spec = serde_json::from_slice(&text).map_err(|error| parse_error(path, &text, &error))?;
    spelling::complete(&mut spec, &text);
    if logging::debug_enabled() {
        report_unknown(path, &text, &spec);
    }
    Ok(spec)
}

fn parse_error(path: &Path, text: &[u8], error: &serde_json::Error) -> SpecError {
    let (line, column) = (error.line(), error.column());
    // The position is said once, in front.
    let message = error.to_string();
    let message = message.strip_suffix(&format!(" at line {line} column {column}")).unwrap_or(&message);
    SpecError::Parse {
        path: path.to_owned(),
        line,
        column,
        field: locate::field_at(text, line, column),
        message: crate::text::one_line(message),
    }
}

fn report_unknown(path: &Path, text: &[u8], spec: &Spec) {
    if let (Ok(given), Ok(understood)) = (serde_json::from_slice(text), serde_json::to_value(spec)) {
        for property in unknown::unknown_properties(&given, &understood) {
            logging::debug(format_args!("{}: the unknown property {property} is ignored", path.display()));
        }
    }
}

fn translate(spec: &Spec, bundle: &Path, role: Role<'_>) -> Result<Translated, FieldError> {
    check_version(spec.version())?;
    unsupported::refuse_unsupported(spec)?;
    let Some(process) = spec.process() else {
        return Err(FieldError::missing("process", "it says what to run"));
    };
    let mut process = process::translate(process)?;

    let linux = spec.linux().as_ref();
    let seccomp = linux.and_then(|linux| linux.seccomp().as_ref());
    process.personality =
        linux.and_then(|linux| linux.personality().as_ref()).map(scheduling::personality).transpose()?;
    process.seccomp = seccomp.map(seccomp::translate).transpose()?.into();
    let namespaces = list(linux.and_then(|linux| linux.namespaces().as_ref()));
    check_pids(namespaces, role)?;
    let named_namespaces = pod::named(namespaces);
    let network_path = named_namespaces.iter().find(|(kind, _)| *kind == LinuxNamespaceType::Network);
    let network_path = network_path.map(|(_, path)| path.as_path());
    let namespaces = Namespaces::translate(namespaces, role)?;
    let id_mappings = namespaces.id_mappings(linux, &process)?;
    let time_offsets = linux.and_then(|linux| linux.time_offsets().as_ref());
    let time_offsets = namespaces.time_offsets(time_offsets)?;
    let hostname = spec.hostname().clone().unwrap_or_default();
    let domainname = spec.domainname().clone().unwrap_or_default();
    namespaces.check_name("hostname", &hostname)?;
    namespaces.check_name("domainname", &domainname)?;
    let sysctls = linux.and_then(|linux| linux.sysctl().clone()).unwrap_or_default();
    namespaces.check_sysctls(&sysctls)?;
    let masked_paths = linux.and_then(|linux| linux.masked_paths().clone()).unwrap_or_default();
    let readonly_paths = linux.and_then(|linux| linux.readonly_paths().clone()).unwrap_or_default();
    linux::check_paths("maskedPaths", &masked_paths)?;
    linux::check_paths("readonlyPaths", &readonly_paths)?;
    let propagation = linux.and_then(|linux| linux.rootfs_propagation().as_deref()).unwrap_or_default();
    let rootfs_propagation = linux::rootfs_propagation(propagation)?;
    let resources = linux.and_then(|linux| linux.resources().as_ref());
    let (mut devices, device_rules, block_devices) = translate_devices(linux, role)?;
    let cgroup_settings = resources.map(resources::translate).transpose()?.unwrap_or_default();

    let (hooks, start_hooks) = spec.hooks().as_ref().map(hooks::translate).transpose()?.unwrap_or_default();
    let annotations = spec.annotations().clone().unwrap_or_default();
    if !matches!(role, Role::Alone) {
        block_io::refuse_devices(resources)?;
    }
    let intel_rdt = linux.and_then(|linux| linux.intel_rdt().as_ref());
    let resctrl = intel_rdt.map(|rdt| intel_rdt::translate(rdt, role)).transpose()?;
    let resources = resources.map(unified::fold).transpose()?;
    let resources = resources.as_ref();
    let (memory_limit_mib, cpu_limit) = (machine::memory_limit_mib(resources), cpu_limit(resources, role)?);
    let (mut machine, cgroup) = machine_and_cgroup(linux, resources, &annotations, role)?;
    machine.oom_score_adj = process.oom_score_adj;
    user_network::check(machine.user_network.as_ref(), network_path, matches!(role, Role::Alone))?;

    let mut shares = match role {
        Role::Member { prefix, .. } => Shares::of_pod(prefix),
        Role::Alone | Role::Sandbox => Shares::default(),
    };
    let (rootfs, rootfs_readonly) = translate_root(spec, bundle, &mut shares)?;
    let wanted = pod::mounts(spec, role);
    let mounts = mounts::translate(&wanted, bundle, id_mappings.as_ref(), &mut shares)?;
    let inherited = if matches!(role, Role::Sandbox) { pod::inherited(&wanted) } else { Vec::new() };
    let IdMappings { uids: uid_mappings, gids: gid_mappings } = id_mappings.unwrap_or_default();
    devices.extend(mounts.devices);
    let request = CreateContainerRequest {
        rootfs: Some(rootfs).into(),
        rootfs_readonly,
        rootfs_propagation,
        hostname,
        domainname,
        mounts: mounts.mounts,
        devices,
        device_filter: device_rules.compile(&[]),
        namespaces: namespaces.to_wire(),
        common_pids: namespaces.common_pids(),
        uid_mappings,
        gid_mappings,
        time_offsets,
        start_hooks,
        masked_paths,
        readonly_paths,
        sysctls,
        process: Some(process).into(),
        cgroup_settings,
        ..CreateContainerRequest::default()
    };
    let (bundle, annotations) = (bundle.to_owned(), annotations.into_iter().collect());
    Ok(Translated {
        request,
        shares,
        block_devices,
        device_rules,
        sockets: mounts.sockets,
        machine,
        memory_limit_mib,
        cpu_limit,
        cgroup,
        resctrl,
        network: namespaces.into_network(),
        named_namespaces,
        inherited,
        hooks,
        notice: None,
        bundle,
        annotations,
    })
}

/// The nodes, what decides over their use, and the block devices of the host among them.
fn translate_devices(
    linux: Option<&Linux>,
    role: Role<'_>,
) -> Result<(Vec<Device>, DeviceRules, Vec<BlockDevice>), FieldError> {
    let devices = list(linux.and_then(|linux| linux.devices().as_ref()));
    let resources = linux.and_then(|linux| linux.resources().as_ref());
    let rules = list(resources.and_then(|resources| resources.devices().as_ref()));
    let (nodes, rules) = (linux::devices(devices)?, device_filter::translate(rules, devices)?);
    let block_devices = match role {
        // Nothing runs there that could use them.
        Role::Sandbox => Vec::new(),
        Role::Alone | Role::Member { .. } => block_devices::open(devices, &rules)?,
    };
    Ok((nodes, rules, block_devices))
}

/// Refuses a pod that is to see the processes of the host.
fn check_pids(namespaces: &[LinuxNamespace], role: Role<'_>) -> Result<(), FieldError> {
    let has_pids = namespaces.is_empty() || namespaces.iter().any(|other| other.typ() == LinuxNamespaceType::Pid);
    if matches!(role, Role::Sandbox) && !has_pids {
        let what = "a pod without a pid namespace, which is to see the processes of the host";
        return Err(FieldError::unsupported("linux.namespaces", what));
    }
    Ok(())
}

/// What a container may use of its machine's processors.
fn cpu_limit(resources: Option<&LinuxResources>, role: Role<'_>) -> Result<CpuLimit, FieldError> {
    let limit = CpuLimit::translate(resources.and_then(|resources| resources.cpu().as_ref()))?;
    Ok(if matches!(role, Role::Member { .. }) { limit.of_quota() } else { limit })
}

/// The machine, and what it may use of the host.
fn machine_and_cgroup(
    linux: Option<&Linux>,
    resources: Option<&LinuxResources>,
    annotations: &HashMap<String, String>,
    role: Role<'_>,
) -> Result<(Machine, CgroupSpec), FieldError> {
    let of_pod = matches!(role, Role::Sandbox).then(|| pod::told(annotations)).transpose()?;
    let besides = of_pod.as_ref().map_or(Besides::default(), |told| Besides {
        overhead_mib: told.overhead_mib.saturating_sub(host_cgroup::HOST_OVERHEAD_MIB),
        max_vcpus: if told.tells_cpu { 0 } else { POD_VCPUS },
    });
    let resources = of_pod.as_ref().map(|told| &told.resources).or(resources);
    let machine = Machine::translate(annotations, resources, besides, Host::THIS)?;
    let cgroups_path = linux.and_then(|linux| linux.cgroups_path().as_deref());
    let mut cgroup = host_cgroup::translate(cgroups_path, resources, &machine)?;
    if matches!(role, Role::Sandbox) {
        // The sum is that of the containers which have a limit, and must not hold for those which have none. Where all have
        // one, the kubelet sets it on the pod's cgroup, which is above this one.
        (cgroup.limits.cpu_quota_us, cgroup.limits.cpu_period_us) = (None, None);
    }
    Ok((machine, cgroup))
}

/// An absent list is an empty one.
fn list<T>(list: Option<&Vec<T>>) -> &[T] {
    list.map_or(&[], Vec::as_slice)
}

/// Versions with the major number 1 are compatible with each other by the specification's own rule.
fn check_version(version: &str) -> Result<(), FieldError> {
    if version.is_empty() {
        return Err(FieldError::missing("ociVersion", "it says which specification the file follows"));
    }
    let core = version.split(['-', '+']).next().unwrap_or_default();
    let numbers: Option<Vec<u32>> = core.split('.').map(|part| part.parse().ok()).collect();
    match numbers.as_deref() {
        Some([1, _, _]) => Ok(()),
        _ => Err(FieldError::invalid("ociVersion", version, "a version 1.x.y")),
    }
}

fn translate_root(
    spec: &Spec,
    bundle: &Path,
    shares: &mut Shares,
) -> Result<(bulkhead_protocol::agent::SharePath, bool), FieldError> {
    let needed = "it names the folder of the root file system";
    let root = spec.root().as_ref().ok_or_else(|| FieldError::missing("root", needed))?;
    if root.path().as_os_str().is_empty() {
        return Err(FieldError::missing("root.path", needed));
    }
    without_nul(|| "root.path".to_owned(), &root.path().to_string_lossy())?;
    let path: PathBuf = bundle.join(root.path());
    let read_only = root.readonly().unwrap_or(false);
    let share = shares.add_rootfs(&path, read_only).map_err(|error| match error {
        ShareError::Path(error) => FieldError::path("root.path", path, error),
        other => FieldError::path("root.path", path, std::io::Error::other(other)),
    })?;
    Ok((share, read_only))
}

#[cfg(test)]
mod tests;
