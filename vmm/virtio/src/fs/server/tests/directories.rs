// SPDX-License-Identifier: Apache-2.0
//! Directories are listed whole, in whatever parts and whatever happens meanwhile.

use super::*;

/// Removes what a listing of the tree gives, bit by bit.
pub(super) fn remove_while_listing(guest: &mut Guest, code: u32, size: u32) {
    let tree = guest.tree();
    let handle = number(&guest.ask(opcode::OPENDIR, tree, &numbers32(&[0, 0])).1, 0, 8);

    let mut offset = 0;
    loop {
        let (error, body) = guest.ask(code, tree, &transfer(handle, offset, size, 0));
        assert_eq!(error, 0);
        // As for a program with a small buffer: only the first half is taken, and removed at once.
        let entries = entries(&body, code);
        let Some(taken) = entries.get(..entries.len().div_ceil(2)) else { break };
        let Some((next, _)) = taken.last() else { break };
        offset = *next;
        for (_, name) in taken.iter().filter(|(_, name)| !name.starts_with('.')) {
            assert_eq!(guest.ask(opcode::UNLINK, tree, &text(name)).0, 0, "{name}");
        }
    }
}

#[test]
fn directories_are_read_in_parts() {
    let mut guest = Guest::new(CachePolicy::Private);
    let tree = guest.tree();
    let mut expected: Vec<String> = (0..300).map(|number| format!("a-name-of-some-length-{number}")).collect();
    for name in &expected {
        fs::write(guest.path(name), "").unwrap();
    }
    expected.extend([".".to_owned(), "..".to_owned()]);
    expected.sort();

    for code in [opcode::READDIR, opcode::READDIRPLUS] {
        for size in [1024, 4096, 65_536] {
            let (names, requests) = guest.list(tree, code, size);
            assert_eq!(names, expected);
            assert!(requests <= 304);
        }
    }
    // Each entry was looked up three times.
    let node = guest.find(tree, "a-name-of-some-length-7").unwrap();
    guest.ask(opcode::FORGET, node, &3_u64.to_le_bytes());
    assert_eq!(guest.ask(opcode::GETATTR, node, &[0; 16]).0, 0);
    guest.ask(opcode::FORGET, node, &1_u64.to_le_bytes());
    assert_eq!(guest.ask(opcode::GETATTR, node, &[0; 16]).0, libc::ESTALE);
}

#[test]
fn a_listing_misses_nothing_when_files_are_removed_meanwhile() {
    // A tmpfs before Linux 6.6 counts its entries, so that removals move all that follow.
    for folder in [tempfile::tempdir_in("/dev/shm").unwrap(), tempfile::tempdir().unwrap()] {
        for (code, size) in [(opcode::READDIR, 300), (opcode::READDIR, 4096), (opcode::READDIRPLUS, 1000)] {
            let mut guest = Guest::start_in(tempfile::tempdir_in(folder.path()).unwrap());
            (0..200).for_each(|number| fs::write(guest.path(&number.to_string()), "").unwrap());

            remove_while_listing(&mut guest, code, size);

            assert_eq!(fs::read_dir(guest.path("")).unwrap().count(), 0);
        }
    }
}

#[test]
fn a_directory_answer_without_room_for_an_entry_is_refused() {
    let mut guest = Guest::new(CachePolicy::Shared);
    let tree = guest.tree();
    let handle = number(&guest.ask(opcode::OPENDIR, tree, &numbers32(&[0, 0])).1, 0, 8);

    assert_eq!(guest.ask(opcode::READDIR, tree, &transfer(handle, 0, 16, 0)).0, libc::EINVAL);
    assert_eq!(guest.ask(opcode::READDIR, tree, &transfer(77, 0, 4096, 0)).0, libc::EBADF);
}
