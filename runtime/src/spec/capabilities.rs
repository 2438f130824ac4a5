// SPDX-License-Identifier: Apache-2.0
//! Capability names to the numbers of <linux/capability.h>.

use bulkhead_protocol::agent::Capabilities;
use oci_spec::runtime::{Capabilities as CapabilitySet, Capability, LinuxCapabilities};

use crate::logging;

/// The names, sorted.
const NAMES: [&str; 41] = [
    "CAP_AUDIT_CONTROL",
    "CAP_AUDIT_READ",
    "CAP_AUDIT_WRITE",
    "CAP_BLOCK_SUSPEND",
    "CAP_BPF",
    "CAP_CHECKPOINT_RESTORE",
    "CAP_CHOWN",
    "CAP_DAC_OVERRIDE",
    "CAP_DAC_READ_SEARCH",
    "CAP_FOWNER",
    "CAP_FSETID",
    "CAP_IPC_LOCK",
    "CAP_IPC_OWNER",
    "CAP_KILL",
    "CAP_LEASE",
    "CAP_LINUX_IMMUTABLE",
    "CAP_MAC_ADMIN",
    "CAP_MAC_OVERRIDE",
    "CAP_MKNOD",
    "CAP_NET_ADMIN",
    "CAP_NET_BIND_SERVICE",
    "CAP_NET_BROADCAST",
    "CAP_NET_RAW",
    "CAP_PERFMON",
    "CAP_SETFCAP",
    "CAP_SETGID",
    "CAP_SETPCAP",
    "CAP_SETUID",
    "CAP_SYSLOG",
    "CAP_SYS_ADMIN",
    "CAP_SYS_BOOT",
    "CAP_SYS_CHROOT",
    "CAP_SYS_MODULE",
    "CAP_SYS_NICE",
    "CAP_SYS_PACCT",
    "CAP_SYS_PTRACE",
    "CAP_SYS_RAWIO",
    "CAP_SYS_RESOURCE",
    "CAP_SYS_TIME",
    "CAP_SYS_TTY_CONFIG",
    "CAP_WAKE_ALARM",
];

/// The names of all capabilities, sorted.
#[must_use]
pub(crate) fn names() -> Vec<&'static str> {
    NAMES.to_vec()
}

/// The wire form; sets are sorted. Absent sets are empty. The kernel has no ambient capability that is not permitted and
/// inheritable too (capabilities(7)): one that is asked for all the same is left out, as by runc, whose own example
/// configuration has such; `--debug` names it.
#[must_use]
pub(crate) fn translate(capabilities: &LinuxCapabilities) -> Capabilities {
    let (inheritable, permitted) = (numbers(capabilities.inheritable()), numbers(capabilities.permitted()));
    let is_possible = |number: &u32| inheritable.contains(number) && permitted.contains(number);
    let (ambient, impossible): (Vec<_>, Vec<_>) = numbers(capabilities.ambient()).into_iter().partition(is_possible);
    if !impossible.is_empty() {
        let left_out = capabilities.ambient().iter().flatten().filter(|one| impossible.contains(&number(**one)));
        let names: Vec<_> = left_out.map(ToString::to_string).collect();
        let names = names.join(", ");
        logging::debug(format_args!(
            "process.capabilities.ambient: {names} left out: an ambient capability has to be permitted and inheritable"
        ));
    }
    Capabilities {
        bounding: numbers(capabilities.bounding()),
        effective: numbers(capabilities.effective()),
        inheritable,
        permitted,
        ambient,
        ..Capabilities::default()
    }
}

fn numbers(set: &Option<CapabilitySet>) -> Vec<u32> {
    let mut numbers: Vec<u32> = set.iter().flatten().map(|capability| number(*capability)).collect();
    numbers.sort_unstable();
    numbers
}

fn number(capability: Capability) -> u32 {
    use Capability::*;
    match capability {
        Chown => 0,
        DacOverride => 1,
        DacReadSearch => 2,
        Fowner => 3,
        Fsetid => 4,
        Kill => 5,
        Setgid => 6,
        Setuid => 7,
        Setpcap => 8,
        LinuxImmutable => 9,
        NetBindService => 10,
        NetBroadcast => 11,
        NetAdmin => 12,
        NetRaw => 13,
        IpcLock => 14,
        IpcOwner => 15,
        SysModule => 16,
        SysRawio => 17,
        SysChroot => 18,
        SysPtrace => 19,
        SysPacct => 20,
        SysAdmin => 21,
        SysBoot => 22,
        SysNice => 23,
        SysResource => 24,
        SysTime => 25,
        SysTtyConfig => 26,
        Mknod => 27,
        Lease => 28,
        AuditWrite => 29,
        AuditControl => 30,
        Setfcap => 31,
        MacOverride => 32,
        MacAdmin => 33,
        Syslog => 34,
        WakeAlarm => 35,
        BlockSuspend => 36,
        AuditRead => 37,
        Perfmon => 38,
        Bpf => 39,
        CheckpointRestore => 40,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_become_sorted_numbers() {
        let text = r#"{"bounding": ["CAP_KILL", "CAP_CHOWN", "CAP_CHECKPOINT_RESTORE"], "ambient": []}"#;
        let capabilities: LinuxCapabilities = serde_json::from_str(text).unwrap();

        let wire = translate(&capabilities);

        assert_eq!(wire.bounding, [0, 5, 40]);
        assert!(wire.ambient.is_empty() && wire.effective.is_empty());
    }

    #[test]
    fn ambient_ones_are_permitted_and_inheritable() {
        let text = r#"{"permitted": ["CAP_KILL", "CAP_CHOWN"], "inheritable": ["CAP_CHOWN", "CAP_MKNOD"],
                       "ambient": ["CAP_MKNOD", "CAP_CHOWN", "CAP_KILL"]}"#;

        assert_eq!(translate(&serde_json::from_str(text).unwrap()).ambient, [0]);
    }
}
