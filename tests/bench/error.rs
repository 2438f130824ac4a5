// SPDX-License-Identifier: Apache-2.0
//! Why the benchmark could not go on.

use std::io;
use std::path::{Path, PathBuf};

use thiserror::Error;

/// A failure of the benchmark itself, or of something that it measures.
#[derive(Debug, Error)]
pub(crate) enum BenchError {
    /// Something could not be done to a file.
    #[error("cannot {doing} {}: {source}", path.display())]
    File { doing: &'static str, path: PathBuf, source: io::Error },
    /// A program that a case needs is nowhere in PATH.
    #[error("{0} is not in PATH; 'make setup' installs it")]
    NoProgram(String),
    /// A started program did not do what the case expects of it.
    #[error("{case}: {why}")]
    Case { case: String, why: String },
    /// A file's content is not what it should be.
    #[error("cannot understand {}: {why}", path.display())]
    Content { path: PathBuf, why: String },
}

/// For `map_err`: what was being done to which file.
pub(crate) fn file<E: Into<io::Error>>(doing: &'static str, path: impl AsRef<Path>) -> impl FnOnce(E) -> BenchError {
    move |source| BenchError::File { doing, path: path.as_ref().to_owned(), source: source.into() }
}
