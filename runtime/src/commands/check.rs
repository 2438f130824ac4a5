// SPDX-License-Identifier: Apache-2.0
//! `bulkhead check`: a line for each thing that a sandbox needs, whether it is there, and how to mend it if not.

use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process;

use clap::{Args, ValueEnum};
use rustix::fs::statfs;
use serde::Serialize;

use super::{Global, Outcome};
use crate::install::Install;
use crate::spec::DEFAULT_MEMORY_MIB;
use crate::supervisor::{StateDir, sweep};
use crate::text;
use crate::user_namespace;

/// `CGROUP2_SUPER_MAGIC` of <linux/magic.h>.
const CGROUP2_MAGIC: i64 = 0x6367_7270;

/// Check whether this host can run sandboxes, and say what is missing
#[derive(Debug, Args)]
pub(crate) struct Arguments {
    /// How to print the result
    #[arg(long, value_enum, default_value = "text", value_name = "FORMAT")]
    format: Format,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Format {
    /// A line for each item.
    Text,
    /// An array of objects.
    Json,
}

/// One thing that was looked at.
#[derive(Debug, Serialize)]
struct Item {
    name: &'static str,
    ok: bool,
    /// What was found.
    found: String,
    /// What to do about it; empty when it is all right.
    mend: &'static str,
}

/// What a look at one thing gives: what was found, and, if that is not good, how to mend it.
type Found = Result<String, (String, &'static str)>;

/// Prints the items; the status is 0 if all are well, else 1.
pub(crate) fn run(global: &Global, arguments: &Arguments) -> Outcome {
    let install = Install::find()?;
    sweep(&global.root);
    let items = [
        item("user rights", user_rights()),
        item("KVM", kvm(&install)),
        item("VMM", vmm(&install.vmm)),
        item("guest kernel", part(install.open_kernel().map_err(|error| text::chain(&error)), &install.kernel)),
        item("guest image", part(install.open_initramfs().map_err(|error| text::chain(&error)), &install.initramfs)),
        item("vsock path", vsock_path(&global.root)),
        item("memory", memory()),
        item("system call filters", filters()),
        item("cgroups", cgroups()),
        item("passt", Ok(passt(&install))),
    ];
    print(&items, arguments.format)?;
    Ok(u8::from(items.iter().any(|item| !item.ok)))
}

fn item(name: &'static str, found: Found) -> Item {
    match found {
        Ok(found) => Item { name, ok: true, found, mend: "" },
        Err((found, mend)) => Item { name, ok: false, found, mend },
    }
}

fn print(items: &[Item], format: Format) -> io::Result<()> {
    let mut out = io::stdout().lock();
    if format == Format::Json {
        serde_json::to_writer_pretty(&mut out, items)?;
        return writeln!(out);
    }
    for Item { name, ok, found, mend } in items {
        let mark = if *ok { "ok  " } else { "FAIL" };
        let mend = if mend.is_empty() { String::new() } else { format!("; to mend it: {mend}") };
        writeln!(out, "{mark} {name}: {found}{mend}")?;
    }
    Ok(())
}

fn user_rights() -> Found {
    if !rustix::process::geteuid().is_root() {
        return Err((
            "not root, so file systems cannot be mounted into the VMM's jail".to_owned(),
            "run bulkhead as root, or in a user namespace (unshare --user --map-root-user)",
        ));
    }
    let sets = rustix::thread::capabilities(None)
        .map_err(|error| (format!("cannot read this process's capabilities: {error}"), "run bulkhead as root"))?;
    if !sets.effective.contains(rustix::thread::CapabilitySet::SYS_ADMIN) {
        let mend = "run bulkhead where root may mount: on the host, or in a container that has CAP_SYS_ADMIN";
        return Err(("root without CAP_SYS_ADMIN, so nothing can be mounted into the VMM's jail".to_owned(), mend));
    }
    let whose = if user_namespace::is_root_of_host() { "root" } else { "root of a user namespace" };
    Ok(whose.to_owned())
}

fn kvm(install: &Install) -> Found {
    let device = install.kvm.display();
    let mend = "enable virtualization (VT-x, AMD-V) in the firmware, or nested virtualization on the host of this \
                machine, and load the module kvm_intel or kvm_amd";
    if !install.kvm.exists() {
        return Err((format!("{device} does not exist"), mend));
    }
    let file = install.open_kvm().map_err(|error| {
        (text::chain(&error), "give this user the device: root, or the group that owns it, usually kvm")
    })?;
    let probed = bulkhead_vmm::probe::run(OwnedFd::from(file));
    probed.map_err(|error| {
        let mend = "use a host whose processor virtualizes (vmx or svm in /proc/cpuinfo); a software KVM is not enough";
        (format!("{device}: {}", text::chain(&error)), mend)
    })?;
    Ok(format!("{device} ran a probe guest"))
}

/// Whether the kernel has what the VMM is to be killed by for a system call that it may not make (seccomp(2), "/proc interfaces").
fn filters() -> Found {
    const ACTIONS: &str = "/proc/sys/kernel/seccomp/actions_avail";
    let mend = "use a kernel with CONFIG_SECCOMP_FILTER, 4.14 or newer";
    let actions = fs::read_to_string(ACTIONS).map_err(|error| (format!("{ACTIONS}: {error}"), mend))?;
    if !actions.split_whitespace().any(|action| action == "kill_process") {
        return Err((format!("{ACTIONS} has no kill_process"), mend));
    }
    Ok("can kill a process".to_owned())
}

fn vmm(path: &Path) -> Found {
    let mend = "install Bulkhead completely, or name the VMM in BULKHEAD_VMM";
    let metadata = fs::metadata(path).map_err(|error| (format!("{}: {error}", path.display()), mend))?;
    if !metadata.is_file() || metadata.permissions().mode() & 0o111 == 0 {
        return Err((format!("{} is not a program", path.display()), mend));
    }
    Ok(path.display().to_string())
}

fn part(opened: Result<File, String>, path: &Path) -> Found {
    let mend = "install Bulkhead completely, or name the file in BULKHEAD_KERNEL or BULKHEAD_INITRAMFS";
    let file = opened.map_err(|error| (error, mend))?;
    let length = file.metadata().map_err(|error| (format!("{}: {error}", path.display()), mend))?.len();
    Ok(format!("{} ({:.1} MiB)", path.display(), mib(length)))
}

#[allow(clippy::cast_precision_loss, reason = "printed with one decimal")]
fn mib(bytes: u64) -> f64 {
    bytes as f64 / f64::from(1 << 20)
}

/// Makes a state directory with its socket, connects, and removes it again.
fn vsock_path(root: &Path) -> Found {
    let mend = "name a folder with --root that can be written to and has free space";
    let failed = |error: String| (error, mend);
    let state =
        StateDir::create(root, &format!("check-{}", process::id())).map_err(|error| failed(text::chain(&error)))?;
    let listener = state.bind_vsock().map_err(|error| failed(text::chain(&error)))?;
    let connected = UnixStream::connect(state.vsock_path());
    drop(listener);
    connected.map_err(|error| failed(format!("cannot connect to a socket under {}: {error}", root.display())))?;
    state.create_console_log().map_err(|error| failed(text::chain(&error)))?;
    Ok(format!("sockets work under {}", root.display()))
}

fn memory() -> Found {
    let mend = "free memory, or set io.bulkhead.memory_mib or a memory limit in config.json to less";
    let mut text = String::new();
    let read = File::open("/proc/meminfo").and_then(|mut file| file.read_to_string(&mut text));
    read.map_err(|error| (format!("cannot read /proc/meminfo: {error}"), "mount proc at /proc"))?;
    let kib: u64 = text
        .lines()
        .find_map(|line| line.strip_prefix("MemAvailable:")?.trim().strip_suffix(" kB")?.parse().ok())
        .ok_or_else(|| ("/proc/meminfo has no MemAvailable".to_owned(), "mount the kernel's own proc at /proc"))?;
    let found = format!("{} MiB available, a sandbox has {DEFAULT_MEMORY_MIB} MiB by default", kib / 1024);
    if kib / 1024 < DEFAULT_MEMORY_MIB { Err((found, mend)) } else { Ok(found) }
}

/// The host's version is told for whoever limits the sandbox as a whole; a sandbox runs with any: the container's limits
/// are kept by the guest's own version 2.
fn cgroups() -> Found {
    let path = "/sys/fs/cgroup";
    match statfs(path) {
        Ok(found) if found.f_type == CGROUP2_MAGIC => Ok("version 2".to_owned()),
        Ok(_) => Ok(format!("no version 2 at {path}; not needed, the guest has its own")),
        Err(error) => Err((format!("{path}: {error}"), "mount sysfs at /sys")),
    }
}

/// Only a network of its own kind needs it.
fn passt(install: &Install) -> String {
    match install.passt() {
        Ok(path) => path.display().to_string(),
        Err(error) => format!("{}; not needed otherwise", text::chain(&error)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_working_root_passes_and_is_left_empty() {
        let root = tempfile::tempdir().unwrap();

        assert!(vsock_path(root.path()).is_ok());
        assert_eq!(fs::read_dir(root.path()).unwrap().count(), 0);
    }

    #[test]
    fn a_root_that_is_a_file_fails_with_advice() {
        let file = tempfile::NamedTempFile::new().unwrap();

        let (found, mend) = vsock_path(file.path()).unwrap_err();

        assert!(found.contains(file.path().to_str().unwrap()), "{found}");
        assert!(mend.contains("--root"));
    }

    #[test]
    fn an_absent_kvm_device_fails_with_advice() {
        let install = Install::find().unwrap();
        let install = Install { vmm: "/x".into(), kvm: "/nonexistent/kvm".into(), ..install };

        let (found, mend) = kvm(&install).unwrap_err();

        assert_eq!(found, "/nonexistent/kvm does not exist");
        assert!(mend.contains("kvm_intel"));
        assert!(vmm(&install.vmm).is_err());
    }
}
