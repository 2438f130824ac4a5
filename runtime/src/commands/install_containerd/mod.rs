// SPDX-License-Identifier: Apache-2.0
//! `bulkhead install-containerd`: makes Bulkhead a runtime of containerd's CRI, and undoes it.

mod edit;

use std::fs::{self, File};
use std::io::{self, Write};
use std::os::unix::fs::{MetadataExt, fchown};
use std::path::{Path, PathBuf};

use clap::Args;
use thiserror::Error;

use self::edit::{Edit, EditError};
use super::Outcome;

/// Add the runtime `bulkhead` to containerd's configuration, for pods
///
/// What the file has otherwise is kept byte for byte. Containerd has to be restarted after it; pods that run go on.
#[derive(Debug, Args)]
pub(crate) struct Arguments {
    /// Containerd's configuration, of version 2 or 3; made if it is absent
    #[arg(long, value_name = "FILE", default_value = "/etc/containerd/config.toml")]
    config: PathBuf,
    /// Remove what this command has added
    #[arg(long)]
    remove: bool,
}

#[derive(Debug, Error)]
enum InstallError {
    #[error("cannot read containerd's configuration {}", .0.display())]
    Read(PathBuf, #[source] io::Error),
    #[error("containerd's configuration {} cannot be changed", .0.display())]
    Edit(PathBuf, #[source] EditError),
    #[error("cannot write containerd's configuration {}", .0.display())]
    Write(PathBuf, #[source] io::Error),
    #[error("cannot remove containerd's configuration {}, which has nothing left", .0.display())]
    Remove(PathBuf, #[source] io::Error),
}

/// Changes the file, and prints what was done.
pub(crate) fn run(arguments: &Arguments) -> Outcome {
    let done = change(&arguments.config, arguments.remove)?;
    writeln!(io::stdout().lock(), "{done}")?;
    Ok(0)
}

fn change(config: &Path, remove: bool) -> Result<String, InstallError> {
    // A link is kept, and what it leads to is changed.
    let path = fs::canonicalize(config).unwrap_or_else(|_| config.to_owned());
    let shown = path.display();
    let old = match fs::read_to_string(&path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => None,
        text => Some(text.map_err(|error| InstallError::Read(path.clone(), error))?),
    };
    let edit = if remove { edit::remove(old.as_deref()) } else { edit::add(old.as_deref()) };
    let restart = "restart containerd to make it so (systemctl restart containerd)";
    match edit.map_err(|error| InstallError::Edit(path.clone(), error))? {
        Edit::None(why) => Ok(format!("{shown}: {why}; nothing was changed")),
        Edit::Text(text) => {
            write(&path, &text).map_err(|error| InstallError::Write(path.clone(), error))?;
            let what = if remove { "removed the runtime" } else { "added the runtime" };
            Ok(format!("{shown}: {what} bulkhead; {restart}"))
        }
        Edit::NoFile => {
            fs::remove_file(&path).map_err(|error| InstallError::Remove(path.clone(), error))?;
            Ok(format!("{shown}: removed the file, which had nothing else; {restart}"))
        }
    }
}

/// Replaces the file as a whole: a crash leaves the old one or the new one. Mode and owner stay.
fn write(path: &Path, text: &str) -> io::Result<()> {
    let folder = path.parent().unwrap_or(Path::new("/"));
    fs::create_dir_all(folder)?;
    let mut name = path.file_name().unwrap_or_default().to_owned();
    name.push(".bulkhead-new");
    let new = folder.join(name);
    let written = File::create(&new).and_then(|mut file| {
        if let Ok(old) = fs::metadata(path) {
            file.set_permissions(old.permissions())?;
            fchown(&file, Some(old.uid()), Some(old.gid()))?;
        }
        file.write_all(text.as_bytes())?;
        file.sync_all()?;
        fs::rename(&new, path)
    });
    written.inspect_err(|_| {
        let _ = fs::remove_file(&new);
    })
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{PermissionsExt, symlink};

    use super::*;

    #[test]
    fn a_file_is_changed_and_changed_back_with_its_mode() {
        let folder = tempfile::tempdir().unwrap();
        let (file, link) = (folder.path().join("real.toml"), folder.path().join("config.toml"));
        let text = "version = 2 # mine\n[grpc]\n  address = '/c'";
        fs::write(&file, text).unwrap();
        fs::set_permissions(&file, fs::Permissions::from_mode(0o640)).unwrap();
        symlink(&file, &link).unwrap();

        let added = change(&link, false).unwrap();
        assert!(added.contains("added the runtime bulkhead; restart containerd"), "{added}");
        assert!(fs::read_to_string(&file).unwrap().starts_with(text));
        assert!(change(&link, false).unwrap().contains("nothing was changed"));
        assert_eq!(fs::metadata(&file).unwrap().permissions().mode() & 0o777, 0o640);

        change(&link, true).unwrap();
        assert_eq!(fs::read_to_string(&file).unwrap(), text);
        assert!(change(&link, true).unwrap().contains("nothing was changed"));
        assert!(fs::symlink_metadata(&link).unwrap().is_symlink());
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 2);
    }

    #[test]
    fn an_absent_file_is_made_and_removed_again() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("containerd/config.toml");

        change(&file, false).unwrap();
        assert!(fs::read_to_string(&file).unwrap().contains("version = 2"));
        change(&file, true).unwrap();
        assert!(!file.exists());
    }

    #[test]
    fn a_file_that_is_not_understood_is_named_and_left_alone() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("config.toml");
        fs::write(&file, "version = 4\n").unwrap();

        let error = crate::text::chain(&change(&file, false).unwrap_err());

        assert!(error.contains("config.toml cannot be changed: version is 4"), "{error}");
        assert_eq!(fs::read_to_string(&file).unwrap(), "version = 4\n");
    }
}
