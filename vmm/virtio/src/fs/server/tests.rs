// SPDX-License-Identifier: Apache-2.0
//! The server, asked in the protocol's bytes, on a temporary directory. Needs no root.

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};

use rustix::fs::{CWD, OFlags};
use vm_memory::VolatileSlice;

use super::*;
use crate::fs::wire::{init, setattr};

mod added_trees;
mod directories;
mod overlay;
mod submounts;

/// A guest's view of a server: the top directory has one tree, `tree`.
struct Guest {
    folder: tempfile::TempDir,
    server: Server,
}

/// An answer: the error number, 0 for none, and the body.
type Answer = (i32, Vec<u8>);

impl Guest {
    fn new(cache: CachePolicy) -> Self {
        Self::start(Self::unstarted(cache))
    }

    fn start_in(folder: tempfile::TempDir) -> Self {
        Self::start(Self::unstarted_in(folder, CachePolicy::Private))
    }

    fn start(mut guest: Self) -> Self {
        let flags = u64::MAX.to_le_bytes();
        let body = [&7_u32.to_le_bytes()[..], &41_u32.to_le_bytes(), &131_072_u32.to_le_bytes(), &flags].concat();
        assert_eq!(guest.ask(opcode::INIT, 0, &body).0, 0);
        guest
    }

    fn unstarted(cache: CachePolicy) -> Self {
        Self::unstarted_in(tempfile::tempdir().unwrap(), cache)
    }

    fn unstarted_in(folder: tempfile::TempDir, cache: CachePolicy) -> Self {
        fs::create_dir(folder.path().join("tree")).unwrap();
        let root = openat(folder.path());
        let proc_self_fd = Arc::new(openat(Path::new("/proc/self/fd")));
        let server = Server::new(&root, proc_self_fd, cache, None).unwrap();
        server.enter_thread().unwrap();
        Self { folder, server }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join("tree").join(name)
    }

    fn ask(&mut self, code: u32, node: u64, body: &[u8]) -> Answer {
        self.ask_for(code, node, body, 70_000).unwrap()
    }

    fn ask_for(&mut self, code: u32, node: u64, body: &[u8], room: usize) -> Result<Answer, Unanswerable> {
        let (uid, gid) = (rustix::process::geteuid().as_raw(), rustix::process::getegid().as_raw());
        self.ask_as(code, node, body, room, (uid, gid))
    }

    fn ask_as(
        &mut self,
        code: u32,
        node: u64,
        body: &[u8],
        room: usize,
        (uid, gid): (u32, u32),
    ) -> Result<Answer, Unanswerable> {
        let length = u32::try_from(IN_HEADER_LEN + body.len()).unwrap();
        let mut request = [
            &length.to_le_bytes()[..],
            &code.to_le_bytes(),
            &9_u64.to_le_bytes(),
            &node.to_le_bytes(),
            &uid.to_le_bytes(),
            &gid.to_le_bytes(),
            &[0; 8],
            body,
        ]
        .concat();
        let mut answer = vec![0; room];
        let mut buffers = Buffers::default();
        buffers.readable.push(VolatileSlice::from(&mut request[..]));
        buffers.writable.push(VolatileSlice::from(&mut answer[..]));
        let written = self.server.serve(&buffers)? as usize;
        if written == 0 {
            return Ok((0, Vec::new()));
        }
        assert_eq!(number(&answer, 0, 4) as usize, written);
        assert_eq!(number(&answer, 8, 8), 9);
        let error = u32::try_from(number(&answer, 4, 4)).unwrap().cast_signed();
        Ok((-error, answer[OUT_HEADER_LEN..written].to_vec()))
    }

    /// The node of a name.
    fn find(&mut self, directory: u64, name: &str) -> Result<u64, i32> {
        match self.ask(opcode::LOOKUP, directory, &text(name)) {
            (0, entry) => Ok(number(&entry, 0, 8)),
            (error, _) => Err(error),
        }
    }

    fn tree(&mut self) -> u64 {
        self.find(ROOT_NODE, "tree").unwrap()
    }

    fn open(&mut self, node: u64, flags: OFlags) -> Result<u64, i32> {
        match self.ask(opcode::OPEN, node, &numbers32(&[flags.bits(), 0])) {
            (0, body) => Ok(number(&body, 0, 8)),
            (error, _) => Err(error),
        }
    }

    fn create(&mut self, directory: u64, name: &str, mode: u32) -> Result<(u64, u64), i32> {
        let flags = (OFlags::WRONLY | OFlags::CREATE).bits();
        let body = [numbers32(&[flags, mode, 0, 0]), text(name)].concat();
        match self.ask(opcode::CREATE, directory, &body) {
            (0, body) => Ok((number(&body, 0, 8), number(&body, 128, 8))),
            (error, _) => Err(error),
        }
    }

    fn read(&mut self, node: u64, handle: u64, offset: u64, size: u32) -> Answer {
        self.ask(opcode::READ, node, &transfer(handle, offset, size, 0))
    }

    fn write(&mut self, node: u64, handle: u64, offset: u64, data: &[u8], flags: u32) -> Answer {
        let size = u32::try_from(data.len()).unwrap();
        self.ask(opcode::WRITE, node, &[transfer(handle, offset, size, flags), data.to_vec()].concat())
    }

    /// All names of a directory, and how many requests that took.
    fn list(&mut self, node: u64, code: u32, size: u32) -> (Vec<String>, usize) {
        let handle = number(&self.ask(opcode::OPENDIR, node, &numbers32(&[0, 0])).1, 0, 8);
        let (mut names, mut offset, mut requests) = (Vec::new(), 0, 0);
        loop {
            let (error, body) = self.ask(code, node, &transfer(handle, offset, size, 0));
            requests += 1;
            assert_eq!(error, 0);
            if body.is_empty() {
                self.ask(opcode::RELEASEDIR, node, &handle.to_le_bytes());
                names.sort();
                return (names, requests);
            }
            for (next, name) in entries(&body, code) {
                offset = next;
                names.push(name);
            }
        }
    }
}

/// The entries of an answer to READDIR or READDIRPLUS: the next one's offset, and the name.
fn entries(body: &[u8], code: u32) -> Vec<(u64, String)> {
    let (mut entries, mut at) = (Vec::new(), 0);
    while at < body.len() {
        at += if code == opcode::READDIRPLUS { 128 } else { 0 };
        let length = number(body, at + 16, 4) as usize;
        let name = String::from_utf8(body[at + 24..at + 24 + length].to_vec()).unwrap();
        entries.push((number(body, at + 8, 8), name));
        at += 24 + length.next_multiple_of(8);
    }
    entries
}

fn openat(path: &Path) -> OwnedFd {
    rustix::fs::openat(CWD, path, OFlags::PATH | OFlags::DIRECTORY, Mode::empty()).unwrap()
}

fn number(bytes: &[u8], at: usize, length: usize) -> u64 {
    bytes[at..at + length].iter().rev().fold(0, |number, byte| number << 8 | u64::from(*byte))
}

fn text(name: &str) -> Vec<u8> {
    [name.as_bytes(), &[0]].concat()
}

fn numbers32(numbers: &[u32]) -> Vec<u8> {
    numbers.iter().flat_map(|number| number.to_le_bytes()).collect()
}

fn numbers64(numbers: &[u64]) -> Vec<u8> {
    numbers.iter().flat_map(|number| number.to_le_bytes()).collect()
}

fn transfer(handle: u64, offset: u64, size: u32, flags: u32) -> Vec<u8> {
    [numbers64(&[handle, offset]), numbers32(&[size, flags, 0, 0, 0, 0])].concat()
}

fn set_attr(valid: u32, size: u64, mode: u32) -> Vec<u8> {
    [numbers32(&[valid, 0]), numbers64(&[0, size, 0, 1_000, 2_000, 0]), numbers32(&[5, 6, 0, mode, 0, 0, 0, 0])]
        .concat()
}

const ENOENT: i32 = libc::ENOENT;

#[test]
fn init_negotiates_what_both_know() {
    let mut guest = Guest::unstarted(CachePolicy::Private);
    let offered = init::MAX_PAGES | init::WRITEBACK_CACHE | 1 << 20;
    let low = u32::try_from(offered).unwrap();

    let (error, body) = guest.ask(opcode::INIT, 0, &numbers32(&[7, 41, 65_536, low, 0]));

    assert_eq!((error, body.len()), (0, 64));
    assert_eq!((number(&body, 0, 4), number(&body, 4, 4), number(&body, 8, 4)), (7, 38, 65_536));
    assert_eq!(number(&body, 12, 4), init::MAX_PAGES | init::WRITEBACK_CACHE);
    assert_eq!((number(&body, 20, 4), number(&body, 28, 2)), (1 << 20, 256));
}

#[test]
fn old_guests_and_early_requests_are_refused() {
    let mut guest = Guest::unstarted(CachePolicy::Private);

    assert_eq!(guest.ask(opcode::GETATTR, 1, &[0; 16]).0, libc::EIO);
    assert_eq!(guest.ask(opcode::INIT, 0, &numbers32(&[7, 30, 0, 0])).0, libc::EPROTO);
    assert_eq!(guest.ask(opcode::INIT, 0, &numbers32(&[6, 40, 0, 0])).0, libc::EPROTO);
}

#[test]
fn a_file_is_created_written_read_and_forgotten() {
    for cache in [CachePolicy::Private, CachePolicy::Shared] {
        let mut guest = Guest::new(cache);
        let tree = guest.tree();

        let (node, handle) = guest.create(tree, "file", 0o640).unwrap();
        let written = guest.write(node, handle, 2, b"hello", 0);
        guest.ask(opcode::FSYNC, node, &[numbers64(&[handle]), numbers32(&[1, 0])].concat());
        guest.ask(opcode::RELEASE, node, &numbers64(&[handle, 0, 0]));
        let handle = if cache == CachePolicy::Private { 0 } else { guest.open(node, OFlags::RDONLY).unwrap() };
        let read = guest.read(node, handle, 1, 100);
        guest.ask(opcode::FORGET, node, &1_u64.to_le_bytes());

        assert_eq!((written.0, number(&written.1, 0, 4)), (0, 5));
        assert_eq!(read, (0, b"\0hello".to_vec()));
        assert_eq!(guest.ask(opcode::GETATTR, node, &[0; 16]).0, libc::ESTALE);
        assert_eq!(fs::read(guest.path("file")).unwrap(), b"\0\0hello");
        assert_eq!(fs::metadata(guest.path("file")).unwrap().mode(), 0o100_640);
    }
}

#[test]
fn private_trees_need_no_open_and_shared_ones_do() {
    let mut private = Guest::new(CachePolicy::Private);
    let mut shared = Guest::new(CachePolicy::Shared);
    for guest in [&mut private, &mut shared] {
        fs::write(guest.path("file"), "content").unwrap();
    }

    let (tree, shared_tree) = (private.tree(), shared.tree());
    let node = private.find(tree, "file").unwrap();
    let shared_node = shared.find(shared_tree, "file").unwrap();

    assert_eq!(private.open(node, OFlags::RDONLY), Err(libc::ENOSYS));
    assert_eq!(private.read(node, 0, 0, 10), (0, b"content".to_vec()));
    assert_eq!(shared.read(shared_node, 0, 0, 10).0, libc::EBADF);
    assert_eq!(shared.open(shared_node, OFlags::RDONLY), Ok(1));
    assert_eq!(shared.open(shared_node, OFlags::ACCMODE), Err(libc::EINVAL));
}

#[test]
fn an_unlinked_file_lives_while_the_guest_knows_it() {
    let mut guest = Guest::new(CachePolicy::Private);
    fs::write(guest.path("file"), "content").unwrap();
    let tree = guest.tree();
    let node = guest.find(tree, "file").unwrap();

    let removed = guest.ask(opcode::UNLINK, tree, &text("file"));

    assert_eq!(removed.0, 0);
    assert_eq!(guest.read(node, 0, 0, 10), (0, b"content".to_vec()));
    assert_eq!(guest.write(node, 0, 0, b"C", 0).0, 0);
}

#[test]
fn names_that_are_no_names_are_refused() {
    let mut guest = Guest::new(CachePolicy::Shared);
    let tree = guest.tree();

    for name in ["", ".", "..", "a/b", "/etc", "../.."] {
        assert_eq!(guest.find(tree, name), Err(libc::EINVAL), "{name}");
        assert_eq!(guest.find(ROOT_NODE, name), Err(libc::EINVAL), "{name}");
        assert_eq!(guest.create(tree, name, 0o600), Err(libc::EINVAL), "{name}");
    }
    assert_eq!(guest.find(tree, &"n".repeat(256)), Err(libc::ENAMETOOLONG));
    assert_eq!(guest.find(tree, &"n".repeat(255)), Err(ENOENT));
}

#[test]
fn a_directory_moved_out_of_the_share_leads_nowhere_else() {
    let mut guest = Guest::new(CachePolicy::Shared);
    let outside = tempfile::tempdir().unwrap();
    fs::create_dir_all(guest.path("moved/below")).unwrap();
    fs::write(outside.path().join("secret"), "secret").unwrap();
    let tree = guest.tree();
    let moved = guest.find(tree, "moved").unwrap();

    fs::rename(guest.path("moved"), outside.path().join("moved")).unwrap();

    assert_eq!(guest.find(moved, ".."), Err(libc::EINVAL));
    assert_eq!(guest.find(moved, "../secret"), Err(libc::EINVAL));
    assert!(guest.find(moved, "below").is_ok());
    assert_eq!(guest.find(tree, "moved"), Err(ENOENT));
}

#[test]
fn symlinks_are_read_and_never_followed() {
    let mut guest = Guest::new(CachePolicy::Shared);
    let tree = guest.tree();

    let made = guest.ask(opcode::SYMLINK, tree, &[text("link"), text("/etc/passwd")].concat());
    let link = guest.find(tree, "link").unwrap();

    assert_eq!(made.0, 0);
    assert_eq!(guest.ask(opcode::READLINK, link, &[]), (0, b"/etc/passwd".to_vec()));
    assert_eq!(guest.open(link, OFlags::RDONLY), Err(libc::ENXIO));
    assert_eq!(guest.find(link, "x"), Err(libc::ENOTDIR));
    assert_eq!(guest.create(tree, "link", 0o600), Err(libc::ENXIO));
}

#[test]
fn fifos_and_devices_are_not_opened() {
    let mut guest = Guest::new(CachePolicy::Shared);
    let tree = guest.tree();
    let make = |mode: u32, device: u32, name: &str| [numbers32(&[mode, device, 0, 0]), text(name)].concat();

    let fifo = guest.ask(opcode::MKNOD, tree, &make(libc::S_IFIFO | 0o600, 0, "fifo"));
    let fifo_node = guest.find(tree, "fifo").unwrap();
    let socket = guest.ask(opcode::MKNOD, tree, &make(libc::S_IFSOCK | 0o600, 0, "socket"));
    let character = guest.ask(opcode::MKNOD, tree, &make(libc::S_IFCHR | 0o600, 0x103, "null"));
    let block = guest.ask(opcode::MKNOD, tree, &make(libc::S_IFBLK | 0o600, 0x800, "disk"));
    let whiteout = guest.ask(opcode::MKNOD, tree, &make(libc::S_IFCHR, 0, "whiteout"));

    assert_eq!((fifo.0, socket.0), (0, 0));
    assert_eq!((character.0, block.0), (libc::EPERM, libc::EPERM));
    assert_eq!(whiteout.0, 0);
    assert_eq!(guest.open(fifo_node, OFlags::RDONLY), Err(libc::ENXIO));
    // `Private` opens by node, and refuses there.
    let mut private = Guest::new(CachePolicy::Private);
    let tree = private.tree();
    private.ask(opcode::MKNOD, tree, &make(libc::S_IFIFO | 0o600, 0, "fifo"));
    let fifo_node = private.find(tree, "fifo").unwrap();
    assert_eq!(private.read(fifo_node, 0, 0, 1).0, libc::ENXIO);
    assert_eq!(private.read(tree, 0, 0, 1).0, libc::EISDIR);
}

#[test]
fn the_top_directory_cannot_be_changed() {
    let mut guest = Guest::new(CachePolicy::Shared);
    let tree = guest.tree();
    fs::write(guest.path("file"), "").unwrap();
    let file = guest.find(tree, "file").unwrap();
    let rename = |directory: u64| [numbers64(&[directory]), text("tree"), text("other")].concat();

    let refused = [
        guest.ask(opcode::MKDIR, ROOT_NODE, &[numbers32(&[0o755, 0]), text("new")].concat()),
        guest.ask(opcode::SYMLINK, ROOT_NODE, &[text("new"), text("x")].concat()),
        guest.ask(opcode::MKNOD, ROOT_NODE, &[numbers32(&[libc::S_IFREG, 0, 0, 0]), text("new")].concat()),
        guest.ask(opcode::CREATE, ROOT_NODE, &[numbers32(&[2, 0o600, 0, 0]), text("new")].concat()),
        guest.ask(opcode::TMPFILE, ROOT_NODE, &[numbers32(&[2, 0o600, 0, 0]), text("/")].concat()),
        guest.ask(opcode::RMDIR, ROOT_NODE, &text("tree")),
        guest.ask(opcode::UNLINK, ROOT_NODE, &text("tree")),
        guest.ask(opcode::RENAME, ROOT_NODE, &rename(ROOT_NODE)),
        guest.ask(opcode::RENAME, ROOT_NODE, &rename(tree)),
        guest.ask(opcode::RENAME, tree, &rename(ROOT_NODE)),
        guest.ask(opcode::LINK, ROOT_NODE, &[numbers64(&[file]), text("new")].concat()),
        guest.ask(opcode::SETATTR, ROOT_NODE, &set_attr(setattr::MODE, 0, 0o777)),
        guest.ask(opcode::SETXATTR, ROOT_NODE, &[numbers32(&[1, 0, 0, 0]), text("user.a"), vec![1]].concat()),
        guest.ask(opcode::REMOVEXATTR, ROOT_NODE, &text("user.a")),
    ];

    assert!(refused.iter().all(|(error, _)| *error == libc::EROFS), "{refused:?}");
}

#[test]
fn names_are_renamed_linked_and_removed() {
    let mut guest = Guest::new(CachePolicy::Shared);
    let tree = guest.tree();
    fs::write(guest.path("a"), "a").unwrap();
    fs::write(guest.path("b"), "b").unwrap();
    let a = guest.find(tree, "a").unwrap();
    let rename =
        |flags: u32, from: &str, to: &str| [numbers64(&[tree]), numbers32(&[flags, 0]), text(from), text(to)].concat();

    assert_eq!(guest.ask(opcode::RENAME2, tree, &rename(1, "a", "b")).0, libc::EEXIST);
    assert_eq!(guest.ask(opcode::RENAME2, tree, &rename(2, "a", "b")).0, 0);
    assert_eq!(guest.ask(opcode::RENAME2, tree, &rename(8, "a", "b")).0, libc::EINVAL);
    assert_eq!(fs::read(guest.path("b")).unwrap(), b"a");
    assert_eq!(guest.ask(opcode::LINK, tree, &[numbers64(&[a]), text("again")].concat()).0, 0);
    assert_eq!(guest.find(tree, "again"), Ok(a));
    assert_eq!(guest.ask(opcode::MKDIR, tree, &[numbers32(&[0o2750, 0]), text("folder")].concat()).0, 0);
    assert_eq!(fs::metadata(guest.path("folder")).unwrap().mode() & 0o777, 0o750);
    assert_eq!(guest.ask(opcode::UNLINK, tree, &text("folder")).0, libc::EISDIR);
    assert_eq!(guest.ask(opcode::RMDIR, tree, &text("folder")).0, 0);
    assert_eq!(guest.find(tree, "folder"), Err(ENOENT));
}

#[test]
fn absent_names_are_remembered_only_in_private_trees() {
    let mut guest = Guest::new(CachePolicy::Private);
    let tree = guest.tree();

    let absent = guest.ask(opcode::LOOKUP, tree, &text("absent"));

    assert_eq!((absent.0, number(&absent.1, 0, 8), number(&absent.1, 16, 8)), (0, 0, PRIVATE_ABSENT.as_secs()));
    assert_eq!(guest.find(ROOT_NODE, "absent"), Err(ENOENT));
}

#[test]
fn attributes_are_changed() {
    let mut guest = Guest::new(CachePolicy::Shared);
    let tree = guest.tree();
    fs::write(guest.path("file"), "0123456789").unwrap();
    let node = guest.find(tree, "file").unwrap();
    let valid = setattr::MODE | setattr::SIZE | setattr::ATIME | setattr::MTIME;

    let (error, body) = guest.ask(opcode::SETATTR, node, &set_attr(valid, 4, 0o4711));

    let metadata = fs::metadata(guest.path("file")).unwrap();
    assert_eq!((error, body.len()), (0, 104));
    assert_eq!((metadata.mode() & 0o7777, metadata.len()), (0o4711, 4));
    assert_eq!((metadata.atime(), metadata.atime_nsec()), (1_000, 5));
    assert_eq!((metadata.mtime(), metadata.mtime_nsec()), (2_000, 6));
    assert_eq!(number(&body, 16 + 8, 8), 4);
}

#[test]
fn set_id_bits_are_cleared_when_asked_for() {
    let mut guest = Guest::new(CachePolicy::Private);
    let tree = guest.tree();
    fs::write(guest.path("file"), "0123").unwrap();
    let node = guest.find(tree, "file").unwrap();
    let set_mode = || fs::set_permissions(guest.folder.path().join("tree/file"), fs::Permissions::from_mode(0o4711));
    set_mode().unwrap();

    assert_eq!(guest.write(node, 0, 0, b"x", crate::fs::wire::WRITE_KILL_SUIDGID).0, 0);

    assert_eq!(fs::metadata(guest.path("file")).unwrap().mode() & 0o7777, 0o711);
}

#[test]
fn extended_attributes_are_kept() {
    let mut guest = Guest::new(CachePolicy::Shared);
    let tree = guest.tree();
    fs::write(guest.path("file"), "").unwrap();
    let node = guest.find(tree, "file").unwrap();
    let set = |flags: u32| [numbers32(&[5, flags, 0, 0]), text("user.name"), b"value".to_vec()].concat();
    let get = |size: u32| [numbers32(&[size, 0]), text("user.name")].concat();

    let (error, _) = guest.ask(opcode::SETXATTR, node, &set(0));
    if error == libc::EOPNOTSUPP {
        // The temporary directory's file system has none.
        return;
    }

    assert_eq!(error, 0);
    assert_eq!(guest.ask(opcode::SETXATTR, node, &set(1)).0, libc::EEXIST);
    assert_eq!(number(&guest.ask(opcode::GETXATTR, node, &get(0)).1, 0, 4), 5);
    assert_eq!(guest.ask(opcode::GETXATTR, node, &get(100)), (0, b"value".to_vec()));
    assert_eq!(guest.ask(opcode::GETXATTR, node, &get(2)).0, libc::ERANGE);
    assert_eq!(guest.ask(opcode::LISTXATTR, node, &numbers32(&[100, 0])), (0, b"user.name\0".to_vec()));
    assert_eq!(guest.ask(opcode::REMOVEXATTR, node, &text("user.name")).0, 0);
    assert_eq!(guest.ask(opcode::GETXATTR, node, &get(0)).0, libc::ENODATA);
}

#[test]
fn holes_allocation_and_copies_reach_the_file() {
    let mut guest = Guest::new(CachePolicy::Private);
    let tree = guest.tree();
    fs::write(guest.path("from"), "0123456789").unwrap();
    let from = guest.find(tree, "from").unwrap();
    let (to, _) = guest.create(tree, "to", 0o600).unwrap();

    let copied = guest.ask(opcode::COPY_FILE_RANGE, from, &numbers64(&[0, 2, to, 0, 1, 5, 0]));
    let allocated = guest.ask(opcode::FALLOCATE, to, &[numbers64(&[0, 0, 100]), numbers32(&[0, 0])].concat());
    let hole = guest.ask(opcode::LSEEK, from, &[numbers64(&[0, 3]), numbers32(&[4, 0])].concat());
    let wrong = guest.ask(opcode::LSEEK, from, &[numbers64(&[0, 3]), numbers32(&[0, 0])].concat());

    assert_eq!((copied.0, number(&copied.1, 0, 4)), (0, 5));
    assert_eq!((allocated.0, fs::metadata(guest.path("to")).unwrap().len()), (0, 100));
    assert_eq!(&fs::read(guest.path("to")).unwrap()[..6], b"\x0023456");
    assert_eq!((hole.0, number(&hole.1, 0, 8)), (0, 10));
    assert_eq!(wrong.0, libc::EINVAL);
}

#[test]
fn a_nameless_file_can_be_given_a_name() {
    let mut guest = Guest::new(CachePolicy::Private);
    let tree = guest.tree();

    let (error, body) = guest.ask(opcode::TMPFILE, tree, &[numbers32(&[2, 0o600, 0, 0]), text("/")].concat());
    if error == libc::EOPNOTSUPP {
        return;
    }
    let node = number(&body, 0, 8);
    guest.write(node, 0, 0, b"content", 0);
    let linked = guest.ask(opcode::LINK, tree, &[numbers64(&[node]), text("named")].concat());

    assert_eq!((error, linked.0), (0, 0));
    assert_eq!(fs::read(guest.path("named")).unwrap(), b"content");
}

#[test]
fn what_the_server_does_not_have_is_said_so() {
    let mut guest = Guest::new(CachePolicy::Shared);

    // FLUSH, GETLK, SETLK, ACCESS, IOCTL, POLL, STATX, SETUPMAPPING, and what no one knows.
    for code in [25, 31, 32, 34, 39, 40, 52, 48, 0, 7, 4096, u32::MAX] {
        assert_eq!(guest.ask(code, ROOT_NODE, &[0; 64]).0, libc::ENOSYS, "{code}");
    }
}

#[test]
fn an_answer_never_exceeds_its_room() {
    let mut guest = Guest::new(CachePolicy::Private);
    let tree = guest.tree();
    fs::write(guest.path("file"), vec![7; 5000]).unwrap();
    let node = guest.find(tree, "file").unwrap();

    let read = guest.ask_for(opcode::READ, node, &transfer(0, 0, 4096, 0), 16 + 100).unwrap();
    let attributes = guest.ask_for(opcode::GETATTR, node, &[0; 16], 16 + 50).unwrap();

    assert_eq!(read, (0, vec![7; 100]));
    assert_eq!(attributes.0, libc::EINVAL);
    assert_eq!(
        guest.ask_for(opcode::GETATTR, node, &[0; 16], 15),
        Err(Unanswerable::NoRoom { opcode: opcode::GETATTR, room: 15 })
    );
    assert_eq!(guest.ask_for(opcode::FORGET, node, &1_u64.to_le_bytes(), 0), Ok((0, Vec::new())));
}

#[test]
fn the_owner_is_who_asked() {
    let mut guest = Guest::new(CachePolicy::Private);
    let tree = guest.tree();
    let folder = [numbers32(&[0o2755, 0]), text("folder")].concat();
    let file = [numbers32(&[2, 0o4755, 0, 0]), text("file")].concat();
    let is_root = rustix::process::geteuid().is_root();

    let made = [
        guest.ask_as(opcode::MKDIR, tree, &folder, 500, (1234, 567)).unwrap(),
        guest.ask_as(opcode::CREATE, tree, &file, 500, (1234, 567)).unwrap(),
        guest.ask_as(opcode::SYMLINK, tree, &[text("link"), text("x")].concat(), 500, (1234, 567)).unwrap(),
    ];

    for ((error, body), name) in made.iter().zip(["folder", "file", "link"]) {
        if is_root {
            let metadata = fs::symlink_metadata(guest.path(name)).unwrap();
            assert_eq!((*error, metadata.uid(), metadata.gid()), (0, 1234, 567), "{name}");
            assert_eq!((number(body, 40 + 68, 4), number(body, 40 + 72, 4)), (1234, 567));
        } else {
            // Nothing is left of what could not be given away.
            assert_eq!(*error, libc::EPERM);
            assert!(fs::symlink_metadata(guest.path(name)).is_err());
        }
    }
    if is_root {
        assert_eq!(fs::metadata(guest.path("file")).unwrap().mode() & 0o7777, 0o4755);
        let inner = [numbers32(&[0o755, 0]), text("inner")].concat();
        fs::set_permissions(guest.path("folder"), fs::Permissions::from_mode(0o2755)).unwrap();
        let folder = guest.find(tree, "folder").unwrap();
        guest.ask_as(opcode::MKDIR, folder, &inner, 500, (8, 9)).unwrap();
        let metadata = fs::metadata(guest.path("folder/inner")).unwrap();
        assert_eq!((metadata.uid(), metadata.gid(), metadata.mode() & 0o7777), (8, 567, 0o2755));
    }
    assert_eq!(guest.ask_as(opcode::MKDIR, tree, &folder, 500, (u32::MAX, 0)).unwrap().0, libc::EINVAL);
}

#[test]
fn destroy_forgets_everything() {
    let mut guest = Guest::new(CachePolicy::Private);
    let tree = guest.tree();

    guest.ask(opcode::DESTROY, 0, &[]);

    assert_eq!(guest.server.nodes.len(), 1);
    assert_eq!(guest.ask(opcode::GETATTR, tree, &[0; 16]).0, libc::EIO);
}
