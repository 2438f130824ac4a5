// SPDX-License-Identifier: Apache-2.0
//! Container engines, each with a state of its own on a tmpfs, and an image that needs no registry.

mod containerd;
mod docker;
mod kubelet;
mod podman;

use std::ffi::OsString;
use std::fs;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

pub(crate) use containerd::Containerd;
pub(crate) use docker::{BY_NAME, Docker, SHIM};
pub(crate) use kubelet::{Kubelet, Pod, RUNTIMES, mount, named};
pub(crate) use podman::Podman;

use serde_json::json;

use crate::bundle::Bundle;
use crate::env::Env;
use crate::failure::{Context as _, Result, ensure, fail, skip};

/// The image that every engine has: busybox.
pub(crate) const IMAGE: &str = "bulkhead-e2e";

/// Names a folder of unpacked packages, whose programs are run instead of this machine's.
const ENGINES: &str = "BULKHEAD_TEST_ENGINES";

/// That folder.
fn unpacked() -> Option<PathBuf> {
    std::env::var_os(ENGINES).filter(|path| !path.is_empty()).map(PathBuf::from)
}

/// Between two questions to an engine's client, which takes an emulated processor for seconds.
pub(crate) const PAUSE: Duration = Duration::from_secs(1);

/// Waits until a daemon listens. Its client is not asked before: on a processor that both share each try takes from the daemon what
/// it needs to start.
fn wait_for_listener(socket: &Path, end: Instant) {
    while UnixStream::connect(socket).is_err() && Instant::now() < end {
        thread::sleep(Duration::from_millis(50));
    }
}

/// How engines are asked for what a container uses.
pub(crate) const USAGE: &str = "{{.Name}} {{.MemUsage}} {{.CPUPerc}} {{.PIDs}}";

/// The answer for a container `box` of 128 MiB that computes without end: what its machine uses of the host, which is more than
/// nothing, and within its limits.
pub(crate) fn expect_usage_of_busy_box(told: &str) -> Result {
    let words: Vec<&str> = told.split_whitespace().collect();
    ensure!(words.len() == 6 && words[0] == "box" && words[2] == "/", "not of the form that was asked for: {told:?}");
    let (used, limit) = (size(words[1])?, size(words[3])?);
    // Its kernel's memory, and the VMM's, are beside what the container may use.
    ensure!(used > 1e4 && used < limit && limit < 400e6, "memory: {told:?}");
    let percent: f64 = words[4].trim_end_matches('%').parse().context(|| format!("parsing {told:?}"))?;
    ensure!(percent > 5.0 && percent < 250.0, "use of processors: {told:?}");
    let processes: u32 = words[5].parse().context(|| format!("parsing {told:?}"))?;
    ensure!((1..200).contains(&processes), "processes: {told:?}");
    Ok(())
}

/// A size as engines print it, in bytes.
fn size(text: &str) -> Result<f64> {
    const UNITS: [(&str, f64); 9] = [
        ("KiB", 1024.0),
        ("MiB", 1048576.0),
        ("GiB", 1073741824.0),
        ("kB", 1e3),
        ("KB", 1e3),
        ("MB", 1e6),
        ("GB", 1e9),
        ("TB", 1e12),
        ("B", 1.0),
    ];
    let parsed = UNITS.iter().find_map(|(unit, factor)| Some((text.strip_suffix(unit)?, factor)));
    let Some((number, factor)) = parsed else { fail!("{text:?} is no size") };
    Ok(number.parse::<f64>().context(|| format!("parsing {text:?}"))? * factor)
}

/// The path of a program of Debian's, or a skip that names its package.
pub(crate) fn debian_program(path: &str, package: &str) -> Result<PathBuf> {
    let unpacked = unpacked().map(|folder| folder.join(path.trim_start_matches('/')));
    if let Some(program) = unpacked.filter(|program| program.exists()) {
        return Ok(program);
    }
    if !Path::new(path).exists() {
        skip!("there is no {path} (package {package})");
    }
    Ok(path.into())
}

/// A folder on a tmpfs: the engines' storage cannot lie on an overlay.
fn state_folder(env: &Env, name: &str) -> Result<PathBuf> {
    let folder = env.folder(name)?;
    env.mount("tmpfs", "tmpfs", &folder, "mode=700")?;
    Ok(folder)
}

/// The path in which engines look for programs, shims among them: the folder of the runtime goes first, and then those of
/// unpacked packages.
fn search_path(env: &Env) -> Result<OsString> {
    let folder = env.runtime.parent().map(Path::to_path_buf);
    let unpacked = unpacked().into_iter().flat_map(|folder| ["usr/bin", "usr/sbin"].map(|name| folder.join(name)));
    let rest = std::env::var_os("PATH").unwrap_or_default();
    let folders = folder.into_iter().chain(unpacked).chain(std::env::split_paths(&rest));
    std::env::join_paths(folders).context(|| "PATH".to_owned())
}

/// The first number of an engine's version.
fn major_version(program: &Path) -> Result<u32> {
    let output = Command::new(program).arg("--version").output().context(|| program.display().to_string())?;
    let text = String::from_utf8_lossy(&output.stdout);
    // containerd, its module, the version; or `Docker version`, and it.
    let number = text.split_whitespace().nth(2).and_then(|version| version.trim_start_matches('v').split('.').next());
    match number.and_then(|number| number.parse().ok()) {
        Some(number) => Ok(number),
        None => fail!("{} --version prints {text:?}", program.display()),
    }
}

/// The image as a tar archive, which the engines import.
fn image_archive(env: &Env) -> Result<Vec<u8>> {
    let rootfs = Bundle::busybox(env)?.rootfs();
    let tar = Command::new("tar").arg("-C").arg(&rootfs).args(["-c", "."]).output();
    let tar = tar.context(|| format!("packing {}", rootfs.display()))?;
    ensure!(tar.status.success(), "packing {}: {}", rootfs.display(), String::from_utf8_lossy(&tar.stderr));
    fs::remove_dir_all(&rootfs)?;
    Ok(tar.stdout)
}

/// Writes the image in docker's archive format, by that name. Its default program sleeps, so that it serves as the sandbox
/// image of a pod too.
fn docker_archive(env: &Env, name: &str, archive: &Path) -> Result {
    let folder = env.folder("image")?;
    fs::write(folder.join("layer.tar"), image_archive(env)?)?;
    let sum = Command::new("sha256sum").arg(folder.join("layer.tar")).output()?;
    let digest = String::from_utf8_lossy(&sum.stdout).split(' ').next().unwrap_or_default().to_owned();
    let config = json!({
        "architecture": "amd64", "os": "linux",
        "config": { "Env": ["PATH=/bin:/sbin:/usr/bin:/usr/sbin"], "Cmd": ["sleep", "1000000"] },
        "rootfs": { "type": "layers", "diff_ids": [format!("sha256:{digest}")] },
    });
    fs::write(folder.join("config.json"), config.to_string())?;
    let manifest = json!([{ "Config": "config.json", "RepoTags": [name], "Layers": ["layer.tar"] }]);
    fs::write(folder.join("manifest.json"), manifest.to_string())?;
    let files = ["config.json", "layer.tar", "manifest.json"];
    let packed = Command::new("tar").arg("-C").arg(&folder).arg("-cf").arg(archive).args(files).status()?;
    ensure!(packed.success(), "packing the image: {packed}");
    Ok(fs::remove_dir_all(&folder)?)
}
