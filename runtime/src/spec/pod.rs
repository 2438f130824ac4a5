// SPDX-License-Identifier: Apache-2.0
//! What a configuration means in a pod: whose namespaces it names, and how large the pod's machine is.

use std::collections::{BTreeMap, HashMap};
use std::path::{Path, PathBuf};

use oci_spec::runtime::{
    LinuxCpuBuilder, LinuxMemoryBuilder, LinuxNamespaceType, LinuxResources, LinuxResourcesBuilder, Mount, Spec,
};

use super::error::FieldError;

/// The annotations by which containerd's CRI tells the sum of what a pod's containers may use.
const MEMORY: &str = "io.kubernetes.cri.sandbox-memory";
const CPU_QUOTA: &str = "io.kubernetes.cri.sandbox-cpu-quota";
const CPU_PERIOD: &str = "io.kubernetes.cri.sandbox-cpu-period";
const CPU_SHARES: &str = "io.kubernetes.cri.sandbox-cpu-shares";

/// Where a container of a pod has what its sandbox's configuration mounts there, unless it has something else there itself:
/// what it is called, and how it finds others.
const INHERITED: [&str; 3] = ["/etc/hostname", "/etc/hosts", "/etc/resolv.conf"];

/// By which paths containers of a pod name its namespaces.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct PodNamespaces {
    /// The process that stands for the sandbox.
    pub(crate) pid: u32,
    /// Where the sandbox has its network from.
    pub(crate) network: Option<PathBuf>,
}

impl PodNamespaces {
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
            || (kind == LinuxNamespaceType::Network && self.network.as_deref() == Some(path))
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

/// What a pod as a whole may use, from its sandbox's annotations; the sandbox's own limits are those of a process that
/// does nothing.
pub(super) fn resources(annotations: &HashMap<String, String>) -> Result<LinuxResources, FieldError> {
    let memory = number(annotations, MEMORY)?;
    let (quota, period) = (number(annotations, CPU_QUOTA)?, number(annotations, CPU_PERIOD)?);
    let shares = number(annotations, CPU_SHARES)?;
    let broken = |error: oci_spec::OciSpecError| FieldError::unsupported("annotations", error.to_string());
    let mut cpu = LinuxCpuBuilder::default();
    if let Some(quota) = quota {
        cpu = cpu.quota(quota);
    }
    if let Some(period) = period.and_then(|period| u64::try_from(period).ok()) {
        cpu = cpu.period(period);
    }
    if let Some(shares) = shares.and_then(|shares| u64::try_from(shares).ok()) {
        cpu = cpu.shares(shares);
    }
    let mut limit = LinuxMemoryBuilder::default();
    if let Some(memory) = memory {
        limit = limit.limit(memory);
    }
    LinuxResourcesBuilder::default()
        .cpu(cpu.build().map_err(broken)?)
        .memory(limit.build().map_err(broken)?)
        .build()
        .map_err(broken)
}

/// Whether the annotations tell what a pod's containers may use of memory together.
pub(crate) fn tells_memory(annotations: &BTreeMap<String, String>) -> bool {
    annotations.get(MEMORY).and_then(|text| text.parse::<i64>().ok()).is_some_and(|memory| memory > 0)
}

/// A number of an annotation; 0 says nothing.
fn number(annotations: &HashMap<String, String>, key: &str) -> Result<Option<i64>, FieldError> {
    let Some(text) = annotations.get(key) else {
        return Ok(None);
    };
    match text.parse::<i64>() {
        Ok(0) => Ok(None),
        Ok(number) => Ok(Some(number)),
        Err(_) => Err(FieldError::invalid(format!("annotations[{key:?}]"), text, "a number")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn a_pods_namespaces_are_its_sandboxs() {
        let pod = PodNamespaces { pid: 7, network: Some("/run/netns/cni-1".into()) };

        assert!(pod.include(LinuxNamespaceType::Ipc, Path::new("/proc/7/ns/ipc")));
        assert!(pod.include(LinuxNamespaceType::Network, Path::new("/proc/7/ns/net")));
        assert!(pod.include(LinuxNamespaceType::Network, Path::new("/run/netns/cni-1")));
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
        let namespaces = PodNamespaces { pid: 7, network: None };

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

        let resources = resources(&annotations).unwrap();

        let cpu = resources.cpu().as_ref().unwrap();
        assert_eq!(resources.memory().as_ref().unwrap().limit(), Some(268_435_456));
        assert_eq!((cpu.quota(), cpu.period(), cpu.shares()), (Some(150_000), Some(100_000), None));
    }

    #[test]
    fn a_sum_of_no_memory_tells_nothing() {
        let tells = |text: &str| tells_memory(&BTreeMap::from([(MEMORY.to_owned(), text.to_owned())]));

        assert!(tells("268435456") && !tells("0") && !tells("-1"));
        assert!(!tells_memory(&BTreeMap::new()));
    }

    #[test]
    fn a_number_that_is_none_is_named() {
        let annotations = HashMap::from([(MEMORY.to_owned(), "lots".to_owned())]);

        let error = resources(&annotations).unwrap_err().to_string();

        assert!(error.starts_with("annotations[\"io.kubernetes.cri.sandbox-memory\"]: \"lots\""), "{error}");
    }
}
