// SPDX-License-Identifier: Apache-2.0
//! What a VMM can still do once its guest runs: only what serving the container's files takes.

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use nix::sys::signal::Signal;

use super::{Case, case};
use crate::bundle::Bundle;
use crate::env::Env;
use crate::failure::{Context as _, Result, ensure, ensure_eq, fail};

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
    let (root, descriptors) = (identity(&proc.join("root"))?, proc.join("fd"));
    for descriptor in names(&descriptors)? {
        let link = descriptors.join(&descriptor);
        if !fs::metadata(&link).is_ok_and(|metadata| metadata.is_dir()) {
            continue;
        }
        let (own, top) = (identity(&link)?, identity(&link.join("../../../../../../../.."))?);
        let is_closed = own == identity(&descriptors)? && own == top;
        let target = fs::read_link(&link)?;
        ensure!(top == root || is_closed, "the folder {} that it has open leads out of its root", target.display());
    }
    running.signal(Signal::SIGTERM)?;
    running.finish()?.expect_code(3)
}
