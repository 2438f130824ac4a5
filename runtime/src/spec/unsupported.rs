// SPDX-License-Identifier: Apache-2.0
//! The fields that are refused by name: what they ask for is not done, and ignoring them would let a container run
//! with less protection, or with other meaning, than its author wrote.

use oci_spec::runtime::{Linux, Process, Spec};

use super::error::FieldError;

/// Refuses a configuration that uses a field which is not honoured. Empty and default values are not uses.
pub(crate) fn refuse_unsupported(spec: &Spec) -> Result<(), FieldError> {
    let checks = [
        (spec.solaris().is_some(), "solaris", "this is a Linux runtime"),
        (spec.windows().is_some(), "windows", "this is a Linux runtime"),
        (spec.zos().is_some(), "zos", "this is a Linux runtime"),
        (spec.vm().is_some(), "vm", "the virtual machine is described by annotations (io.bulkhead.…)"),
        (used(spec.uid_mappings()), "uidMappings", "user namespaces"),
        (used(spec.gid_mappings()), "gidMappings", "user namespaces"),
    ];
    refuse(&checks)?;
    if let Some(process) = spec.process() {
        refuse_process(process)?;
    }
    spec.linux().as_ref().map_or(Ok(()), refuse_linux)
}

/// The same for a process alone, as one that is added to a container.
pub(super) fn refuse_process(process: &Process) -> Result<(), FieldError> {
    let named = |value: &Option<String>| value.as_ref().is_some_and(|value| !value.is_empty());
    let apparmor = process.apparmor_profile().as_deref().is_some_and(|name| !is_of_every_container(name));
    refuse(&[
        (named(process.command_line()), "process.commandLine", "a Windows field; use process.args"),
        (named(process.user().username()), "process.user.username", "a Windows field; use process.user.uid"),
        (apparmor, "process.apparmorProfile", "AppArmor profiles: the guest's kernel has no AppArmor"),
        (named(process.selinux_label()), "process.selinuxLabel", "SELinux labels: the guest's kernel has no SELinux"),
    ])
}

/// Whether an AppArmor profile is nobody's choice: none, or the one that an engine gives each container where the host has
/// AppArmor. Those keep programs from the interfaces of a kernel that they share with the host; here they share none.
fn is_of_every_container(profile: &str) -> bool {
    matches!(profile, "" | "unconfined" | "docker-default" | "cri-containerd.apparmor.d" | "nerdctl-default")
        || profile == "crio-default"
        || ["containers-default-", "crio-default-"].iter().any(|prefix| profile.starts_with(prefix))
}

fn refuse_linux(linux: &Linux) -> Result<(), FieldError> {
    let labelled = linux.mount_label().as_ref().is_some_and(|label| !label.is_empty());
    let net_devices = linux.net_devices().as_ref().is_some_and(|devices| !devices.is_empty());
    refuse(&[
        (labelled, "linux.mountLabel", "SELinux labels: the guest's kernel has no SELinux"),
        (linux.memory_policy().is_some(), "linux.memoryPolicy", "NUMA memory policies"),
        (net_devices, "linux.netDevices", "moving host network devices into a guest"),
    ])
}

fn used<T>(list: &Option<Vec<T>>) -> bool {
    list.as_ref().is_some_and(|list| !list.is_empty())
}

fn refuse(checks: &[(bool, &str, &str)]) -> Result<(), FieldError> {
    match checks.iter().find(|(used, ..)| *used) {
        Some((_, field, what)) => Err(FieldError::unsupported(*field, *what)),
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn refused(value: serde_json::Value) -> Option<String> {
        let spec: Spec = serde_json::from_value(value).unwrap();
        refuse_unsupported(&spec).err().map(|error| error.field)
    }

    #[test]
    fn each_unsupported_field_is_refused_by_name() {
        let linux = [("mountLabel", json!("l")), ("netDevices", json!({"eth0": {}}))];
        for (field, value) in linux {
            assert_eq!(refused(json!({"linux": {field: value}})), Some(format!("linux.{field}")));
        }
        let process = [("apparmorProfile", json!("strict")), ("selinuxLabel", json!("l")), ("commandLine", json!("x"))];
        for (field, value) in process {
            let spec = json!({"process": {"cwd": "/", "user": {}, field: value}});
            assert_eq!(refused(spec), Some(format!("process.{field}")));
        }
    }

    #[test]
    fn empty_and_default_values_are_not_refused() {
        let spec = json!({
            "process": {"cwd": "/", "user": {}, "apparmorProfile": "", "selinuxLabel": ""},
            "linux": {"uidMappings": [], "cgroupsPath": "", "mountLabel": "", "netDevices": {}, "timeOffsets": {}},
        });
        assert_eq!(refused(spec), None);
        assert_eq!(refused(json!({"process": {"cwd": "/", "user": {}, "apparmorProfile": "unconfined"}})), None);
    }
}
