// SPDX-License-Identifier: Apache-2.0
//! What a VMM can still do once its guest runs: only what serving the container's files takes.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::Path;

use nix::sys::signal::Signal;
use serde_json::json;

use super::network::Namespace;
use super::{Case, case};
use crate::bundle::Bundle;
use crate::env::Env;
use crate::failure::{Context as _, Result, ensure, ensure_eq, fail};
use crate::loop_device::LoopDevice;

pub(super) const CASES: &[Case] = &[case!(running_machine_is_locked_in)];

/// CHOWN, DAC_OVERRIDE, FOWNER, FSETID and SETFCAP (capabilities(7)), as `/proc/PID/status` writes a set.
const CAPABILITIES: &str = "000000008000001b";
const NONE: &str = "0000000000000000";

/// The names of a folder.
fn names(folder: &Path) -> Result<BTreeSet<String>> {
    let entries = fs::read_dir(folder).context(|| format!("reading {}", folder.display()))?;
    entries.map(|entry| Ok(entry?.file_name().to_string_lossy().into_owned())).collect()
}

/// A field of a thread's `status`.
fn field<'a>(status: &'a str, name: &str) -> Result<&'a str> {
    let value = status.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
    match value {
        Some(value) => Ok(value.trim()),
        None => fail!("no {name} in {status}"),
    }
}

fn running_machine_is_locked_in(env: &Env) -> Result {
    env.only_bulkhead()?;
    let volume = env.folder("volume")?;
    let mut bundle = Bundle::busybox(env)?;
    bundle.sh("trap 'exit 3' TERM; echo ready; while :; do sleep 0.1; done");
    bundle.bind(&volume, "/volume", &["rbind"]);
    // What it has of the host's devices, it has for these.
    let namespace = Namespace::new(env, "jail")?.with_addresses(1)?;
    namespace.give_to(&mut bundle);
    let device = LoopDevice::new(env, 1 << 20)?;
    bundle.set("/linux/devices", json!([device.at("/dev/xvda")]));
    bundle.set("/linux/resources", json!({ "devices": [device.rule(true, "r")] }));
    let mut running = env.run(&bundle)?.spawn()?;
    running.wait_for("ready\n")?;
    let proc = format!("/proc/{}", running.wait_for_vmm()?);
    let proc = Path::new(&proc);

    for thread in names(&proc.join("task"))? {
        let status = fs::read_to_string(proc.join("task").join(&thread).join("status"))?;
        ensure_eq!(field(&status, "NoNewPrivs")?, "1", "no_new_privs of {}", field(&status, "Name")?);
        // 2 is SECCOMP_MODE_FILTER (proc(5)).
        ensure_eq!(field(&status, "Seccomp")?, "2", "the filter of system calls of {}", field(&status, "Name")?);
        let sets = [
            ("CapEff", CAPABILITIES),
            ("CapPrm", CAPABILITIES),
            ("CapBnd", CAPABILITIES),
            ("CapInh", NONE),
            ("CapAmb", NONE),
        ];
        for (set, expected) in sets {
            ensure_eq!(field(&status, set)?, expected, "{set} of {}", field(&status, "Name")?);
        }
    }
    for kind in ["mnt", "net", "ipc", "uts"] {
        let namespace = |of: &Path| fs::read_link(of.join("ns").join(kind));
        ensure!(namespace(proc)? != namespace(Path::new("/proc/self"))?, "it shares the host's {kind} namespace");
    }
    // By a path it reaches the shared trees, and can make nothing beside them.
    ensure_eq!(names(&proc.join("root"))?, BTreeSet::from(["private", "shared"].map(str::to_owned)), "its root folder");
    for line in fs::read_to_string(proc.join("mountinfo"))?.lines() {
        let fields: Vec<&str> = line.split(' ').collect();
        let (target, options) = (fields[4], fields[5]);
        let is_tree = target.starts_with("/private/") || target.starts_with("/shared/");
        ensure!(is_tree || target == "/" && options.split(',').any(|option| option == "ro"), "it has the mount {line}");
    }
    // What it has open leads nowhere else: upwards from each folder is its own root, and from that of its descriptors nothing.
    let identity = |path: &Path| -> Result<_> {
        let metadata = fs::metadata(path).context(|| format!("looking at {}", path.display()))?;
        Ok((metadata.dev(), metadata.ino()))
    };
    let (root, descriptors, mut nodes) = (identity(&proc.join("root"))?, proc.join("fd"), 0);
    for descriptor in names(&descriptors)? {
        let link = descriptors.join(&descriptor);
        let Ok(metadata) = fs::metadata(&link) else { continue };
        if metadata.file_type().is_char_device() || metadata.file_type().is_block_device() {
            nodes += 1;
            let again = File::open(&link).err().and_then(|error| error.raw_os_error());
            ensure!(again == Some(libc::EACCES), "it can open {} again", fs::read_link(&link)?.display());
            let chmod = fs::set_permissions(&link, metadata.permissions()).err().and_then(|error| error.raw_os_error());
            ensure!(chmod == Some(libc::EROFS), "it can change the mode of {}", fs::read_link(&link)?.display());
        }
        if !metadata.is_dir() {
            continue;
        }
        let (own, top) = (identity(&link)?, identity(&link.join("../../../../../../../.."))?);
        let is_closed = own == identity(&descriptors)? && own == top;
        let target = fs::read_link(&link)?;
        ensure!(top == root || is_closed, "the folder {} that it has open leads out of its root", target.display());
    }
    ensure!(nodes >= 2, "it has {nodes} device nodes open, and neither a tap nor a disk");
    running.signal(Signal::SIGTERM)?;
    running.finish()?.expect_code(3)?;
    device.end()
}
