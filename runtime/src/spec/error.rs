// SPDX-License-Identifier: Apache-2.0
//! What can be wrong with a bundle's configuration: always which field of which file, with what value.

use std::fmt;
use std::io;
use std::path::{Path, PathBuf};

use thiserror::Error;

use crate::text;

/// A bundle that cannot be run.
#[derive(Debug, Error)]
pub(crate) enum SpecError {
    #[error("cannot find the bundle folder {}", .0.display())]
    Bundle(PathBuf, #[source] io::Error),
    #[error("cannot read {}: is {} a bundle?", .0.display(), .0.parent().unwrap_or(Path::new("/")).display())]
    Read(PathBuf, #[source] io::Error),
    #[error("{} is {length} bytes long, more than the {max} that are read", path.display())]
    TooLong { path: PathBuf, length: u64, max: u64 },
    #[error("{}, line {line}, column {column}: {}{message}", path.display(), at(field))]
    Parse { path: PathBuf, line: usize, column: usize, field: String, message: String },
    #[error("{}", .0.display())]
    Field(PathBuf, #[source] FieldError),
}

/// A part of a configuration that stands alone and cannot be used.
#[derive(Debug, Error)]
pub(crate) enum PartError {
    #[error("it is not what the specification asks for")]
    Parse(#[from] serde_json::Error),
    #[error(transparent)]
    Field(#[from] FieldError),
}

fn at(field: &str) -> String {
    if field.is_empty() { String::new() } else { format!("{field}: ") }
}

/// One field that cannot be honoured.
#[derive(Debug, Error)]
#[error("{field}: {problem}")]
pub(crate) struct FieldError {
    /// As in `process.user.uid` or `mounts[3].source`.
    pub(crate) field: String,
    /// What is wrong with it.
    pub(crate) problem: Problem,
}

/// What is wrong with a field.
#[derive(Debug)]
pub(crate) enum Problem {
    /// It is needed, and absent or empty; the text says what for.
    Missing(&'static str),
    /// Its value means nothing here: the value, and what it should be.
    Invalid { value: String, expected: String },
    /// It asks for something that Bulkhead does not do: what it asks for.
    Unsupported(String),
    /// It names a path that cannot be used.
    Path { path: PathBuf, source: io::Error },
}

impl fmt::Display for Problem {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Missing(needed) => write!(formatter, "missing; {needed}"),
            Self::Invalid { value, expected } => {
                write!(formatter, "{} is not {expected}", text::one_line(&format!("{value:?}")))
            }
            Self::Unsupported(what) => write!(formatter, "not supported: {what}"),
            Self::Path { path, source } => write!(formatter, "cannot use {}: {source}", path.display()),
        }
    }
}

impl FieldError {
    pub(crate) fn missing(field: impl Into<String>, needed: &'static str) -> Self {
        Self { field: field.into(), problem: Problem::Missing(needed) }
    }

    pub(crate) fn invalid(field: impl Into<String>, value: impl ToString, expected: impl Into<String>) -> Self {
        let problem = Problem::Invalid { value: value.to_string(), expected: expected.into() };
        Self { field: field.into(), problem }
    }

    pub(crate) fn unsupported(field: impl Into<String>, what: impl Into<String>) -> Self {
        Self { field: field.into(), problem: Problem::Unsupported(what.into()) }
    }

    pub(crate) fn path(field: impl Into<String>, path: impl Into<PathBuf>, source: io::Error) -> Self {
        Self { field: field.into(), problem: Problem::Path { path: path.into(), source } }
    }
}

/// Refuses a string that could not be given to the kernel.
pub(crate) fn without_nul(field: impl FnOnce() -> String, value: &str) -> Result<(), FieldError> {
    if value.contains('\0') {
        return Err(FieldError::invalid(field(), value, "a text without NUL"));
    }
    Ok(())
}
