// SPDX-License-Identifier: Apache-2.0
//! The options of mounts, and sources that are no files.

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixDatagram;
use std::process::Command;

use super::{Case, case};
use crate::bundle::Bundle;
use crate::env::{Env, Kind};
use crate::failure::{Context as _, Result, ensure, ensure_eq};

pub(super) const CASES: &[Case] = &[
    case!(options_are_the_configured_ones),
    case!(options_of_a_whole_tree),
    case!(earlier_mounts_are_changed),
    case!(nothing_to_be_changed),
    case!(sources_of_no_files),
];

/// Destination of a tmpfs, its options, and those that the kernel is to tell of it, or not to tell.
type Row = (&'static str, &'static [&'static str], &'static [&'static str], &'static [&'static str]);

const ROWS: &[Row] = &[
    ("/o/still", &["noatime", "nodiratime"], &["noatime", "nodiratime"], &["relatime"]),
    ("/o/strict", &["strictatime"], &[], &["relatime", "noatime"]),
    ("/o/written", &["sync", "dirsync"], &["sync", "dirsync"], &[]),
    ("/o/lazy", &["lazytime"], &["lazytime"], &[]),
    ("/o/last", &["ro", "noexec", "exec", "nosuid", "suid", "nodev"], &["ro", "nodev"], &["noexec", "nosuid"]),
    ("/o/back", &["sync", "async", "noatime", "atime", "ro", "rw"], &["rw"], &["sync", "noatime"]),
];

/// The same of a bind of a whole tree.
const TREE_ROWS: &[Row] = &[
    ("/t/none", &[], &["relatime"], &["nosuid", "nodev", "noatime", "nodiratime"]),
    ("/t/nosuid", &["rnosuid"], &["nosuid"], &["nodev"]),
    ("/t/suid", &["nosuid", "rsuid"], &[], &["nosuid"]),
    ("/t/nodev", &["rnodev"], &["nodev"], &["nosuid"]),
    ("/t/dev", &["nodev", "rdev"], &[], &["nodev"]),
    ("/t/noatime", &["rnoatime"], &["noatime"], &["relatime"]),
    ("/t/strictatime", &["rstrictatime"], &[], &["relatime", "noatime"]),
    ("/t/relatime", &["noatime", "rrelatime"], &["relatime"], &["noatime"]),
    ("/t/nodiratime", &["rnodiratime"], &["nodiratime"], &["noatime"]),
];

/// The optional fields of mounts in mountinfo (proc_pid_mountinfo(5)), without the groups' numbers, and without whom they follow:
/// where a source is the host's own, that may be the host.
const PROPAGATION: &str = r#"awk '$5 ~ /^\/p-/ { printf "%s", $5; for (i = 7; $i != "-"; i++) if ($i !~ /^master/) printf " %s", $i; print "" }' \
/proc/self/mountinfo | tr -d 0-9 | sort"#;

fn options_are_the_configured_ones(env: &Env) -> Result {
    let mut bundle = Bundle::busybox(env)?;
    let folder = env.folder("folder")?;
    for (place, options, ..) in ROWS {
        bundle.mount("tmpfs", "tmpfs", place, options);
    }
    bundle.bind(&folder, "/o/bound", &["noatime", "nosuid", "nodev", "noexec", "exec"]);
    let tree = folder.display().to_string();
    for (place, options, ..) in TREE_ROWS {
        bundle.mount("bind", &tree, place, &[&["rbind"], *options].concat());
    }
    // Older ones of runc do not know it.
    let of_links: &[&str] = if env.kind == Kind::Bulkhead { &["nosymfollow"] } else { &[] };
    bundle.mount("tmpfs", "tmpfs", "/o/links", of_links);
    let of_tree_links = if env.kind == Kind::Bulkhead { "rnosymfollow" } else { "rbind" };
    bundle.mount("bind", &tree, "/t/links", &["rbind", of_tree_links]);
    bundle.bind(&folder, "/p-shared", &["shared"]).bind(&folder, "/p-private", &["rprivate"]);
    bundle.bind(&folder, "/p-unbindable", &["unbindable"]).mount("tmpfs", "tmpfs", "/p-tmpfs", &["rshared"]);
    // What is the only one of its group, and is to follow that, is private.
    bundle.mount("tmpfs", "tmpfs", "/p-slave", &["shared", "slave"]);
    bundle.mount("tmpfs", "tmpfs", "/p-rslave", &["rshared", "rslave"]);
    bundle.mount("tmpfs", "tmpfs", "/p-runbindable", &["runbindable"]);
    bundle.mount("bind", "/dev/zero", "/o/zero", &["bind"]);
    bundle.sh(&format!(
        "while read source place kind options rest; do echo \"$place $options\"; done </proc/mounts; echo --; {PROPAGATION}; \
         head -c 3 /o/zero | wc -c"
    ));

    let output = env.run(&bundle)?.output()?;

    output.expect_code(0)?;
    let text = output.stdout();
    let options = |place: &str| -> BTreeSet<&str> {
        let line = text.lines().find_map(|line| line.strip_prefix(place)?.strip_prefix(' '));
        line.unwrap_or_default().split(',').collect()
    };
    let bound: Row = ("/o/bound", &[], &["noatime", "nosuid", "nodev"], &["noexec"]);
    let links: Row = ("/o/links", &[], of_links_told(of_links), &[]);
    let tree_links: Row = ("/t/links", &[], of_links_told(of_links), &[]);
    for (place, _, present, absent) in ROWS.iter().chain(TREE_ROWS).chain([&bound, &links, &tree_links]) {
        let seen = options(place);
        let fits = present.iter().all(|name| seen.contains(name)) && !absent.iter().any(|name| seen.contains(name));
        ensure!(fits, "{place} is to have {present:?} and not {absent:?}: {seen:?}");
    }
    let rest = text.split_once("--\n").map(|(_, rest)| rest).unwrap_or_default();
    let expected = "/p-private\n/p-rslave\n/p-runbindable unbindable\n/p-shared shared:\n/p-slave\n/p-tmpfs shared:\n\
                    /p-unbindable unbindable\n3\n";
    ensure_eq!(rest, expected, "what follows");
    Ok(())
}

fn of_links_told(options: &[&str]) -> &'static [&'static str] {
    if options.is_empty() { &[] } else { &["nosymfollow"] }
}

fn options_of_a_whole_tree(env: &Env) -> Result {
    env.only_bulkhead()?; // runc takes none of them back that was given before, and gives a tmpfs none.
    let mut bundle = Bundle::busybox(env)?;
    let folder = env.folder("folder")?;
    let below = env.folder("folder/below")?;
    env.mount("tmpfs", "tmpfs", &below, "size=1m,mode=755")?;
    for place in [&folder, &below] {
        fs::write(place.join("tool"), "#!/bin/sh\necho ran\n")?;
        fs::set_permissions(place.join("tool"), fs::Permissions::from_mode(0o755))?;
    }
    let tree = folder.display().to_string();
    bundle.mount("bind", &tree, "/closed", &["rbind", "rro", "rnoexec", "rnosuid", "rnodev"]);
    bundle.mount("bind", &tree, "/open", &["rbind", "rro", "rrw", "rnoexec", "rexec"]);
    bundle.mount("tmpfs", "tmpfs", "/sealed", &["rro", "rnoexec"]);
    bundle.mount("tmpfs", "tmpfs", "/sealed/inner", &[]);
    bundle.sh(
        "for top in /closed /open; do for place in $top $top/below; do \
         $place/tool 2>/dev/null || echo \"$place: not run\"; touch $place/new 2>/dev/null || echo \"$place: not written\"; \
         done; done; touch /sealed/new 2>&1; touch /sealed/inner/new; grep -c ' /sealed .*noexec' /proc/self/mountinfo; \
         grep ' /closed .*nosuid' /proc/self/mountinfo | grep -c nodev",
    );

    env.run(&bundle)?.output()?.expect_stdout(
        "/closed: not run\n/closed: not written\n/closed/below: not run\n/closed/below: not written\nran\nran\n\
         touch: /sealed/new: Read-only file system\n1\n1\n",
    )?;

    ensure!(folder.join("new").exists() && below.join("new").exists(), "what the container made is not on the host");
    Ok(())
}

fn earlier_mounts_are_changed(env: &Env) -> Result {
    let mut bundle = Bundle::busybox(env)?;
    let folder = env.folder("folder")?;
    bundle.bind(&folder, "/data", &["rw", "noexec"]).bind(&folder, "/data", &["remount", "ro", "nosuid"]);
    bundle.mount("tmpfs", "tmpfs", "/scratch", &["size=1m", "mode=755"]);
    bundle.mount("tmpfs", "tmpfs", "/scratch", &["remount", "size=3m", "nodev"]);
    bundle.sh("touch /data/x 2>/dev/null || echo not written; head -c 2000000 /dev/zero >/scratch/x && echo written; \
               while read source place kind options rest; do \
               case $place in /data|/scratch) echo \"$place $options,\";; esac; done </proc/mounts");

    let output = env.run(&bundle)?.output()?;

    output.expect_code(0)?;
    let text = output.stdout();
    let lines: Vec<&str> = text.lines().collect();
    ensure_eq!(lines.len(), 4, "lines of {text:?}: two answers, and each mount once");
    ensure_eq!(lines[..2], ["not written", "written"], "what can be written");
    let has = |line: &str, options: &[&str]| options.iter().all(|option| line.contains(&format!("{option},")));
    ensure!(has(lines[2], &["ro", "nosuid"]) && !has(lines[2], &["noexec"]), "not what was asked for: {}", lines[2]);
    ensure!(has(lines[3], &["rw", "nodev", "size=3072k"]), "not what was asked for: {}", lines[3]);
    ensure_eq!(fs::read_dir(&folder)?.count(), 0, "files in the folder");
    Ok(())
}

fn nothing_to_be_changed(env: &Env) -> Result {
    let mut bundle = Bundle::busybox(env)?;
    let folder = env.folder("folder")?;
    fs::create_dir(bundle.path("data"))?;
    bundle.bind(&folder, "/data", &["remount", "ro"]);

    let output = env.run(&bundle)?.output()?;

    if env.kind == Kind::Bulkhead {
        return output.expect_error(&["/data", "nothing is mounted there"]);
    }
    ensure!(!output.status.success(), "{}", output.describe());
    Ok(())
}

fn sources_of_no_files(env: &Env) -> Result {
    env.only_bulkhead()?;
    let folder = env.folder("folder")?;
    let (socket, pipe) = (folder.join("socket"), folder.join("pipe"));
    let _datagrams = UnixDatagram::bind(&socket).context(|| format!("making {}", socket.display()))?;
    let made = Command::new("mkfifo").arg(&pipe).status()?;
    ensure!(made.success(), "mkfifo: {made}");
    for (source, what) in [
        (socket.as_path(), "Unix socket of datagrams"),
        (pipe.as_path(), "named pipe"),
        ("/dev/kvm".as_ref(), "device of the host"),
    ] {
        let mut bundle = Bundle::busybox(env)?;
        bundle.bind(source, "/data", &[]);
        env.run(&bundle)?.output()?.expect_error(&["mounts[7].source", what])?;
        ensure!(!bundle.path("data").exists(), "its destination was made");
    }
    Ok(())
}
