// SPDX-License-Identifier: Apache-2.0
//! Volumes that the node changes while a pod runs, of which containers that come later find what is there then, as with other
//! runtimes; and volumes of memory.

use std::ffi::OsStr;
use std::fs;
use std::os::unix::ffi::OsStrExt;

use super::pods::WAIT;
use super::{Case, case};
use crate::engines::{Kubelet, Pod, mount};
use crate::env::{Env, Kind};
use crate::failure::{Result, ensure, ensure_eq};

pub(super) const CASES: &[Case] = &[case!(replaced), case!(mounted_into), case!(of_memory)];

/// Prints what a container has of the volumes.
const READ: &str = "cat /folder/version /file";

fn replaced(env: &Env) -> Result {
    let kubelet = Kubelet::new(env)?;
    let (folder, files) = (kubelet.volume("folder")?, kubelet.volume("files")?);
    let file = files.join("file");
    fs::write(folder.join("version"), "old\n")?;
    fs::write(&file, "old\n")?;
    let pod = kubelet.pod("replaced")?;
    let start = |name: &str, attempt| {
        let mut config = pod.config(name, WAIT);
        config.metadata.mut_or_insert_default().attempt = attempt;
        config.mounts = vec![mount(&folder, "/folder", false), mount(&file, "/file", true)];
        pod.start(config)
    };
    let (lasting, ending) = (start("lasting", 0)?, start("ending", 0)?);

    fs::rename(&folder, files.join("old-folder"))?;
    fs::create_dir(&folder)?;
    fs::write(folder.join("version"), "new\n")?;
    fs::write(files.join("new-file"), "new\n")?;
    fs::rename(files.join("new-file"), &file)?;
    pod.stop(&ending, 0)?;
    pod.remove_container(&ending)?;
    let restarted = start("ending", 1)?;

    ensure_eq!(pod.output(&lasting, READ)?, "old\nold\n", "what the container has that was there before");
    ensure_eq!(pod.output(&restarted, READ)?, "new\nnew\n", "what the one has that came later");
    // Those that come together have it in common again.
    let third = start("third", 0)?;
    pod.output(&third, "echo from the third > /folder/version")?;
    ensure_eq!(pod.output(&restarted, READ)?, "from the third\nnew\n", "what another has written");
    ensure_eq!(pod.output(&lasting, READ)?, "old\nold\n", "what the first has still");
    pod.remove()?;
    kubelet.end()
}

/// What is in the folder below the volume.
fn below(pod: &Pod<'_>, id: &str) -> Result<String> {
    pod.output(id, "ls /folder/below")
}

fn mounted_into(env: &Env) -> Result {
    let kubelet = Kubelet::new(env)?;
    let folder = kubelet.volume("folder")?;
    let place = folder.join("below");
    fs::create_dir(&place)?;
    let pod = kubelet.pod("mounted")?;
    let start = |name: &str| {
        let mut config = pod.config(name, WAIT);
        config.mounts = vec![mount(&folder, "/folder", false)];
        pod.start(config)
    };
    let before = start("before")?;

    env.mount("tmpfs", "tmpfs", &place, "size=1m")?;
    fs::write(place.join("there"), "")?;
    let after = start("after")?;

    ensure_eq!(below(&pod, &after)?, "there\n", "what is mounted for the container that came later");
    ensure_eq!(below(&pod, &before)?, "", "what is mounted for the earlier one");
    pod.remove()?;
    kubelet.end()
}

/// Volumes as the kubelet lays them out: an `emptyDir` of the medium `Memory`, of which a second container has a part (`subPath`), and
/// a secret.
fn of_memory(env: &Env) -> Result {
    let kubelet = Kubelet::new(env)?;
    let volume = kubelet.volume("pods/7e57/volumes/kubernetes.io~empty-dir/cache")?;
    let secret = kubelet.volume("pods/7e57/volumes/kubernetes.io~secret/key")?;
    let part = kubelet.volume("pods/7e57/volume-subpaths/cache/second/0")?;
    env.mount("tmpfs", "tmpfs", &volume, "size=1m,mode=0777,gid=1234")?;
    env.mount("tmpfs", "tmpfs", &secret, "size=1m")?;
    fs::create_dir(volume.join("part"))?;
    env.bind(&volume.join("part"), &part)?;
    fs::write(secret.join("key"), "old\n")?;
    // What else is mounted on the node is none of the pod's business.
    let other = secret.join(OsStr::from_bytes(b"caf\xe9"));
    fs::create_dir(&other)?;
    env.mount("tmpfs", "tmpfs", &other, "size=1m")?;
    let pod = kubelet.pod("memory")?;
    let start = |name: &str, attempt, source, place: &str| {
        let mut config = pod.config(name, WAIT);
        config.metadata.mut_or_insert_default().attempt = attempt;
        config.mounts = vec![mount(source, place, false), mount(&secret, "/secret", true)];
        pod.start(config)
    };
    let (first, second) = (start("first", 0, &volume, "/cache")?, start("second", 0, &part, "/part")?);

    ensure_eq!(pod.output(&first, "stat -c '%a %g' /cache")?, "777 1234\n", "the mode and the group");
    ensure_eq!(pod.output(&first, "set -- $(df -k /cache | tail -n 1); echo $2")?, "1024\n", "KiB of the volume");
    pod.output(&first, "echo one > /cache/file")?;
    pod.output(&second, "echo two > /part/file")?;
    ensure!(
        pod.exec(&first, "head -c 2000000 /dev/zero > /cache/large")?.exit_code != 0,
        "a volume of 1 MiB is larger"
    );
    pod.output(&first, "rm /cache/large; echo of the first > /cache/settings")?;
    // The kubelet makes a folder of what it does not find on the node, and binds what it finds.
    let settings = kubelet.volume("pods/7e57/volume-subpaths/cache/third")?.join("0");
    if volume.join("settings").exists() {
        fs::write(&settings, "")?;
    } else {
        fs::create_dir(volume.join("settings"))?;
        fs::create_dir(&settings)?;
    }
    env.bind(&volume.join("settings"), &settings)?;
    let third = start("third", 0, &settings, "/etc/settings")?;
    ensure_eq!(pod.output(&third, "cat /etc/settings")?, "of the first\n", "a file that another has made");
    pod.output(&third, "echo of the third > /etc/settings")?;
    ensure_eq!(pod.output(&first, "cat /cache/settings")?, "of the third\n", "the same file");
    pod.stop(&third, 0)?;
    pod.remove_container(&third)?;
    ensure_eq!(pod.output(&first, "cat /cache/part/file")?, "two\n", "what another has written to its part");
    for id in [&first, &second] {
        pod.stop(id, 0)?;
        pod.remove_container(id)?;
    }
    let (first, second) = (start("first", 1, &volume, "/cache")?, start("second", 1, &part, "/part")?);
    ensure_eq!(pod.output(&first, "cat /cache/file")?, "one\n", "what is kept while containers are restarted");
    ensure_eq!(pod.output(&second, "cat /part/file")?, "two\n", "what is kept of a part");
    // Memory of the guest's for the one, files of the node's for the other.
    ensure_eq!(volume.join("file").exists(), env.kind == Kind::Other, "whether the node has the volume's files");
    fs::write(secret.join("key"), "new\n")?;
    ensure_eq!(pod.output(&first, "sleep 1; cat /secret/key")?, "new\n", "the secret");
    pod.remove()?;
    kubelet.end()
}
