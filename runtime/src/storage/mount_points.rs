// SPDX-License-Identifier: Apache-2.0
//! The mount points of a container whose root file system is read-only.
//!
//! Absent mount points are made in the root file system, as runc does. In a writable one the agent does it; a read-only
//! one is read-only for the guest as a whole, so the host makes them before it is shared. Every step is resolved inside
//! the root file system (`openat2` with `RESOLVE_IN_ROOT`), whatever links a bundle holds.

use std::io;
use std::os::fd::OwnedFd;
use std::path::{Component, Path, PathBuf};

use rustix::fs::{AtFlags, Gid, Mode, OFlags, ResolveFlags, Uid, chownat, mkdirat, open, openat2};
use rustix::io::Errno;
use rustix::process::{getegid, geteuid};

/// What a mount point has to be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    /// For a file system or a bound folder.
    Folder,
    /// For a bound file.
    File,
}

/// Makes the mount points that are absent, in order, and gives them to their owner (user and group); those below an earlier one lie in what is mounted there, and are not
/// the root file system's.
///
/// # Errors
///
/// Which one could not be made, and why. A file system that is read-only itself is no error: the agent tells what is
/// missing in it.
pub(crate) fn make<'a>(
    rootfs: &Path,
    owner: (u32, u32),
    points: impl IntoIterator<Item = (&'a str, Kind)>,
) -> Result<(), (PathBuf, io::Error)> {
    let failed = |path: &Path| {
        let path = path.to_owned();
        move |error: Errno| (path, io::Error::from(error))
    };
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let root = open(rootfs, flags, Mode::empty()).map_err(failed(rootfs))?;
    let mut covered: Vec<&Path> = Vec::new();
    for (point, kind) in points {
        let path = Path::new(point);
        if !covered.iter().any(|cover| path.starts_with(cover)) {
            match make_one(&root, path, owner, kind) {
                Ok(()) | Err(Errno::ROFS) => {}
                Err(error) => return Err(failed(path)(error)),
            }
        }
        covered.push(path);
    }
    Ok(())
}

fn make_one(root: &OwnedFd, path: &Path, owner: (u32, u32), kind: Kind) -> Result<(), Errno> {
    if open_in(root, path, OFlags::PATH).is_ok() {
        return Ok(());
    }
    let mut names: Vec<_> = path.components().filter(|part| matches!(part, Component::Normal(_))).collect();
    let file = if kind == Kind::File { names.pop() } else { None };
    let mut made = PathBuf::from("/");
    let mut folder = open_in(root, &made, OFlags::PATH | OFlags::DIRECTORY)?;
    for name in names {
        made.push(name);
        folder = match open_in(root, &made, OFlags::PATH | OFlags::DIRECTORY) {
            Err(Errno::NOENT) => {
                match mkdirat(&folder, Path::new(&name), Mode::from_raw_mode(0o755)) {
                    Ok(()) => give(&folder, Path::new(&name), owner)?,
                    // Made by another bulkhead, or a dangling link, which the next step finds.
                    Err(Errno::EXIST) => {}
                    Err(error) => return Err(error),
                }
                open_in(root, &made, OFlags::PATH | OFlags::DIRECTORY)?
            }
            opened => opened?,
        };
    }
    if let Some(name) = file {
        let flags = OFlags::CREATE | OFlags::EXCL | OFlags::WRONLY | OFlags::CLOEXEC | OFlags::NOFOLLOW;
        match rustix::fs::openat(&folder, Path::new(&name), flags, Mode::from_raw_mode(0o644)) {
            Ok(_) => give(&folder, Path::new(&name), owner)?,
            Err(Errno::EXIST) => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

/// Changes the owner of what was just made, unless it is right already.
fn give(folder: &OwnedFd, name: &Path, owner: (u32, u32)) -> Result<(), Errno> {
    if owner == (geteuid().as_raw(), getegid().as_raw()) {
        return Ok(());
    }
    let (user, group) = (Uid::from_raw(owner.0), Gid::from_raw(owner.1));
    chownat(folder, name, Some(user), Some(group), AtFlags::SYMLINK_NOFOLLOW)
}

fn open_in(root: &OwnedFd, path: &Path, flags: OFlags) -> Result<OwnedFd, Errno> {
    openat2(root, path, flags | OFlags::CLOEXEC, Mode::empty(), ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;
    use std::os::unix::fs::symlink;

    fn own() -> (u32, u32) {
        (geteuid().as_raw(), getegid().as_raw())
    }

    #[test]
    fn absent_points_are_made_and_covered_ones_are_not() {
        let root = tempfile::tempdir().unwrap();

        make(root.path(), own(), [("/dev", Kind::Folder), ("/dev/pts", Kind::Folder), ("/a/b/hosts", Kind::File)])
            .unwrap();

        assert!(root.path().join("dev").is_dir());
        assert!(!root.path().join("dev/pts").exists());
        assert!(root.path().join("a/b/hosts").is_file());
    }

    #[test]
    fn what_is_there_is_kept() {
        let root = tempfile::tempdir().unwrap();
        fs::write(root.path().join("hosts"), "kept").unwrap();

        make(root.path(), own(), [("/hosts", Kind::File), ("/", Kind::Folder)]).unwrap();

        assert_eq!(fs::read_to_string(root.path().join("hosts")).unwrap(), "kept");
    }

    #[test]
    fn links_never_lead_out() {
        let outside = tempfile::tempdir().unwrap();
        let root = tempfile::tempdir().unwrap();
        symlink(outside.path(), root.path().join("absolute")).unwrap();
        symlink(format!("../../../../../..{}", outside.path().display()), root.path().join("relative")).unwrap();

        // The links dangle inside the root, so nothing can be made through them.
        assert!(make(root.path(), own(), [("/absolute/x", Kind::Folder)]).is_err());
        assert!(make(root.path(), own(), [("/relative/x", Kind::File)]).is_err());

        assert_eq!(fs::read_dir(outside.path()).unwrap().count(), 0);
    }

    #[test]
    fn links_inside_are_followed_inside() {
        let root = tempfile::tempdir().unwrap();
        fs::create_dir(root.path().join("real")).unwrap();
        symlink("/real", root.path().join("link")).unwrap();

        make(root.path(), own(), [("/link/x", Kind::Folder)]).unwrap();

        assert!(root.path().join("real/x").is_dir());
    }
}
