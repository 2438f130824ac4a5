// SPDX-License-Identifier: Apache-2.0
//! The root file system that containerd's snapshotters describe as mounts: made on the bundle's `rootfs`, and undone.
//!
//! The server makes them in a mount namespace of its own: they end with it, however it ends.

use std::fs::{self, DirBuilder};
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::DirBuilderExt;
use std::path::{Component, Path, PathBuf};

use containerd_shim_protos::types::mount::Mount;
use nix::errno::Errno;
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, unshare};
use rustix::fs::{Mode, OFlags, open};
use thiserror::Error;

use super::loop_device::LoopDevice;
use crate::apart::apart;

/// The bundle's folder for it.
const FOLDER: &str = "rootfs";

/// Longest data of mount(2): a page, ended by a NUL byte.
const MAX_DATA: usize = 4095;

/// The options that are flags of mount(2), as fstab(5) knows them, and whether each sets its flag.
const FLAGS: [(&str, bool, MsFlags); 25] = [
    ("async", false, MsFlags::MS_SYNCHRONOUS),
    ("atime", false, MsFlags::MS_NOATIME),
    ("bind", true, MsFlags::MS_BIND),
    ("dev", false, MsFlags::MS_NODEV),
    ("diratime", false, MsFlags::MS_NODIRATIME),
    ("dirsync", true, MsFlags::MS_DIRSYNC),
    ("exec", false, MsFlags::MS_NOEXEC),
    ("mand", true, MsFlags::MS_MANDLOCK),
    ("noatime", true, MsFlags::MS_NOATIME),
    ("nodev", true, MsFlags::MS_NODEV),
    ("nodiratime", true, MsFlags::MS_NODIRATIME),
    ("noexec", true, MsFlags::MS_NOEXEC),
    ("nomand", false, MsFlags::MS_MANDLOCK),
    ("norelatime", false, MsFlags::MS_RELATIME),
    ("nostrictatime", false, MsFlags::MS_STRICTATIME),
    ("nosuid", true, MsFlags::MS_NOSUID),
    ("rbind", true, MsFlags::MS_BIND.union(MsFlags::MS_REC)),
    ("relatime", true, MsFlags::MS_RELATIME),
    ("remount", true, MsFlags::MS_REMOUNT),
    ("ro", true, MsFlags::MS_RDONLY),
    ("rw", false, MsFlags::MS_RDONLY),
    ("strictatime", true, MsFlags::MS_STRICTATIME),
    ("suid", false, MsFlags::MS_NOSUID),
    ("sync", true, MsFlags::MS_SYNCHRONOUS),
    ("defaults", true, MsFlags::empty()),
];

/// What begins the option of an overlay that may grow long.
const LOWER: &str = "lowerdir=";

/// A root file system that cannot be made.
#[derive(Debug, Error)]
pub(super) enum RootfsError {
    #[error("cannot make the folder {}", .0.display())]
    Folder(PathBuf, #[source] io::Error),
    #[error("cannot mount {kind:?} {source_path:?} on {} with the options {options:?}", target.display())]
    Mount { kind: String, source_path: String, target: PathBuf, options: Vec<String>, source: io::Error },
    #[error("cannot mount on {0:?}: it is not a path below the root file system")]
    Target(String),
    #[error("cannot make a block device of {}, which the mount option loop of the root file system asks for (module loop)", .0.display())]
    Loop(PathBuf, #[source] io::Error),
    #[error("cannot open {} for an overlay", .0.display())]
    Lower(PathBuf, #[source] io::Error),
    #[error("{0:?} are no options of a bind mount, which the root file system is to be")]
    OfBind(String),
    #[error("the options of a mount of the root file system are longer than {MAX_DATA} bytes")]
    TooLong,
    #[error("cannot make a thread that mounts the root file system")]
    Thread(#[source] io::Error),
}

/// Gives this process a mount namespace of its own, where what the host mounts and unmounts is followed.
pub(super) fn separate() -> io::Result<()> {
    unshare(CloneFlags::CLONE_NEWNS)?;
    let none: Option<&str> = None;
    Ok(mount(none, "/", none, MsFlags::MS_SLAVE | MsFlags::MS_REC, none)?)
}

/// A root file system; it is unmounted when this is dropped.
#[derive(Debug)]
pub(super) struct Rootfs {
    bundle: PathBuf,
}

impl Rootfs {
    /// Makes the mounts, one on top of the other.
    pub(super) fn mount(bundle: &Path, mounts: &[Mount]) -> Result<Self, RootfsError> {
        let folder = bundle.join(FOLDER);
        let rootfs = Self { bundle: bundle.to_owned() };
        if !mounts.is_empty() {
            let made = DirBuilder::new().recursive(true).mode(0o711).create(&folder);
            made.map_err(|error| RootfsError::Folder(folder.clone(), error))?;
        }
        for mount in mounts {
            mount_one(&folder, mount)?;
        }
        Ok(rootfs)
    }

    /// The same, while others go on.
    pub(super) async fn mount_apart(bundle: &Path, mounts: &[Mount]) -> Result<Self, RootfsError> {
        if mounts.is_empty() {
            return Self::mount(bundle, mounts);
        }
        let (bundle, mounts) = (bundle.to_owned(), mounts.to_vec());
        apart("rootfs", move || Self::mount(&bundle, &mounts)).await.map_err(RootfsError::Thread)?
    }

    /// Unmounts it while others go on: the last unmount of an overlay writes a whole file system back.
    pub(super) async fn unmount_apart(self) {
        // Without a thread it is dropped all the same.
        let _ = apart("rootfs", move || drop(self)).await;
    }
}

impl Drop for Rootfs {
    fn drop(&mut self) {
        if let Err(error) = unmount_all(&self.bundle) {
            crate::logging::warn(format_args!("cannot unmount {}: {error}", self.bundle.join(FOLDER).display()));
        }
    }
}

/// Unmounts what is mounted on a bundle's root file system.
pub(super) fn unmount_all(bundle: &Path) -> io::Result<()> {
    let folder = bundle.join(FOLDER);
    loop {
        match umount2(&folder, MntFlags::MNT_DETACH | MntFlags::UMOUNT_NOFOLLOW) {
            Ok(()) => {}
            // Nothing is mounted there any more, or there is no such folder.
            Err(Errno::EINVAL | Errno::ENOENT) => return Ok(()),
            Err(error) => return Err(error.into()),
        }
    }
}

fn mount_one(folder: &Path, description: &Mount) -> Result<(), RootfsError> {
    let target = target(folder, &description.target)?;
    let Options { flags, data, is_file } = Options::parse(&description.options);
    let (kind, source) = (description.type_.as_str(), Path::new(&description.source));
    // Held until it is mounted, which then holds it.
    let device = is_file.then(|| attach(source, flags.contains(MsFlags::MS_RDONLY))).transpose()?;
    let source = device.as_ref().map_or(source, LoopDevice::path);
    let (data, _lower) = if data.len() > MAX_DATA { shorten(&data)? } else { (data, Vec::new()) };
    if data.len() > MAX_DATA {
        return Err(RootfsError::TooLong);
    }
    let is_bind = flags.contains(MsFlags::MS_BIND) || kind == "bind";
    if is_bind && !data.is_empty() {
        // The kernel passes over them, whatever they were to do.
        return Err(RootfsError::OfBind(data));
    }
    let mounted = if is_bind {
        bind(source, &target, flags)
    } else {
        mount(Some(source), &target, Some(kind), flags, Some(data.as_str()))
    };
    mounted.map_err(|error| RootfsError::Mount {
        kind: kind.to_owned(),
        source_path: description.source.clone(),
        target,
        options: description.options.clone(),
        source: error.into(),
    })
}

fn attach(file: &Path, read_only: bool) -> Result<LoopDevice, RootfsError> {
    LoopDevice::attach(file, read_only).map_err(|error| RootfsError::Loop(file.to_owned(), error))
}

/// A bind mount takes its other flags by a second call only.
fn bind(source: &Path, target: &Path, flags: MsFlags) -> nix::Result<()> {
    let none: Option<&str> = None;
    let recursive = flags & MsFlags::MS_REC;
    mount(Some(source), target, none, MsFlags::MS_BIND | recursive, none)?;
    let others = flags - MsFlags::MS_REC - MsFlags::MS_BIND;
    if others.is_empty() {
        return Ok(());
    }
    mount(none, target, none, MsFlags::MS_BIND | MsFlags::MS_REMOUNT | others, none)
}

/// The place of a mount: the root file system, or a folder in it.
fn target(folder: &Path, below: &str) -> Result<PathBuf, RootfsError> {
    let parts = Path::new(below).components().filter(|part| !matches!(part, Component::RootDir | Component::CurDir));
    let mut target = folder.to_owned();
    for part in parts {
        match part {
            Component::Normal(name) => target.push(name),
            _ => return Err(RootfsError::Target(below.to_owned())),
        }
        // What lies in an image is not trusted.
        if fs::symlink_metadata(&target).is_ok_and(|status| status.is_symlink()) {
            return Err(RootfsError::Target(below.to_owned()));
        }
    }
    Ok(target)
}

/// Options of fstab(5), as flags and as what is the file system's own.
struct Options {
    flags: MsFlags,
    data: String,
    /// Whether the source is a file that is to be a block device.
    is_file: bool,
}

impl Options {
    fn parse(options: &[String]) -> Self {
        let mut flags = MsFlags::empty();
        let mut is_file = false;
        let mut data = Vec::new();
        for option in options {
            match FLAGS.iter().find(|(name, ..)| name == option) {
                Some((_, sets, flag)) => flags.set(*flag, *sets),
                None if option == "loop" => is_file = true,
                None if option.is_empty() => {}
                None => data.push(option.as_str()),
            }
        }
        Self { flags, data: data.join(","), is_file }
    }
}

/// Names the lower folders of an overlay by descriptors, which are short; they are needed until it is mounted.
fn shorten(data: &str) -> Result<(String, Vec<OwnedFd>), RootfsError> {
    let mut held = Vec::new();
    let mut options = Vec::new();
    for option in data.split(',') {
        let Some(folders) = option.strip_prefix(LOWER) else {
            options.push(option.to_owned());
            continue;
        };
        let mut names = Vec::new();
        for folder in folders.split(':') {
            let opened = open(folder, OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty());
            let opened = opened.map_err(|error| RootfsError::Lower(folder.into(), error.into()))?;
            names.push(format!("/proc/self/fd/{}", opened.as_raw_fd()));
            held.push(opened);
        }
        options.push(format!("{LOWER}{}", names.join(":")));
    }
    Ok((options.join(","), held))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(options: &[&str]) -> Options {
        Options::parse(&options.iter().map(|option| (*option).to_owned()).collect::<Vec<_>>())
    }

    #[test]
    fn options_are_flags_or_the_file_systems_own() {
        let parsed = parse(&["rbind", "ro", "index=off", "lowerdir=/a:/b"]);

        assert_eq!(parsed.flags, MsFlags::MS_BIND | MsFlags::MS_REC | MsFlags::MS_RDONLY);
        assert_eq!(parsed.data, "index=off,lowerdir=/a:/b");
        assert!(!parsed.is_file && parse(&["ro", "loop"]).is_file);
        for known in ["atime", "diratime", "strictatime", "norelatime", "dirsync", "mand", "remount", "defaults", "rw"]
        {
            assert_eq!(parse(&[known]).data, "", "{known}");
        }
        assert_eq!(parse(&["dirsync", "strictatime"]).flags, MsFlags::MS_DIRSYNC | MsFlags::MS_STRICTATIME);
        assert_eq!(parse(&["ro", "noatime", "rw", "atime"]).flags, MsFlags::empty());
    }

    #[test]
    fn what_a_bind_mount_would_pass_over_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let options = ["rbind", "uidmap=0:1000:65536"].map(str::to_owned).to_vec();
        let mount = Mount { type_: "bind".into(), source: "/".into(), options, ..Mount::default() };

        let refused = mount_one(dir.path(), &mount).unwrap_err();

        assert!(matches!(&refused, RootfsError::OfBind(options) if options == "uidmap=0:1000:65536"), "{refused}");
    }

    #[test]
    fn a_target_stays_in_the_root_file_system() {
        let dir = tempfile::tempdir().unwrap();
        std::os::unix::fs::symlink("/etc", dir.path().join("link")).unwrap();

        assert_eq!(target(dir.path(), "").unwrap(), dir.path());
        assert_eq!(target(dir.path(), "/a/b").unwrap(), dir.path().join("a/b"));
        assert!(target(dir.path(), "../a").is_err());
        assert!(target(dir.path(), "link/a").is_err());
    }

    #[test]
    fn the_lower_folders_of_an_overlay_have_short_names() {
        let dir = tempfile::tempdir().unwrap();
        let data = format!("index=off,lowerdir={0}:{0},upperdir=/u", dir.path().display());

        let (short, held) = shorten(&data).unwrap();

        assert_eq!(held.len(), 2);
        assert!(short.starts_with("index=off,lowerdir=/proc/self/fd/"), "{short}");
        assert!(short.ends_with(",upperdir=/u"), "{short}");
        assert!(matches!(shorten("lowerdir=/no/such"), Err(RootfsError::Lower(..))));
    }

    #[test]
    fn what_is_not_mounted_is_unmounted_without_a_word() {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir(dir.path().join(FOLDER)).unwrap();

        // Without privileges the kernel says no before it looks.
        let unmounted = unmount_all(dir.path());
        assert!(unmounted.is_ok() || unmounted.is_err_and(|error| error.raw_os_error() == Some(libc::EPERM)));
    }
}
