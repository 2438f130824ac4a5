// SPDX-License-Identifier: Apache-2.0
//! The initramfs of the QEMU case: one program and the device nodes it needs.

use std::io::{self, Write};

use cpio::newc;

/// File type bits of st_mode.
const S_IFCHR: u32 = 0o020_000;
const S_IFDIR: u32 = 0o040_000;
const S_IFREG: u32 = 0o100_000;

/// One file of the archive; `major` and `minor` are a device node's number.
#[derive(Debug)]
struct Entry<'a> {
    name: &'static str,
    mode: u32,
    major: u32,
    minor: u32,
    content: &'a [u8],
}

/// An uncompressed initramfs with `init`, /dev/kmsg and /dev/console.
///
/// # Errors
///
/// Those of writing to memory, of which there are none; the archive's writer has them in its type.
pub(crate) fn initramfs(init: &[u8]) -> io::Result<Vec<u8>> {
    let node = |name, mode, (major, minor)| Entry { name, mode, major, minor, content: &[] };
    let entries = [
        node("dev", S_IFDIR | 0o755, (0, 0)),
        node("dev/console", S_IFCHR | 0o600, (5, 1)),
        node("dev/kmsg", S_IFCHR | 0o600, (1, 11)),
        Entry { name: "init", mode: S_IFREG | 0o755, major: 0, minor: 0, content: init },
    ];
    let mut archive = Vec::new();
    for (inode, entry) in (1..).zip(entries) {
        let size = u32::try_from(entry.content.len()).map_err(|_| io::ErrorKind::FileTooLarge)?;
        let header = newc::Builder::new(entry.name).ino(inode).nlink(1).mode(entry.mode);
        let mut writer = header.rdev_major(entry.major).rdev_minor(entry.minor).write(&mut archive, size);
        writer.write_all(entry.content)?;
        writer.finish()?;
    }
    newc::trailer(&mut archive)?;
    Ok(archive)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn image_holds_the_program_and_its_console() {
        let image = initramfs(b"program").unwrap();
        let mut names = Vec::new();
        let mut rest = image.as_slice();

        loop {
            let reader = newc::Reader::new(rest).unwrap();
            if reader.entry().is_trailer() {
                break;
            }
            names.push((reader.entry().name().to_owned(), reader.entry().file_size()));
            rest = reader.finish().unwrap();
        }

        assert_eq!(names[3], ("init".to_owned(), 7));
        assert_eq!(names.iter().filter(|(name, _)| name.starts_with("dev/")).count(), 2);
    }
}
