// SPDX-License-Identifier: Apache-2.0
//! The parts of a configuration's `linux` that describe the container: namespaces, sysctls, devices, paths.

use std::collections::HashMap;
use std::path::Path;

use bulkhead_protocol::agent::{Device, Namespace, NamespaceKind, Process, TimeOffset};
use oci_spec::runtime::{Linux, LinuxDevice, LinuxDeviceType, LinuxNamespace, LinuxNamespaceType, LinuxTimeOffset};

use super::error::{FieldError, without_nul};
use super::id_mappings::IdMappings;
use super::mount_options::propagation_flags;
use super::network_namespace;
use super::pod::Role;
use crate::network::NetworkNamespace;

/// Sysctls of the IPC namespace, besides those under `fs.mqueue.`.
const IPC_SYSCTLS: &[&str] = &[
    "kernel.msgmax",
    "kernel.msgmnb",
    "kernel.msgmni",
    "kernel.sem",
    "kernel.shmall",
    "kernel.shmmax",
    "kernel.shmmni",
    "kernel.shm_rmid_forced",
];

/// The namespaces of a container.
#[derive(Debug)]
pub(crate) struct Namespaces {
    kinds: Vec<NamespaceKind>,
    /// Whether its processes are those of its pod.
    common_pids: bool,
    /// One of the host's, whose interfaces become the guest's.
    network: Option<NetworkNamespace>,
}

impl Namespaces {
    /// Checks the list. A container in a virtual machine always has a mount and a pid namespace.
    ///
    /// A path that names a namespace of the pod that the container is in means that it has none of its own: the pod's are
    /// the guest's. So a sandbox' are, whose engine may have made some on the host for it.
    pub(crate) fn translate(namespaces: &[LinuxNamespace], role: Role<'_>) -> Result<Self, FieldError> {
        let pod = role.pod();
        let mut kinds = Vec::with_capacity(namespaces.len() + 2);
        let (mut network, mut common_pids) = (None, false);
        for (index, namespace) in namespaces.iter().enumerate() {
            let field = |name: &str| format!("linux.namespaces[{index}].{name}");
            if let Some(path) = namespace.path().as_ref().filter(|path| !path.as_os_str().is_empty()) {
                if pod.is_some_and(|pod| pod.include(namespace.typ(), path)) {
                    common_pids |= namespace.typ() == LinuxNamespaceType::Pid;
                    continue;
                }
                match (namespace.typ(), role) {
                    (LinuxNamespaceType::Network, Role::Alone | Role::Sandbox) => {
                        network = Some(network_namespace::open(&field("path"), path)?);
                    }
                    (LinuxNamespaceType::Ipc | LinuxNamespaceType::Uts, Role::Sandbox) => {}
                    _ => {
                        let path = path.display();
                        let what = format!("{path} is a namespace of the host's kernel; the container has its own");
                        return Err(FieldError::unsupported(field("path"), what));
                    }
                }
            }
            let kind = match namespace.typ() {
                LinuxNamespaceType::Mount => NamespaceKind::MOUNT,
                LinuxNamespaceType::Pid => NamespaceKind::PID,
                LinuxNamespaceType::Ipc => NamespaceKind::IPC,
                LinuxNamespaceType::Uts => NamespaceKind::UTS,
                LinuxNamespaceType::Cgroup => NamespaceKind::CGROUP,
                LinuxNamespaceType::Network => NamespaceKind::NETWORK,
                LinuxNamespaceType::User => NamespaceKind::USER,
                LinuxNamespaceType::Time => NamespaceKind::TIME,
            };
            if kinds.contains(&kind) {
                return Err(FieldError::invalid(field("type"), namespace.typ(), "given once only"));
            }
            kinds.push(kind);
        }
        // A list without it asks for the host's, or in a pod for the pod's; no list asks for nothing.
        if pod.is_none() && !kinds.is_empty() && !kinds.contains(&NamespaceKind::NETWORK) {
            return Err(network_namespace::absent());
        }
        if common_pids && kinds.contains(&NamespaceKind::USER) {
            let what = "the pod's processes in a container with a user namespace of its own";
            return Err(FieldError::unsupported("linux.namespaces", what));
        }
        let always =
            if common_pids { &[NamespaceKind::MOUNT][..] } else { &[NamespaceKind::MOUNT, NamespaceKind::PID] };
        for kind in always {
            if !kinds.contains(kind) {
                kinds.push(*kind);
            }
        }
        Ok(Self { kinds, common_pids, network })
    }

    /// The host's network namespace that was named.
    pub(crate) fn into_network(self) -> Option<NetworkNamespace> {
        self.network
    }

    /// Whether the container sees the processes of its pod.
    pub(crate) fn common_pids(&self) -> bool {
        self.common_pids
    }

    /// The namespaces that the agent makes. The interfaces of one of the host's are in the guest's own.
    pub(crate) fn to_wire(&self) -> Vec<Namespace> {
        let is_guests = |kind: &NamespaceKind| *kind == NamespaceKind::NETWORK && self.network.is_some();
        let kinds = self.kinds.iter().filter(|kind| !is_guests(kind));
        kinds.map(|kind| Namespace { kind: (*kind).into(), ..Namespace::default() }).collect()
    }

    fn has(&self, kind: NamespaceKind) -> bool {
        self.kinds.contains(&kind)
    }

    /// Checks `linux.uidMappings` and `gidMappings`, which a user namespace needs, and which need one; and that the process
    /// has its ids there.
    pub(crate) fn id_mappings(
        &self,
        linux: Option<&Linux>,
        process: &Process,
    ) -> Result<Option<IdMappings>, FieldError> {
        let field = |name: &str| format!("linux.{name}");
        let (uids, gids) =
            linux.map_or((None, None), |linux| (linux.uid_mappings().as_ref(), linux.gid_mappings().as_ref()));
        let mappings = IdMappings::translate(field, uids, gids)?;
        let Some(mappings) = mappings else {
            if self.has(NamespaceKind::USER) {
                return Err(FieldError::missing(field("uidMappings"), "a user namespace has no ids without them"));
            }
            return Ok(None);
        };
        if !self.has(NamespaceKind::USER) {
            let what = "the container has no user namespace in linux.namespaces";
            return Err(FieldError::unsupported(field("uidMappings"), what));
        }
        if !mappings.has_user(0) || !mappings.has_group(0) {
            let name = if mappings.has_user(0) { "gidMappings" } else { "uidMappings" };
            return Err(FieldError::missing(field(name), "the container's root (0) has to be mapped"));
        }
        let gids = process.additional_gids.iter().enumerate();
        let gids = gids.map(|(index, gid)| (format!("additionalGids[{index}]"), *gid));
        let unmapped = if mappings.has_user(process.uid) {
            let mut gids = std::iter::once(("gid".to_owned(), process.gid)).chain(gids);
            gids.find(|(_, gid)| !mappings.has_group(*gid)).map(|(name, gid)| (name, gid, "linux.gidMappings"))
        } else {
            Some(("uid".to_owned(), process.uid, "linux.uidMappings"))
        };
        match unmapped {
            Some((name, id, list)) => {
                Err(FieldError::invalid(format!("process.user.{name}"), id, format!("mapped by {list}")))
            }
            None => Ok(Some(mappings)),
        }
    }

    /// Checks `linux.timeOffsets`, which need a time namespace.
    pub(crate) fn time_offsets(
        &self,
        offsets: Option<&HashMap<String, LinuxTimeOffset>>,
    ) -> Result<Vec<TimeOffset>, FieldError> {
        let mut wire = Vec::new();
        for (name, offset) in offsets.into_iter().flatten() {
            let field = format!("linux.timeOffsets[{name:?}]");
            let clock = match name.as_str() {
                "monotonic" => libc::CLOCK_MONOTONIC,
                "boottime" => libc::CLOCK_BOOTTIME,
                _ => return Err(FieldError::invalid(field, name, "monotonic or boottime")),
            };
            if !self.has(NamespaceKind::TIME) {
                let what = "the container has no time namespace in linux.namespaces";
                return Err(FieldError::unsupported(field, what));
            }
            let nanoseconds = offset.nanosecs().unwrap_or(0);
            if nanoseconds > 999_999_999 {
                return Err(FieldError::invalid(field, nanoseconds, "less than a second"));
            }
            wire.push(TimeOffset { clock, seconds: offset.secs().unwrap_or(0), nanoseconds, ..TimeOffset::default() });
        }
        wire.sort_by_key(|offset| offset.clock);
        Ok(wire)
    }

    /// Checks a `hostname` or `domainname`, which needs a UTS namespace and fits into 64 bytes.
    pub(crate) fn check_name(&self, field: &'static str, name: &str) -> Result<(), FieldError> {
        without_nul(|| field.to_owned(), name)?;
        if name.len() > 64 {
            return Err(FieldError::invalid(field, name, "at most 64 bytes long"));
        }
        if !name.is_empty() && !self.has(NamespaceKind::UTS) {
            return Err(FieldError::invalid(field, name, "possible without a uts namespace in linux.namespaces"));
        }
        Ok(())
    }

    /// Checks that each sysctl belongs to a namespace of the container's own, as runc does.
    pub(crate) fn check_sysctls(&self, sysctls: &HashMap<String, String>) -> Result<(), FieldError> {
        for (key, value) in sysctls {
            let field = format!("linux.sysctl[{key:?}]");
            without_nul(|| field.clone(), key)?;
            without_nul(|| field.clone(), value)?;
            let dotted = dotted_sysctl(key);
            let (kind, name) = if IPC_SYSCTLS.contains(&dotted.as_str()) || dotted.starts_with("fs.mqueue.") {
                (NamespaceKind::IPC, "ipc")
            } else if dotted.starts_with("net.") {
                (NamespaceKind::NETWORK, "network")
            } else if dotted == "kernel.domainname" {
                (NamespaceKind::UTS, "uts")
            } else if dotted == "kernel.hostname" {
                return Err(FieldError::unsupported(field, "use the field hostname instead"));
            } else {
                return Err(FieldError::unsupported(field, "it does not belong to a namespace of the container"));
            };
            if !self.has(kind) {
                let what = format!("the container has no {name} namespace in linux.namespaces");
                return Err(FieldError::unsupported(field, what));
            }
            if dotted.split('.').any(|part| part.is_empty() || part == "..") || dotted.contains("/.") {
                return Err(FieldError::invalid(field, key, "the name of a sysctl"));
            }
        }
        Ok(())
    }
}

/// The dotted form of a name that may be dotted or slashed, as sysctl(8) reads it: the first separator decides, and
/// then the other character stands for the separator inside a part.
fn dotted_sysctl(key: &str) -> String {
    let slashed = key.find(['.', '/']).is_some_and(|at| key.as_bytes()[at] == b'/');
    if !slashed {
        return key.to_owned();
    }
    key.chars()
        .map(|c| match c {
            '/' => '.',
            '.' => '/',
            other => other,
        })
        .collect()
}

/// Checks the devices and brings them to their wire form; they are nodes for the guest's own devices, and for block devices of
/// the host, which have another number in the guest.
pub(crate) fn devices(devices: &[LinuxDevice]) -> Result<Vec<Device>, FieldError> {
    devices
        .iter()
        .enumerate()
        .map(|(index, device)| {
            let path = device.path().to_string_lossy().into_owned();
            let field = |name: &str| format!("linux.devices[{index}].{name}");
            absolute(|| field("path"), &path)?;
            match device.typ() {
                LinuxDeviceType::B | LinuxDeviceType::C | LinuxDeviceType::U | LinuxDeviceType::P => {}
                LinuxDeviceType::A => return Err(FieldError::invalid(field("type"), "a", "b, c, u or p")),
            }
            // Linux device numbers: 12 bits of major, 20 of minor.
            for (name, number, max) in [("major", device.major(), 0xfff), ("minor", device.minor(), 0xf_ffff)] {
                if !(0..=max).contains(&number) {
                    return Err(FieldError::invalid(field(name), number, format!("from 0 to {max}")));
                }
            }
            let mode = device.file_mode().unwrap_or(0o666);
            // The file type bits that some engines leave in the mode say nothing that `type` does not.
            let permissions = mode & !libc::S_IFMT;
            if permissions > 0o7777 {
                return Err(FieldError::invalid(field("fileMode"), mode, "permission bits"));
            }
            Ok(Device {
                path,
                kind: device.typ().as_str().to_owned(),
                major: device.major(),
                minor: device.minor(),
                mode: permissions,
                uid: device.uid().unwrap_or(0),
                gid: device.gid().unwrap_or(0),
                ..Device::default()
            })
        })
        .collect()
}

/// Checks `maskedPaths` or `readonlyPaths`.
pub(crate) fn check_paths(list: &'static str, paths: &[String]) -> Result<(), FieldError> {
    paths.iter().enumerate().try_for_each(|(index, path)| absolute(|| format!("linux.{list}[{index}]"), path))
}

fn absolute(field: impl Fn() -> String, path: &str) -> Result<(), FieldError> {
    without_nul(&field, path)?;
    if Path::new(path).is_absolute() { Ok(()) } else { Err(FieldError::invalid(field(), path, "an absolute path")) }
}

/// The MS_* flags of `linux.rootfsPropagation`; 0 for the default.
pub(crate) fn rootfs_propagation(name: &str) -> Result<u64, FieldError> {
    if name.is_empty() {
        return Ok(0);
    }
    propagation_flags(name)
        .ok_or_else(|| FieldError::invalid("linux.rootfsPropagation", name, "a propagation mode such as private"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::spec::PodNamespaces;
    use serde_json::{Value, json};

    fn namespaces(value: Value) -> Result<Namespaces, String> {
        let list: Vec<LinuxNamespace> = serde_json::from_value(value).unwrap();
        Namespaces::translate(&list, Role::Alone).map_err(|error| error.to_string())
    }

    #[test]
    fn mount_and_pid_are_always_there() {
        let translated = namespaces(json!([{"type": "network"}, {"type": "pid"}])).unwrap();

        assert_eq!(translated.kinds, [NamespaceKind::NETWORK, NamespaceKind::PID, NamespaceKind::MOUNT]);
        assert_eq!(namespaces(json!([])).unwrap().kinds, [NamespaceKind::MOUNT, NamespaceKind::PID]);
    }

    #[test]
    fn what_cannot_cross_to_a_guest_is_refused() {
        let cases = [
            (json!([{"type": "network", "path": "/run/no/such"}]), "linux.namespaces[0].path: cannot use /run/no/such"),
            (json!([{"type": "ipc", "path": "/proc/1/ns/ipc"}]), "linux.namespaces[0].path: not supported"),
            (json!([{"type": "pid"}]), "linux.namespaces: not supported: without a network namespace"),
            (json!([{"type": "pid"}, {"type": "pid"}]), "linux.namespaces[1].type: \"pid\" is not given once only"),
        ];
        for (list, expected) in cases {
            let error = namespaces(list).unwrap_err();
            assert!(error.starts_with(expected), "{error}");
        }
        assert!(namespaces(json!([{"type": "ipc", "path": ""}, {"type": "network"}])).is_ok());
    }

    #[test]
    fn a_sandbox_has_the_ones_that_its_engine_has_made_for_it() {
        let translate = |value: Value| {
            let list: Vec<LinuxNamespace> = serde_json::from_value(value).unwrap();
            Namespaces::translate(&list, Role::Sandbox).map_err(|error| error.to_string())
        };
        let pinned = |kind: &str| json!([{"type": "network"}, {"type": kind, "path": format!("/run/{kind}ns/1")}]);

        for (name, kind) in [("ipc", NamespaceKind::IPC), ("uts", NamespaceKind::UTS)] {
            assert!(translate(pinned(name)).unwrap().kinds.contains(&kind));
        }
        for name in ["pid", "user", "mount"] {
            let refused = translate(pinned(name)).unwrap_err();
            assert!(refused.starts_with("linux.namespaces[1].path: not supported"), "{refused}");
        }
    }

    #[test]
    fn a_pods_namespaces_are_shared_and_no_others() {
        let named = vec![(LinuxNamespaceType::Ipc, "/run/ipcns/1".into())];
        let pod = PodNamespaces { pid: 7, named };
        let role = Role::Member { namespaces: &pod, mounts: &[], prefix: "" };
        let translate = |value: Value| {
            let list: Vec<LinuxNamespace> = serde_json::from_value(value).unwrap();
            Namespaces::translate(&list, role).map_err(|error| error.to_string())
        };

        let pinned = translate(json!([{"type": "ipc", "path": "/run/ipcns/1"}, {"type": "pid"}])).unwrap();
        assert_eq!(pinned.kinds, [NamespaceKind::PID, NamespaceKind::MOUNT]);
        let joined = translate(json!([
            {"type": "ipc", "path": "/proc/7/ns/ipc"}, {"type": "uts"}, {"type": "network", "path": "/proc/7/ns/net"}
        ]))
        .unwrap();
        assert_eq!(joined.kinds, [NamespaceKind::UTS, NamespaceKind::MOUNT, NamespaceKind::PID]);
        assert!(!joined.common_pids());
        let common = translate(json!([{"type": "pid", "path": "/proc/7/ns/pid"}])).unwrap();
        assert_eq!((common.kinds.as_slice(), common.common_pids()), ([NamespaceKind::MOUNT].as_slice(), true));
        let user = translate(json!([{"type": "pid", "path": "/proc/7/ns/pid"}, {"type": "user"}])).unwrap_err();
        assert!(user.contains("a user namespace of its own"), "{user}");
        for (kind, path) in [("pid", "/proc/8/ns/pid"), ("ipc", "/proc/8/ns/ipc"), ("network", "/proc/8/ns/net")] {
            let error = translate(json!([{"type": kind, "path": path}])).unwrap_err();
            assert!(error.starts_with("linux.namespaces[0].path: not supported"), "{error}");
        }
    }

    #[test]
    fn offsets_need_a_time_namespace_and_a_known_clock() {
        let with = namespaces(json!([{"type": "time"}, {"type": "network"}])).unwrap();
        let without = namespaces(json!([])).unwrap();
        let offsets = |namespaces: &Namespaces, value: Value| {
            let offsets: HashMap<String, LinuxTimeOffset> = serde_json::from_value(value).unwrap();
            namespaces.time_offsets(Some(&offsets)).map_err(|error| error.to_string())
        };

        let both = json!({"boottime": {"secs": -5}, "monotonic": {"secs": 1, "nanosecs": 7}});
        let wire = offsets(&with, both).unwrap();

        assert_eq!((wire[0].clock, wire[0].seconds, wire[0].nanoseconds), (1, 1, 7));
        assert_eq!((wire[1].clock, wire[1].seconds), (7, -5));
        assert!(offsets(&without, json!({"boottime": {"secs": 1}})).is_err());
        assert!(offsets(&with, json!({"realtime": {"secs": 1}})).is_err());
        assert!(offsets(&with, json!({"boottime": {"nanosecs": 1_000_000_000}})).is_err());
        assert!(offsets(&without, json!({})).is_ok());
    }

    #[test]
    fn sysctls_must_belong_to_a_namespace_of_the_container() {
        let all = namespaces(json!([{"type": "ipc"}, {"type": "network"}, {"type": "uts"}])).unwrap();
        let none = namespaces(json!([])).unwrap();
        let check = |namespaces: &Namespaces, key: &str| {
            namespaces.check_sysctls(&HashMap::from([(key.to_owned(), "1".to_owned())])).is_ok()
        };

        for key in ["kernel.sem", "kernel/shmmax", "fs.mqueue.msg_max", "net.core.somaxconn", "net/ipv4/conf/eth0.1/x"]
        {
            assert!(check(&all, key), "{key}");
            assert!(!check(&none, key), "{key}");
        }
        for key in ["kernel.hostname", "vm.swappiness", "kernel.panic", "net", "", "net...x", "net/../kernel/panic"] {
            assert!(!check(&all, key), "{key}");
        }
    }

    #[test]
    fn a_hostname_needs_a_uts_namespace() {
        let with = namespaces(json!([{"type": "uts"}, {"type": "network"}])).unwrap();
        let without = namespaces(json!([])).unwrap();

        assert!(with.check_name("hostname", "box").is_ok());
        assert!(with.check_name("hostname", &"x".repeat(65)).is_err());
        assert!(without.check_name("hostname", "box").is_err());
        assert!(without.check_name("hostname", "").is_ok());
    }

    #[test]
    fn devices_are_checked_and_translated() {
        let translate = |value: Value| {
            let list: Vec<LinuxDevice> = serde_json::from_value(json!([value])).unwrap();
            devices(&list).map_err(|error| error.to_string())
        };

        let fuse = json!({"path": "/dev/fuse", "type": "c", "major": 10, "minor": 229, "fileMode": 0o020_666});
        let fuse = translate(fuse).unwrap().remove(0);

        assert_eq!((fuse.kind.as_str(), fuse.major, fuse.minor, fuse.mode), ("c", 10, 229, 0o666));
        let cases = [
            (json!({"path": "dev/x", "type": "c"}), "linux.devices[0].path: \"dev/x\" is not an absolute path"),
            (json!({"path": "/x", "type": "a"}), "linux.devices[0].type: \"a\" is not b, c, u or p"),
            (json!({"path": "/x", "type": "c", "major": 4096}), "linux.devices[0].major: \"4096\" is not from 0"),
            (json!({"path": "/x", "type": "c", "minor": -1}), "linux.devices[0].minor: \"-1\" is not from 0"),
        ];
        for (device, expected) in cases {
            let error = translate(device).unwrap_err();
            assert!(error.starts_with(expected), "{error}");
        }
    }

    #[test]
    fn propagation_of_the_root_is_a_known_mode() {
        assert_eq!(rootfs_propagation("").unwrap(), 0);
        assert_eq!(rootfs_propagation("rslave").unwrap(), libc::MS_SLAVE | libc::MS_REC);
        assert!(rootfs_propagation("sideways").is_err());
    }
}
