// SPDX-License-Identifier: Apache-2.0
//! The numbers of the FUSE protocol that the server speaks: version 7.38, and the mapped ids of 7.41, as in
//! `linux/fuse.h`. All integers are
//! little-endian on the wire, since the guest is x86-64.

/// The protocol's major version.
pub const MAJOR: u32 = 7;
/// The minor version that the server speaks. A newer guest falls back to it.
pub const MINOR: u32 = 38;
/// The oldest minor version that has everything the server relies on (`max_pages`, `map_alignment` in INIT's answer).
pub const MINOR_MIN: u32 = 31;

/// Bytes of `fuse_in_header`.
pub const IN_HEADER_LEN: usize = 40;
/// Bytes of `fuse_out_header`.
pub const OUT_HEADER_LEN: usize = 16;
/// Bytes of `fuse_write_in`: what lies between WRITE's header and its data.
pub const WRITE_IN_LEN: usize = 40;

/// Most pages that one READ or WRITE carries: 1 MiB.
pub const MAX_PAGES: u16 = 256;
/// Most data bytes of one READ or WRITE.
pub const MAX_IO_LEN: u32 = MAX_PAGES as u32 * 4096;
/// Most bytes of an extended attribute's value (`XATTR_SIZE_MAX`) or list (`XATTR_LIST_MAX`).
pub const MAX_XATTR_LEN: usize = 65_536;
/// Most bytes of a request without WRITE's data: SETXATTR with the longest name and value is the longest one.
pub const MAX_REQUEST_LEN: usize = IN_HEADER_LEN + 16 + 256 + MAX_XATTR_LEN;
/// Most bytes of a name in a directory, without its NUL (`NAME_MAX`).
pub const MAX_NAME_LEN: usize = 255;
/// Most bytes of a symlink's target, with its NUL (`PATH_MAX`).
pub const MAX_TARGET_LEN: usize = 4096;
/// Most bytes of entries in one answer to READDIR or READDIRPLUS.
pub const MAX_DIRECTORY_LEN: u32 = 65_536;

/// The node id of the device's top directory.
pub const ROOT_NODE: u64 = 1;

/// Request numbers (`enum fuse_opcode`).
pub mod opcode {
    #![allow(missing_docs, reason = "the names are the protocol's")]
    pub const LOOKUP: u32 = 1;
    pub const FORGET: u32 = 2;
    pub const GETATTR: u32 = 3;
    pub const SETATTR: u32 = 4;
    pub const READLINK: u32 = 5;
    pub const SYMLINK: u32 = 6;
    pub const MKNOD: u32 = 8;
    pub const MKDIR: u32 = 9;
    pub const UNLINK: u32 = 10;
    pub const RMDIR: u32 = 11;
    pub const RENAME: u32 = 12;
    pub const LINK: u32 = 13;
    pub const OPEN: u32 = 14;
    pub const READ: u32 = 15;
    pub const WRITE: u32 = 16;
    pub const STATFS: u32 = 17;
    pub const RELEASE: u32 = 18;
    pub const FSYNC: u32 = 20;
    pub const SETXATTR: u32 = 21;
    pub const GETXATTR: u32 = 22;
    pub const LISTXATTR: u32 = 23;
    pub const REMOVEXATTR: u32 = 24;
    pub const FLUSH: u32 = 25;
    pub const INIT: u32 = 26;
    pub const OPENDIR: u32 = 27;
    pub const READDIR: u32 = 28;
    pub const RELEASEDIR: u32 = 29;
    pub const FSYNCDIR: u32 = 30;
    pub const CREATE: u32 = 35;
    pub const INTERRUPT: u32 = 36;
    pub const DESTROY: u32 = 38;
    pub const BATCH_FORGET: u32 = 42;
    pub const FALLOCATE: u32 = 43;
    pub const READDIRPLUS: u32 = 44;
    pub const RENAME2: u32 = 45;
    pub const LSEEK: u32 = 46;
    pub const COPY_FILE_RANGE: u32 = 47;
    pub const SYNCFS: u32 = 50;
    pub const TMPFILE: u32 = 51;
}

/// Bits of INIT's `flags` (the low half) and `flags2` (the high half).
pub mod init {
    #![allow(missing_docs, reason = "the names are the protocol's")]
    pub const ASYNC_READ: u64 = 1 << 0;
    pub const ATOMIC_O_TRUNC: u64 = 1 << 3;
    pub const BIG_WRITES: u64 = 1 << 5;
    pub const AUTO_INVAL_DATA: u64 = 1 << 12;
    pub const DO_READDIRPLUS: u64 = 1 << 13;
    pub const READDIRPLUS_AUTO: u64 = 1 << 14;
    pub const ASYNC_DIO: u64 = 1 << 15;
    pub const WRITEBACK_CACHE: u64 = 1 << 16;
    pub const NO_OPEN_SUPPORT: u64 = 1 << 17;
    pub const PARALLEL_DIROPS: u64 = 1 << 18;
    pub const MAX_PAGES: u64 = 1 << 22;
    pub const CACHE_SYMLINKS: u64 = 1 << 23;
    pub const SUBMOUNTS: u64 = 1 << 27;
    pub const HANDLE_KILLPRIV_V2: u64 = 1 << 28;
    pub const SETXATTR_EXT: u64 = 1 << 29;
    pub const INIT_EXT: u64 = 1 << 30;
    pub const ALLOW_IDMAP: u64 = 1 << 40;
}

/// Bits of SETATTR's `valid`.
pub mod setattr {
    #![allow(missing_docs, reason = "the names are the protocol's")]
    pub const MODE: u32 = 1 << 0;
    pub const UID: u32 = 1 << 1;
    pub const GID: u32 = 1 << 2;
    pub const SIZE: u32 = 1 << 3;
    pub const ATIME: u32 = 1 << 4;
    pub const MTIME: u32 = 1 << 5;
    pub const FH: u32 = 1 << 6;
    pub const ATIME_NOW: u32 = 1 << 7;
    pub const MTIME_NOW: u32 = 1 << 8;
    pub const KILL_SUIDGID: u32 = 1 << 11;
}

/// `fuse_attr.flags`: the node is the root of another file system.
pub const ATTR_SUBMOUNT: u32 = 1 << 0;
/// OPEN's answer: the guest may keep what it has cached of the file.
pub const FOPEN_KEEP_CACHE: u32 = 1 << 1;
/// OPENDIR's answer: the guest may cache the directory's entries.
pub const FOPEN_CACHE_DIR: u32 = 1 << 3;
/// OPEN's and CREATE's `open_flags`: clear the set-id bits when the file is truncated.
pub const OPEN_KILL_SUIDGID: u32 = 1 << 0;
/// WRITE's `write_flags`: clear the set-id bits.
pub const WRITE_KILL_SUIDGID: u32 = 1 << 2;
/// FSYNC's `fsync_flags`: data only.
pub const FSYNC_FDATASYNC: u32 = 1 << 0;
/// SETXATTR's `setxattr_flags`: clear the set-group-id bit.
pub const SETXATTR_ACL_KILL_SGID: u32 = 1 << 0;
