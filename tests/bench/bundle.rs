// SPDX-License-Identifier: Apache-2.0
//! The bundles that every runtime is given: the same busybox root, and a config.json of the usual kind.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::Path;

use serde_json::{Value, json};

use crate::error::{BenchError, file};
use crate::stage::Stage;

/// Memory of a measured guest.
pub(crate) const GUEST_MEM_SIZE_MIB: u64 = 128;

/// A bundle's name and what its process is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Bundle {
    /// `true`.
    True,
    /// `echo` of [`ECHO_OUTPUT`].
    Echo,
    /// The same, on a machine that may come to use four processors.
    Spare,
    /// Prints the guest's /proc/meminfo and [`IDLE_READY`], then sleeps.
    Idle,
    /// Uses up the guest's memory, and prints the kernel's messages: what it tells of memory then shows what the
    /// agent holds, which no container can see otherwise.
    Agent,
}

/// What the process of [`Bundle::Echo`] prints.
pub(crate) const ECHO_OUTPUT: &str = "hello from the container\n";

/// The last line of [`Bundle::Idle`] before it sleeps.
pub(crate) const IDLE_READY: &str = "ready";

impl Bundle {
    pub(crate) const ALL: [Self; 5] = [Self::True, Self::Echo, Self::Spare, Self::Idle, Self::Agent];

    /// The bundle's folder on the stage.
    pub(crate) fn folder(self) -> &'static Path {
        Path::new(match self {
            Self::True => "/bundles/true",
            Self::Echo => "/bundles/echo",
            Self::Spare => "/bundles/spare",
            Self::Idle => "/bundles/idle",
            Self::Agent => "/bundles/agent",
        })
    }

    fn process_args(self) -> Vec<String> {
        let shell = |script: String| vec!["sh".to_owned(), "-c".to_owned(), script];
        match self {
            Self::True => vec!["true".to_owned()],
            Self::Echo | Self::Spare => vec!["echo".to_owned(), ECHO_OUTPUT.trim_end().to_owned()],
            Self::Idle => shell(format!("cat /proc/meminfo; echo {IDLE_READY}; exec sleep 600")),
            Self::Agent => shell("tail /dev/zero >/dev/null 2>&1; dmesg".to_owned()),
        }
    }

    pub(crate) fn config(self) -> Value {
        let capabilities: &[&str] = match self {
            Self::Agent => &["CAP_SYSLOG"],
            _ => &["CAP_AUDIT_WRITE", "CAP_KILL", "CAP_NET_BIND_SERVICE"],
        };
        let most = if self == Self::Spare { "4" } else { "1" };
        let namespaces = ["pid", "network", "ipc", "uts", "mount", "cgroup"].map(|kind| json!({"type": kind}));
        json!({
            "ociVersion": "1.0.2",
            "process": {
                "terminal": false,
                "user": {"uid": 0, "gid": 0},
                "args": self.process_args(),
                "env": ["PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "TERM=xterm"],
                "cwd": "/",
                "capabilities": {"bounding": capabilities, "effective": capabilities, "permitted": capabilities},
                "rlimits": [{"type": "RLIMIT_NOFILE", "hard": 1024, "soft": 1024}],
                "noNewPrivileges": true,
            },
            "root": {"path": "rootfs", "readonly": true},
            "hostname": "bench",
            "annotations": {"io.bulkhead.memory_mib": GUEST_MEM_SIZE_MIB.to_string(), "io.bulkhead.max_vcpus": most},
            "mounts": mounts(),
            "linux": {
                "resources": {"devices": [{"allow": false, "access": "rwm"}]},
                "namespaces": namespaces,
                "maskedPaths": ["/proc/kcore", "/proc/keys", "/proc/timer_list", "/sys/firmware"],
                "readonlyPaths": ["/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"],
            },
        })
    }
}

/// The mounts that `runc spec` writes.
fn mounts() -> Value {
    let mount = |destination: &str, kind: &str, source: &str, options: &[&str]| json!({"destination": destination, "type": kind, "source": source, "options": options});
    json!([
        mount("/proc", "proc", "proc", &[]),
        mount("/dev", "tmpfs", "tmpfs", &["nosuid", "strictatime", "mode=755", "size=65536k"]),
        mount(
            "/dev/pts",
            "devpts",
            "devpts",
            &["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5"]
        ),
        mount("/dev/shm", "tmpfs", "shm", &["nosuid", "noexec", "nodev", "mode=1777", "size=65536k"]),
        mount("/dev/mqueue", "mqueue", "mqueue", &["nosuid", "noexec", "nodev"]),
        mount("/sys", "sysfs", "sysfs", &["nosuid", "noexec", "nodev", "ro"]),
        mount("/sys/fs/cgroup", "cgroup", "cgroup", &["nosuid", "noexec", "nodev", "relatime", "ro"]),
    ])
}

/// Writes all bundles to the stage, with the static busybox at `busybox`.
///
/// # Errors
///
/// The file that could not be written.
pub(crate) fn write_all(stage: &Stage, busybox: &Path) -> Result<(), BenchError> {
    for bundle in Bundle::ALL {
        let rootfs = bundle.folder().join("rootfs");
        stage.copy(busybox, rootfs.join("bin/busybox"))?;
        for applet in ["sh", "cat", "dmesg", "echo", "sleep", "tail", "true"] {
            let link = stage.at(rootfs.join("bin").join(applet));
            symlink("busybox", &link).map_err(file("create", &link))?;
        }
        for folder in ["dev", "etc", "proc", "sys", "tmp"] {
            let path = stage.at(rootfs.join(folder));
            fs::create_dir_all(&path).map_err(file("create", &path))?;
        }
        let config = stage.at(bundle.folder().join("config.json"));
        fs::write(&config, bundle.config().to_string()).map_err(file("write", &config))?;
    }
    Ok(())
}
