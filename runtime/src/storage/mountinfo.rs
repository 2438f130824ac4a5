// SPDX-License-Identifier: Apache-2.0
//! What is mounted below a path, as proc_pid_mountinfo(5) tells it.

use std::ffi::OsString;
use std::fs;
use std::io;
use std::os::unix::ffi::OsStringExt;
use std::path::{Path, PathBuf};

/// The fields that make a mount another one: its id, its parent's, the device, the root, the place.
const FIELDS: usize = 5;

/// The mounts below a path, each as its line begins. The path is one without links.
///
/// # Errors
///
/// There is no /proc.
pub(crate) fn mounts_below(path: &Path) -> io::Result<Vec<String>> {
    Ok(below(&fs::read_to_string("/proc/self/mountinfo")?, path))
}

/// The part of its file system that is mounted at a path without links; `None` if nothing is mounted there.
pub(crate) fn root_of(path: &Path) -> Option<PathBuf> {
    root(&fs::read_to_string("/proc/self/mountinfo").ok()?, path)
}

fn root(mountinfo: &str, path: &Path) -> Option<PathBuf> {
    let mut mounts = mountinfo.lines().map(|line| line.split(' ').take(FIELDS).collect::<Vec<_>>());
    // The last one is on top.
    let mounted = mounts.rfind(|fields| fields.get(FIELDS - 1).is_some_and(|place| unescape(place) == path))?;
    Some(unescape(mounted.get(FIELDS - 2)?))
}

fn below(mountinfo: &str, path: &Path) -> Vec<String> {
    let fields = mountinfo.lines().map(|line| line.split(' ').take(FIELDS).collect::<Vec<_>>());
    let is_below = |fields: &Vec<&str>| {
        let place = fields.get(FIELDS - 1).map(|place| unescape(place));
        place.is_some_and(|place| place != path && place.starts_with(path))
    };
    fields.filter(is_below).map(|fields| fields.join(" ")).collect()
}

/// A path whose special characters are as in `\040`.
fn unescape(place: &str) -> PathBuf {
    let mut parts = place.split('\\');
    let mut bytes = parts.next().unwrap_or_default().as_bytes().to_vec();
    for part in parts {
        // Three digits, which are ASCII, and so no part of another character.
        let (code, rest) = part.split_at_checked(3).unwrap_or((part, ""));
        match u8::from_str_radix(code, 8) {
            Ok(byte) => bytes.push(byte),
            Err(_) => bytes.extend_from_slice(format!("\\{code}").as_bytes()),
        }
        bytes.extend_from_slice(rest.as_bytes());
    }
    OsString::from_vec(bytes).into()
}

#[cfg(test)]
mod tests {
    use super::*;

    const TEXT: &str = "\
        22 1 8:1 / / rw - ext4 /dev/sda1 rw\n\
        30 22 0:5 / /vol rw shared:1 - tmpfs tmpfs rw\n\
        31 30 0:6 /sub /vol/a\\040b rw - tmpfs tmpfs rw\n\
        32 22 0:7 / /volume/x rw - tmpfs tmpfs rw\n";

    #[test]
    fn mounts_below_a_path_are_those_of_the_same_folders() {
        assert_eq!(below(TEXT, Path::new("/vol")), ["31 30 0:6 /sub /vol/a\\040b"]);
        assert_eq!(below(TEXT, Path::new("/")).len(), 3);
        assert!(below(TEXT, Path::new("/vol/a b")).is_empty());
        assert_eq!(below(TEXT, Path::new("/vol/a")), Vec::<String>::new());
    }

    #[test]
    fn what_is_mounted_is_a_part_of_a_file_system() {
        assert_eq!(root(TEXT, Path::new("/vol/a b")), Some("/sub".into()));
        assert_eq!(root(TEXT, Path::new("/vol/a")), None);
    }

    #[test]
    fn special_characters_are_read_as_they_are_written() {
        assert_eq!(unescape("/a\\040b\\134"), Path::new("/a b\\"));
        assert_eq!(unescape("/a\\zz"), Path::new("/a\\zz"));
    }
}
