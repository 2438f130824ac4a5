// SPDX-License-Identifier: Apache-2.0
//! The debugging image: an erofs file system with the agent and a busybox shell, made by `mkfs.erofs`.

use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::agent_binary::{self, ProgramError};
use crate::layout::{DIRECTORIES, INIT, MODE_DIRECTORY, MODE_PROGRAM};
use crate::output::{self, OutputError};

const MKFS: &str = "mkfs.erofs";

/// The file system's UUID, fixed so that the same inputs give the same image.
const UUID: &str = "62756c6b-6865-6164-2d64-656275672d31";

/// The names by which busybox is called in the image; `busybox NAME` gives the rest.
const SHELL_NAMES: &[&str] = &["cat", "dmesg", "ls", "mount", "ps", "sh"];

/// Why a debugging image could not be made.
#[derive(Debug, thiserror::Error)]
pub(crate) enum DebugImageError {
    #[error("a program cannot go into the debugging image")]
    Program(#[from] ProgramError),
    #[error("cannot lay out {} for the debugging image", path.display())]
    Stage { path: PathBuf, source: std::io::Error },
    #[error("{MKFS} is not installed, and makes the debugging image: install the package erofs-utils")]
    MkfsAbsent,
    #[error("cannot run {MKFS}")]
    MkfsStart(#[source] std::io::Error),
    #[error("{MKFS} failed ({status}): {output}")]
    MkfsFailed { status: std::process::ExitStatus, output: String },
    #[error("the debugging image cannot be written")]
    Output(#[from] OutputError),
}

/// Makes the image at `output` out of the programs at `agent` and `shell`.
pub(crate) fn write(agent: &Path, shell: &Path, output: &Path) -> Result<(), DebugImageError> {
    let agent = agent_binary::read(agent)?;
    let shell = agent_binary::read(shell)?;
    let staging = output::staging_folder(output)?;
    let tree = staging.path().join("tree");
    stage(&tree, &agent, &shell).map_err(|source| DebugImageError::Stage { path: tree.clone(), source })?;
    let image = staging.path().join("image");
    make_file_system(&tree, &image)?;
    let bytes = std::fs::read(&image).map_err(|source| DebugImageError::Stage { path: image, source })?;
    output::write_atomically(output, &bytes)?;
    Ok(())
}

/// Lays the image's content out as a folder.
fn stage(tree: &Path, agent: &[u8], shell: &[u8]) -> std::io::Result<()> {
    make_directory(tree)?;
    for name in DIRECTORIES {
        make_directory(&tree.join(name))?;
    }
    let programs = tree.join("bin");
    make_directory(&programs)?;
    make_program(&tree.join(INIT), agent)?;
    make_program(&programs.join("busybox"), shell)?;
    for name in SHELL_NAMES {
        std::os::unix::fs::symlink("busybox", programs.join(name))?;
    }
    Ok(())
}

// The caller's umask must not show in the image: set the bits after making.
fn make_directory(path: &Path) -> std::io::Result<()> {
    std::fs::create_dir(path)?;
    std::fs::set_permissions(path, PermissionsExt::from_mode(MODE_DIRECTORY))
}

fn make_program(path: &Path, content: &[u8]) -> std::io::Result<()> {
    std::fs::write(path, content)?;
    std::fs::set_permissions(path, PermissionsExt::from_mode(MODE_PROGRAM))
}

fn make_file_system(tree: &Path, image: &Path) -> Result<(), DebugImageError> {
    let result = Command::new(MKFS).args(["-T0", "-U", UUID, "--all-root", "-x-1"]).arg(image).arg(tree).output();
    let output = match result {
        Ok(output) => output,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Err(DebugImageError::MkfsAbsent),
        Err(error) => return Err(DebugImageError::MkfsStart(error)),
    };
    if output.status.success() {
        return Ok(());
    }
    let text = String::from_utf8_lossy(&output.stderr).trim().to_owned();
    Err(DebugImageError::MkfsFailed { status: output.status, output: text })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::agent_binary::tests::static_elf;

    #[test]
    fn same_programs_give_the_same_image() {
        let folder = tempfile::tempdir().unwrap();
        let (agent, shell) = (folder.path().join("agent"), folder.path().join("busybox"));
        std::fs::write(&agent, static_elf(9000)).unwrap();
        std::fs::write(&shell, static_elf(70)).unwrap();
        let images = [folder.path().join("first"), folder.path().join("second")];

        for image in &images {
            match write(&agent, &shell, image) {
                Err(DebugImageError::MkfsAbsent) => {
                    println!("skipped: needs mkfs.erofs (package erofs-utils)");
                    return;
                }
                result => result.unwrap(),
            }
        }

        let bytes = images.map(|image| std::fs::read(image).unwrap());
        assert_eq!(bytes[0], bytes[1]);
        assert_eq!(bytes[0][1024..1028], 0xe0f5_e1e2_u32.to_le_bytes(), "the superblock's magic number");
    }

    #[test]
    fn shell_that_is_a_script_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let (agent, shell) = (folder.path().join("agent"), folder.path().join("busybox"));
        std::fs::write(&agent, static_elf(0)).unwrap();
        std::fs::write(&shell, "#!/bin/sh\n").unwrap();

        let result = write(&agent, &shell, &folder.path().join("image"));

        assert!(matches!(result, Err(DebugImageError::Program(ProgramError::NotElf(_)))));
    }
}
