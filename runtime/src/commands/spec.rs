// SPDX-License-Identifier: Apache-2.0
//! `bulkhead spec`: writes a configuration that runs here.

use std::fs::OpenOptions;
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use clap::Args;
use thiserror::Error;

use super::Outcome;
use crate::spec::{CONFIG_FILE, template};

/// Write an example config.json
#[derive(Debug, Args)]
pub(crate) struct Arguments {
    /// Folder to write it to
    #[arg(long, short, value_name = "DIR", default_value = ".")]
    bundle: PathBuf,
}

#[derive(Debug, Error)]
#[error("spec: cannot write {}{}", path.display(), hint(source))]
struct WriteSpecError {
    path: PathBuf,
    source: io::Error,
}

fn hint(error: &io::Error) -> &'static str {
    if error.kind() == io::ErrorKind::AlreadyExists { " (remove the old one first)" } else { "" }
}

/// Writes the file, unless there is one.
pub(crate) fn run(arguments: &Arguments) -> Outcome {
    let path = arguments.bundle.join(CONFIG_FILE);
    write_new(&path).map_err(|source| WriteSpecError { path, source })?;
    Ok(0)
}

fn write_new(path: &Path) -> io::Result<()> {
    let text = format!("{:#}\n", template::template());
    OpenOptions::new().write(true).create_new(true).open(path)?.write_all(text.as_bytes())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn writes_a_bundle_that_loads_and_never_overwrites() {
        let bundle = tempfile::tempdir().unwrap();
        std::fs::create_dir(bundle.path().join("rootfs")).unwrap();
        let arguments = Arguments { bundle: bundle.path().to_owned() };

        assert_eq!(run(&arguments).unwrap(), 0);
        assert!(crate::spec::load(bundle.path()).is_ok());

        let failure = run(&arguments).unwrap_err();
        assert!(failure.error.to_string().ends_with("config.json (remove the old one first)"));
    }
}
