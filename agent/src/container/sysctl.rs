// SPDX-License-Identifier: Apache-2.0
//! Kernel parameters of the container's namespaces.

use super::{Failure, SpecError, Stage};

/// What belongs to an IPC, UTS or network namespace. A part ending in `/` stands for everything below it.
const NAMESPACED: [&str; 11] = [
    "fs/mqueue/",
    "kernel/domainname",
    "kernel/hostname",
    "kernel/msgmax",
    "kernel/msgmnb",
    "kernel/msgmni",
    "kernel/sem",
    "kernel/shm_rmid_forced",
    "kernel/shmall",
    "kernel/shmmax",
    "kernel/shmmni",
];

/// Turns a key into a path under /proc/sys and checks that it belongs to a namespace.
pub(crate) fn check((key, value): (String, String)) -> Result<(String, String), SpecError> {
    let path = path(&key);
    let clean = path.split('/').all(|part| !matches!(part, "" | "." | "..")) && !path.contains('\0');
    let namespaced = path.starts_with("net/")
        || NAMESPACED.iter().any(|known| if known.ends_with('/') { path.starts_with(known) } else { path == *known });
    if clean && namespaced { Ok((path, value)) } else { Err(SpecError::Sysctl(key)) }
}

/// The separator is whichever of `.` and `/` comes first; the other one is part of a name, as in
/// `net.ipv4.conf.eth0/1.rp_filter`.
fn path(key: &str) -> String {
    if key.find(['.', '/']).is_some_and(|at| key.as_bytes()[at] == b'/') {
        return key.to_owned();
    }
    let swap = |letter| match letter {
        '.' => '/',
        '/' => '.',
        other => other,
    };
    key.chars().map(swap).collect()
}

/// Sets the parameters. To be called in the container's namespaces, where /proc is still the agent's.
pub(crate) fn apply(sysctls: &[(String, String)]) -> Result<(), Failure> {
    for (path, value) in sysctls {
        std::fs::write(format!("/proc/sys/{path}"), value)
            .map_err(|error| Failure::new(Stage::Sysctl, format!("{path} to {value:?}"), error))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn checked(key: &str) -> Result<String, SpecError> {
        check((key.to_owned(), "1".to_owned())).map(|(path, _)| path)
    }

    #[test]
    fn both_spellings_give_the_same_path() {
        assert_eq!(checked("net.ipv4.ip_forward").unwrap(), "net/ipv4/ip_forward");
        assert_eq!(checked("net/ipv4/ip_forward").unwrap(), "net/ipv4/ip_forward");
        assert_eq!(checked("net.ipv4.conf.eth0/1.rp_filter").unwrap(), "net/ipv4/conf/eth0.1/rp_filter");
        assert_eq!(checked("net/ipv4/conf/eth0.1/rp_filter").unwrap(), "net/ipv4/conf/eth0.1/rp_filter");
    }

    #[test]
    fn namespaced_parameters_are_accepted() {
        for key in ["kernel.shmmax", "fs.mqueue.msg_max", "kernel.hostname"] {
            checked(key).unwrap();
        }
    }

    #[test]
    fn parameters_of_the_whole_guest_are_refused() {
        for key in ["kernel.panic", "vm.swappiness", "kernel.shmmax.x", "net/../kernel/panic", "net", "net.", ""] {
            assert!(matches!(checked(key), Err(SpecError::Sysctl(_))), "{key:?}");
        }
    }
}
