// SPDX-License-Identifier: Apache-2.0
//! The initramfs of the QEMU cases: one program or a folder's files, and the device nodes they need.

use std::fs;
use std::io::{self, Write};
use std::path::Path;

use cpio::newc;

/// File type bits of st_mode.
const S_IFCHR: u32 = 0o020_000;
const S_IFDIR: u32 = 0o040_000;
const S_IFREG: u32 = 0o100_000;

/// One file of the archive; `major` and `minor` are a device node's number.
#[derive(Debug)]
struct Entry {
    name: String,
    mode: u32,
    major: u32,
    minor: u32,
    content: Vec<u8>,
}

impl Entry {
    fn folder(name: impl Into<String>) -> Self {
        Self { name: name.into(), mode: S_IFDIR | 0o755, major: 0, minor: 0, content: Vec::new() }
    }

    fn node(name: &str, mode: u32, (major, minor): (u32, u32)) -> Self {
        Self { name: name.into(), mode: S_IFCHR | mode, major, minor, content: Vec::new() }
    }

    fn program(name: impl Into<String>, content: Vec<u8>) -> Self {
        Self { name: name.into(), mode: S_IFREG | 0o755, major: 0, minor: 0, content }
    }
}

/// An uncompressed initramfs with `init`, /dev/kmsg and /dev/console.
///
/// # Errors
///
/// Those of writing to memory, of which there are none; the archive's writer has them in its type.
pub(crate) fn initramfs(init: &[u8]) -> io::Result<Vec<u8>> {
    archive([
        Entry::folder("dev"),
        Entry::node("dev/console", 0o600, (5, 1)),
        Entry::node("dev/kmsg", 0o600, (1, 11)),
        Entry::program("init", init.to_vec()),
    ])
}

/// An uncompressed initramfs with the folders and files below `root`, all of them executable, and the device nodes that
/// programs of an ordinary system expect.
///
/// # Errors
///
/// A file cannot be read, or is neither folder nor file.
pub(crate) fn initramfs_of(root: &Path) -> io::Result<Vec<u8>> {
    let mut entries = Vec::new();
    let mut folders = vec![root.to_owned()];
    while let Some(folder) = folders.pop() {
        for file in fs::read_dir(&folder)? {
            let path = file?.path();
            let name = path.strip_prefix(root).map_err(io::Error::other)?.display().to_string();
            let metadata = fs::symlink_metadata(&path)?;
            if metadata.is_dir() {
                entries.push(Entry::folder(name));
                folders.push(path);
            } else if metadata.is_file() {
                entries.push(Entry::program(name, fs::read(&path)?));
            } else {
                return Err(io::Error::other(format!("{} is neither folder nor file", path.display())));
            }
        }
    }
    for (name, number) in [("console", (5, 1)), ("kmsg", (1, 11)), ("null", (1, 3)), ("urandom", (1, 9))] {
        entries.push(Entry::node(&format!("dev/{name}"), 0o666, number));
    }
    archive(entries)
}

fn archive(entries: impl IntoIterator<Item = Entry>) -> io::Result<Vec<u8>> {
    let mut archive = Vec::new();
    for (inode, entry) in (1..).zip(entries) {
        let size = u32::try_from(entry.content.len()).map_err(|_| io::ErrorKind::FileTooLarge)?;
        let header = newc::Builder::new(&entry.name).ino(inode).nlink(1).mode(entry.mode);
        let mut writer = header.rdev_major(entry.major).rdev_minor(entry.minor).write(&mut archive, size);
        writer.write_all(&entry.content)?;
        writer.finish()?;
    }
    newc::trailer(&mut archive)?;
    Ok(archive)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The names in an archive, in order, with the sizes of the files.
    fn names(image: &[u8]) -> Vec<(String, u32)> {
        let mut names = Vec::new();
        let mut rest = image;
        loop {
            let reader = newc::Reader::new(rest).unwrap();
            if reader.entry().is_trailer() {
                break;
            }
            names.push((reader.entry().name().to_owned(), reader.entry().file_size()));
            rest = reader.finish().unwrap();
        }
        names
    }

    #[test]
    fn image_holds_the_program_and_its_console() {
        let names = names(&initramfs(b"program").unwrap());

        assert_eq!(names[3], ("init".to_owned(), 7));
        assert_eq!(names.iter().filter(|(name, _)| name.starts_with("dev/")).count(), 2);
    }

    #[test]
    fn folders_come_before_what_is_in_them() {
        let root = tempfile::tempdir().unwrap();
        fs::create_dir_all(root.path().join("dev")).unwrap();
        fs::create_dir_all(root.path().join("usr/bin")).unwrap();
        fs::write(root.path().join("usr/bin/program"), "12345").unwrap();

        let names = names(&initramfs_of(root.path()).unwrap());

        let place = |name: &str| names.iter().position(|(other, _)| other == name).unwrap();
        assert!(place("usr") < place("usr/bin") && place("usr/bin") < place("usr/bin/program"));
        assert!(place("dev") < place("dev/null"));
        assert_eq!(names[place("usr/bin/program")].1, 5);
    }
}
