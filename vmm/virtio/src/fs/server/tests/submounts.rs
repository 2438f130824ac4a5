// SPDX-License-Identifier: Apache-2.0
//! What the host mounts below a tree while the guest runs. Plain folders stand for mounts.

use super::*;

struct Volume {
    guest: Guest,
    added: AddedTrees,
    folder: tempfile::TempDir,
    tree: u64,
}

impl Volume {
    /// A tree with `below/hidden`, and beside it two folders to be mounted, each with a file of its own name.
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        for name in ["volume/below", "one/below", "other"] {
            fs::create_dir_all(folder.path().join(name)).unwrap();
        }
        for file in ["volume/below/hidden", "one/one", "other/other"] {
            fs::write(folder.path().join(file), file).unwrap();
        }
        let mut guest = Guest::unstarted(CachePolicy::Shared);
        let added = AddedTrees::new(["tree".to_owned()]).unwrap();
        guest.server.added = Some(added.clone());
        let mut guest = Guest::start(guest);
        added.add("m0", openat(&folder.path().join("volume"))).unwrap();
        let tree = guest.find(ROOT_NODE, "m0").unwrap();
        Self { guest, added, folder, tree }
    }

    fn at(&self, name: &str) -> OwnedFd {
        openat(&self.folder.path().join(name))
    }

    fn mount(&self, name: &str, parent: Option<&str>, covered: &str, top: &str) {
        self.added.add_mount((name, "m0", parent), self.at(covered), self.at(top)).unwrap();
    }

    /// Whether a directory has a name.
    fn has(&mut self, directory: u64, name: &str) -> bool {
        self.guest.find(directory, name).is_ok()
    }
}

#[test]
fn a_mount_is_in_the_place_of_what_it_covers_until_it_is_taken_away() {
    let mut volume = Volume::new();
    let before = volume.guest.find(volume.tree, "below").unwrap();

    volume.mount("m0-1", None, "volume/below", "one");
    let mounted = volume.guest.find(volume.tree, "below").unwrap();
    let file = volume.guest.find(mounted, "one").unwrap();
    let handle = volume.guest.open(file, OFlags::RDONLY).unwrap();

    assert_ne!(mounted, before);
    assert_eq!(volume.guest.find(mounted, "hidden"), Err(ENOENT));
    assert_eq!(volume.guest.read(file, handle, 0, 100), (0, b"one/one".to_vec()));
    volume.added.remove_mount("m0-1").unwrap();
    assert_eq!(volume.guest.read(file, handle, 0, 100).0, libc::EBADF);
    assert_eq!(volume.guest.find(mounted, "one"), Err(libc::ESTALE));
    assert_eq!(volume.guest.find(volume.tree, "below"), Ok(before));
    assert!(volume.has(before, "hidden"));
}

#[test]
fn nothing_of_what_was_taken_away_stays_open() {
    let mut volume = Volume::new();
    volume.mount("m0-1", None, "volume/below", "one");
    volume.mount("m0-2", Some("m0-1"), "one/below", "other");
    let one = volume.guest.find(volume.tree, "below").unwrap();
    let other = volume.guest.find(one, "below").unwrap();
    let directory = number(&volume.guest.ask(opcode::OPENDIR, other, &numbers32(&[0, 0])).1, 0, 8);
    assert!(volume.has(other, "other"));

    volume.added.remove_mount("m0-2").unwrap();
    volume.added.remove_mount("m0-1").unwrap();

    assert_eq!(volume.guest.ask(opcode::READDIR, other, &transfer(directory, 0, 1000, 0)).0, libc::EBADF);
    let mounted = ["one", "other"].map(|name| volume.folder.path().canonicalize().unwrap().join(name));
    let is_held = |entry: std::io::Result<fs::DirEntry>| {
        fs::read_link(entry.unwrap().path()).is_ok_and(|target| mounted.iter().any(|path| target.starts_with(path)))
    };
    assert!(!fs::read_dir("/proc/self/fd").unwrap().any(is_held));
}

#[test]
fn what_is_covered_keeps_its_name() {
    let mut volume = Volume::new();
    volume.mount("m0-1", None, "volume/below", "one");
    let rename = |from: &str, to: &str| [numbers64(&[volume.tree]), text(from), text(to)].concat();
    let (away, onto) = (rename("below", "away"), rename("new", "below"));
    volume.guest.ask(opcode::MKDIR, volume.tree, &[numbers32(&[0o755, 0]), text("new")].concat());

    assert_eq!(volume.guest.ask(opcode::RMDIR, volume.tree, &text("below")).0, libc::EBUSY);
    assert_eq!(volume.guest.ask(opcode::RENAME, volume.tree, &away).0, libc::EBUSY);
    assert_eq!(volume.guest.ask(opcode::RENAME, volume.tree, &onto).0, libc::EBUSY);
    volume.added.remove_mount("m0-1").unwrap();
    assert_eq!(volume.guest.ask(opcode::RENAME, volume.tree, &away).0, 0);
}

#[test]
fn what_is_mounted_over_a_whole_tree_is_seen_in_the_node_that_the_guest_has() {
    let mut volume = Volume::new();

    volume.mount("m0-1", None, "volume", "one");
    assert!(volume.has(volume.tree, "one") && !volume.has(volume.tree, "other"));
    // Looked up anew, it is the same.
    assert_eq!(volume.guest.find(ROOT_NODE, "m0"), Ok(volume.tree));
    volume.added.remove_mount("m0-1").unwrap();
    volume.mount("m0-2", None, "volume", "other");
    assert!(volume.has(volume.tree, "other") && !volume.has(volume.tree, "one"));
    volume.added.remove_mount("m0-2").unwrap();
    let below = volume.guest.find(volume.tree, "below").unwrap();
    assert!(volume.has(below, "hidden"));

    volume.mount("m0-3", None, "volume", "one");
    volume.added.remove("m0").unwrap();
    assert_eq!(volume.guest.find(volume.tree, "one"), Err(libc::ESTALE));
}

#[test]
fn a_file_is_not_covered_by_a_folder() {
    let volume = Volume::new();

    let file = fs::File::open(volume.folder.path().join("volume/below/hidden")).unwrap();

    let refused = volume.added.add_mount(("m0-1", "m0", None), file.into(), volume.at("one"));

    assert!(matches!(refused, Err(crate::fs::TreeError::Kind(_))), "{refused:?}");
}
