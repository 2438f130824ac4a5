// SPDX-License-Identifier: Apache-2.0
//! Mappings of user and group ids (user_namespaces(7)): of a container's user namespace, or of one mount.

use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::path::PathBuf;

use bulkhead_protocol::agent as wire;

use super::{Failure, SpecError, Stage};
use crate::sys::{self, Child, Cloned, Parent};

/// Most lines of a mapping that the kernel takes.
const MAX_LINES: usize = 340;

/// Where the process that makes a user namespace for a mount keeps what it knows.
const NAMESPACE_FILE: &str = "ns/user";

/// Mappings of user ids and of group ids.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct IdMappings {
    users: Vec<Range>,
    groups: Vec<Range>,
}

/// Consecutive ids: `first` and those after it, which stand for `outside` and those after it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Range {
    first: u32,
    outside: u32,
    count: u32,
}

impl IdMappings {
    /// The mappings of a request, checked; `None` without any.
    pub(crate) fn from_wire(users: &[wire::IdMapping], groups: &[wire::IdMapping]) -> Result<Option<Self>, SpecError> {
        if users.is_empty() && groups.is_empty() {
            return Ok(None);
        }
        Ok(Some(Self { users: ranges(users)?, groups: ranges(groups)? }))
    }

    /// The guest's id of a user of the namespace; `None` where there is none.
    pub(crate) fn user_outside(&self, uid: u32) -> Option<u32> {
        outside(&self.users, uid)
    }

    /// The same of a group.
    pub(crate) fn group_outside(&self, gid: u32) -> Option<u32> {
        outside(&self.groups, gid)
    }

    /// Gives the user namespace that a process was made in these mappings.
    pub(crate) fn write(&self, pid: i32) -> Result<(), Failure> {
        for (file, ranges) in [("uid_map", &self.users), ("gid_map", &self.groups)] {
            let lines = lines(ranges);
            // The kernel takes the whole in one write.
            std::fs::write(of_process(pid, file), &lines)
                .map_err(|error| Failure::new(Stage::Namespace, format!("user, with the {file} {lines:?}"), error))?;
        }
        Ok(())
    }

    /// A user namespace with these mappings, for a mount. It has no process.
    pub(crate) fn namespace(&self) -> Result<OwnedFd, Failure> {
        let failed = |error: io::Error| Failure::new(Stage::Namespace, "user, for a mount", error);
        // The process ends when this end of the pipe does, whatever happens here.
        let (read, write) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC).map_err(|e| failed(e.into()))?;
        match sys::clone_process(Parent::Caller, u64::from(libc::CLONE_NEWUSER.cast_unsigned()), None) {
            Ok(Cloned::Parent(Child { pid, .. })) => {
                self.write(pid)?;
                let namespace = File::open(of_process(pid, NAMESPACE_FILE)).map_err(failed)?;
                drop(write);
                Ok(namespace.into())
            }
            Ok(Cloned::Child) => {
                crate::init::enter_child();
                let _ = sys::close_all_but(&[std::os::fd::AsFd::as_fd(&read)]);
                let _ = rustix::io::read(&read, &mut [0_u8; 1][..]);
                sys::exit_now(0)
            }
            Err(error) => Err(failed(error)),
        }
    }
}

fn of_process(pid: i32, file: &str) -> PathBuf {
    PathBuf::from(format!("/proc/{pid}/{file}"))
}

fn ranges(wire: &[wire::IdMapping]) -> Result<Vec<Range>, SpecError> {
    if wire.is_empty() || wire.len() > MAX_LINES {
        return Err(SpecError::IdMappings { lines: wire.len(), max: MAX_LINES });
    }
    let range =
        |mapping: &wire::IdMapping| Range { first: mapping.inside, outside: mapping.outside, count: mapping.count };
    Ok(wire.iter().map(range).collect())
}

fn outside(ranges: &[Range], id: u32) -> Option<u32> {
    ranges.iter().find_map(|range| {
        let offset = id.checked_sub(range.first).filter(|offset| *offset < range.count)?;
        range.outside.checked_add(offset)
    })
}

fn lines(ranges: &[Range]) -> String {
    ranges.iter().map(|range| format!("{} {} {}\n", range.first, range.outside, range.count)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mapping(inside: u32, outside: u32, count: u32) -> wire::IdMapping {
        wire::IdMapping { inside, outside, count, ..Default::default() }
    }

    #[test]
    fn ids_are_found_in_their_range_and_nowhere_else() {
        let users = [mapping(0, 100_000, 1000), mapping(5000, 7, 1)];
        let mappings = IdMappings::from_wire(&users, &[mapping(1, u32::MAX, 2)]).unwrap().unwrap();

        assert_eq!(
            [0, 999, 1000, 5000].map(|id| mappings.user_outside(id)),
            [Some(100_000), Some(100_999), None, Some(7)]
        );
        assert_eq!([0, 1, 2].map(|id| mappings.group_outside(id)), [None, Some(u32::MAX), None]);
        assert_eq!(lines(&mappings.users), "0 100000 1000\n5000 7 1\n");
    }

    #[test]
    fn one_without_the_other_and_too_many_are_refused() {
        assert_eq!(IdMappings::from_wire(&[], &[]).unwrap(), None);
        assert!(IdMappings::from_wire(&[mapping(0, 0, 1)], &[]).is_err());
        let many = vec![mapping(0, 0, 1); MAX_LINES + 1];
        assert!(IdMappings::from_wire(&many, &many).is_err());
    }
}
