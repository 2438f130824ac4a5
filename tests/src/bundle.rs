// SPDX-License-Identifier: Apache-2.0
//! OCI bundles, made here so that no case depends on the runtime's own `spec`.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::{Value, json};

use crate::env::Env;
use crate::failure::{Context as _, Result, ensure, fail};

/// The static busybox of the machine.
const BUSYBOX: &str = "/bin/busybox";

/// What the container's root may do; what engines give by default.
const CAPABILITIES: &[&str] = &[
    "CAP_AUDIT_WRITE",
    "CAP_CHOWN",
    "CAP_DAC_OVERRIDE",
    "CAP_FOWNER",
    "CAP_FSETID",
    "CAP_KILL",
    "CAP_MKNOD",
    "CAP_NET_BIND_SERVICE",
    "CAP_NET_RAW",
    "CAP_SETFCAP",
    "CAP_SETGID",
    "CAP_SETPCAP",
    "CAP_SETUID",
    "CAP_SYS_CHROOT",
];

/// A bundle: a folder, and the configuration that [`Bundle::write`] puts there.
#[derive(Debug)]
pub(crate) struct Bundle {
    pub(crate) folder: PathBuf,
    pub(crate) spec: Value,
}

impl Bundle {
    /// A root file system that holds busybox and its applets.
    pub(crate) fn busybox(env: &Env) -> Result<Self> {
        let bundle = Self::new(env)?;
        let rootfs = bundle.rootfs();
        for folder in ["bin", "dev", "etc", "proc", "root", "sys", "tmp", "usr", "var"] {
            fs::create_dir_all(rootfs.join(folder))?;
        }
        fs::write(rootfs.join("etc/passwd"), "root:x:0:0::/root:/bin/sh\nuser:x:1000:1000::/:/bin/sh\n")?;
        fs::write(rootfs.join("etc/group"), "root:x:0:\nuser:x:1000:\n")?;
        fs::copy(BUSYBOX, rootfs.join("bin/busybox"))
            .context(|| format!("copying {BUSYBOX} (package busybox-static)"))?;
        let applets = Command::new(BUSYBOX).arg("--list").output().context(|| format!("running {BUSYBOX}"))?;
        for applet in String::from_utf8_lossy(&applets.stdout).lines().filter(|applet| *applet != "busybox") {
            symlink("busybox", rootfs.join("bin").join(applet))?;
        }
        Ok(bundle)
    }

    /// The Debian root file system, under an overlay that keeps it as it is.
    pub(crate) fn debian(env: &Env) -> Result<Self> {
        let lower = env.debian()?.to_owned();
        let bundle = Self::new(env)?;
        let layer = env.folder("layer")?;
        env.mount("tmpfs", "tmpfs", &layer, "size=1g,mode=755")?;
        let [upper, work] = ["upper", "work"].map(|name| layer.join(name));
        fs::create_dir(&upper)?;
        fs::create_dir(&work)?;
        let options = format!("lowerdir={},upperdir={},workdir={}", lower.display(), upper.display(), work.display());
        env.mount("overlay", "overlay", &bundle.rootfs(), &options)?;
        Ok(bundle)
    }

    fn new(env: &Env) -> Result<Self> {
        let folder = (1..).map(|number| env.work.join(format!("bundle{number}"))).find(|folder| !folder.exists());
        let Some(folder) = folder else { fail!("no free folder name") };
        fs::create_dir_all(folder.join("rootfs")).context(|| format!("making {}", folder.display()))?;
        Ok(Self { folder, spec: base() })
    }

    pub(crate) fn rootfs(&self) -> PathBuf {
        self.folder.join("rootfs")
    }

    /// A path below the root file system.
    pub(crate) fn path(&self, below: &str) -> PathBuf {
        self.rootfs().join(below.trim_start_matches('/'))
    }

    pub(crate) fn config(&self) -> PathBuf {
        self.folder.join("config.json")
    }

    pub(crate) fn args(&mut self, args: &[&str]) -> &mut Self {
        self.set("/process/args", json!(args))
    }

    /// The process is a shell with that script.
    pub(crate) fn sh(&mut self, script: &str) -> &mut Self {
        self.args(&["sh", "-c", script])
    }

    /// Sets the field at a JSON pointer; the objects on the way are made.
    pub(crate) fn set(&mut self, pointer: &str, value: Value) -> &mut Self {
        let mut place = &mut self.spec;
        for key in pointer.split('/').skip(1) {
            if !place.is_object() {
                *place = json!({});
            }
            place = &mut place[key];
        }
        *place = value;
        self
    }

    pub(crate) fn annotation(&mut self, name: &str, value: &str) -> &mut Self {
        self.set("/annotations", json!({ name: value }))
    }

    pub(crate) fn user(&mut self, uid: u32, gid: u32) -> &mut Self {
        self.set("/process/user", json!({ "uid": uid, "gid": gid }))
    }

    /// Adds a mount.
    pub(crate) fn mount(&mut self, kind: &str, source: &str, destination: &str, options: &[&str]) -> &mut Self {
        let mount = json!({ "type": kind, "source": source, "destination": destination, "options": options });
        if let Some(mounts) = self.spec["mounts"].as_array_mut() {
            mounts.push(mount);
        }
        self
    }

    /// Adds a bind mount of a place of the host.
    pub(crate) fn bind(&mut self, source: &Path, destination: &str, options: &[&str]) -> &mut Self {
        let options: Vec<&str> = std::iter::once("bind").chain(options.iter().copied()).collect();
        self.mount("bind", &source.display().to_string(), destination, &options)
    }

    /// Writes `config.json`.
    pub(crate) fn write(&self) -> Result {
        let path = self.config();
        fs::write(&path, format!("{:#}\n", self.spec)).context(|| format!("writing {}", path.display()))
    }

    /// Writes a file of that mode into the root file system.
    pub(crate) fn add_file(&self, below: &str, content: impl AsRef<[u8]>, mode: u32) -> Result<PathBuf> {
        use std::os::unix::fs::PermissionsExt;

        let path = self.path(below);
        ensure!(path.starts_with(self.rootfs()), "{below} leaves the root file system");
        if let Some(parent) = path.parent() {
            fs::create_dir_all(parent)?;
        }
        fs::write(&path, content).context(|| format!("writing {}", path.display()))?;
        fs::set_permissions(&path, fs::Permissions::from_mode(mode))?;
        Ok(path)
    }
}

fn base() -> Value {
    json!({
        "ociVersion": "1.0.2",
        "process": {
            "terminal": false,
            "user": { "uid": 0, "gid": 0 },
            "args": ["true"],
            "env": ["PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "TERM=xterm"],
            "cwd": "/",
            "capabilities": { "bounding": CAPABILITIES, "effective": CAPABILITIES, "permitted": CAPABILITIES },
            "rlimits": [{ "type": "RLIMIT_NOFILE", "hard": 1024, "soft": 1024 }],
            "noNewPrivileges": true,
        },
        "root": { "path": "rootfs", "readonly": false },
        "hostname": "bulkhead-test",
        "mounts": mounts(),
        "linux": {
            "namespaces": [
                { "type": "pid" }, { "type": "network" }, { "type": "ipc" }, { "type": "uts" }, { "type": "mount" },
                { "type": "cgroup" },
            ],
            "maskedPaths": ["/proc/kcore", "/proc/keys", "/proc/timer_list", "/sys/firmware"],
            "readonlyPaths": ["/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"],
        },
    })
}

/// What engines mount by default.
fn mounts() -> Value {
    json!([
        { "destination": "/proc", "type": "proc", "source": "proc" },
        { "destination": "/dev", "type": "tmpfs", "source": "tmpfs",
          "options": ["nosuid", "strictatime", "mode=755", "size=65536k"] },
        { "destination": "/dev/pts", "type": "devpts", "source": "devpts",
          "options": ["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5"] },
        { "destination": "/dev/shm", "type": "tmpfs", "source": "shm",
          "options": ["nosuid", "noexec", "nodev", "mode=1777", "size=65536k"] },
        { "destination": "/dev/mqueue", "type": "mqueue", "source": "mqueue", "options": ["nosuid", "noexec", "nodev"] },
        { "destination": "/sys", "type": "sysfs", "source": "sysfs", "options": ["nosuid", "noexec", "nodev", "ro"] },
        { "destination": "/sys/fs/cgroup", "type": "cgroup", "source": "cgroup",
          "options": ["nosuid", "noexec", "nodev", "relatime", "ro"] },
    ])
}
