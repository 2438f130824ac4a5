// SPDX-License-Identifier: Apache-2.0
//! Copies a directory of the container's root file system into a new file system that will cover it (`tmpcopyup`).

use std::ffi::CStr;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};

use rustix::fs::{AtFlags, Dir, FileType, Gid, Mode, OFlags, Uid};
use rustix::io::Errno;

use super::resolve;

/// Nesting that is copied before the copy is refused: each level takes stack and a descriptor.
const MAX_DEPTH: usize = 100;

/// Copies what is in the directory `from` into the directory `to`: files, directories, links, fifos and sockets' names,
/// with owner and permissions. Links are copied, never followed.
pub(crate) fn copy(from: BorrowedFd<'_>, to: BorrowedFd<'_>) -> io::Result<()> {
    copy_directory(from, to, MAX_DEPTH)
}

fn copy_directory(from: BorrowedFd<'_>, to: BorrowedFd<'_>, depth: usize) -> io::Result<()> {
    let depth = depth.checked_sub(1).ok_or(Errno::LOOP)?;
    for entry in Dir::read_from(from)? {
        let entry = entry?;
        let name = entry.file_name();
        if name != c"." && name != c".." {
            copy_entry(from, to, name, depth)?;
        }
    }
    Ok(())
}

fn copy_entry(from: BorrowedFd<'_>, to: BorrowedFd<'_>, name: &CStr, depth: usize) -> io::Result<()> {
    let source = rustix::fs::openat(from, name, OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC, Mode::empty())?;
    let status = rustix::fs::fstat(&source)?;
    let kind = FileType::from_raw_mode(status.st_mode);
    let mode = Mode::from_raw_mode(status.st_mode & 0o7777);
    match kind {
        FileType::Directory => {
            rustix::fs::mkdirat(to, name, Mode::RWXU)?;
            let source = resolve::open(source.as_fd(), ".", OFlags::RDONLY | OFlags::DIRECTORY)?;
            let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
            let target = rustix::fs::openat(to, name, flags, Mode::empty())?;
            copy_directory(source.as_fd(), target.as_fd(), depth)?;
        }
        FileType::RegularFile => copy_file(from, to, name)?,
        FileType::Symlink => {
            let target = rustix::fs::readlinkat(from, name, Vec::new())?;
            rustix::fs::symlinkat(target, to, name)?;
        }
        _ => rustix::fs::mknodat(to, name, kind, mode, status.st_rdev)?,
    }
    let owner = (Uid::from_raw(status.st_uid), Gid::from_raw(status.st_gid));
    rustix::fs::chownat(to, name, Some(owner.0), Some(owner.1), AtFlags::SYMLINK_NOFOLLOW)?;
    if kind != FileType::Symlink {
        // After chown, which takes set-id bits away. The target is new, and nobody else's.
        rustix::fs::chmodat(to, name, mode, AtFlags::empty())?;
    }
    Ok(())
}

fn copy_file(from: BorrowedFd<'_>, to: BorrowedFd<'_>, name: &CStr) -> io::Result<()> {
    // Not blocking: the entry could have become a fifo since it was looked at.
    let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
    let mut source: File = rustix::fs::openat(from, name, flags, Mode::empty())?.into();
    let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let mut target: File = rustix::fs::openat(to, name, flags, Mode::RUSR | Mode::WUSR)?.into();
    io::copy(&mut source, &mut target)?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::{PermissionsExt, symlink};

    #[test]
    fn files_links_and_directories_are_copied_with_their_permissions() {
        let folder = tempfile::tempdir().unwrap();
        let (from, to) = (folder.path().join("from"), folder.path().join("to"));
        std::fs::create_dir_all(from.join("inner/deep")).unwrap();
        std::fs::create_dir(&to).unwrap();
        std::fs::write(from.join("inner/file"), "content").unwrap();
        std::fs::set_permissions(from.join("inner/file"), PermissionsExt::from_mode(0o640)).unwrap();
        symlink("/etc/passwd", from.join("link")).unwrap();

        let descriptors = [File::open(&from).unwrap(), File::open(&to).unwrap()];
        copy(descriptors[0].as_fd(), descriptors[1].as_fd()).unwrap();

        assert_eq!(std::fs::read(to.join("inner/file")).unwrap(), b"content");
        assert_eq!(std::fs::metadata(to.join("inner/file")).unwrap().permissions().mode() & 0o7777, 0o640);
        assert_eq!(std::fs::read_link(to.join("link")).unwrap().to_str(), Some("/etc/passwd"));
        assert!(to.join("inner/deep").is_dir());
    }

    #[test]
    fn too_deep_a_tree_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let (from, to) = (folder.path().join("from"), folder.path().join("to"));
        std::fs::create_dir(&to).unwrap();
        std::fs::create_dir_all(from.join(vec!["d"; MAX_DEPTH + 1].join("/"))).unwrap();

        let descriptors = [File::open(&from).unwrap(), File::open(&to).unwrap()];
        let error = copy(descriptors[0].as_fd(), descriptors[1].as_fd()).unwrap_err();

        assert_eq!(error.raw_os_error(), Some(libc::ELOOP));
    }
}
