// SPDX-License-Identifier: Apache-2.0
//! `--pid-file`: the process that stands for the container, which is this one.

use std::ffi::OsString;
use std::fs;
use std::io;
use std::path::Path;
use std::process;

/// Writes the file so that whoever sees it sees all of it.
pub(crate) fn write(path: &Path) -> io::Result<()> {
    let name = path.file_name().ok_or(io::ErrorKind::InvalidInput)?;
    let mut temporary_name = OsString::from(".");
    temporary_name.push(name);
    let temporary = path.with_file_name(temporary_name);
    // Also where the disk is full, when the file is there, and empty.
    let written = fs::write(&temporary, process::id().to_string()).and_then(|()| fs::rename(&temporary, path));
    written.inspect_err(|_| {
        let _ = fs::remove_file(&temporary);
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_file_holds_the_process_id_alone() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("pid");

        write(&path).unwrap();

        assert_eq!(fs::read_to_string(&path).unwrap(), process::id().to_string());
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
        assert!(write(&dir.path().join("absent/pid")).is_err());
    }
}
