// SPDX-License-Identifier: Apache-2.0
//! Guest kernels and images that fail in a known way.

use std::fs;
use std::path::{Path, PathBuf};

use crate::env::Env;
use crate::failure::{Result, fail};

/// Where the made kernels lie in guest memory: past the first MiB.
const LOAD_ADDRESS: u64 = 0x10_0000;

/// `jmp .`: it spins.
pub(crate) const SPIN: &[u8] = &[0xeb, 0xfe];

/// `cli; hlt; jmp .-1`: it sleeps for good.
pub(crate) const SLEEP: &[u8] = &[0xfa, 0xf4, 0xeb, 0xfd];

/// `ud2`: no instruction.
pub(crate) const ILLEGAL: &[u8] = &[0x0f, 0x0b];

/// `hlt`: not for user space.
pub(crate) const PRIVILEGED: &[u8] = &[0xf4];

/// Loads an empty interrupt table and raises an exception that nothing handles: a triple fault. In AT&T syntax
/// `push $0; push $0; lidt (%rsp); ud2`.
pub(crate) const TRIPLE_FAULT: &[u8] = &[0x6a, 0x00, 0x6a, 0x00, 0x0f, 0x01, 0x1c, 0x24, 0x0f, 0x0b];

/// Has the keyboard controller reset the machine, as a kernel's last act. `mov $0xfe, %al; out %al, $0x64; jmp .`
pub(crate) const RESET: &[u8] = &[0xb0, 0xfe, 0xe6, 0x64, 0xeb, 0xfe];

/// Writes `text` to the first serial port, then sleeps for good.
pub(crate) fn print_and_sleep(text: &[u8]) -> Vec<u8> {
    // mov dx, 0x3f8
    let mut code = vec![0x66, 0xba, 0xf8, 0x03];
    for byte in text {
        // mov al, byte; out dx, al
        code.extend([0xb0, *byte, 0xee]);
    }
    code.extend(SLEEP);
    code
}

/// Writes a guest kernel that is nothing but `code`, which is entered in 64-bit mode.
pub(crate) fn kernel(env: &Env, name: &str, code: &[u8]) -> Result<PathBuf> {
    let path = env.work.join(name);
    fs::write(&path, elf(code))?;
    Ok(path)
}

/// An ELF file of one segment, a kernel or a static program (System V ABI, chapter 4 and 5).
pub(crate) fn elf(code: &[u8]) -> Vec<u8> {
    const HEADER: u64 = 64;
    const PROGRAM_HEADER: u64 = 56;
    /// The segment's place in the file, congruent to its address.
    const OFFSET: u64 = 0x1000;

    let length = code.len() as u64;
    let mut file = vec![0x7f, b'E', b'L', b'F', 2, 1, 1];
    file.resize(16, 0);
    // Type (executable), machine (x86-64), version, entry, program headers, section headers, flags.
    file.extend(2u16.to_le_bytes());
    file.extend(62u16.to_le_bytes());
    file.extend(1u32.to_le_bytes());
    file.extend(LOAD_ADDRESS.to_le_bytes());
    file.extend(HEADER.to_le_bytes());
    file.extend(0u64.to_le_bytes());
    file.extend(0u32.to_le_bytes());
    for half in [HEADER as u16, PROGRAM_HEADER as u16, 1, 64, 0, 0] {
        file.extend(half.to_le_bytes());
    }
    // Type (loadable), flags (all), offset, virtual and physical address, length in the file and in memory, alignment.
    file.extend(1u32.to_le_bytes());
    file.extend(7u32.to_le_bytes());
    for word in [OFFSET, LOAD_ADDRESS, LOAD_ADDRESS, length, length, 0x1000] {
        file.extend(word.to_le_bytes());
    }
    file.resize(OFFSET as usize, 0);
    file.extend(code);
    file
}

/// Writes a guest image without an init: the guest's kernel has nothing to run.
pub(crate) fn image_without_init(env: &Env) -> Result<PathBuf> {
    let path = env.work.join("no-init.cpio");
    let mut archive = Vec::new();
    entry(&mut archive, "etc", 0o40_755, b"");
    entry(&mut archive, "TRAILER!!!", 0, b"");
    fs::write(&path, archive)?;
    Ok(path)
}

/// Writes a guest image whose init is that program of the host.
pub(crate) fn image_with_init(env: &Env, name: &str, program: &Path) -> Result<PathBuf> {
    let path = env.work.join(name);
    let mut archive = Vec::new();
    entry(&mut archive, "init", 0o100_755, &fs::read(program)?);
    entry(&mut archive, "TRAILER!!!", 0, b"");
    fs::write(&path, archive)?;
    Ok(path)
}

/// Adds an entry in the `newc` format of cpio.
fn entry(archive: &mut Vec<u8>, name: &str, mode: u32, content: &[u8]) {
    let fields = [0, mode as usize, 0, 0, 1, 0, content.len(), 0, 0, 0, 0, name.len() + 1, 0];
    archive.extend(b"070701");
    for field in fields {
        archive.extend(format!("{field:08x}").bytes());
    }
    archive.extend(name.bytes().chain([0]));
    archive.resize(archive.len().next_multiple_of(4), 0);
    archive.extend(content);
    archive.resize(archive.len().next_multiple_of(4), 0);
}

/// The installed file `lib/bulkhead/NAME` of the runtime that is tested.
pub(crate) fn installed(env: &Env, name: &str) -> Result<PathBuf> {
    let program = fs::canonicalize(&env.runtime)?;
    match program.parent().and_then(Path::parent).map(|prefix| prefix.join("lib/bulkhead").join(name)) {
        Some(path) if path.is_file() => Ok(path),
        _ => fail!("the runtime {} has no lib/bulkhead/{name} beside it", program.display()),
    }
}
