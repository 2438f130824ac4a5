// SPDX-License-Identifier: Apache-2.0
//! Programs, and what they are attached to.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd, RawFd};

use crate::sys;

/// Bytes of a `struct bpf_insn`.
pub const INSTRUCTION_LEN: usize = 8;

/// Programs of cgroups below this one are asked as well: a container may have containers of its own.
const ALLOW_MULTI: u32 = 1 << 1;
const REPLACE: u32 = 1 << 2;

/// What a program decides.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// Whether a cgroup may use a device.
    CgroupDevice,
    /// Which socket of a network namespace gets a connection that none has yet (Linux 5.9).
    SocketLookup,
    /// What becomes of a frame that comes in at an interface, or goes out; it is attached by tc-bpf(8).
    TrafficFilter,
}

impl Kind {
    fn program_type(self) -> u32 {
        match self {
            Self::CgroupDevice => 15,
            Self::SocketLookup => 30,
            Self::TrafficFilter => 3,
        }
    }

    fn attach_type(self) -> u32 {
        match self {
            Self::CgroupDevice => 6,
            Self::SocketLookup => 36,
            // None that tc would look at.
            Self::TrafficFilter => 0,
        }
    }
}

/// A program that the kernel has checked and taken.
#[derive(Debug)]
pub struct Program {
    descriptor: OwnedFd,
    kind: Kind,
}

/// What a program has been attached to: it decides until this is dropped, or this process is gone.
#[derive(Debug)]
pub struct Link {
    _descriptor: OwnedFd,
}

impl Program {
    /// Loads a program of instructions (`struct bpf_insn`), which the kernel checks. Bytes after the last whole one are not
    /// looked at.
    ///
    /// # Errors
    ///
    /// Those of bpf(2).
    pub fn load(kind: Kind, name: &str, instructions: &[u8]) -> io::Result<Self> {
        let (instructions, _) = instructions.as_chunks::<INSTRUCTION_LEN>();
        let descriptor = sys::load_program(kind.program_type(), kind.attach_type(), sys::name(name), instructions)?;
        Ok(Self { descriptor, kind })
    }

    /// Has it decide for a cgroup, in the place of one that is `replaced`.
    ///
    /// # Errors
    ///
    /// Those of bpf(2).
    pub fn attach_to_cgroup(&self, cgroup: BorrowedFd<'_>, replaced: Option<&Self>) -> io::Result<()> {
        sys::attach_program(&sys::AttachArgs {
            target: number(&cgroup),
            program: number(&self.descriptor),
            attach_type: self.kind.attach_type(),
            flags: ALLOW_MULTI | if replaced.is_some() { REPLACE } else { 0 },
            replaced: replaced.map_or(0, |program| number(&program.descriptor)),
        })
    }

    /// Has it decide for a network namespace, as long as the link is there.
    ///
    /// # Errors
    ///
    /// Those of bpf(2).
    pub fn link_to_namespace(&self, namespace: BorrowedFd<'_>) -> io::Result<Link> {
        let args = sys::LinkArgs {
            program: number(&self.descriptor),
            target: number(&namespace),
            attach_type: self.kind.attach_type(),
            flags: 0,
        };
        Ok(Link { _descriptor: sys::create_link(&args)? })
    }
}

impl AsRawFd for Program {
    fn as_raw_fd(&self) -> RawFd {
        self.descriptor.as_raw_fd()
    }
}

fn number(descriptor: &impl AsRawFd) -> u32 {
    descriptor.as_raw_fd().cast_unsigned()
}
