// SPDX-License-Identifier: Apache-2.0
//! Trees that come and go while the guest runs.

use std::fs::File;

use super::*;

impl Guest {
    fn growing(cache: CachePolicy) -> (Self, AddedTrees) {
        let mut guest = Self::unstarted(cache);
        let added = AddedTrees::new(["tree".to_owned()]).unwrap();
        guest.server.added = Some(added.clone());
        (Self::start(guest), added)
    }
}

/// A folder with a file in it.
fn folder() -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    fs::write(folder.path().join("file"), "content").unwrap();
    folder
}

#[test]
fn an_added_tree_is_found_by_its_name_and_used_as_any() {
    for cache in [CachePolicy::Private, CachePolicy::Shared] {
        let (mut guest, added) = Guest::growing(cache);
        let folder = folder();
        assert_eq!(guest.find(ROOT_NODE, "c1"), Err(ENOENT));

        added.add("c1", openat(folder.path())).unwrap();
        let tree = guest.find(ROOT_NODE, "c1").unwrap();
        let node = guest.find(tree, "file").unwrap();
        let handle = guest.open(node, OFlags::RDONLY).unwrap();
        let read = guest.read(node, handle, 0, 100);
        guest.create(tree, "new", 0o600).unwrap();

        assert_eq!(read, (0, b"content".to_vec()));
        assert!(folder.path().join("new").exists());
        // Not below the top.
        assert_ne!(guest.find(tree, "c1"), Ok(tree));
        assert!(guest.find(ROOT_NODE, "tree").is_ok());
        assert_eq!(guest.find(tree, "..").unwrap_err(), libc::EINVAL);
    }
}

#[test]
fn a_tree_may_be_a_file() {
    let (mut guest, added) = Guest::growing(CachePolicy::Shared);
    let folder = folder();

    added.add("m0", File::open(folder.path().join("file")).unwrap().into()).unwrap();
    let node = guest.find(ROOT_NODE, "m0").unwrap();
    let handle = guest.open(node, OFlags::RDONLY).unwrap();

    assert_eq!(guest.read(node, handle, 0, 100), (0, b"content".to_vec()));
}

#[test]
fn nothing_of_a_removed_tree_stays_open() {
    let (mut guest, added) = Guest::growing(CachePolicy::Private);
    let folder = folder();
    added.add("c1", openat(folder.path())).unwrap();
    let tree = guest.find(ROOT_NODE, "c1").unwrap();
    let node = guest.find(tree, "file").unwrap();
    let handle = guest.open(node, OFlags::RDWR).unwrap();
    let directory = number(&guest.ask(opcode::OPENDIR, tree, &numbers32(&[0, 0])).1, 0, 8);

    added.remove("c1").unwrap();

    assert_eq!(guest.read(node, handle, 0, 100).0, libc::EBADF);
    assert_eq!(guest.write(node, handle, 0, b"late", 0).0, libc::EBADF);
    assert_eq!(guest.ask(opcode::READDIR, tree, &transfer(directory, 0, 1000, 0)).0, libc::EBADF);
    assert_eq!(guest.ask(opcode::GETATTR, tree, &[0; 16]).0, libc::ESTALE);
    assert_eq!(guest.find(tree, "file"), Err(libc::ESTALE));
    assert_eq!(guest.find(ROOT_NODE, "c1"), Err(ENOENT));
    assert_eq!(fs::read(folder.path().join("file")).unwrap(), b"content");
    let path = folder.path().canonicalize().unwrap();
    let is_held = |entry: std::io::Result<fs::DirEntry>| {
        fs::read_link(entry.unwrap().path()).is_ok_and(|target| target.starts_with(&path))
    };
    assert!(!fs::read_dir("/proc/self/fd").unwrap().any(is_held));
}

#[test]
fn the_numbers_of_a_removed_trees_nodes_are_not_given_to_others() {
    let (mut guest, added) = Guest::growing(CachePolicy::Private);
    let folder = folder();
    added.add("c1", openat(folder.path())).unwrap();
    let old = guest.find(ROOT_NODE, "c1").unwrap();

    added.remove("c1").unwrap();
    // The same directory of the same mount: nothing but the tree tells them apart.
    added.add("c2", openat(folder.path())).unwrap();
    let new = guest.find(ROOT_NODE, "c2").unwrap();
    guest.ask(opcode::FORGET, old, &1_u64.to_le_bytes());

    assert_ne!(old, new);
    assert!(guest.find(new, "file").is_ok());
    assert_eq!(guest.find(ROOT_NODE, "c2"), Ok(new));
}

#[test]
fn a_new_session_finds_what_is_there() {
    let (mut guest, added) = Guest::growing(CachePolicy::Private);
    let (kept, removed) = (folder(), folder());
    added.add("kept", openat(kept.path())).unwrap();
    added.add("removed", openat(removed.path())).unwrap();
    guest.find(ROOT_NODE, "kept").unwrap();

    guest.ask(opcode::DESTROY, 0, &[]);
    added.remove("removed").unwrap();
    let mut guest = Guest::start(guest);

    assert!(guest.find(ROOT_NODE, "kept").is_ok());
    assert_eq!(guest.find(ROOT_NODE, "removed"), Err(ENOENT));
}
