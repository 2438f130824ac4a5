// SPDX-License-Identifier: Apache-2.0
//! Why a container's first process could not be set up: made in that process, carried to the agent as bytes.

use std::fmt;
use std::io;

/// The step that failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Stage {
    /// The program does not exist, or the interpreter it names does not. The subject is the whole message.
    ProgramNotFound = 1,
    /// The program is there and cannot be executed. The subject is the whole message.
    ProgramNotExecutable,
    /// Entering a namespace.
    Namespace,
    /// Putting the root file system in place.
    Rootfs,
    /// One of the spec's mounts.
    Mount,
    /// A device node or one of the links in `/dev`.
    Device,
    /// Hiding a path.
    MaskedPath,
    /// Making a path read-only.
    ReadonlyPath,
    /// A kernel parameter.
    Sysctl,
    /// Host or domain name.
    Hostname,
    /// The network interfaces.
    Network,
    /// The terminal or the session.
    Terminal,
    /// Standard input, output and error.
    Stdio,
    /// A resource limit.
    Rlimit,
    /// The out-of-memory score adjustment.
    OomScore,
    /// The working directory.
    WorkingDirectory,
    /// User, groups, capabilities, no-new-privileges.
    Credentials,
    /// Signals, descriptors, and talking with the agent.
    Process,
    /// The filter of system calls.
    Seccomp,
    /// CPU scheduling, I/O priority, execution domain.
    Scheduling,
    /// A program that is run before the container's own.
    Hook,
}

impl Stage {
    const ALL: [Self; 21] = [
        Self::ProgramNotFound,
        Self::ProgramNotExecutable,
        Self::Namespace,
        Self::Rootfs,
        Self::Mount,
        Self::Device,
        Self::MaskedPath,
        Self::ReadonlyPath,
        Self::Sysctl,
        Self::Hostname,
        Self::Network,
        Self::Terminal,
        Self::Stdio,
        Self::Rlimit,
        Self::OomScore,
        Self::WorkingDirectory,
        Self::Credentials,
        Self::Process,
        Self::Seccomp,
        Self::Scheduling,
        Self::Hook,
    ];

    /// What was being done, to be followed by the subject; `None` where the subject says it all.
    fn action(self) -> Option<&'static str> {
        match self {
            Self::ProgramNotFound | Self::ProgramNotExecutable => None,
            Self::Namespace => Some("cannot enter the namespace:"),
            Self::Rootfs => Some("cannot put the root file system in place:"),
            Self::Mount => Some("cannot mount"),
            Self::Device => Some("cannot make device"),
            Self::MaskedPath => Some("cannot mask"),
            Self::ReadonlyPath => Some("cannot make read-only:"),
            Self::Sysctl => Some("cannot set sysctl"),
            Self::Hostname => Some("cannot set"),
            Self::Network => Some("cannot set up network interface"),
            Self::Terminal => Some("cannot set up the terminal:"),
            Self::Stdio => Some("cannot set up standard streams:"),
            Self::Rlimit => Some("cannot set resource limit"),
            Self::OomScore => Some("cannot set oom_score_adj"),
            Self::WorkingDirectory => Some("cannot use working directory"),
            Self::Credentials => Some("cannot set"),
            Self::Process => Some("cannot prepare the process:"),
            Self::Seccomp => Some("cannot install the seccomp filter"),
            Self::Scheduling => Some("cannot set the process's"),
            Self::Hook => Some("the hook failed:"),
        }
    }
}

/// Why a container's process could not be set up.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Failure {
    /// The step.
    pub stage: Stage,
    /// What the step worked on: a path, a name, a value.
    pub subject: String,
    /// The system's error number; 0 if the subject says why.
    pub errno: i32,
}

impl std::error::Error for Failure {}

impl fmt::Display for Failure {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(action) = self.stage.action() {
            write!(out, "{action} ")?;
        }
        out.write_str(&self.subject)?;
        if self.errno != 0 {
            write!(out, ": {}", io::Error::from_raw_os_error(self.errno))?;
        }
        Ok(())
    }
}

/// Longest subject carried: well over PATH_MAX, so that a path is never cut.
const MAX_SUBJECT_LEN: usize = 8 << 10;

impl Failure {
    /// A failure that the system explains.
    pub fn new(stage: Stage, subject: impl Into<String>, error: impl Into<io::Error>) -> Self {
        let error: io::Error = error.into();
        match error.raw_os_error() {
            Some(errno) => Self { stage, subject: subject.into(), errno },
            None => Self { stage, subject: format!("{}: {error}", subject.into()), errno: 0 },
        }
    }

    /// A failure that the subject explains.
    pub fn explained(stage: Stage, subject: impl Into<String>) -> Self {
        Self { stage, subject: subject.into(), errno: 0 }
    }

    /// The bytes: stage, error number (little-endian), subject.
    pub(crate) fn encode(&self) -> Vec<u8> {
        let mut end = self.subject.len().min(MAX_SUBJECT_LEN);
        while !self.subject.is_char_boundary(end) {
            end -= 1;
        }
        let mut bytes = vec![self.stage as u8];
        bytes.extend(self.errno.to_le_bytes());
        bytes.extend(&self.subject.as_bytes()[..end]);
        bytes
    }

    /// The failure in `bytes`, if they hold one.
    pub(crate) fn decode(bytes: &[u8]) -> Option<Self> {
        let (&stage, rest) = bytes.split_first()?;
        let (errno, subject) = rest.split_first_chunk()?;
        let stage = Stage::ALL.into_iter().find(|known| *known as u8 == stage)?;
        Some(Self { stage, subject: String::from_utf8_lossy(subject).into_owned(), errno: i32::from_le_bytes(*errno) })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn failure_survives_the_way_to_the_agent() {
        for stage in Stage::ALL {
            let failure = Failure { stage, subject: "proc at /proc".to_owned(), errno: libc::EPERM };
            assert_eq!(Failure::decode(&failure.encode()), Some(failure));
        }
    }

    #[test]
    fn message_says_what_on_what_and_why() {
        let failure = Failure::new(Stage::Mount, "proc at /proc", io::Error::from_raw_os_error(libc::EPERM));
        assert_eq!(failure.to_string(), "cannot mount proc at /proc: Operation not permitted (os error 1)");
    }

    #[test]
    fn explained_failure_is_its_subject() {
        let failure = Failure::explained(Stage::ProgramNotFound, "exec: \"x\": executable file not found in $PATH");
        assert_eq!(failure.to_string(), "exec: \"x\": executable file not found in $PATH");
    }

    #[test]
    fn damaged_bytes_are_no_failure() {
        assert_eq!(Failure::decode(&[]), None);
        assert_eq!(Failure::decode(&[Stage::Mount as u8, 0, 0, 0]), None);
        assert_eq!(Failure::decode(&[200, 0, 0, 0, 0]), None);
    }

    #[test]
    fn overlong_subject_is_cut() {
        let failure = Failure::explained(Stage::Mount, "ä".repeat(MAX_SUBJECT_LEN));
        let decoded = Failure::decode(&failure.encode()).unwrap();
        assert!(failure.subject.starts_with(&decoded.subject));
    }
}
