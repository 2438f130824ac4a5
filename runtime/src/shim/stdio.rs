// SPDX-License-Identifier: Apache-2.0
//! The streams that containerd names for a process: named pipes, files, a program, or nothing.

use std::fs::{self, DirBuilder, File};
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{DirBuilderExt, FileTypeExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use containerd_shim_protos::api::StateResponse;
use thiserror::Error;

use super::logger::{self, LoggerError, Source};
use super::uri::Uri;
use crate::apart::apart;
use crate::supervisor::streams::{GivenEnds, Input, InputCloser};

/// A stream that cannot be had.
#[derive(Debug, Error)]
pub(super) enum StdioError {
    #[error("cannot open {}", .0.display())]
    Open(PathBuf, #[source] io::Error),
    #[error("{0:?} is not supported for a stream: a path, fifo:// and, for output, file:// and binary:// are")]
    Scheme(String),
    #[error("{0:?} is no URI with a path")]
    Uri(String),
    #[error("cannot make a thread that opens streams")]
    Thread(#[source] io::Error),
    #[error(transparent)]
    Logger(#[from] LoggerError),
}

/// What containerd has named, each empty for nothing.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Stdio {
    pub(super) stdin: String,
    pub(super) stdout: String,
    pub(super) stderr: String,
    pub(super) terminal: bool,
}

impl Stdio {
    /// Gives the streams their names in an answer.
    pub(super) fn name(&self, state: &mut StateResponse) {
        state.stdin.clone_from(&self.stdin);
        state.stdout.clone_from(&self.stdout);
        state.stderr.clone_from(&self.stderr);
        state.terminal = self.terminal;
    }

    /// Which of stdin, stdout and stderr there are to be.
    pub(super) fn wanted(&self) -> Result<[bool; 3], StdioError> {
        let by_program = matches!(Target::parse(&self.stdout)?, Target::Program(_));
        // One program takes both; a terminal has one output.
        let stderr = !self.terminal && (by_program || !self.stderr.is_empty());
        Ok([!self.stdin.is_empty(), !self.stdout.is_empty(), stderr])
    }

    /// Opens what was named, while others go on. With a stdin, there is something to end it by.
    pub(super) async fn open(&self, source: Source<'_>) -> Result<(GivenEnds, Option<InputCloser>), StdioError> {
        if *self == (Self { terminal: self.terminal, ..Self::default() }) {
            return Ok((GivenEnds::default(), None));
        }
        let paths = self.clone();
        let opened = apart("streams", move || paths.open_paths()).await.map_err(StdioError::Thread)?;
        let (mut ends, closer) = opened?;
        if let Target::Program(uri) = Target::parse(&self.stdout)? {
            // One program takes both.
            let [stdout, stderr] = logger::start(uri, source).await?;
            (ends.stdout, ends.stderr) = (Some(stdout), (!self.terminal).then_some(stderr));
        }
        Ok((ends, closer))
    }

    /// Opens what is in the file system.
    fn open_paths(&self) -> Result<(GivenEnds, Option<InputCloser>), StdioError> {
        let mut ends = GivenEnds::default();
        if !matches!(Target::parse(&self.stdout)?, Target::Program(_)) {
            ends.stdout = open_output(&self.stdout, &mut ends.held)?;
            if !self.terminal {
                ends.stderr = open_output(&self.stderr, &mut ends.held)?;
            }
        }
        if self.stdin.is_empty() {
            return Ok((ends, None));
        }
        let Target::Path(path) = Target::parse(&self.stdin)? else {
            return Err(StdioError::Scheme(self.stdin.clone()));
        };
        // Not blocking: whoever writes there may come later.
        let file = File::options().read(true).custom_flags(libc::O_NONBLOCK).open(&path);
        let opened = file.and_then(|file| Input::new(file.into()));
        let (input, closer) = opened.map_err(|error| StdioError::Open(path, error))?;
        ends.stdin = Some(input);
        Ok((ends, Some(closer)))
    }
}

/// What a name stands for.
#[derive(Debug, PartialEq, Eq)]
enum Target {
    /// A named pipe, most likely, that is there.
    Path(PathBuf),
    /// A file that is appended to, and made.
    Log(PathBuf),
    /// A program that takes output.
    Program(Uri),
}

impl Target {
    fn parse(name: &str) -> Result<Self, StdioError> {
        let Some((scheme, rest)) = name.split_once("://") else {
            return Ok(Self::Path(name.into()));
        };
        let uri = || Uri::parse(rest).ok_or_else(|| StdioError::Uri(name.to_owned()));
        match scheme {
            "fifo" => Ok(Self::Path(uri()?.path)),
            "file" => Ok(Self::Log(uri()?.path)),
            "binary" => Ok(Self::Program(uri()?)),
            _ => Err(StdioError::Scheme(name.to_owned())),
        }
    }
}

/// Opens an output. Of a named pipe both ends, the reading one into `held`: neither its opening nor a write waits for a
/// reader then, and a reader that goes is no error.
fn open_output(name: &str, held: &mut Vec<OwnedFd>) -> Result<Option<OwnedFd>, StdioError> {
    if name.is_empty() {
        return Ok(None);
    }
    let (opened, path) = match Target::parse(name)? {
        Target::Path(path) => (open_path(&path, held), path),
        Target::Log(path) => (open_log(&path), path),
        // One is for both outputs.
        Target::Program(_) => return Err(StdioError::Scheme(name.to_owned())),
    };
    opened.map(|file| Some(file.into())).map_err(|error| StdioError::Open(path, error))
}

fn open_path(path: &Path, held: &mut Vec<OwnedFd>) -> io::Result<File> {
    let mut options = File::options();
    options.write(true).custom_flags(libc::O_NONBLOCK);
    if fs::metadata(path)?.file_type().is_fifo() {
        let reader = File::options().read(true).custom_flags(libc::O_NONBLOCK).open(path)?;
        held.push(reader.into());
    } else {
        options.append(true);
    }
    options.open(path)
}

fn open_log(path: &Path) -> io::Result<File> {
    if let Some(folder) = path.parent() {
        DirBuilder::new().recursive(true).mode(0o711).create(folder)?;
    }
    File::options().append(true).create(true).mode(0o644).open(path)
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};

    use nix::sys::stat::Mode;
    use nix::unistd::mkfifo;

    use super::*;

    const SOURCE: Source<'_> = Source { namespace: "ns", id: "c1" };

    #[test]
    fn names_are_paths_pipes_or_files() {
        assert_eq!(Target::parse("/a%20b").unwrap(), Target::Path("/a%20b".into()));
        assert_eq!(Target::parse("fifo:///a").unwrap(), Target::Path("/a".into()));
        assert_eq!(Target::parse("file:///a%20b?x=y").unwrap(), Target::Log("/a b".into()));
        assert!(matches!(Target::parse("binary:///a?x=y"), Ok(Target::Program(uri)) if uri.path == Path::new("/a")));
        assert!(matches!(Target::parse("vsock://1"), Err(StdioError::Scheme(_))));
        assert!(matches!(Target::parse("file:///a%2"), Err(StdioError::Uri(_))));
    }

    #[tokio::test]
    async fn a_named_pipe_opens_without_a_reader_and_keeps_what_is_written() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("out");
        mkfifo(&path, Mode::S_IRWXU).unwrap();
        let stdio = Stdio { stdout: path.to_str().unwrap().to_owned(), ..Stdio::default() };

        let (ends, closer) = stdio.open(SOURCE).await.unwrap();
        assert_eq!((ends.wanted(), closer.is_some(), ends.held.len()), ([false, true, false], false, 1));
        let mut writer = File::from(ends.stdout.unwrap());
        writer.write_all(b"early").unwrap();
        let mut reader = File::options().read(true).custom_flags(libc::O_NONBLOCK).open(&path).unwrap();
        drop((writer, ends.held));

        let mut text = String::new();
        reader.read_to_string(&mut text).unwrap();
        assert_eq!(text, "early");
    }

    #[tokio::test]
    async fn what_is_wanted_is_what_is_opened() {
        let dir = tempfile::tempdir().unwrap();
        let file = format!("file://{}", dir.path().join("log").display());
        let names = [String::new(), file, "binary:///bin/true".to_owned()];
        let cases = names.iter().flat_map(|stdout| names[..2].iter().map(move |stderr| (stdout, stderr)));
        for (stdout, stderr) in cases {
            for terminal in [false, true] {
                let (stdout, stderr) = (stdout.clone(), stderr.clone());
                let stdio = Stdio { stdin: "/dev/null".to_owned(), stdout, stderr, terminal };
                assert_eq!(stdio.wanted().unwrap(), stdio.open(SOURCE).await.unwrap().0.wanted(), "{stdio:?}");
            }
        }
    }

    #[tokio::test]
    async fn a_log_is_made_and_appended_to() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("logs/out");
        let stdio = Stdio {
            stdout: format!("file://{}", path.display().to_string().replace("out", "%6fut")),
            ..Stdio::default()
        };

        for _ in 0..2 {
            let (ends, _) = stdio.open(SOURCE).await.unwrap();
            File::from(ends.stdout.unwrap()).write_all(b"line\n").unwrap();
        }

        assert_eq!(fs::read_to_string(path).unwrap(), "line\nline\n");
    }
}
