// SPDX-License-Identifier: Apache-2.0
//! A network namespace of the host that a configuration names: its interfaces become the guest's.

use std::fs;
use std::path::{Path, PathBuf};

use super::error::FieldError;
use crate::network::NetworkNamespace;

/// Why the host's network is refused, and what to do.
const INSTEAD: &str = "which a virtual machine cannot be in: give the container a network of its own (engines: --network bridge, \
                       with -p for ports, or --network none)";

/// The error of a configuration that wants no network namespace of any kind: that means the host's.
pub(crate) fn absent() -> FieldError {
    let what = format!("without a network namespace in it the container has this host's own network, {INSTEAD}");
    FieldError::unsupported("linux.namespaces", what)
}

/// The namespace at `path`.
///
/// # Errors
///
/// There is none, or it is the host's own, or that of another runtime's container.
pub(crate) fn open(field: &str, path: &Path) -> Result<NetworkNamespace, FieldError> {
    let failed = |error| FieldError::path(field.to_owned(), path, error);
    let namespace = NetworkNamespace::open(path).map_err(failed)?;
    if namespace.is_host().map_err(failed)? {
        let what = format!("{} is this host's own network, {INSTEAD}", path.display());
        return Err(FieldError::unsupported(field.to_owned(), what));
    }
    if let Some(pid) = process_of(path)
        && is_in_container(pid)
    {
        let what =
            format!("{} is the network of another runtime's container (process {pid}), {INSTEAD}", path.display());
        return Err(FieldError::unsupported(field.to_owned(), what));
    }
    Ok(namespace)
}

/// The process whose network a path names: engines write it so where a container is to share that of another one.
fn process_of(path: &Path) -> Option<&str> {
    let pid = path.to_str()?.strip_prefix("/proc/")?.strip_suffix("/ns/net")?;
    (!pid.is_empty() && pid.bytes().all(|byte| byte.is_ascii_digit())).then_some(pid)
}

/// Whether a process is in a container of another runtime, where it has a PID namespace of its own. One that only keeps a network
/// namespace has none; nor has the process that stands for a container of this runtime.
fn is_in_container(pid: &str) -> bool {
    let namespace = |process: &str| -> Option<PathBuf> { fs::read_link(format!("/proc/{process}/ns/pid")).ok() };
    match (namespace(pid), namespace("self")) {
        (Some(its), Some(own)) => its != own,
        // It has gone, and left its network.
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_no_namespace_of_a_container_is_refused() {
        let error = |path| open("linux.namespaces[0].path", Path::new(path)).unwrap_err().to_string();
        assert_eq!(
            error("/no/such"),
            "linux.namespaces[0].path: cannot use /no/such: No such file or directory (os error 2)"
        );
        assert_eq!(
            error("/proc/self/stat"),
            "linux.namespaces[0].path: cannot use /proc/self/stat: it is not a network namespace"
        );
        assert!(error("/proc/self/ns/net").contains("this host's own network, which"));
        assert!(absent().to_string().contains("--network none"));
    }

    #[test]
    fn paths_that_name_a_process_are_known() {
        for (path, pid) in [
            ("/proc/12/ns/net", Some("12")),
            ("/proc/self/ns/net", None),
            ("/proc//ns/net", None),
            ("/proc/12/task/13/ns/net", None),
            ("/run/netns/12/ns/net", None),
        ] {
            assert_eq!(process_of(Path::new(path)), pid, "{path}");
        }
        assert!(!is_in_container(&std::process::id().to_string()));
    }
}
