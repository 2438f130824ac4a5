// SPDX-License-Identifier: Apache-2.0
//! Whether this process is the host's root, or that of a user namespace, which an ordinary user may make.

use std::fs;

/// The identity mapping of all ids.
const ALL_IDS: [&str; 3] = ["0", "0", "4294967295"];

/// Whether this is root in the user namespace that the system began with, or one that looks the same.
pub(crate) fn is_root_of_host() -> bool {
    let map = fs::read_to_string("/proc/self/uid_map").unwrap_or_default();
    rustix::process::geteuid().is_root() && map.split_whitespace().eq(ALL_IDS)
}
