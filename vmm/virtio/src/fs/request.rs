// SPDX-License-Identifier: Apache-2.0
//! A request's bytes become a typed request. Nothing here touches a file: this is where the guest's lengths and names
//! are checked, and it is tested and fuzzed alone.

use std::ffi::CStr;

use rustix::io::Errno;

use super::wire::{
    IN_HEADER_LEN, MAX_IO_LEN, MAX_NAME_LEN, MAX_REQUEST_LEN, MAX_TARGET_LEN, MAX_XATTR_LEN, WRITE_IN_LEN, opcode,
};

/// `fuse_in_header`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Header {
    /// Bytes of the whole request, header and WRITE's data included.
    pub length: u32,
    /// What is asked for; one of [`super::wire::opcode`], or something unknown.
    pub opcode: u32,
    /// Repeated in the answer.
    pub unique: u64,
    /// The node that the request is about.
    pub node: u64,
    /// The user that asks; owner of what is created.
    pub uid: u32,
    /// The user's group.
    pub gid: u32,
}

/// Why bytes are not a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum DecodeError {
    /// The header's length is not that of the bytes, or beyond [`MAX_REQUEST_LEN`].
    #[error("the request's header says {said} bytes, where {given} were given")]
    Length {
        /// What the header says.
        said: usize,
        /// What the driver gave.
        given: usize,
    },
    /// The request ends within its arguments.
    #[error("the request ends within its arguments")]
    Truncated,
    /// A name is not ended by a NUL.
    #[error("a name is not ended by a NUL")]
    Unterminated,
    /// A name is empty, `.` or `..`, or has a `/` in it.
    #[error("a name is empty, `.`, `..`, or has a `/` in it")]
    Name,
    /// A name or a symlink's target is too long.
    #[error("a name or a symlink's target is too long")]
    NameTooLong,
    /// A number is beyond what the request allows.
    #[error("an argument is out of its range")]
    Range,
}

impl DecodeError {
    /// The error number that the guest gets.
    #[must_use]
    pub fn errno(self) -> Errno {
        match self {
            Self::NameTooLong => Errno::NAMETOOLONG,
            Self::Length { .. } | Self::Truncated | Self::Unterminated | Self::Name | Self::Range => Errno::INVAL,
        }
    }
}

/// A name in a directory: 1 to [`MAX_NAME_LEN`] bytes, no `/`, neither `.` nor `..`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Name<'a>(&'a CStr);

impl<'a> Name<'a> {
    /// Checks a name.
    ///
    /// # Errors
    ///
    /// [`DecodeError::Name`] and [`DecodeError::NameTooLong`].
    pub fn new(name: &'a CStr) -> Result<Self, DecodeError> {
        let bytes = name.to_bytes();
        if bytes.len() > MAX_NAME_LEN {
            return Err(DecodeError::NameTooLong);
        }
        if matches!(bytes, b"" | b"." | b"..") || bytes.contains(&b'/') {
            return Err(DecodeError::Name);
        }
        Ok(Self(name))
    }

    /// The name.
    #[must_use]
    pub fn as_c_str(self) -> &'a CStr {
        self.0
    }
}

/// SETATTR's arguments.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[allow(missing_docs, reason = "the fields are the protocol's")]
pub struct SetAttr {
    /// Which fields count: bits of [`super::wire::setattr`].
    pub valid: u32,
    pub handle: u64,
    pub size: u64,
    pub atime: (i64, u32),
    pub mtime: (i64, u32),
    pub mode: u32,
    pub uid: u32,
    pub gid: u32,
}

/// READ's, WRITE's, READDIR's and READDIRPLUS' arguments.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[allow(missing_docs, reason = "the fields are the protocol's")]
pub struct Transfer {
    pub handle: u64,
    /// In bytes; for a directory, what an entry's `off` said.
    pub offset: u64,
    /// In bytes.
    pub size: u32,
    /// WRITE's `write_flags`; 0 in the others.
    pub write_flags: u32,
}

/// COPY_FILE_RANGE's arguments.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[allow(missing_docs, reason = "the fields are the protocol's")]
pub struct CopyFileRange {
    pub handle_in: u64,
    pub offset_in: u64,
    pub node_out: u64,
    pub handle_out: u64,
    pub offset_out: u64,
    pub length: u64,
    pub flags: u64,
}

/// A request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[allow(missing_docs, reason = "the fields are the protocol's")]
pub enum Request<'a> {
    Init {
        major: u32,
        minor: u32,
        max_readahead: u32,
        flags: u64,
    },
    Destroy,
    Lookup {
        name: Name<'a>,
    },
    Forget {
        lookups: u64,
    },
    BatchForget {
        forgets: Forgets<'a>,
    },
    GetAttr,
    SetAttr(SetAttr),
    ReadLink,
    Symlink {
        name: Name<'a>,
        target: &'a CStr,
    },
    MkNod {
        name: Name<'a>,
        mode: u32,
        rdev: u32,
    },
    MkDir {
        name: Name<'a>,
        mode: u32,
    },
    Unlink {
        name: Name<'a>,
    },
    RmDir {
        name: Name<'a>,
    },
    Rename {
        name: Name<'a>,
        new_directory: u64,
        new_name: Name<'a>,
        flags: u32,
    },
    Link {
        target: u64,
        name: Name<'a>,
    },
    Open {
        flags: u32,
        open_flags: u32,
    },
    Create {
        name: Name<'a>,
        flags: u32,
        mode: u32,
        open_flags: u32,
    },
    TmpFile {
        flags: u32,
        mode: u32,
    },
    Read(Transfer),
    Write(Transfer),
    StatFs,
    Release {
        handle: u64,
    },
    ReleaseDir {
        handle: u64,
    },
    Fsync {
        handle: u64,
        flags: u32,
    },
    FsyncDir {
        handle: u64,
        flags: u32,
    },
    SetXattr {
        name: &'a CStr,
        value: &'a [u8],
        flags: u32,
        setxattr_flags: u32,
    },
    GetXattr {
        name: &'a CStr,
        size: u32,
    },
    ListXattr {
        size: u32,
    },
    RemoveXattr {
        name: &'a CStr,
    },
    OpenDir,
    ReadDir(Transfer),
    ReadDirPlus(Transfer),
    Interrupt,
    Fallocate {
        handle: u64,
        offset: u64,
        length: u64,
        mode: u32,
    },
    Lseek {
        handle: u64,
        offset: u64,
        whence: u32,
    },
    CopyFileRange(CopyFileRange),
    SyncFs,
    /// An operation that the server does not have: answered with `ENOSYS`, after which the guest does without it.
    Unsupported,
}

/// BATCH_FORGET's list: pairs of a node and its lookups.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Forgets<'a>(&'a [u8]);

impl Forgets<'_> {
    /// The pairs, node id first.
    pub fn iter(&self) -> impl Iterator<Item = (u64, u64)> + '_ {
        let (pairs, _) = self.0.as_chunks::<16>();
        pairs.iter().map(|pair| {
            let mut arguments = Arguments(pair);
            (arguments.u64().unwrap_or(0), arguments.u64().unwrap_or(0))
        })
    }
}

impl Header {
    /// Reads a request's header; [`None`] if `bytes` are too few for one.
    #[must_use]
    pub fn decode(bytes: &[u8]) -> Option<Self> {
        let mut arguments = Arguments(bytes.get(..IN_HEADER_LEN)?);
        Some(Self {
            length: arguments.u32().ok()?,
            opcode: arguments.u32().ok()?,
            unique: arguments.u64().ok()?,
            node: arguments.u64().ok()?,
            uid: arguments.u32().ok()?,
            gid: arguments.u32().ok()?,
        })
    }
}

/// Makes a typed request of the bytes after a header.
///
/// `body` holds what follows the header, for WRITE at least its 40 bytes of arguments; `given` says how many bytes the
/// driver gave for the whole request, WRITE's data included.
///
/// # Errors
///
/// [`DecodeError`], each with the error number that the guest gets.
pub fn decode<'a>(header: &Header, body: &'a [u8], given: usize) -> Result<Request<'a>, DecodeError> {
    let said = usize::try_from(header.length).map_err(|_| DecodeError::Range)?;
    if said != given || said < IN_HEADER_LEN || (header.opcode != opcode::WRITE && said > MAX_REQUEST_LEN) {
        return Err(DecodeError::Length { said, given });
    }
    let mut arguments = Arguments(body.get(..body.len().min(said - IN_HEADER_LEN)).unwrap_or(body));
    match header.opcode {
        opcode::WRITE => {
            let transfer = arguments.transfer(true)?;
            let data = said - IN_HEADER_LEN - WRITE_IN_LEN;
            if transfer.size > MAX_IO_LEN || usize::try_from(transfer.size).is_ok_and(|size| size > data) {
                return Err(DecodeError::Range);
            }
            Ok(Request::Write(transfer))
        }
        opcode::LOOKUP..=opcode::LINK | opcode::RENAME2 => decode_tree(header.opcode, &mut arguments),
        opcode::INIT | opcode::DESTROY | opcode::INTERRUPT | opcode::BATCH_FORGET => {
            decode_session(header.opcode, &mut arguments)
        }
        opcode::SETXATTR..=opcode::REMOVEXATTR => decode_xattr(header.opcode, &mut arguments),
        _ => decode_file(header.opcode, &mut arguments),
    }
}

/// Requests about the session.
fn decode_session<'a>(code: u32, arguments: &mut Arguments<'a>) -> Result<Request<'a>, DecodeError> {
    Ok(match code {
        opcode::INIT => {
            let (major, minor) = (arguments.u32()?, arguments.u32()?);
            let (max_readahead, low) = (arguments.u32()?, arguments.u32()?);
            // Guests older than 7.36 send no second half.
            let high = arguments.u32().unwrap_or(0);
            Request::Init { major, minor, max_readahead, flags: u64::from(low) | u64::from(high) << 32 }
        }
        opcode::DESTROY => Request::Destroy,
        opcode::INTERRUPT => Request::Interrupt,
        _ => {
            let count = arguments.u32()?;
            arguments.skip(4)?;
            let length = usize::try_from(count).ok().and_then(|count| count.checked_mul(16));
            let bytes = length.and_then(|length| arguments.0.get(..length)).ok_or(DecodeError::Truncated)?;
            Request::BatchForget { forgets: Forgets(bytes) }
        }
    })
}

/// Requests about the tree: names, links and attributes.
fn decode_tree<'a>(code: u32, arguments: &mut Arguments<'a>) -> Result<Request<'a>, DecodeError> {
    Ok(match code {
        opcode::LOOKUP => Request::Lookup { name: arguments.name()? },
        opcode::FORGET => Request::Forget { lookups: arguments.u64()? },
        opcode::GETATTR => Request::GetAttr,
        opcode::SETATTR => Request::SetAttr(arguments.set_attr()?),
        opcode::READLINK => Request::ReadLink,
        opcode::SYMLINK => {
            let name = arguments.name()?;
            let target = arguments.string()?;
            if target.count_bytes() >= MAX_TARGET_LEN {
                return Err(DecodeError::NameTooLong);
            }
            Request::Symlink { name, target }
        }
        opcode::MKNOD => {
            let (mode, rdev) = (arguments.u32()?, arguments.u32()?);
            arguments.skip(8)?;
            Request::MkNod { name: arguments.name()?, mode, rdev }
        }
        opcode::MKDIR => {
            let mode = arguments.u32()?;
            arguments.skip(4)?;
            Request::MkDir { name: arguments.name()?, mode }
        }
        opcode::UNLINK => Request::Unlink { name: arguments.name()? },
        opcode::RMDIR => Request::RmDir { name: arguments.name()? },
        opcode::RENAME | opcode::RENAME2 => {
            let new_directory = arguments.u64()?;
            let flags = if code == opcode::RENAME2 {
                let flags = arguments.u32()?;
                arguments.skip(4)?;
                flags
            } else {
                0
            };
            Request::Rename { new_directory, flags, name: arguments.name()?, new_name: arguments.name()? }
        }
        opcode::LINK => Request::Link { target: arguments.u64()?, name: arguments.name()? },
        _ => Request::Unsupported,
    })
}

/// Requests about extended attributes.
fn decode_xattr<'a>(code: u32, arguments: &mut Arguments<'a>) -> Result<Request<'a>, DecodeError> {
    Ok(match code {
        opcode::SETXATTR => {
            let (size, flags, setxattr_flags) = (arguments.u32()?, arguments.u32()?, arguments.u32()?);
            arguments.skip(4)?;
            let name = arguments.xattr_name()?;
            let size = usize::try_from(size).map_err(|_| DecodeError::Range)?;
            if size > MAX_XATTR_LEN {
                return Err(DecodeError::Range);
            }
            let value = arguments.0.get(..size).ok_or(DecodeError::Truncated)?;
            Request::SetXattr { name, value, flags, setxattr_flags }
        }
        opcode::GETXATTR => {
            let size = arguments.u32()?;
            arguments.skip(4)?;
            Request::GetXattr { name: arguments.xattr_name()?, size }
        }
        opcode::LISTXATTR => Request::ListXattr { size: arguments.u32()? },
        _ => Request::RemoveXattr { name: arguments.xattr_name()? },
    })
}

/// Requests about open files and directories.
fn decode_file<'a>(code: u32, arguments: &mut Arguments<'a>) -> Result<Request<'a>, DecodeError> {
    Ok(match code {
        opcode::OPEN => Request::Open { flags: arguments.u32()?, open_flags: arguments.u32()? },
        opcode::CREATE | opcode::TMPFILE => {
            let (flags, mode) = (arguments.u32()?, arguments.u32()?);
            arguments.skip(4)?;
            let open_flags = arguments.u32()?;
            if code == opcode::TMPFILE {
                Request::TmpFile { flags, mode }
            } else {
                Request::Create { name: arguments.name()?, flags, mode, open_flags }
            }
        }
        opcode::READ => Request::Read(arguments.transfer(false)?),
        opcode::READDIR => Request::ReadDir(arguments.transfer(false)?),
        opcode::READDIRPLUS => Request::ReadDirPlus(arguments.transfer(false)?),
        opcode::STATFS => Request::StatFs,
        opcode::RELEASE => Request::Release { handle: arguments.u64()? },
        opcode::RELEASEDIR => Request::ReleaseDir { handle: arguments.u64()? },
        opcode::FSYNC => Request::Fsync { handle: arguments.u64()?, flags: arguments.u32()? },
        opcode::FSYNCDIR => Request::FsyncDir { handle: arguments.u64()?, flags: arguments.u32()? },
        opcode::OPENDIR => Request::OpenDir,
        opcode::FALLOCATE => Request::Fallocate {
            handle: arguments.u64()?,
            offset: arguments.offset()?,
            length: arguments.offset()?,
            mode: arguments.u32()?,
        },
        opcode::LSEEK => {
            Request::Lseek { handle: arguments.u64()?, offset: arguments.offset()?, whence: arguments.u32()? }
        }
        opcode::COPY_FILE_RANGE => Request::CopyFileRange(CopyFileRange {
            handle_in: arguments.u64()?,
            offset_in: arguments.offset()?,
            node_out: arguments.u64()?,
            handle_out: arguments.u64()?,
            offset_out: arguments.offset()?,
            length: arguments.u64()?,
            flags: arguments.u64()?,
        }),
        opcode::SYNCFS => Request::SyncFs,
        _ => Request::Unsupported,
    })
}

/// What is left of a request's arguments.
struct Arguments<'a>(&'a [u8]);

impl<'a> Arguments<'a> {
    fn array<const N: usize>(&mut self) -> Result<[u8; N], DecodeError> {
        let (array, rest) = self.0.split_first_chunk().ok_or(DecodeError::Truncated)?;
        self.0 = rest;
        Ok(*array)
    }

    fn u32(&mut self) -> Result<u32, DecodeError> {
        self.array().map(u32::from_le_bytes)
    }

    fn u64(&mut self) -> Result<u64, DecodeError> {
        self.array().map(u64::from_le_bytes)
    }

    /// A file offset: what fits the host's signed offsets.
    fn offset(&mut self) -> Result<u64, DecodeError> {
        let offset = self.u64()?;
        if i64::try_from(offset).is_ok() { Ok(offset) } else { Err(DecodeError::Range) }
    }

    fn skip(&mut self, count: usize) -> Result<(), DecodeError> {
        self.0 = self.0.get(count..).ok_or(DecodeError::Truncated)?;
        Ok(())
    }

    fn string(&mut self) -> Result<&'a CStr, DecodeError> {
        let string = CStr::from_bytes_until_nul(self.0).map_err(|_| DecodeError::Unterminated)?;
        self.0 = self.0.get(string.count_bytes() + 1..).unwrap_or_default();
        Ok(string)
    }

    fn name(&mut self) -> Result<Name<'a>, DecodeError> {
        Name::new(self.string()?)
    }

    /// An extended attribute's name: 1 to 255 bytes.
    fn xattr_name(&mut self) -> Result<&'a CStr, DecodeError> {
        let name = self.string()?;
        match name.count_bytes() {
            0 => Err(DecodeError::Range),
            1..=MAX_NAME_LEN => Ok(name),
            _ => Err(DecodeError::NameTooLong),
        }
    }

    /// `fuse_read_in` and `fuse_write_in`, which differ in the fourth number's name.
    fn transfer(&mut self, is_write: bool) -> Result<Transfer, DecodeError> {
        let handle = self.u64()?;
        // A directory's offset is a cookie of the host's file system, any 64 bits of it.
        let offset = if is_write { self.offset()? } else { self.u64()? };
        let (size, flags) = (self.u32()?, self.u32()?);
        self.skip(16)?;
        Ok(Transfer { handle, offset, size, write_flags: if is_write { flags } else { 0 } })
    }

    fn set_attr(&mut self) -> Result<SetAttr, DecodeError> {
        let valid = self.u32()?;
        self.skip(4)?;
        let (handle, size) = (self.u64()?, self.u64()?);
        self.skip(8)?;
        let (atime, mtime, _ctime) = (self.u64()?, self.u64()?, self.u64()?);
        let (atime_ns, mtime_ns, _ctime_ns) = (self.u32()?, self.u32()?, self.u32()?);
        let mode = self.u32()?;
        self.skip(4)?;
        let (uid, gid) = (self.u32()?, self.u32()?);
        self.skip(4)?;
        if i64::try_from(size).is_err() || atime_ns >= 1_000_000_000 || mtime_ns >= 1_000_000_000 {
            return Err(DecodeError::Range);
        }
        // Seconds before 1970 are negative numbers in an unsigned field.
        let (atime, mtime) = ((atime.cast_signed(), atime_ns), (mtime.cast_signed(), mtime_ns));
        Ok(SetAttr { valid, handle, size, atime, mtime, mode, uid, gid })
    }
}

#[cfg(test)]
mod tests;
