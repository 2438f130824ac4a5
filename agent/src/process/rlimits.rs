// SPDX-License-Identifier: Apache-2.0
//! Resource limits.

use rustix::process::{Pid, Resource, Rlimit, prlimit};

use crate::container::{Failure, Stage};

/// RLIMIT_* number (x86-64) and resource.
const RESOURCES: [Resource; 16] = [
    Resource::Cpu,
    Resource::Fsize,
    Resource::Data,
    Resource::Stack,
    Resource::Core,
    Resource::Rss,
    Resource::Nproc,
    Resource::Nofile,
    Resource::Memlock,
    Resource::As,
    Resource::Locks,
    Resource::Sigpending,
    Resource::Msgqueue,
    Resource::Nice,
    Resource::Rtprio,
    Resource::Rttime,
];

/// Sets the limits (RLIMIT_* number, soft, hard) of a process, or of the calling one.
pub(crate) fn apply(process: Option<Pid>, limits: &[(u32, u64, u64)]) -> Result<(), Failure> {
    for &(number, soft, hard) in limits {
        let resource = usize::try_from(number).ok().and_then(|index| RESOURCES.get(index));
        let Some(resource) = resource else {
            return Err(Failure::explained(Stage::Rlimit, format!("number {number}: there is no such resource")));
        };
        let limit = Rlimit { current: finite(soft), maximum: finite(hard) };
        prlimit(process, *resource, limit)
            .map_err(|error| Failure::new(Stage::Rlimit, format!("{resource:?} to {soft}:{hard}"), error))?;
    }
    Ok(())
}

fn finite(limit: u64) -> Option<u64> {
    (limit != libc::RLIM_INFINITY).then_some(limit)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_those_of_the_system() {
        assert_eq!(RESOURCES[libc::RLIMIT_NOFILE as usize], Resource::Nofile);
        assert_eq!(RESOURCES[libc::RLIMIT_CORE as usize], Resource::Core);
        assert_eq!(RESOURCES[libc::RLIMIT_RTTIME as usize], Resource::Rttime);
    }

    #[test]
    fn unknown_resource_is_an_error() {
        assert_eq!(apply(None, &[(16, 1, 1)]).unwrap_err().stage, Stage::Rlimit);
    }

    #[test]
    fn soft_limit_over_hard_limit_is_an_error() {
        let error = apply(None, &[(libc::RLIMIT_CORE, 2, 1)]).unwrap_err();
        assert_eq!(error.errno, libc::EINVAL);
    }
}
