// SPDX-License-Identifier: Apache-2.0
//! Which mounts are seen from a place, and that this changes (proc_pid_mountinfo(5)).

use std::collections::HashMap;
use std::fs::File;
use std::io::{self, Read, Seek};
use std::path::{Path, PathBuf};

use super::mountinfo::{FIELDS, MOUNTINFO, unescape};

/// A mount.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct MountEntry {
    pub(crate) id: u64,
    parent: u64,
    /// Where it is mounted.
    pub(crate) place: PathBuf,
    /// What makes it another one: the beginning of its line.
    pub(crate) identity: Vec<u8>,
    /// Whether mounts spread to it, or from it.
    pub(crate) propagates: bool,
}

impl MountEntry {
    fn read(line: &[u8]) -> Option<Self> {
        let fields: Vec<&[u8]> = line.split(|&byte| byte == b' ').collect();
        let (begin, rest) = fields.split_at_checked(FIELDS)?;
        let &[id, parent, _, _, place] = begin else { return None };
        let number = |field: &[u8]| str::from_utf8(field).ok()?.parse().ok();
        let mut optional = rest.iter().skip(1).take_while(|field| **field != b"-");
        let propagates = optional.any(|field| field.starts_with(b"shared:") || field.starts_with(b"master:"));
        let (id, parent, identity) = (number(id)?, number(parent)?, begin.join(&b' '));
        Some(Self { id, parent, place: unescape(place), identity, propagates })
    }
}

/// What is mounted, to be read again when it has changed, which poll(2) tells by `POLLPRI`.
#[derive(Debug)]
pub(crate) struct MountTree(pub(crate) File);

impl MountTree {
    /// That of the calling thread's mount namespace, whoever reads it later.
    ///
    /// # Errors
    ///
    /// There is no /proc.
    pub(crate) fn open() -> io::Result<Self> {
        File::open(MOUNTINFO).map(Self)
    }

    /// All mounts.
    ///
    /// # Errors
    ///
    /// As read(2).
    pub(crate) fn read(&self) -> io::Result<Vec<MountEntry>> {
        let mut text = Vec::new();
        let mut file = &self.0;
        file.rewind()?;
        file.read_to_end(&mut text)?;
        Ok(entries(&text))
    }
}

fn entries(mountinfo: &[u8]) -> Vec<MountEntry> {
    mountinfo.split(|&byte| byte == b'\n').filter_map(MountEntry::read).collect()
}

/// Whether what is mounted below a path, or over it, is seen in a bind mount of it that gets mounts from the host.
pub(crate) fn spreads(path: &Path) -> bool {
    let find = || {
        let mounts = MountTree::open().and_then(|mounts| mounts.read()).ok()?;
        let id = super::mount_id(path).ok()?;
        mounts.into_iter().find(|mount| mount.id == id)
    };
    find().is_some_and(|mount| mount.propagates)
}

/// The mounts that are seen from the mount `top` at `source`, a place in it, and below, and for each the one in which it lies; `None`
/// for `top`. Those come before what lies in them.
pub(crate) fn seen_from<'a>(
    mounts: &'a [MountEntry],
    top: u64,
    source: &'a Path,
) -> Vec<(&'a MountEntry, Option<&'a MountEntry>)> {
    let mut children: HashMap<u64, Vec<&MountEntry>> = HashMap::new();
    for mount in mounts.iter().filter(|mount| mount.id != mount.parent && mount.place.starts_with(source)) {
        children.entry(mount.parent).or_default().push(mount);
    }
    let at = |parent: u64, place: &Path| {
        children.get(&parent).and_then(|children| children.iter().rfind(|mount| mount.place == place)).copied()
    };
    // Of several on top of each other, the last one is seen.
    let topmost = |mut mount: &'a MountEntry| {
        while let Some(over) = at(mount.id, &mount.place) {
            mount = over;
        }
        mount
    };
    let mut seen = Vec::new();
    let mut left: Vec<(u64, Option<&MountEntry>)> = vec![(top, None)];
    while let Some((id, inside)) = left.pop() {
        // What covers all of the source hides the rest.
        let whole = if inside.is_none() { at(id, source) } else { None };
        let found = whole.map_or_else(|| children.get(&id).cloned().unwrap_or_default(), |whole| vec![whole]);
        for mount in found.into_iter().map(topmost) {
            seen.push((mount, inside));
            left.push((mount.id, Some(mount)));
        }
    }
    seen
}

#[cfg(test)]
mod tests {
    use super::*;

    const TEXT: &str = "\
        22 1 8:1 / / rw - ext4 /dev/sda1 rw\n\
        30 22 0:5 / /vol rw shared:1 - tmpfs tmpfs rw\n\
        31 30 0:6 /sub /vol/a\\040b rw - tmpfs tmpfs rw\n\
        32 22 0:7 / /volume/x rw - tmpfs tmpfs rw\n";

    fn seen(text: &str, top: u64, source: &str) -> Vec<(u64, Option<u64>)> {
        let mounts = entries(text.as_bytes());
        let seen = seen_from(&mounts, top, Path::new(source));
        seen.iter().map(|(mount, inside)| (mount.id, inside.map(|inside| inside.id))).collect()
    }

    #[test]
    fn what_is_seen_from_a_mount_lies_in_it_and_is_not_covered() {
        assert_eq!(seen(TEXT, 22, "/"), [(30, None), (32, None), (31, Some(30))]);
        assert_eq!(seen(TEXT, 22, "/vol"), [(30, None), (31, Some(30))]);
        assert_eq!(seen(TEXT, 30, "/vol"), [(31, None)]);
        assert_eq!(seen(TEXT, 22, "/vol/none"), []);
        let over = |place: &str, parent: u64| format!("{TEXT}40 {parent} 0:9 / {place} rw - tmpfs tmpfs rw\n");
        // Over one that lies there, over that in which it lies, and over the source.
        assert_eq!(seen(&over("/vol/a\\040b", 31), 22, "/vol"), [(30, None), (40, Some(30))]);
        assert_eq!(seen(&over("/vol", 30), 22, "/"), [(40, None), (32, None)]);
        assert_eq!(seen(&over("/vol", 30), 30, "/vol"), [(40, None)]);
    }

    #[test]
    fn mounts_tell_whether_they_spread() {
        let spread = |line: &[u8]| MountEntry::read(line).map(|mount| mount.propagates);

        assert_eq!(spread(b"30 22 0:5 / /caf\xe9 rw shared:7 - tmpfs tmpfs rw"), Some(true));
        assert_eq!(spread(b"30 22 0:5 / /vol rw master:7 - tmpfs tmpfs rw"), Some(true));
        assert_eq!(spread(b"30 22 0:5 / /vol rw - tmpfs shared:7 rw"), Some(false));
        assert_eq!(spread(b"30 22"), None);
    }
}
