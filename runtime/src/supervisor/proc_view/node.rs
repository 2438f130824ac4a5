// SPDX-License-Identifier: Apache-2.0
//! The files that there are, and their numbers.
//!
//! | number | file |
//! | --- | --- |
//! | 1 to 4 | `/`, `stat`, `self`, `self/auxv` |
//! | 4 × (pid + 1) | the folder of a process |
//! | 1 to 3 more | `stat`, `status`, `cmdline` in it |

/// A file, or a folder.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Node {
    Root,
    /// When the machine was booted.
    Stat,
    /// Of whoever looks.
    Reader,
    /// What the kernel tells a program: here, how many ticks a second has.
    Auxv,
    Process(u32),
    File(u32, ProcessFile),
}

/// A file of a process.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum ProcessFile {
    Stat,
    Status,
    Cmdline,
}

/// The names of a process' files.
pub(super) const FILES: [(&str, ProcessFile); 3] =
    [("stat", ProcessFile::Stat), ("status", ProcessFile::Status), ("cmdline", ProcessFile::Cmdline)];

impl Node {
    pub(super) fn number(self) -> u64 {
        let folder = |pid: u32| 4 * (u64::from(pid) + 1);
        match self {
            Self::Root => 1,
            Self::Stat => 2,
            Self::Reader => 3,
            // That of a process 0, which no namespace has.
            Self::Auxv => 4,
            Self::Process(pid) => folder(pid),
            Self::File(pid, file) => folder(pid) + 1 + file as u64,
        }
    }

    pub(super) fn from_number(number: u64) -> Option<Self> {
        match number {
            1 => Some(Self::Root),
            2 => Some(Self::Stat),
            3 => Some(Self::Reader),
            4 => Some(Self::Auxv),
            _ => {
                let pid = u32::try_from((number / 4).checked_sub(1)?).ok().filter(|pid| *pid > 0)?;
                Some(match number % 4 {
                    0 => Self::Process(pid),
                    index => Self::File(pid, FILES[index as usize - 1].1),
                })
            }
        }
    }

    /// What `name` is in this folder, if there can be such a thing.
    pub(super) fn child(self, name: &str) -> Option<Self> {
        match (self, name) {
            (Self::Root, "stat") => Some(Self::Stat),
            (Self::Root, "self") => Some(Self::Reader),
            // Digits alone, the first of which is not 0.
            (Self::Root, _) => name.parse().ok().filter(|pid: &u32| pid.to_string() == name).and_then(Self::process),
            (Self::Reader, "auxv") => Some(Self::Auxv),
            (Self::Process(pid), _) => {
                FILES.iter().find(|(known, _)| *known == name).map(|(_, file)| Self::File(pid, *file))
            }
            _ => None,
        }
    }

    fn process(pid: u32) -> Option<Self> {
        (pid > 0).then_some(Self::Process(pid))
    }

    /// The process that it belongs to.
    pub(super) fn pid(self) -> Option<u32> {
        match self {
            Self::Process(pid) | Self::File(pid, _) => Some(pid),
            Self::Root | Self::Stat | Self::Reader | Self::Auxv => None,
        }
    }

    pub(super) fn is_folder(self) -> bool {
        matches!(self, Self::Root | Self::Reader | Self::Process(_))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_number_is_one_files() {
        let fixed = [Node::Root, Node::Stat, Node::Reader, Node::Auxv];
        let of_process = |pid| {
            let files = FILES.map(|(_, file)| Node::File(pid, file));
            [Node::Process(pid), files[0], files[1], files[2]]
        };
        let all = [fixed, of_process(1), of_process(2), of_process(u32::MAX)].concat();
        for (index, node) in all.iter().enumerate() {
            assert_eq!(Node::from_number(node.number()), Some(*node));
            assert!(all[..index].iter().all(|other| other.number() != node.number()), "{node:?}");
        }
        for number in [0, 5, 6, 7, u64::MAX] {
            assert_eq!(Node::from_number(number), None, "{number}");
        }
    }

    #[test]
    fn names_are_those_of_proc() {
        assert_eq!(Node::Root.child("17"), Some(Node::Process(17)));
        assert_eq!(Node::Process(17).child("status"), Some(Node::File(17, ProcessFile::Status)));
        assert_eq!(Node::Reader.child("auxv"), Some(Node::Auxv));
        for name in ["0", "017", "+17", "-1", "4294967296", "status", ""] {
            assert_eq!(Node::Root.child(name), None, "{name}");
        }
        assert_eq!(Node::Stat.child("stat"), None);
    }
}
