// SPDX-License-Identifier: Apache-2.0
//! What a configuration means in a pod: whose namespaces it names, and how large the pod's machine is.

use std::collections::{BTreeMap, HashMap};
use std::path::{Path, PathBuf};

use oci_spec::runtime::{
    LinuxCpuBuilder, LinuxMemoryBuilder, LinuxNamespace, LinuxNamespaceType, LinuxResources, LinuxResourcesBuilder,
    Mount, Spec,
};
use serde::Deserialize;

use super::error::FieldError;

/// The annotations by which containerd's CRI tells the sum of what a pod's containers may use.
const MEMORY: &str = "io.kubernetes.cri.sandbox-memory";
const CPU_QUOTA: &str = "io.kubernetes.cri.sandbox-cpu-quota";
const CPU_PERIOD: &str = "io.kubernetes.cri.sandbox-cpu-period";
const CPU_SHARES: &str = "io.kubernetes.cri.sandbox-cpu-shares";

/// Those by which CRI-O tells the same, and what the pod may use besides, each by its older and its newer name: CRI's own
/// messages, in JSON.
const RESOURCES: [&str; 2] = ["io.kubernetes.cri-o.PodLinuxResources", "pod-linux-resources.crio.io"];
pub(crate) const OVERHEAD: [&str; 2] = ["io.kubernetes.cri-o.PodLinuxOverhead", "pod-linux-overhead.crio.io"];

/// Where a container of a pod has what its sandbox's configuration mounts there, unless it has something else there itself:
/// what it is called, and how it finds others.
const INHERITED: [&str; 3] = ["/etc/hostname", "/etc/hosts", "/etc/resolv.conf"];

/// By which paths containers of a pod name its namespaces.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct PodNamespaces {
    /// The process that stands for the sandbox.
    pub(crate) pid: u32,
    /// Those that the sandbox's own configuration names.
    pub(crate) named: Vec<(LinuxNamespaceType, PathBuf)>,
}

/// The namespaces that a configuration names by a path.
pub(super) fn named(namespaces: &[LinuxNamespace]) -> Vec<(LinuxNamespaceType, PathBuf)> {
    let named = namespaces.iter().filter_map(|namespace| Some((namespace.typ(), namespace.path().clone()?)));
    named.filter(|(_, path)| !path.as_os_str().is_empty()).collect()
}

impl PodNamespaces {
    /// Where the sandbox has its network from.
    pub(crate) fn network(&self) -> Option<&Path> {
        self.named.iter().find(|(kind, _)| *kind == LinuxNamespaceType::Network).map(|(_, path)| path.as_path())
    }

    /// Whether a path names the pod's namespace of that kind.
    pub(super) fn include(&self, kind: LinuxNamespaceType, path: &Path) -> bool {
        let name = match kind {
            LinuxNamespaceType::Ipc => "ipc",
            LinuxNamespaceType::Uts => "uts",
            LinuxNamespaceType::Network => "net",
            LinuxNamespaceType::Pid => "pid",
            _ => return false,
        };
        path == Path::new(&format!("/proc/{}/ns/{name}", self.pid))
            || self.named.iter().any(|(named, place)| *named == kind && place == path)
    }
}

/// How a configuration is to be understood.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Role<'a> {
    /// A container in a machine of its own.
    Alone,
    /// A pod's sandbox: its machine, its names, its network. Its process is none.
    Sandbox,
    /// A container in a pod's machine, with the mounts that it inherits, whose trees have names with that prefix.
    Member { namespaces: &'a PodNamespaces, mounts: &'a [Mount], prefix: &'a str },
}

impl Role<'_> {
    /// The pod that the container is in.
    pub(super) fn pod(&self) -> Option<&PodNamespaces> {
        match self {
            Self::Member { namespaces, .. } => Some(namespaces),
            Self::Alone | Self::Sandbox => None,
        }
    }
}

/// What containers of a pod inherit of its sandbox's configuration.
pub(super) fn inherited(sandbox: &[Mount]) -> Vec<Mount> {
    sandbox
        .iter()
        .filter(|mount| INHERITED.iter().any(|place| mount.destination() == Path::new(place)))
        .cloned()
        .collect()
}

/// The mounts of a container, with those that it inherits.
pub(super) fn mounts(spec: &Spec, role: Role<'_>) -> Vec<Mount> {
    let mut mounts = spec.mounts().clone().unwrap_or_default();
    let Role::Member { mounts: inherited, .. } = role else {
        return mounts;
    };
    let is_read_only = spec.root().as_ref().is_some_and(|root| root.readonly() == Some(true));
    for mount in inherited {
        if mounts.iter().any(|own| own.destination() == mount.destination()) {
            continue;
        }
        let mut mount = mount.clone();
        if is_read_only {
            let options = mount.options().iter().flatten().cloned().chain(["ro".to_owned()]).collect();
            mount.set_options(Some(options));
        }
        mounts.push(mount);
    }
    mounts
}

/// CRI's `LinuxContainerResources`, as far as a pod is made of it; 0 says nothing.
#[derive(Debug, Default, Clone, PartialEq, Eq, Deserialize)]
#[serde(default)]
struct CriResources {
    cpu_period: i64,
    cpu_quota: i64,
    cpu_shares: i64,
    memory_limit_in_bytes: i64,
}

impl CriResources {
    /// The sum of a pod's containers, from its sandbox's annotations.
    fn sum(annotations: &HashMap<String, String>) -> Result<Self, FieldError> {
        let sum = Self {
            cpu_period: number(annotations, CPU_PERIOD)?,
            cpu_quota: number(annotations, CPU_QUOTA)?,
            cpu_shares: number(annotations, CPU_SHARES)?,
            memory_limit_in_bytes: number(annotations, MEMORY)?,
        };
        if sum == Self::default() { Self::of_json(annotations, RESOURCES) } else { Ok(sum) }
    }

    /// What an annotation of one of these names says; nothing where there is none.
    fn of_json(annotations: &HashMap<String, String>, names: [&str; 2]) -> Result<Self, FieldError> {
        let Some((key, text)) = names.iter().find_map(|name| annotations.get_key_value(*name)) else {
            return Ok(Self::default());
        };
        // `null` is the pod's that says nothing.
        let parsed: Result<Option<Self>, _> = serde_json::from_str(text);
        let expected = "CRI's LinuxContainerResources in JSON";
        parsed
            .map(Option::unwrap_or_default)
            .map_err(|_| FieldError::invalid(format!("annotations[{key:?}]"), text, expected))
    }
}

/// What a pod as a whole may use; the sandbox's own limits are those of a process that does nothing.
#[derive(Debug)]
pub(super) struct Told {
    /// The sum of its containers'; its share of the processors with what the sandbox may use of them itself.
    pub(super) resources: LinuxResources,
    /// What it may use of memory besides, on the host; 0 if that is not told.
    pub(super) overhead_mib: u64,
    /// Whether what its containers may use of the processors is told, were it that they have no limit.
    pub(super) tells_cpu: bool,
}

/// What a pod may use, from its sandbox's annotations.
pub(super) fn told(annotations: &HashMap<String, String>) -> Result<Told, FieldError> {
    let (sum, overhead) = (CriResources::sum(annotations)?, CriResources::of_json(annotations, OVERHEAD)?);
    let broken = |error: oci_spec::OciSpecError| FieldError::unsupported("annotations", error.to_string());
    let positive = |number: i64| u64::try_from(number).ok().filter(|number| *number > 0);
    let mut cpu = LinuxCpuBuilder::default();
    if sum.cpu_quota != 0 {
        cpu = cpu.quota(sum.cpu_quota);
    }
    if let Some(period) = positive(sum.cpu_period) {
        cpu = cpu.period(period);
    }
    if let Some(shares) = positive(sum.cpu_shares) {
        cpu = cpu.shares(shares.saturating_add(positive(overhead.cpu_shares).unwrap_or(0)));
    }
    let mut limit = LinuxMemoryBuilder::default();
    if sum.memory_limit_in_bytes != 0 {
        limit = limit.limit(sum.memory_limit_in_bytes);
    }
    let resources = LinuxResourcesBuilder::default()
        .cpu(cpu.build().map_err(broken)?)
        .memory(limit.build().map_err(broken)?)
        .build()
        .map_err(broken)?;
    let tells_cpu = [sum.cpu_quota, sum.cpu_period, sum.cpu_shares].iter().any(|number| *number != 0);
    let overhead_mib = positive(overhead.memory_limit_in_bytes).unwrap_or(0) >> 20;
    Ok(Told { resources, overhead_mib, tells_cpu })
}

/// Whether the annotations tell what a pod's containers may use of memory together.
pub(crate) fn tells_memory(annotations: &BTreeMap<String, String>) -> bool {
    let annotations = annotations.iter().map(|(key, value)| (key.clone(), value.clone())).collect();
    // What cannot be understood has been refused before.
    CriResources::sum(&annotations).is_ok_and(|sum| sum.memory_limit_in_bytes > 0)
}

/// A number of an annotation; 0, which says nothing, where there is none.
fn number(annotations: &HashMap<String, String>, key: &str) -> Result<i64, FieldError> {
    let Some(text) = annotations.get(key) else { return Ok(0) };
    text.parse().map_err(|_| FieldError::invalid(format!("annotations[{key:?}]"), text, "a number"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn a_pods_namespaces_are_its_sandboxs() {
        let named = [
            (LinuxNamespaceType::Network, "/run/netns/cni-1".into()),
            (LinuxNamespaceType::Uts, "/run/utsns/1".into()),
        ];
        let pod = PodNamespaces { pid: 7, named: named.to_vec() };

        assert!(pod.include(LinuxNamespaceType::Ipc, Path::new("/proc/7/ns/ipc")));
        assert!(pod.include(LinuxNamespaceType::Network, Path::new("/proc/7/ns/net")));
        assert!(pod.include(LinuxNamespaceType::Network, Path::new("/run/netns/cni-1")));
        assert!(pod.include(LinuxNamespaceType::Uts, Path::new("/run/utsns/1")));
        assert!(!pod.include(LinuxNamespaceType::Ipc, Path::new("/run/utsns/1")));
        assert!(!pod.include(LinuxNamespaceType::Ipc, Path::new("/proc/8/ns/ipc")));
        assert!(!pod.include(LinuxNamespaceType::Ipc, Path::new("/proc/7/ns/uts")));
        assert!(!pod.include(LinuxNamespaceType::Mount, Path::new("/proc/7/ns/mnt")));
    }

    #[test]
    fn a_container_inherits_what_it_has_nothing_for() {
        let read = |json: serde_json::Value| serde_json::from_value::<Spec>(json).unwrap();
        let bind = |place: &str, source: &str| json!({"destination": place, "source": source, "options": ["rbind"]});
        let sandbox = read(json!({
            "ociVersion": "1.2.0",
            "mounts": [bind("/etc/hosts", "/pod"), bind("/etc/resolv.conf", "/pod"), bind("/other", "/pod")],
        }));
        let container = read(json!({
            "ociVersion": "1.2.0", "root": {"path": "r", "readonly": true}, "mounts": [bind("/etc/hosts", "/own")],
        }));
        let inherited = inherited(sandbox.mounts().as_deref().unwrap());
        let namespaces = PodNamespaces { pid: 7, named: Vec::new() };

        let mounts = mounts(&container, Role::Member { namespaces: &namespaces, mounts: &inherited, prefix: "" });

        let sources: Vec<_> = mounts.iter().filter_map(|mount| mount.source().as_deref()).collect();
        assert_eq!(sources, [Path::new("/own"), Path::new("/pod")]);
        assert_eq!(mounts[1].destination(), Path::new("/etc/resolv.conf"));
        assert_eq!(mounts[1].options().as_deref().unwrap(), ["rbind", "ro"]);
    }

    #[test]
    fn a_pods_resources_are_the_sum_that_its_annotations_tell() {
        let annotations = HashMap::from([
            (MEMORY.to_owned(), "268435456".to_owned()),
            (CPU_QUOTA.to_owned(), "150000".to_owned()),
            (CPU_PERIOD.to_owned(), "100000".to_owned()),
            (CPU_SHARES.to_owned(), "0".to_owned()),
        ]);

        let Told { resources, overhead_mib, tells_cpu } = told(&annotations).unwrap();

        assert_eq!((overhead_mib, tells_cpu), (0, true));
        let cpu = resources.cpu().as_ref().unwrap();
        assert_eq!(resources.memory().as_ref().unwrap().limit(), Some(268_435_456));
        assert_eq!((cpu.quota(), cpu.period(), cpu.shares()), (Some(150_000), Some(100_000), None));
    }

    #[test]
    fn cri_o_tells_the_sum_and_the_overhead_in_json() {
        for (resources, overhead) in [(RESOURCES[0], OVERHEAD[0]), (RESOURCES[1], OVERHEAD[1])] {
            let sum = r#"{"cpu_period":100000,"cpu_quota":150000,"cpu_shares":512,"memory_limit_in_bytes":268435456}"#;
            let besides = r#"{"cpu_shares":51,"memory_limit_in_bytes":314572800,"unified":{"x":"y"}}"#;
            let annotations =
                [(resources, sum), (overhead, besides)].map(|(key, text)| (key.to_owned(), text.to_owned()));

            let Told { resources, overhead_mib, tells_cpu } = told(&HashMap::from(annotations.clone())).unwrap();

            let cpu = resources.cpu().as_ref().unwrap();
            assert_eq!((cpu.quota(), cpu.period(), cpu.shares()), (Some(150_000), Some(100_000), Some(563)));
            assert_eq!((resources.memory().as_ref().unwrap().limit(), overhead_mib), (Some(256 << 20), 300));
            assert!(tells_cpu && tells_memory(&annotations.into()));
        }
        let silent = [RESOURCES[0], OVERHEAD[0]].map(|key| (key.to_owned(), "null".to_owned()));
        assert_eq!(told(&silent.clone().into()).unwrap().overhead_mib, 0);
        assert!(!told(&silent.clone().into()).unwrap().tells_cpu);
        assert!(!tells_memory(&silent.into()));
    }

    #[test]
    fn a_sum_of_no_memory_tells_nothing() {
        let tells = |text: &str| tells_memory(&BTreeMap::from([(MEMORY.to_owned(), text.to_owned())]));

        assert!(tells("268435456") && !tells("0") && !tells("-1"));
        assert!(!tells_memory(&BTreeMap::new()));
    }

    #[test]
    fn shares_without_a_quota_tell_that_there_is_none() {
        let tells =
            |key: &str, text: &str| told(&HashMap::from([(key.to_owned(), text.to_owned())])).unwrap().tells_cpu;

        assert!(tells(CPU_SHARES, "2") && tells(CPU_QUOTA, "-1"));
        assert!(!tells(CPU_SHARES, "0") && !tells(MEMORY, "268435456"));
    }

    #[test]
    fn a_number_that_is_none_is_named() {
        let annotations = HashMap::from([(MEMORY.to_owned(), "lots".to_owned())]);

        let error = told(&annotations).unwrap_err().to_string();

        assert!(error.starts_with("annotations[\"io.kubernetes.cri.sandbox-memory\"]: \"lots\""), "{error}");
        let annotations = HashMap::from([(OVERHEAD[0].to_owned(), "{\"cpu_shares\":\"2\"}".to_owned())]);
        let error = told(&annotations).unwrap_err().to_string();
        assert!(error.starts_with("annotations[\"io.kubernetes.cri-o.PodLinuxOverhead\"]: "), "{error}");
    }
}
