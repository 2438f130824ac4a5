// SPDX-License-Identifier: Apache-2.0
//! What is mounted below a path, as proc_pid_mountinfo(5) tells it.

use std::ffi::OsString;
use std::fs;
use std::io;
use std::os::unix::ffi::OsStringExt;
use std::path::{Path, PathBuf};

/// The fields that make a mount another one: its id, its parent's, the device, the root, the place.
pub(super) const FIELDS: usize = 5;

/// The mounts of the namespace that the calling thread is in: the first one of a process may be in another.
pub(super) const MOUNTINFO: &str = "/proc/thread-self/mountinfo";

/// The mounts below a path, each as its line begins. The path is one without links.
///
/// # Errors
///
/// There is no /proc.
pub(crate) fn mounts_below(path: &Path) -> io::Result<Vec<Vec<u8>>> {
    Ok(below(&read()?, path))
}

/// The part of its file system that is mounted at a path without links; `None` if nothing is mounted there.
pub(crate) fn root_of(path: &Path) -> Option<PathBuf> {
    root(&read().ok()?, path)
}

/// As bytes: the kernel escapes few characters, and one mount of somebody else's may have a name that is no UTF-8.
fn read() -> io::Result<Vec<u8>> {
    fs::read(MOUNTINFO)
}

/// The first [`FIELDS`] of each line.
fn mounts(mountinfo: &[u8]) -> impl DoubleEndedIterator<Item = Vec<&[u8]>> {
    let lines = mountinfo.split(|&byte| byte == b'\n').filter(|line| !line.is_empty());
    lines.map(|line| line.split(|&byte| byte == b' ').take(FIELDS).collect())
}

fn root(mountinfo: &[u8], path: &Path) -> Option<PathBuf> {
    // The last one is on top.
    let is_there = |fields: &Vec<&[u8]>| fields.get(FIELDS - 1).is_some_and(|place| unescape(place) == path);
    let mounted = mounts(mountinfo).rfind(is_there)?;
    Some(unescape(mounted.get(FIELDS - 2)?))
}

fn below(mountinfo: &[u8], path: &Path) -> Vec<Vec<u8>> {
    let is_below = |fields: &Vec<&[u8]>| {
        let place = fields.get(FIELDS - 1).map(|place| unescape(place));
        place.is_some_and(|place| place != path && place.starts_with(path))
    };
    mounts(mountinfo).filter(is_below).map(|fields| fields.join(&b' ')).collect()
}

/// A path whose special characters are as in `\040`.
pub(super) fn unescape(place: &[u8]) -> PathBuf {
    let mut parts = place.split(|&byte| byte == b'\\');
    let mut bytes = parts.next().unwrap_or_default().to_vec();
    for part in parts {
        let (code, rest) = part.split_at_checked(3).unwrap_or((part, &[]));
        match str::from_utf8(code).ok().and_then(|code| u8::from_str_radix(code, 8).ok()) {
            Some(byte) => bytes.push(byte),
            None => {
                bytes.push(b'\\');
                bytes.extend_from_slice(code);
            }
        }
        bytes.extend_from_slice(rest);
    }
    OsString::from_vec(bytes).into()
}

#[cfg(test)]
mod tests {
    use std::ffi::OsStr;
    use std::os::unix::ffi::OsStrExt;

    use super::*;

    const TEXT: &[u8] = b"\
        22 1 8:1 / / rw - ext4 /dev/sda1 rw\n\
        29 22 0:4 / /mnt/caf\xe9 rw - tmpfs tmpfs rw\n\
        30 22 0:5 / /vol rw shared:1 - tmpfs tmpfs rw\n\
        31 30 0:6 /sub /vol/a\\040b rw - tmpfs tmpfs rw\n\
        32 22 0:7 / /volume/x rw - tmpfs tmpfs rw\n";

    #[test]
    fn mounts_below_a_path_are_those_of_the_same_folders() {
        assert_eq!(below(TEXT, Path::new("/vol")), [b"31 30 0:6 /sub /vol/a\\040b"]);
        assert_eq!(below(TEXT, Path::new("/")).len(), 4);
        assert!(below(TEXT, Path::new("/vol/a b")).is_empty());
        assert_eq!(below(TEXT, Path::new("/vol/a")), Vec::<Vec<u8>>::new());
    }

    #[test]
    fn a_name_that_is_no_text_is_a_name() {
        assert_eq!(below(TEXT, Path::new("/mnt")), [b"29 22 0:4 / /mnt/caf\xe9"]);
        assert_eq!(root(TEXT, Path::new(OsStr::from_bytes(b"/mnt/caf\xe9"))), Some("/".into()));
    }

    #[test]
    fn what_is_mounted_is_a_part_of_a_file_system() {
        assert_eq!(root(TEXT, Path::new("/vol/a b")), Some("/sub".into()));
        assert_eq!(root(TEXT, Path::new("/vol/a")), None);
    }

    #[test]
    fn special_characters_are_read_as_they_are_written() {
        assert_eq!(unescape(b"/a\\040b\\134"), Path::new("/a b\\"));
        assert_eq!(unescape(b"/a\\zz"), Path::new("/a\\zz"));
    }
}
