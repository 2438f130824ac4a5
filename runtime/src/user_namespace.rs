// SPDX-License-Identifier: Apache-2.0
//! Whether this process is the host's root, or that of a user namespace, which an ordinary user may make.

use std::env;
use std::fs;
use std::path::PathBuf;

/// The identity mapping of all ids.
const ALL_IDS: [&str; 3] = ["0", "0", "4294967295"];

/// Whether this is root in the user namespace that the system began with, or one that looks the same.
pub(crate) fn is_root_of_host() -> bool {
    let map = fs::read_to_string("/proc/self/uid_map").unwrap_or_default();
    rustix::process::geteuid().is_root() && map.split_whitespace().eq(ALL_IDS)
}

/// The folder of an ordinary user's that goes with the session (XDG Base Directory Specification); none for the host's root.
pub(crate) fn runtime_dir() -> Option<PathBuf> {
    let dir = env::var_os("XDG_RUNTIME_DIR").map(PathBuf::from).filter(|dir| dir.is_absolute())?;
    (!is_root_of_host()).then_some(dir)
}
