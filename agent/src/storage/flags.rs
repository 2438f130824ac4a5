// SPDX-License-Identifier: Apache-2.0
//! The flags of mount(2), in which the OCI spec's options are expressed, as attributes of mount_setattr(2) and fsmount(2).

/// Flag of mount(2) and attribute that stand for the same thing.
const SAME_MEANING: [(u64, u64); 7] = [
    (libc::MS_RDONLY, libc::MOUNT_ATTR_RDONLY),
    (libc::MS_NOSUID, libc::MOUNT_ATTR_NOSUID),
    (libc::MS_NODEV, libc::MOUNT_ATTR_NODEV),
    (libc::MS_NOEXEC, libc::MOUNT_ATTR_NOEXEC),
    (libc::MS_NODIRATIME, libc::MOUNT_ATTR_NODIRATIME),
    (MS_NOSYMFOLLOW, libc::MOUNT_ATTR_NOSYMFOLLOW),
    (libc::MS_NOATIME, libc::MOUNT_ATTR_NOATIME),
];

/// Of <linux/mount.h>; not in the libc crate.
const MS_NOSYMFOLLOW: u64 = 256;

/// Flags that belong to the file system, not to the mount, with the names by which fsconfig(2) knows them.
const FILE_SYSTEM_FLAGS: [(u64, &str); 4] = [
    (libc::MS_SYNCHRONOUS, "sync"),
    (libc::MS_DIRSYNC, "dirsync"),
    (libc::MS_MANDLOCK, "mand"),
    (libc::MS_LAZYTIME, "lazytime"),
];

/// The propagation types, of which a mount has one.
const PROPAGATION: u64 = libc::MS_SHARED | libc::MS_PRIVATE | libc::MS_SLAVE | libc::MS_UNBINDABLE;

/// The MOUNT_ATTR_* that `flags` (MS_*) ask for.
pub(crate) fn attributes(flags: u64) -> u64 {
    let mut attributes =
        SAME_MEANING.iter().filter(|(flag, _)| flags & flag != 0).fold(0, |sum, (_, attribute)| sum | attribute);
    if flags & libc::MS_STRICTATIME != 0 {
        attributes |= libc::MOUNT_ATTR_STRICTATIME;
    }
    attributes
}

/// The attributes to clear so that those in `set` can be set: the ways to keep access times exclude each other, and the
/// kernel wants the whole field cleared when one is chosen.
pub(crate) fn access_time_field(flags: u64, set: u64) -> u64 {
    let chosen = set & libc::MOUNT_ATTR__ATIME != 0 || flags & libc::MS_RELATIME != 0;
    if chosen { libc::MOUNT_ATTR__ATIME } else { 0 }
}

/// The names of the file system flags in `flags` (MS_*).
pub(crate) fn file_system_flags(flags: u64) -> impl Iterator<Item = &'static str> {
    FILE_SYSTEM_FLAGS.into_iter().filter(move |(flag, _)| flags & flag != 0).map(|(_, name)| name)
}

/// The propagation type in `flags` (MS_*) and whether it is for everything below too.
pub(crate) fn propagation(flags: u64) -> (u64, bool) {
    (flags & PROPAGATION, flags & libc::MS_REC != 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn flags_become_attributes() {
        let flags = libc::MS_RDONLY | libc::MS_NOSUID | libc::MS_STRICTATIME;
        assert_eq!(attributes(flags), libc::MOUNT_ATTR_RDONLY | libc::MOUNT_ATTR_NOSUID | libc::MOUNT_ATTR_STRICTATIME);
    }

    #[test]
    fn choosing_access_times_clears_the_field_first() {
        assert_eq!(access_time_field(libc::MS_NOATIME, attributes(libc::MS_NOATIME)), libc::MOUNT_ATTR__ATIME);
        assert_eq!(access_time_field(libc::MS_RELATIME, attributes(libc::MS_RELATIME)), libc::MOUNT_ATTR__ATIME);
        assert_eq!(access_time_field(libc::MS_RDONLY, attributes(libc::MS_RDONLY)), 0);
    }

    #[test]
    fn file_system_flags_are_named() {
        let names: Vec<_> = file_system_flags(libc::MS_SYNCHRONOUS | libc::MS_LAZYTIME | libc::MS_NOSUID).collect();
        assert_eq!(names, ["sync", "lazytime"]);
    }

    #[test]
    fn propagation_is_told_from_its_reach() {
        assert_eq!(propagation(libc::MS_SLAVE | libc::MS_REC), (libc::MS_SLAVE, true));
        assert_eq!(propagation(0), (0, false));
    }
}
