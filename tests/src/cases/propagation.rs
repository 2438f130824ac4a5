// SPDX-License-Identifier: Apache-2.0
//! What the host mounts and unmounts below a bind mount's source while a container runs (`mountPropagation: HostToContainer` of
//! Kubernetes).

use std::fs;
use std::path::{Path, PathBuf};

use nix::mount::{MsFlags, umount};

use super::pods::WAIT;
use super::{Case, case};
use crate::bundle::Bundle;
use crate::cri::api;
use crate::detached::Detached;
use crate::engines::{Kubelet, mount};
use crate::env::{Env, Kind};
use crate::failure::{Context as _, Result, ensure, ensure_eq};
use crate::loop_device::LoopDevice;

pub(super) const CASES: &[Case] = &[
    case!(mounts_come_and_go),
    case!(over_the_source_itself),
    case!(what_was_there_before),
    case!(read_only_trees),
    case!(what_is_mounted_on_cannot_be_moved),
    case!(what_is_unmounted_is_let_go_of),
    case!(in_pods),
];

/// The numbers of propagation in CRI.
const HOST_TO_CONTAINER: i32 = 1;

/// A volume that is a file system of its own, with a folder `below` that has the file `hidden`.
fn volume(env: &Env) -> Result<PathBuf> {
    let volume = env.folder("volume")?;
    env.mount("tmpfs", "tmpfs", &volume, "size=1m")?;
    fs::create_dir(volume.join("below"))?;
    fs::write(volume.join("below/hidden"), "")?;
    Ok(volume)
}

/// Mounts a file system there that has a file of this name, to be unmounted by [`unmount`].
fn mount_with(place: &Path, file: &str) -> Result {
    mount_there("tmpfs", "tmpfs", place, "size=1m,mode=0777")?;
    Ok(fs::write(place.join(file), "")?)
}

fn mount_there(kind: &str, source: &str, place: &Path, options: &str) -> Result {
    nix::mount::mount(Some(source), place, Some(kind), MsFlags::empty(), Some(options))
        .context(|| format!("mounting {kind} on {}", place.display()))
}

fn unmount(place: &Path) -> Result {
    umount(place).context(|| format!("unmounting {}", place.display()))
}

/// A script that waits until something is gone, and fails where it stays.
fn gone(path: &str) -> String {
    format!("for i in $(seq 100); do [ -e {path} ] || exit 0; sleep 0.1; done; exit 1")
}

/// A script that lists a folder once it has a file of that name, or after a while.
fn ls_with(folder: &str, file: &str) -> String {
    format!("for i in $(seq 100); do [ -e {folder}/{file} ] && break; sleep 0.1; done; ls {folder}")
}

fn container<'a>(env: &'a Env, bundle: &mut Bundle) -> Result<Detached<'a>> {
    bundle.sh("sleep 1000");
    Detached::run(env, bundle)
}

fn end(container: &Detached<'_>) -> Result {
    container.must(&["delete", "--force"]).map(drop)
}

fn mounts_come_and_go(env: &Env) -> Result {
    let volume = volume(env)?;
    let place = volume.join("below");
    let mut bundle = Bundle::busybox(env)?;
    let source = volume.display().to_string();
    let (following, staying) = (["slave", "rslave", "shared", "rshared", "unsaid"], ["private", "rprivate"]);
    for name in following.iter().filter(|name| **name != "unsaid").chain(&staying) {
        bundle.mount("bind", &source, &format!("/{name}"), &["rbind", name]);
    }
    bundle.mount("bind", &source, "/unsaid", &["bind"]);
    let container = container(env, &mut bundle)?;
    // What is in all of those, once the file is there.
    let expect = |names: &[&str], file: &str, expected: &str| -> Result {
        let scripts = names.iter().map(|name| ls_with(&format!("/{name}/below"), file)).collect::<Vec<_>>();
        let seen = container.exec(&scripts.join(" | tr '\\n' ' '; echo; ")).output()?;
        ensure_eq!(
            seen.stdout().split_whitespace().collect::<Vec<_>>().join(" "),
            [expected; 5][..names.len()].join(" "),
            "in {names:?}"
        );
        Ok(())
    };
    expect(&following, "hidden", "hidden")?;

    for round in ["first", "second"] {
        mount_with(&place, round)?;
        // One in the other, in a folder that only that has.
        fs::create_dir(place.join("deep"))?;
        mount_with(&place.join("deep"), "deepest")?;
        expect(&following, round, &format!("deep {round}"))?;
        expect(&following, "deep/deepest", &format!("deep {round}"))?;
        expect(&staying, "hidden", "hidden")?;
        unmount(&place.join("deep"))?;
        unmount(&place)?;
        expect(&following, "hidden", "hidden")?;
    }
    // Both ways, until the end.
    mount_with(&place, "third")?;
    expect(&["rslave"], "third", "third")?;
    let script = "echo written > /rslave/below/new; stat -c %d /rslave /rslave/below | uniq | wc -l";
    let output = container.exec(script).output()?;
    ensure_eq!(output.stdout().trim(), "2", "file systems");
    ensure_eq!(fs::read_to_string(place.join("new"))?, "written\n", "what the container has written to it");
    end(&container)?;
    unmount(&place)
}

/// As when a driver mounts a volume anew that has broken.
fn over_the_source_itself(env: &Env) -> Result {
    let volume = volume(env)?;
    let mut bundle = Bundle::busybox(env)?;
    bundle.mount("bind", &volume.display().to_string(), "/data", &["rbind", "rslave"]);
    bundle.mount("bind", &volume.display().to_string(), "/private", &["rbind", "rprivate"]);
    let container = container(env, &mut bundle)?;
    let list =
        |file: &str| -> Result<String> { Ok(container.exec(&ls_with("/data", file)).output()?.stdout().to_owned()) };
    ensure_eq!(list("below")?, "below\n", "the volume");

    mount_with(&volume, "new")?;
    ensure_eq!(list("new")?, "new\n", "what is mounted over it");
    fs::create_dir(volume.join("folder"))?;
    mount_with(&volume.join("folder"), "inner")?;
    let inner = container.exec(&ls_with("/data/folder", "inner")).output()?;
    ensure_eq!(inner.stdout(), "inner\n", "what is mounted in that");
    ensure_eq!(container.exec("ls /private").output()?.stdout(), "below\n", "the volume without propagation");
    unmount(&volume.join("folder"))?;
    unmount(&volume)?;
    ensure_eq!(list("below")?, "below\n", "the volume again");
    end(&container)
}

/// A mount that is there at the start is unmounted too; without `rbind` it is not seen, but what is mounted later.
fn what_was_there_before(env: &Env) -> Result {
    let volume = volume(env)?;
    let (place, other) = (volume.join("below"), volume.join("other"));
    fs::create_dir(&other)?;
    mount_with(&place, "early")?;
    let mut bundle = Bundle::busybox(env)?;
    bundle.mount("bind", &volume.display().to_string(), "/all", &["rbind", "rslave"]);
    bundle.mount("bind", &volume.display().to_string(), "/one", &["bind", "rslave"]);
    let container = container(env, &mut bundle)?;
    let lists = |below: &str, other: &str| -> Result<String> {
        let script =
            format!("{}; {}; ls /one/below /all/other", ls_with("/all/below", below), ls_with("/one/other", other));
        Ok(container.exec(&script).output()?.stdout().to_owned())
    };

    let before = container.exec("ls /all/below /one/below").output()?;
    mount_with(&other, "late")?;
    let meanwhile = lists("early", "late")?;
    unmount(&place)?;
    let after = lists("hidden", "late")?;

    ensure_eq!(before.stdout(), "/all/below:\nearly\n\n/one/below:\nhidden\n", "at the start");
    ensure_eq!(meanwhile, "early\nlate\n/all/other:\nlate\n\n/one/below:\nhidden\n", "with a later mount");
    ensure_eq!(after, "hidden\nlate\n/all/other:\nlate\n\n/one/below:\nhidden\n", "without the first");
    end(&container)?;
    unmount(&other)
}

/// runc's `ro` is that of one mount; here what is mounted below later is as read-only as what was there before, and a guest
/// that does not keep to it cannot write either.
fn read_only_trees(env: &Env) -> Result {
    let volume = volume(env)?;
    let place = volume.join("below");
    let mut bundle = Bundle::busybox(env)?;
    bundle.mount("bind", &volume.display().to_string(), "/data", &["rbind", "rslave", "ro"]);
    bundle.set("/process/capabilities", serde_json::json!({}));
    for set in ["bounding", "effective", "permitted"] {
        bundle.set(&format!("/process/capabilities/{set}"), serde_json::json!(["CAP_SYS_ADMIN", "CAP_DAC_OVERRIDE"]));
    }
    let container = container(env, &mut bundle)?;

    mount_with(&place, "there")?;
    let seen = container.exec(&ls_with("/data/below", "there")).output()?;
    let write = "touch /data/below/new; rm /data/below/there; chmod 700 /data/below";
    container.exec(write).output()?;
    let touched = place.join("new").exists();
    container
        .exec(&format!("mount -o remount,bind,rw /data/below; mount -o remount,rw /data/below; {write}"))
        .output()?;

    ensure_eq!(seen.stdout(), "there\n", "what is mounted");
    ensure_eq!(touched, env.kind == Kind::Other, "whether it can be written to");
    if env.kind == Kind::Bulkhead {
        ensure!(!place.join("new").exists() && place.join("there").exists(), "an administrator has changed it");
    }
    end(&container)?;
    unmount(&place)
}

/// The kernel of a host would detach the host's mount of a directory that is removed in another mount namespace.
fn what_is_mounted_on_cannot_be_moved(env: &Env) -> Result {
    let volume = volume(env)?;
    let place = volume.join("empty");
    fs::create_dir(&place)?;
    let mut bundle = Bundle::busybox(env)?;
    bundle.mount("bind", &volume.display().to_string(), "/data", &["rbind", "rslave"]);
    let container = container(env, &mut bundle)?;
    mount_with(&place, "there")?;
    container.exec(&ls_with("/data/empty", "there")).output()?.expect_stdout("there\n")?;

    let output = container.exec("rmdir /data/empty || mv /data/empty /data/moved || echo refused").output()?;

    ensure_eq!(output.stdout(), "refused\n", "what became of it");
    ensure!(place.join("there").exists(), "the host's mount has gone");
    unmount(&place)?;
    container.exec(&gone("/data/empty/there")).output()?.expect_code(0)?;
    container.exec("rmdir /data/empty").output()?.expect_code(0)?;
    end(&container)
}

/// A file that a container has open there keeps runc's host from unmounting; here it becomes stale.
fn what_is_unmounted_is_let_go_of(env: &Env) -> Result {
    env.only_bulkhead()?;
    let volume = volume(env)?;
    let place = volume.join("below");
    let device = LoopDevice::new(env, 16 << 20)?;
    let made = env.tool(Path::new("mkfs.ext4"), ["-q".into(), device.path.clone().into_os_string()]).output()?;
    made.expect_code(0)?;
    let mut bundle = Bundle::busybox(env)?;
    bundle.mount("bind", &volume.display().to_string(), "/data", &["rbind", "rslave"]);
    bundle.sh("until [ -e /data/below/file ]; do sleep 0.1; done; exec 3< /data/below/file; read first <&3; \
               echo $first; until ! cat /data/below/file 2>/dev/null; do sleep 0.1; done; cat <&3 || echo stale; sleep 1000");
    let container = Detached::run(env, &bundle)?;

    mount_there("ext4", &device.path.display().to_string(), &place, "")?;
    fs::write(place.join("file"), "content\nmore\n".repeat(10_000))?;
    container.wait_for("content\n")?;
    unmount(&place)?;

    device.end()?;
    container.wait_for("stale\n")?;
    end(&container)
}

fn in_pods(env: &Env) -> Result {
    let kubelet = Kubelet::new(env)?;
    let volume = kubelet.volume("volume")?;
    let place = volume.join("below");
    fs::create_dir(&place)?;
    let pod = kubelet.pod("propagation")?;
    let start = |name: &str, propagation| {
        let mut config = pod.config(name, WAIT);
        config.mounts = vec![api::Mount { propagation, ..mount(&volume, "/volume", name == "reader") }];
        pod.start(config)
    };
    let list = |id: &str, file: &str| pod.output(id, &ls_with("/volume/below", file));
    let (first, reader) = (start("first", HOST_TO_CONTAINER)?, start("reader", HOST_TO_CONTAINER)?);
    let apart = start("apart", 0)?;

    mount_with(&place, "there")?;
    let later = start("later", HOST_TO_CONTAINER)?;

    for id in [&first, &reader, &later] {
        ensure_eq!(list(id, "there")?, "there\n", "what is mounted");
    }
    ensure_eq!(pod.output(&apart, "ls /volume/below")?, "", "what is mounted for one that is to see none");
    pod.output(&first, "echo one > /volume/below/file")?;
    ensure_eq!(pod.output(&later, "cat /volume/below/file")?, "one\n", "what another has written");
    pod.stop(&later, 0)?;
    pod.remove_container(&later)?;
    unmount(&place)?;
    for id in [&first, &reader] {
        pod.output(id, &gone("/volume/below/there"))?;
    }
    mount_with(&volume, "anew")?;
    ensure_eq!(pod.output(&reader, &ls_with("/volume", "anew"))?, "anew\n", "what is mounted over the volume");
    pod.remove()?;
    unmount(&volume)?;
    kubelet.end()
}
