// SPDX-License-Identifier: Apache-2.0
//! The initramfs: a newc cpio archive that holds the agent as `/init` and the directories it mounts on.
//!
//! It is not compressed: the kernel unpacks it at every start, and copying is faster than any decompressor.

use std::io::Write;
use std::path::Path;

use cpio::newc::{Builder, ModeFileType};

use crate::agent_binary::{self, ProgramError};
use crate::layout::{CONSOLE, CONSOLE_DEVICE, DIRECTORIES, INIT, MODE_CONSOLE, MODE_DIRECTORY, MODE_PROGRAM};
use crate::output::{self, OutputError};

/// The image must be smaller than this: its size is paid in time and memory by every sandbox.
pub(crate) const MAX_LEN: usize = 3 << 20;

/// Why an initramfs could not be made.
#[derive(Debug, thiserror::Error)]
pub(crate) enum InitramfsError {
    #[error("the agent cannot go into the guest image")]
    Agent(#[from] ProgramError),
    #[error("cannot encode entry {name} of the guest image")]
    Encode { name: &'static str, source: std::io::Error },
    #[error("the guest image would be {len} bytes, and must be smaller than {MAX_LEN}: make the agent smaller")]
    TooLarge { len: usize },
    #[error("the guest image cannot be written")]
    Output(#[from] OutputError),
}

/// Makes the archive at `output` out of the program at `agent`.
pub(crate) fn write(agent: &Path, output: &Path) -> Result<(), InitramfsError> {
    let image = encode(&agent_binary::read(agent)?)?;
    output::write_atomically(output, &image)?;
    Ok(())
}

/// One entry of the archive.
struct Entry<'a> {
    name: &'static str,
    kind: ModeFileType,
    permissions: u32,
    device: (u32, u32),
    content: &'a [u8],
}

fn encode(agent: &[u8]) -> Result<Vec<u8>, InitramfsError> {
    // The archive's lengths are 32 bits wide: refuse before anything could be cut off.
    if agent.len() >= MAX_LEN {
        return Err(InitramfsError::TooLarge { len: agent.len() });
    }
    let mut image = Vec::with_capacity(agent.len() + 4096);
    for (ino, entry) in (1_u32..).zip(entries(agent)) {
        let name = entry.name;
        append(&mut image, ino, entry).map_err(|source| InitramfsError::Encode { name, source })?;
    }
    cpio::newc::trailer(&mut image).map_err(|source| InitramfsError::Encode { name: "TRAILER!!!", source })?;
    if image.len() >= MAX_LEN {
        return Err(InitramfsError::TooLarge { len: image.len() });
    }
    Ok(image)
}

/// All entries, sorted by name, so that a directory comes before what is in it.
fn entries(agent: &[u8]) -> Vec<Entry<'_>> {
    let mut entries: Vec<Entry<'_>> = DIRECTORIES
        .iter()
        .map(|name| Entry {
            name,
            kind: ModeFileType::Directory,
            permissions: MODE_DIRECTORY,
            device: (0, 0),
            content: &[],
        })
        .collect();
    entries.push(Entry {
        name: CONSOLE,
        kind: ModeFileType::Char,
        permissions: MODE_CONSOLE,
        device: CONSOLE_DEVICE,
        content: &[],
    });
    entries.push(Entry {
        name: INIT,
        kind: ModeFileType::Regular,
        permissions: MODE_PROGRAM,
        device: (0, 0),
        content: agent,
    });
    entries.sort_by_key(|entry| entry.name);
    entries
}

fn append(image: &mut Vec<u8>, ino: u32, entry: Entry<'_>) -> std::io::Result<()> {
    let nlink = if matches!(entry.kind, ModeFileType::Directory) { 2 } else { 1 };
    let content_len = u32::try_from(entry.content.len()).map_err(std::io::Error::other)?;
    let mut writer = Builder::new(entry.name)
        .ino(ino)
        .mode(entry.permissions)
        .set_mode_file_type(entry.kind)
        .nlink(nlink)
        .uid(0)
        .gid(0)
        .mtime(0)
        .rdev_major(entry.device.0)
        .rdev_minor(entry.device.1)
        .write(image, content_len);
    writer.write_all(entry.content)?;
    writer.finish()?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::agent_binary::tests::static_elf;
    use cpio::newc::Reader;

    struct Decoded {
        name: String,
        mode: u32,
        device: (u32, u32),
        mtime: u32,
        content: Vec<u8>,
    }

    fn decode(image: &[u8]) -> Vec<Decoded> {
        let mut rest = image;
        let mut found = Vec::new();
        loop {
            let mut reader = Reader::new(rest).unwrap();
            if reader.entry().is_trailer() {
                return found;
            }
            let mut content = Vec::new();
            std::io::Read::read_to_end(&mut reader, &mut content).unwrap();
            let entry = reader.entry();
            found.push(Decoded {
                name: entry.name().to_owned(),
                mode: entry.mode(),
                device: (entry.rdev_major(), entry.rdev_minor()),
                mtime: entry.mtime(),
                content,
            });
            rest = reader.finish().unwrap();
        }
    }

    #[test]
    fn image_holds_the_agent_the_console_and_the_mount_points() {
        let agent = static_elf(5);

        let entries = decode(&encode(&agent).unwrap());

        let names: Vec<&str> = entries.iter().map(|entry| entry.name.as_str()).collect();
        assert_eq!(names, ["dev", "dev/console", "init", "proc", "run", "sys"]);
        assert_eq!((entries[1].mode, entries[1].device), (0o020_600, (5, 1)));
        assert_eq!((entries[2].mode, &entries[2].content), (0o100_755, &agent));
        assert!(entries.iter().all(|entry| entry.mtime == 0), "every time is 0");
    }

    #[test]
    fn same_agent_gives_the_same_bytes() {
        let folder = tempfile::tempdir().unwrap();
        let agent = folder.path().join("agent");
        let (first, second) = (folder.path().join("first"), folder.path().join("second"));
        std::fs::write(&agent, static_elf(1000)).unwrap();

        write(&agent, &first).unwrap();
        write(&agent, &second).unwrap();

        assert_eq!(std::fs::read(first).unwrap(), std::fs::read(second).unwrap());
    }

    #[test]
    fn too_large_agent_is_refused() {
        for agent_len in [MAX_LEN - 200, MAX_LEN] {
            let result = encode(&vec![0; agent_len]);
            assert!(matches!(result, Err(InitramfsError::TooLarge { .. })), "{agent_len} bytes were accepted");
        }
    }

    #[test]
    fn bad_agent_leaves_no_image() {
        let folder = tempfile::tempdir().unwrap();
        let (agent, output) = (folder.path().join("agent"), folder.path().join("image"));
        std::fs::write(&agent, "not a program").unwrap();

        let result = write(&agent, &output);

        assert!(matches!(result, Err(InitramfsError::Agent(ProgramError::NotElf(_)))));
        assert!(!output.exists());
    }
}
