// SPDX-License-Identifier: Apache-2.0
//! A network namespace of the host that a configuration names: its interfaces become the guest's.

use std::path::Path;

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
/// There is none, or it is the host's own.
pub(crate) fn open(field: &str, path: &Path) -> Result<NetworkNamespace, FieldError> {
    let failed = |error| FieldError::path(field.to_owned(), path, error);
    let namespace = NetworkNamespace::open(path).map_err(failed)?;
    if namespace.is_host().map_err(failed)? {
        let what = format!("{} is this host's own network, {INSTEAD}", path.display());
        return Err(FieldError::unsupported(field.to_owned(), what));
    }
    Ok(namespace)
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
}
