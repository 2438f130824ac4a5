// SPDX-License-Identifier: Apache-2.0
//! Paths that a container may not see, and paths that it may not change.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};

use rustix::fs::FileType;

use super::{resolve, tree};
use crate::container::{Failure, Stage};

/// Covers `path` in the root file system: a directory by an empty read-only one, a file by `null`, an open `/dev/null`.
/// A path that is not there needs no cover.
pub(crate) fn mask(root: BorrowedFd<'_>, path: &str, null: BorrowedFd<'_>) -> Result<(), Failure> {
    cover(root, path, null).map_err(|error| Failure::new(Stage::MaskedPath, path, error))
}

fn cover(root: BorrowedFd<'_>, path: &str, null: BorrowedFd<'_>) -> io::Result<()> {
    let Some(place) = existing(root, path)? else { return Ok(()) };
    let cover = if resolve::file_type(place.as_fd())? == FileType::Directory {
        tree::make("tmpfs", "tmpfs", libc::MS_RDONLY, "").map_err(io::Error::other)?
    } else {
        tree::clone_at(null, false)?
    };
    tree::attach(cover.as_fd(), place.as_fd())
}

/// Makes `path` in the root file system read-only. A path that is not there needs nothing.
pub(crate) fn make_readonly(root: BorrowedFd<'_>, path: &str) -> Result<(), Failure> {
    let make = || -> io::Result<()> {
        let Some(place) = existing(root, path)? else { return Ok(()) };
        let mount = tree::clone_at(place.as_fd(), true)?;
        tree::change(mount.as_fd(), false, libc::MS_RDONLY, 0)?;
        tree::attach(mount.as_fd(), place.as_fd())
    };
    make().map_err(|error| Failure::new(Stage::ReadonlyPath, path, error))
}

fn existing(root: BorrowedFd<'_>, path: &str) -> io::Result<Option<std::os::fd::OwnedFd>> {
    match resolve::existing(root, path) {
        Ok(place) => Ok(Some(place)),
        Err(error) if matches!(error.raw_os_error(), Some(libc::ENOENT | libc::ENOTDIR)) => Ok(None),
        Err(error) => Err(error),
    }
}
