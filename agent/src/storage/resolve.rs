// SPDX-License-Identifier: Apache-2.0
//! Finds, and where they are missing makes, the places in a container's root file system that something is mounted on.
//!
//! The file system's content is not trusted: any component may be a symbolic link that leads anywhere. Here `/` and `..`
//! stop at the container's root, for links too, so nothing outside it can be reached or made.

use std::collections::VecDeque;
use std::ffi::{OsStr, OsString};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;

use rustix::fs::{AtFlags, CWD, FileType, Mode, OFlags, ResolveFlags};
use rustix::io::Errno;

/// Symbolic links followed before giving up, as in the kernel.
const MAX_LINKS: usize = 40;

/// Permission bits of what is made on the way.
const MODE_CREATED: u32 = 0o755;

/// What a path has to be, and is made as when it is missing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    /// A directory.
    Directory,
    /// Anything that is not a directory; made as an empty regular file.
    File,
}

/// The place that `path` names inside `root`, without its contents being opened (`O_PATH`).
pub(crate) fn existing(root: BorrowedFd<'_>, path: &str) -> io::Result<OwnedFd> {
    open(root, path, OFlags::PATH)
}

/// Opens what `path` names inside `root`. Links that lead to other processes' files (`/proc/*/fd/*`) are not followed.
pub(crate) fn open(root: BorrowedFd<'_>, path: &str, flags: OFlags) -> io::Result<OwnedFd> {
    let resolve = ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS;
    let path = if path.is_empty() { "." } else { path };
    loop {
        match rustix::fs::openat2(root, path, flags | OFlags::CLOEXEC, Mode::empty(), resolve) {
            // The kernel saw a rename elsewhere while it resolved `..`, and could not be sure.
            Err(Errno::AGAIN | Errno::INTR) => {}
            result => return Ok(result?),
        }
    }
}

/// The place that `path` names inside `root`; what is missing of it is made.
pub(crate) fn existing_or_made(root: BorrowedFd<'_>, path: &str, kind: Kind) -> io::Result<OwnedFd> {
    let place = match existing(root, path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Walk::new(root, path).finish(kind)?,
        result => result?,
    };
    let is_directory = file_type(place.as_fd())? == FileType::Directory;
    match kind {
        Kind::Directory if !is_directory => Err(Errno::NOTDIR.into()),
        Kind::File if is_directory => Err(Errno::ISDIR.into()),
        _ => Ok(place),
    }
}

/// What kind of file `file` is.
pub(crate) fn file_type(file: BorrowedFd<'_>) -> io::Result<FileType> {
    Ok(FileType::from_raw_mode(rustix::fs::fstat(file)?.st_mode))
}

/// The place where the last component of `path` lies, and that component. The directory is made if it is missing; the
/// last component is not looked at.
pub(crate) fn parent_and_name(root: BorrowedFd<'_>, path: &str) -> io::Result<(OwnedFd, OsString)> {
    let path = path.trim_end_matches('/');
    let (parent, name) = path.rsplit_once('/').unwrap_or(("", path));
    if matches!(name, "" | "." | "..") {
        return Err(Errno::INVAL.into());
    }
    Ok((existing_or_made(root, parent, Kind::Directory)?, name.into()))
}

/// A walk from the container's root, one component at a time.
struct Walk<'a> {
    root: BorrowedFd<'a>,
    /// The directories from below the root to where the walk is. Going up takes the last one away.
    entered: Vec<OwnedFd>,
    /// What is still to be walked.
    rest: VecDeque<OsString>,
    links: usize,
}

impl<'a> Walk<'a> {
    fn new(root: BorrowedFd<'a>, path: &str) -> Self {
        let mut walk = Self { root, entered: Vec::new(), rest: VecDeque::new(), links: 0 };
        walk.insert(path.as_bytes());
        walk
    }

    /// Puts the components of `path` before what is still to be walked.
    fn insert(&mut self, path: &[u8]) {
        if path.first() == Some(&b'/') {
            self.entered.clear();
        }
        for part in path.split(|byte| *byte == b'/').rev() {
            if !part.is_empty() && part != b"." {
                self.rest.push_front(OsStr::from_bytes(part).to_owned());
            }
        }
    }

    fn here(&self) -> BorrowedFd<'_> {
        self.entered.last().map_or(self.root, AsFd::as_fd)
    }

    fn finish(mut self, kind: Kind) -> io::Result<OwnedFd> {
        while let Some(name) = self.rest.pop_front() {
            if name == ".." {
                self.entered.pop();
                continue;
            }
            let kind = if self.rest.is_empty() { kind } else { Kind::Directory };
            let next = open_or_make(self.here(), &name, kind)?;
            match file_type(next.as_fd())? {
                FileType::Symlink => self.follow(&name)?,
                FileType::Directory => self.entered.push(next),
                _ if self.rest.is_empty() => return Ok(next),
                _ => return Err(Errno::NOTDIR.into()),
            }
        }
        match self.entered.pop() {
            Some(last) => Ok(last),
            None => existing(self.root, "."),
        }
    }

    fn follow(&mut self, name: &OsStr) -> io::Result<()> {
        self.links += 1;
        if self.links > MAX_LINKS {
            return Err(Errno::LOOP.into());
        }
        let target = rustix::fs::readlinkat(self.here(), name, Vec::new())?;
        self.insert(target.as_bytes());
        Ok(())
    }
}

fn open_or_make(directory: BorrowedFd<'_>, name: &OsStr, kind: Kind) -> io::Result<OwnedFd> {
    let open_it = || {
        let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        rustix::fs::openat(directory, name, flags, Mode::empty())
    };
    match open_it() {
        Err(Errno::NOENT) => {}
        result => return Ok(result?),
    }
    let made = match kind {
        Kind::Directory => rustix::fs::mkdirat(directory, name, Mode::from_raw_mode(MODE_CREATED)),
        Kind::File => {
            let flags = OFlags::CREATE | OFlags::EXCL | OFlags::WRONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
            rustix::fs::openat(directory, name, flags, Mode::from_raw_mode(MODE_CREATED)).map(drop)
        }
    };
    match made {
        // Somebody else made it first; what it is gets checked after this.
        Ok(()) | Err(Errno::EXIST) => Ok(open_it()?),
        Err(error) => Err(error.into()),
    }
}

/// The directory at `path`, without its contents being opened (`O_PATH`). For paths of the agent's own.
pub(crate) fn own_directory(path: &std::path::Path) -> io::Result<OwnedFd> {
    Ok(rustix::fs::openat(CWD, path, OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())?)
}

/// Makes a folder in a tmpfs of the agent's that containers write to, and gives it the permissions of its top; one that is there
/// stays as it is.
pub(crate) fn make_folder(top: &std::path::Path, folder: &str) -> io::Result<()> {
    let top = own_directory(top)?;
    if existing(top.as_fd(), folder).is_ok() {
        return Ok(());
    }
    existing_or_made(top.as_fd(), folder, Kind::Directory)?;
    let made = open(top.as_fd(), folder, OFlags::RDONLY | OFlags::DIRECTORY)?;
    Ok(rustix::fs::fchmod(&made, Mode::from_raw_mode(permissions(top.as_fd())?))?)
}

/// Permission bits of the file.
pub(crate) fn permissions(file: BorrowedFd<'_>) -> io::Result<u32> {
    Ok(rustix::fs::statat(file, "", AtFlags::EMPTY_PATH)?.st_mode & 0o7777)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::symlink;
    use std::path::{Path, PathBuf};

    /// A directory with `root` in it, and the root opened.
    fn root() -> (tempfile::TempDir, PathBuf, OwnedFd) {
        let folder = tempfile::tempdir().unwrap();
        let root = folder.path().join("root");
        std::fs::create_dir(&root).unwrap();
        let descriptor = own_directory(&root).unwrap();
        (folder, root, descriptor)
    }

    fn place_of(file: &OwnedFd) -> PathBuf {
        use std::os::fd::AsRawFd;
        std::fs::read_link(format!("/proc/self/fd/{}", file.as_raw_fd())).unwrap()
    }

    fn made(root: &OwnedFd, path: &str, kind: Kind) -> io::Result<PathBuf> {
        existing_or_made(root.as_fd(), path, kind).map(|file| place_of(&file))
    }

    #[test]
    fn missing_directories_and_files_are_made() {
        let (_folder, root, descriptor) = root();
        assert_eq!(made(&descriptor, "/a/b/c", Kind::Directory).unwrap(), root.join("a/b/c"));
        assert_eq!(made(&descriptor, "/a/x/file", Kind::File).unwrap(), root.join("a/x/file"));
        assert!(root.join("a/x/file").is_file());
    }

    #[test]
    fn absolute_link_out_of_the_root_stays_inside() {
        let (folder, root, descriptor) = root();
        let outside = folder.path().join("outside");
        std::fs::create_dir(&outside).unwrap();
        symlink(&outside, root.join("link")).unwrap();

        let place = made(&descriptor, "/link/new", Kind::Directory).unwrap();

        assert!(place.starts_with(&root) && place.ends_with("outside/new"), "{}", place.display());
        assert_eq!(std::fs::read_dir(outside).unwrap().count(), 0);
    }

    #[test]
    fn parent_components_stop_at_the_root() {
        let (folder, root, descriptor) = root();
        symlink("../../../../up", root.join("link")).unwrap();

        assert_eq!(made(&descriptor, "/link/x", Kind::Directory).unwrap(), root.join("up/x"));
        assert_eq!(made(&descriptor, "/../../y", Kind::Directory).unwrap(), root.join("y"));
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1);
    }

    #[test]
    fn link_loop_is_an_error() {
        let (_folder, root, descriptor) = root();
        symlink("b", root.join("a")).unwrap();
        symlink("a", root.join("b")).unwrap();
        let error = made(&descriptor, "/a/x", Kind::Directory).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::ELOOP));
    }

    #[test]
    fn file_on_the_way_is_an_error() {
        let (_folder, root, descriptor) = root();
        std::fs::write(root.join("file"), "").unwrap();
        let error = made(&descriptor, "/file/x", Kind::Directory).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::ENOTDIR));
    }

    #[test]
    fn wrong_kind_is_an_error() {
        let (_folder, root, descriptor) = root();
        std::fs::write(root.join("file"), "").unwrap();
        std::fs::create_dir(root.join("directory")).unwrap();
        assert!(made(&descriptor, "/file", Kind::Directory).is_err());
        assert!(made(&descriptor, "/directory", Kind::File).is_err());
    }

    #[test]
    fn existing_content_is_kept() {
        let (_folder, root, descriptor) = root();
        std::fs::write(root.join("file"), "content").unwrap();
        made(&descriptor, "/file", Kind::File).unwrap();
        assert_eq!(std::fs::read(root.join("file")).unwrap(), b"content");
    }

    #[test]
    fn parent_is_made_and_the_name_left_alone() {
        let (_folder, root, descriptor) = root();
        let (parent, name) = parent_and_name(descriptor.as_fd(), "/dev/null").unwrap();
        assert_eq!((place_of(&parent), name.as_os_str()), (root.join("dev"), OsStr::new("null")));
        assert!(!root.join("dev/null").exists());
        for path in ["/", "/dev/..", ""] {
            assert!(parent_and_name(descriptor.as_fd(), path).is_err(), "{path}");
        }
    }

    #[test]
    fn root_itself_is_found() {
        let (_folder, root, descriptor) = root();
        assert_eq!(made(&descriptor, "/", Kind::Directory).unwrap(), root);
        assert_eq!(Path::new("/nonexistent-share").exists(), own_directory(Path::new("/nonexistent-share")).is_ok());
    }
}
