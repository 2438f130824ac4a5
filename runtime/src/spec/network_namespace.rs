// SPDX-License-Identifier: Apache-2.0
//! A network namespace of the host that a configuration names. Engines make one for each container, also for one without a
//! network. The container's own is the guest's, with a loopback interface; what the host's has besides is not there.

use std::fs::File;
use std::io;
use std::path::Path;
use std::thread;

use nix::net::if_::if_nameindex;
use nix::sched::{CloneFlags, setns};

use super::error::FieldError;
use crate::logging;

/// Says which interfaces of the namespace at `path` the container will not have.
///
/// # Errors
///
/// There is no network namespace at `path`.
pub(crate) fn check(field: &str, path: &Path) -> Result<(), FieldError> {
    match interfaces(path) {
        Ok(names) if names.is_empty() => Ok(()),
        Ok(names) => {
            let names = crate::text::one_line(&names.join(", "));
            let path = path.display();
            logging::warn(format_args!(
                "the container has no network: the interfaces of {path} ({names}) are not passed on"
            ));
            Ok(())
        }
        // Whoever may not look has no interfaces to miss.
        Err(error) if error.kind() == io::ErrorKind::PermissionDenied => {
            logging::debug(format_args!("cannot look into the network namespace {}: {error}", path.display()));
            Ok(())
        }
        Err(error) => Err(FieldError::path(field, path, error)),
    }
}

/// The interfaces besides the loopback.
fn interfaces(path: &Path) -> io::Result<Vec<String>> {
    let namespace = File::open(path)?;
    // A thread of its own enters it: one can leave a namespace only for one that one has kept, and this one ends.
    let look = thread::Builder::new().name("netns".to_owned()).spawn(move || -> io::Result<Vec<String>> {
        setns(&namespace, CloneFlags::CLONE_NEWNET)?;
        let interfaces = if_nameindex()?;
        let names = interfaces.iter().map(|interface| interface.name().to_string_lossy().into_owned());
        Ok(names.filter(|name| name != "lo").collect())
    })?;
    look.join().map_err(|_| io::Error::other("looking into it failed"))?
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_no_network_namespace_is_refused() {
        let error = check("linux.namespaces[0].path", Path::new("/no/such")).unwrap_err().to_string();
        assert_eq!(error, "linux.namespaces[0].path: cannot use /no/such: No such file or directory (os error 2)");
        assert!(check("linux.namespaces[0].path", Path::new("/proc/self/stat")).is_err());
    }

    #[test]
    fn this_process_own_can_be_looked_into() {
        assert!(check("linux.namespaces[0].path", Path::new("/proc/self/ns/net")).is_ok());
    }
}
