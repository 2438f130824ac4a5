// SPDX-License-Identifier: Apache-2.0
//! The command line that containerd gives: flags in the way of Go's, then a verb.

use std::env;
use std::ffi::OsString;
use std::io;
use std::path::PathBuf;

use thiserror::Error;

use crate::supervisor::state::check_id;

/// What is to be done.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Verb {
    Start,
    Delete,
    Info,
    Version,
}

/// A command line that is not containerd's.
#[derive(Debug, Error)]
pub(super) enum ArgumentError {
    #[error("the argument {0:?} is not valid Unicode")]
    Unicode(OsString),
    #[error("the flag -{0} is not known")]
    Unknown(String),
    #[error("the flag -{0} has no value")]
    NoValue(String),
    #[error("the flag -{0} is missing, or empty")]
    Missing(&'static str),
    #[error("-{flag} is {value:?}, which has other characters than A-Z a-z 0-9 _ + - .")]
    Name { flag: &'static str, value: String },
    #[error("{0:?} is not a verb: start and delete are, and containerd gives them")]
    Verb(String),
    #[error("cannot find out the current folder")]
    Folder(#[source] io::Error),
}

/// A command line.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Arguments {
    pub(super) verb: Verb,
    /// Containerd's namespace.
    pub(super) namespace: String,
    /// Of the container, or of the sandbox.
    pub(super) id: String,
    /// Containerd's own socket.
    pub(super) address: String,
    /// Where containerd takes events, if that does not follow from its own socket.
    pub(super) events: Option<PathBuf>,
    /// The folder of the server's socket, if it is not the usual one. Absolute.
    pub(super) sockets: Option<PathBuf>,
    /// Absolute.
    pub(super) bundle: PathBuf,
    pub(super) debug: bool,
}

impl Arguments {
    /// Takes the words apart.
    pub(super) fn parse(words: impl Iterator<Item = OsString>) -> Result<Self, ArgumentError> {
        let folder = env::current_dir().map_err(ArgumentError::Folder)?;
        Self::parse_in(words, folder)
    }

    /// The same where `folder` is the current one, which is the bundle unless a flag names it.
    fn parse_in(words: impl Iterator<Item = OsString>, folder: PathBuf) -> Result<Self, ArgumentError> {
        let mut words = words.map(|word| word.into_string().map_err(ArgumentError::Unicode));
        let mut parsed = Self {
            verb: Verb::Version,
            namespace: String::new(),
            id: String::new(),
            address: String::new(),
            events: None,
            sockets: None,
            bundle: folder,
            debug: false,
        };
        let mut verb = String::new();
        while let Some(word) = words.next().transpose()? {
            let Some(flag) = word.strip_prefix('-') else {
                verb = word;
                break;
            };
            let flag = flag.strip_prefix('-').unwrap_or(flag);
            let (name, value) = match flag.split_once('=') {
                Some((name, value)) => (name, Some(value.to_owned())),
                None => (flag, None),
            };
            match name {
                "debug" => parsed.debug = value.is_none_or(|value| value == "true"),
                "v" | "version" => return Ok(parsed),
                "info" => return Ok(Self { verb: Verb::Info, ..parsed }),
                "namespace" | "id" | "address" | "bundle" | "publish-binary" | "socket" | "debug-socket" => {
                    let value = match value {
                        Some(value) => value,
                        None => words.next().ok_or_else(|| ArgumentError::NoValue(name.to_owned()))??,
                    };
                    parsed.set(name, value);
                }
                _ => return Err(ArgumentError::Unknown(name.to_owned())),
            }
        }
        parsed.verb = match verb.as_str() {
            "start" => Verb::Start,
            "delete" => Verb::Delete,
            _ => return Err(ArgumentError::Verb(verb)),
        };
        // Both become names of files.
        for (flag, value) in [("namespace", &parsed.namespace), ("id", &parsed.id)] {
            if value.is_empty() {
                return Err(ArgumentError::Missing(flag));
            }
            check_id(value).map_err(|_| ArgumentError::Name { flag, value: value.clone() })?;
        }
        Ok(parsed)
    }

    fn set(&mut self, name: &str, value: String) {
        match name {
            "namespace" => self.namespace = value,
            "id" => self.id = value,
            "address" => self.address = value,
            "bundle" if !value.is_empty() => self.bundle = self.bundle.join(value),
            // Events go to containerd's socket, and the server's own has a name of its own.
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(line: &str) -> Result<Arguments, ArgumentError> {
        Arguments::parse_in(line.split_whitespace().map(OsString::from), "/b".into())
    }

    #[test]
    fn containerds_lines_are_understood() {
        let start =
            parse("-namespace ns -address /c.sock -publish-binary /usr/bin/containerd -id c1 -debug start").unwrap();
        let delete = parse("--namespace=ns -id=c1 -bundle /x/c1 -debug=false delete").unwrap();

        assert_eq!((start.verb, start.debug, start.bundle), (Verb::Start, true, "/b".into()));
        assert_eq!((start.namespace.as_str(), start.id.as_str(), start.address.as_str()), ("ns", "c1", "/c.sock"));
        assert_eq!((delete.verb, delete.debug, delete.bundle), (Verb::Delete, false, "/x/c1".into()));
        assert_eq!(parse("-v").unwrap().verb, Verb::Version);
        assert_eq!(parse("-info").unwrap().verb, Verb::Info);
    }

    #[test]
    fn other_lines_are_refused_by_what_is_wrong() {
        let refused = |line: &str| parse(line).unwrap_err().to_string();

        assert_eq!(refused("-fly start"), "the flag -fly is not known");
        assert_eq!(refused("-id"), "the flag -id has no value");
        assert_eq!(refused("-namespace n start"), "the flag -id is missing, or empty");
        assert!(refused("-namespace ../n -id c start").starts_with("-namespace is \"../n\""));
        assert!(refused("-namespace n -id c serve").starts_with("\"serve\" is not a verb"));
        assert!(refused("").starts_with("\"\" is not a verb"));
    }
}
