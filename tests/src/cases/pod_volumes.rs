// SPDX-License-Identifier: Apache-2.0
//! Volumes that the node changes while a pod runs: containers that come later find what is there then, as with other runtimes.

use std::fs;

use super::pods::WAIT;
use super::{Case, case};
use crate::engines::{Kubelet, Pod, mount};
use crate::env::Env;
use crate::failure::{Result, ensure_eq};

pub(super) const CASES: &[Case] = &[case!(replaced), case!(mounted_into)];

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
