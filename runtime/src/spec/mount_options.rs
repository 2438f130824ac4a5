// SPDX-License-Identifier: Apache-2.0
//! The mount options of the OCI specification ("Linux mount options") and what each means to mount(2) and
//! mount_setattr(2).

use libc::{
    MS_BIND, MS_DIRSYNC, MS_I_VERSION, MS_LAZYTIME, MS_MANDLOCK, MS_NOATIME, MS_NODEV, MS_NODIRATIME, MS_NOEXEC,
    MS_NOSUID, MS_PRIVATE, MS_RDONLY, MS_REC, MS_RELATIME, MS_REMOUNT, MS_SHARED, MS_SILENT, MS_SLAVE, MS_STRICTATIME,
    MS_SYNCHRONOUS, MS_UNBINDABLE,
};

/// `MS_NOSYMFOLLOW` of <linux/mount.h>.
const MS_NOSYMFOLLOW: u64 = 256;

/// How far an option reaches.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Depth {
    /// `idmap`
    Mount,
    /// `ridmap`
    Tree,
}

/// Options, taken apart.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct MountOptions {
    /// MS_* for mount(2).
    pub(crate) flags: u64,
    /// MS_* that the last word on is that they are not set.
    pub(crate) cleared: u64,
    /// MS_* propagation, with `MS_REC` where it is recursive; 0 for none.
    pub(crate) propagation: u64,
    /// MS_* to set on a bind and all that is mounted below it.
    pub(crate) recursive_set: u64,
    /// MS_* to clear there.
    pub(crate) recursive_clear: u64,
    /// Copy what lies under a tmpfs into it.
    pub(crate) tmpcopyup: bool,
    /// What is left for the file system, in order.
    pub(crate) data: Vec<String>,
    /// Whether the ids of the mount's files are to be mapped, and of what is mounted below it too.
    pub(crate) id_map: Option<Depth>,
}

/// Name, whether it clears, and flag.
const FLAGS: &[(&str, bool, u64)] = &[
    ("async", true, MS_SYNCHRONOUS),
    ("atime", true, MS_NOATIME),
    ("bind", false, MS_BIND),
    ("defaults", false, 0),
    ("dev", true, MS_NODEV),
    ("diratime", true, MS_NODIRATIME),
    ("dirsync", false, MS_DIRSYNC),
    ("exec", true, MS_NOEXEC),
    ("iversion", false, MS_I_VERSION),
    ("lazytime", false, MS_LAZYTIME),
    ("loud", true, MS_SILENT),
    ("mand", false, MS_MANDLOCK),
    ("noatime", false, MS_NOATIME),
    ("nodev", false, MS_NODEV),
    ("nodiratime", false, MS_NODIRATIME),
    ("noexec", false, MS_NOEXEC),
    ("noiversion", true, MS_I_VERSION),
    ("nolazytime", true, MS_LAZYTIME),
    ("nomand", true, MS_MANDLOCK),
    ("norelatime", true, MS_RELATIME),
    ("nostrictatime", true, MS_STRICTATIME),
    ("nosuid", false, MS_NOSUID),
    ("nosymfollow", false, MS_NOSYMFOLLOW),
    ("rbind", false, MS_BIND | MS_REC),
    ("relatime", false, MS_RELATIME),
    ("remount", false, MS_REMOUNT),
    ("ro", false, MS_RDONLY),
    ("rw", true, MS_RDONLY),
    ("silent", false, MS_SILENT),
    ("strictatime", false, MS_STRICTATIME),
    ("suid", true, MS_NOSUID),
    ("symfollow", true, MS_NOSYMFOLLOW),
    ("sync", false, MS_SYNCHRONOUS),
];

/// Name, whether it clears, and flag of those that apply to a whole tree of mounts.
const RECURSIVE: &[(&str, bool, u64)] = &[
    ("ratime", true, MS_NOATIME),
    ("rdev", true, MS_NODEV),
    ("rdiratime", true, MS_NODIRATIME),
    ("rexec", true, MS_NOEXEC),
    ("rnoatime", false, MS_NOATIME),
    ("rnodev", false, MS_NODEV),
    ("rnodiratime", false, MS_NODIRATIME),
    ("rnoexec", false, MS_NOEXEC),
    ("rnorelatime", true, MS_RELATIME),
    ("rnostrictatime", true, MS_STRICTATIME),
    ("rnosuid", false, MS_NOSUID),
    ("rnosymfollow", false, MS_NOSYMFOLLOW),
    ("rrelatime", false, MS_RELATIME),
    ("rro", false, MS_RDONLY),
    ("rrw", true, MS_RDONLY),
    ("rstrictatime", false, MS_STRICTATIME),
    ("rsuid", true, MS_NOSUID),
    ("rsymfollow", true, MS_NOSYMFOLLOW),
];

const PROPAGATION: &[(&str, u64)] = &[
    ("private", MS_PRIVATE),
    ("rprivate", MS_PRIVATE | MS_REC),
    ("rshared", MS_SHARED | MS_REC),
    ("rslave", MS_SLAVE | MS_REC),
    ("runbindable", MS_UNBINDABLE | MS_REC),
    ("shared", MS_SHARED),
    ("slave", MS_SLAVE),
    ("unbindable", MS_UNBINDABLE),
];

/// The names of all options that are Bulkhead's to honour, sorted.
#[must_use]
pub(crate) fn names() -> Vec<&'static str> {
    let propagation = PROPAGATION.iter().map(|(name, _)| *name);
    let mut names: Vec<_> = FLAGS.iter().chain(RECURSIVE).map(|(name, ..)| *name).chain(propagation).collect();
    names.extend(["idmap", "ridmap", "tmpcopyup"]);
    names.sort_unstable();
    names
}

/// The MS_* flags of a propagation mode, or `None` for a name that is none.
#[must_use]
pub(crate) fn propagation_flags(name: &str) -> Option<u64> {
    PROPAGATION.iter().find(|(known, _)| *known == name).map(|(_, flags)| *flags)
}

impl MountOptions {
    /// Takes options apart. A later option wins over an earlier one; an unknown one is the file system's.
    #[must_use]
    pub(crate) fn parse<'a>(options: impl IntoIterator<Item = &'a str>) -> Self {
        let mut parsed = Self::default();
        for option in options {
            if let Some((_, clears, flag)) = FLAGS.iter().find(|(name, ..)| *name == option) {
                let (on, off) = if *clears { (0, *flag) } else { (*flag, 0) };
                parsed.flags = parsed.flags & !off | on;
                parsed.cleared = parsed.cleared & !on | off;
            } else if let Some((_, clears, flag)) = RECURSIVE.iter().find(|(name, ..)| *name == option) {
                let (on, off) = if *clears { (0, *flag) } else { (*flag, 0) };
                parsed.recursive_set = parsed.recursive_set & !off | on;
                parsed.recursive_clear = parsed.recursive_clear & !on | off;
            } else if let Some(flags) = propagation_flags(option) {
                parsed.propagation = flags;
            } else {
                match option {
                    "tmpcopyup" => parsed.tmpcopyup = true,
                    "idmap" => parsed.id_map = Some(Depth::Mount),
                    "ridmap" => parsed.id_map = Some(Depth::Tree),
                    "" => {}
                    data => parsed.data.push(data.to_owned()),
                }
            }
        }
        parsed
    }

    /// Whether what the host mounts below a bind mount's source while the container runs is to be seen. As with runc, in whose
    /// mount namespace all mounts get those of the host at first, it is unless the options say otherwise.
    #[must_use]
    pub(crate) fn follows_host(&self) -> bool {
        self.propagation & (MS_PRIVATE | MS_UNBINDABLE) == 0
    }

    /// Whether the host has to keep the guest from writing to a bind mount's source.
    #[must_use]
    pub(crate) fn read_only(&self) -> bool {
        (self.flags | self.recursive_set) & MS_RDONLY != 0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_later_option_wins() {
        let options = MountOptions::parse(["ro", "nosuid", "rw", "noexec", "exec", "noexec"]);

        assert_eq!(options.flags, MS_NOSUID | MS_NOEXEC);
        assert_eq!(options.cleared, MS_RDONLY);
    }

    #[test]
    fn options_of_a_default_config() {
        let options = MountOptions::parse(["nosuid", "strictatime", "mode=755", "size=65536k"]);

        assert_eq!(options.flags, MS_NOSUID | MS_STRICTATIME);
        assert_eq!(options.data, ["mode=755", "size=65536k"]);
        assert_eq!(options.propagation, 0);
    }

    #[test]
    fn binds_and_propagation() {
        let options = MountOptions::parse(["rbind", "rslave", "ro"]);

        assert_eq!(options.flags, MS_BIND | MS_REC | MS_RDONLY);
        assert_eq!(options.propagation, MS_SLAVE | MS_REC);
        assert!(options.read_only());
        for (option, follows) in
            [("rbind", true), ("slave", true), ("rshared", true), ("rprivate", false), ("runbindable", false)]
        {
            assert_eq!(MountOptions::parse([option]).follows_host(), follows, "{option}");
        }
    }

    #[test]
    fn recursive_attributes_set_and_clear() {
        let options = MountOptions::parse(["rro", "rnosuid", "rsuid", "rexec"]);

        assert_eq!(options.recursive_set, MS_RDONLY);
        assert_eq!(options.recursive_clear, MS_NOSUID | MS_NOEXEC);
        assert!(options.read_only());
    }

    #[test]
    fn extensions_are_told_apart_from_data() {
        let options = MountOptions::parse(["tmpcopyup", "idmap", "", "x=y"]);

        assert!(options.tmpcopyup);
        assert_eq!(options.id_map, Some(Depth::Mount));
        assert_eq!(MountOptions::parse(["idmap", "ridmap"]).id_map, Some(Depth::Tree));
        assert_eq!(options.data, ["x=y"]);
    }

    #[test]
    fn no_name_is_in_two_tables() {
        let names =
            FLAGS.iter().map(|f| f.0).chain(RECURSIVE.iter().map(|f| f.0)).chain(PROPAGATION.iter().map(|p| p.0));
        let names: Vec<_> = names.collect();

        for (index, name) in names.iter().enumerate() {
            assert!(!names[index + 1..].contains(name), "{name}");
        }
    }
}
