// SPDX-License-Identifier: Apache-2.0
//! What the guest has said of a container's processes. Nothing of it is understood here; whoever reads it is told so by where
//! it comes from.

use std::collections::BTreeMap;

use bulkhead_protocol::agent::{ProcessFiles, ReadProcessesResponse};

use super::node::{FILES, Node, ProcessFile};

/// `AT_CLKTCK` and `AT_NULL` of getauxval(3).
const AT_CLKTCK: u64 = 17;
const AT_NULL: u64 = 0;

/// Clock ticks in a second, as `stat` counts them: the same in every Linux on x86-64 (`USER_HZ`).
const TICKS_PER_SECOND: u64 = 100;

/// The processes at some time.
#[derive(Debug)]
pub(super) struct Snapshot {
    booted_s: u64,
    processes: BTreeMap<u32, ProcessFiles>,
}

impl Snapshot {
    /// What has a pid that cannot be one is not there.
    pub(super) fn new(answer: ReadProcessesResponse) -> Self {
        let numbered = |process: ProcessFiles| Some((u32::try_from(process.pid).ok().filter(|pid| *pid > 0)?, process));
        let processes = answer.processes.into_iter().filter_map(numbered).collect();
        Self { booted_s: answer.booted_s, processes }
    }

    pub(super) fn has(&self, pid: u32) -> bool {
        self.processes.contains_key(&pid)
    }

    /// What is in a folder.
    pub(super) fn entries(&self, folder: Node) -> Vec<(String, Node)> {
        match folder {
            Node::Root => {
                let fixed = [("stat".to_owned(), Node::Stat), ("self".to_owned(), Node::Reader)];
                let processes = self.processes.keys().map(|pid| (pid.to_string(), Node::Process(*pid)));
                fixed.into_iter().chain(processes).collect()
            }
            Node::Reader => vec![("auxv".to_owned(), Node::Auxv)],
            Node::Process(pid) => FILES.map(|(name, file)| (name.to_owned(), Node::File(pid, file))).to_vec(),
            Node::Stat | Node::Auxv | Node::File(..) => Vec::new(),
        }
    }

    /// What is in a file; `None` if there is no such file.
    pub(super) fn content(&self, node: Node) -> Option<Vec<u8>> {
        match node {
            Node::Stat => Some(format!("btime {}\n", self.booted_s).into_bytes()),
            Node::Auxv => {
                let words = [AT_CLKTCK, TICKS_PER_SECOND, AT_NULL, 0];
                Some(words.into_iter().flat_map(u64::to_le_bytes).collect())
            }
            Node::File(pid, file) => {
                let process = self.processes.get(&pid)?;
                let content = match file {
                    ProcessFile::Stat => &process.stat,
                    ProcessFile::Status => &process.status,
                    ProcessFile::Cmdline => &process.cmdline,
                };
                Some(content.clone())
            }
            Node::Root | Node::Reader | Node::Process(_) => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn processes_are_found_by_their_pids() {
        let process = |pid, stat: &str| ProcessFiles { pid, stat: stat.into(), ..Default::default() };
        let processes = vec![process(9, "nine"), process(1, "one"), process(0, "none"), process(-1, "none")];
        let seen = Snapshot::new(ReadProcessesResponse { booted_s: 77, processes, ..Default::default() });

        let names: Vec<_> = seen.entries(Node::Root).into_iter().map(|(name, _)| name).collect();
        assert_eq!(names, ["stat", "self", "1", "9"]);
        assert!(seen.has(9) && !seen.has(2));
        assert_eq!(seen.content(Node::File(9, ProcessFile::Stat)).as_deref(), Some(b"nine".as_slice()));
        assert_eq!(seen.content(Node::File(2, ProcessFile::Stat)), None);
        assert_eq!(seen.content(Node::Stat).as_deref(), Some(b"btime 77\n".as_slice()));
        assert_eq!(seen.content(Node::Root), None);
    }
}
