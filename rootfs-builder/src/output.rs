// SPDX-License-Identifier: Apache-2.0
//! Puts a finished file in its place in one step, so that nobody ever sees half of it.

use std::io::Write;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use tempfile::{NamedTempFile, TempDir};

/// Permission bits of the files that this program writes.
const MODE_IMAGE: u32 = 0o644;

/// Why an output file could not be written.
#[derive(Debug, thiserror::Error)]
pub(crate) enum OutputError {
    #[error("cannot make a temporary file beside {}", path.display())]
    Create { path: PathBuf, source: std::io::Error },
    #[error("cannot write {}", path.display())]
    Write { path: PathBuf, source: std::io::Error },
    #[error("cannot put {} in its place", path.display())]
    Rename { path: PathBuf, source: std::io::Error },
}

/// Writes `bytes` to `path`, replacing what is there.
pub(crate) fn write_atomically(path: &Path, bytes: &[u8]) -> Result<(), OutputError> {
    let write_error = |source| OutputError::Write { path: path.into(), source };
    let mut file =
        NamedTempFile::new_in(folder(path)).map_err(|source| OutputError::Create { path: path.into(), source })?;
    file.write_all(bytes).map_err(write_error)?;
    file.as_file().set_permissions(PermissionsExt::from_mode(MODE_IMAGE)).map_err(write_error)?;
    file.persist(path).map_err(|error| OutputError::Rename { path: path.into(), source: error.error })?;
    Ok(())
}

/// A folder for intermediate files on the file system of `path`. It goes away with the value.
pub(crate) fn staging_folder(path: &Path) -> Result<TempDir, OutputError> {
    TempDir::new_in(folder(path)).map_err(|source| OutputError::Create { path: path.into(), source })
}

fn folder(path: &Path) -> &Path {
    match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn existing_file_is_replaced_and_nothing_else_is_left() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("image");
        std::fs::write(&path, "old").unwrap();

        write_atomically(&path, b"new").unwrap();

        assert_eq!(std::fs::read(&path).unwrap(), b"new");
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1);
    }

    #[test]
    fn absent_folder_is_an_error_that_names_the_file() {
        let error = write_atomically(Path::new("/nonexistent/image"), b"").unwrap_err();
        assert!(error.to_string().contains("/nonexistent/image"));
    }
}
