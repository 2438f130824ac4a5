// SPDX-License-Identifier: Apache-2.0
//! Reads a program and makes sure that the guest can run it: there is nothing in the guest but that program, so it must
//! be an x86-64 ELF executable without a dynamic loader.
//!
//! Layout from the ELF-64 object file format, version 1.5.

use std::path::{Path, PathBuf};

const MAGIC: &[u8] = b"\x7fELF";
const CLASS_64: u8 = 2;
const DATA_LITTLE_ENDIAN: u8 = 1;
const TYPE_EXECUTABLE: u16 = 2;
/// A position-independent executable has the type of a shared object.
const TYPE_SHARED: u16 = 3;
const MACHINE_X86_64: u16 = 62;
const SEGMENT_INTERPRETER: u32 = 3;

/// Why a program cannot be put in the image.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ProgramError {
    #[error("cannot read program {}", path.display())]
    Read { path: PathBuf, source: std::io::Error },
    #[error("{} is not an ELF program", .0.display())]
    NotElf(PathBuf),
    #[error("{} is not a 64-bit little-endian x86-64 executable", .0.display())]
    WrongMachine(PathBuf),
    #[error("{} has a damaged ELF header: its program headers lie outside the file", .0.display())]
    Damaged(PathBuf),
    #[error(
        "{} is dynamically linked, and the guest has no loader: build it with RUSTFLAGS='-C target-feature=+crt-static'",
        .0.display()
    )]
    Dynamic(PathBuf),
}

/// The bytes of the static program at `path`.
pub(crate) fn read(path: &Path) -> Result<Vec<u8>, ProgramError> {
    let bytes = std::fs::read(path).map_err(|source| ProgramError::Read { path: path.into(), source })?;
    check(&bytes, path)?;
    Ok(bytes)
}

fn check(bytes: &[u8], path: &Path) -> Result<(), ProgramError> {
    if !bytes.starts_with(MAGIC) {
        return Err(ProgramError::NotElf(path.into()));
    }
    let damaged = || ProgramError::Damaged(path.into());
    let class = *bytes.get(4).ok_or_else(damaged)?;
    let data = *bytes.get(5).ok_or_else(damaged)?;
    let object_type = u16_at(bytes, 16).ok_or_else(damaged)?;
    let machine = u16_at(bytes, 18).ok_or_else(damaged)?;
    if class != CLASS_64
        || data != DATA_LITTLE_ENDIAN
        || machine != MACHINE_X86_64
        || !matches!(object_type, TYPE_EXECUTABLE | TYPE_SHARED)
    {
        return Err(ProgramError::WrongMachine(path.into()));
    }
    let table = u64_at(bytes, 32).ok_or_else(damaged)?;
    let entry_len = u16_at(bytes, 54).ok_or_else(damaged)?;
    let entries = u16_at(bytes, 56).ok_or_else(damaged)?;
    for index in 0..u64::from(entries) {
        let offset = table.checked_add(index * u64::from(entry_len)).ok_or_else(damaged)?;
        let offset = usize::try_from(offset).map_err(|_| damaged())?;
        if u32_at(bytes, offset).ok_or_else(damaged)? == SEGMENT_INTERPRETER {
            return Err(ProgramError::Dynamic(path.into()));
        }
    }
    Ok(())
}

fn array_at<const N: usize>(bytes: &[u8], offset: usize) -> Option<[u8; N]> {
    bytes.get(offset..offset.checked_add(N)?)?.try_into().ok()
}

fn u16_at(bytes: &[u8], offset: usize) -> Option<u16> {
    array_at(bytes, offset).map(u16::from_le_bytes)
}

fn u32_at(bytes: &[u8], offset: usize) -> Option<u32> {
    array_at(bytes, offset).map(u32::from_le_bytes)
}

fn u64_at(bytes: &[u8], offset: usize) -> Option<u64> {
    array_at(bytes, offset).map(u64::from_le_bytes)
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// A header with one program header of type `segment`, followed by `padding` bytes.
    pub(crate) fn elf(machine: u16, segment: u32, padding: usize) -> Vec<u8> {
        let mut bytes = vec![0_u8; 64 + 56 + padding];
        bytes[..4].copy_from_slice(MAGIC);
        bytes[4] = CLASS_64;
        bytes[5] = DATA_LITTLE_ENDIAN;
        bytes[16..18].copy_from_slice(&TYPE_SHARED.to_le_bytes());
        bytes[18..20].copy_from_slice(&machine.to_le_bytes());
        bytes[32..40].copy_from_slice(&64_u64.to_le_bytes());
        bytes[54..56].copy_from_slice(&56_u16.to_le_bytes());
        bytes[56..58].copy_from_slice(&1_u16.to_le_bytes());
        bytes[64..68].copy_from_slice(&segment.to_le_bytes());
        bytes
    }

    pub(crate) fn static_elf(padding: usize) -> Vec<u8> {
        elf(MACHINE_X86_64, 1, padding)
    }

    fn check_bytes(bytes: &[u8]) -> Result<(), ProgramError> {
        check(bytes, Path::new("agent"))
    }

    #[test]
    fn static_program_is_accepted() {
        check_bytes(&static_elf(0)).unwrap();
    }

    #[test]
    fn script_is_refused() {
        assert!(matches!(check_bytes(b"#!/bin/sh\n"), Err(ProgramError::NotElf(_))));
    }

    #[test]
    fn other_machine_is_refused() {
        let aarch64 = elf(183, 1, 0);
        assert!(matches!(check_bytes(&aarch64), Err(ProgramError::WrongMachine(_))));
    }

    #[test]
    fn dynamic_program_is_refused() {
        let dynamic = elf(MACHINE_X86_64, SEGMENT_INTERPRETER, 0);
        assert!(matches!(check_bytes(&dynamic), Err(ProgramError::Dynamic(_))));
    }

    #[test]
    fn truncated_program_is_refused_at_every_length() {
        let whole = static_elf(0);
        for len in 0..68 {
            assert!(check_bytes(&whole[..len]).is_err(), "{len} bytes were accepted");
        }
    }

    #[test]
    fn absent_program_is_named() {
        let error = read(Path::new("/nonexistent/agent")).unwrap_err();
        assert!(error.to_string().contains("/nonexistent/agent"));
    }
}
